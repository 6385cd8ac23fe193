"""Which parameters train: every loss term reaches exactly those of the mode, and nothing else moves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from helpers import some_images, tiny_vae, vae_run

from latentpipe import UserError, VAEStage
from latentpipe.checkpoints.pipeline_io import load_pipeline
from latentpipe.checkpoints.tensor_source import VAE_FILE
from latentpipe.checkpoints.vae_io import load_vae, save_vae, vae_hash
from latentpipe.train.config import Predicted, TrainVAE
from latentpipe.train.distributed import DistributedContext
from latentpipe.train.text_encoder import token_ids
from latentpipe.train.vae import train as training
from latentpipe.train.vae import trainable
from latentpipe.train.vae.denoiser_outputs import Predictor
from latentpipe.train.vae.distillation import Draw, Lesson, as_taught
from latentpipe.train.vae.model import build_vae, new_vae, with_new_head
from latentpipe.train.vae.objective import Objective
from latentpipe.train.vae.training_pass import TrainingPass
from latentpipe.utils.errors import LatentpipeWarning

EVERY_TERM = {
    "l1": 1.0, "l2": 1.0, "charbonnier": 1.0, "structure": 1.0, "perceptual": 1.0, "kl": 0.5, "spectrum": 1.0, "scale": 1.0,
    "edges": 1.0, "equivariance": 0.0,
}  # fmt: skip
PICTURE_TERMS = {"l1", "l2", "charbonnier", "structure", "edges", "perceptual", "adversarial"}
ENCODER_TERMS = {"kl", "spectrum", "scale"}
BODY = ("encoder.conv_in", "encoder.down_blocks", "encoder.mid_block")
MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # what the config says, and the parameter names that must not train
    "all": ({}, ()),
    "decoder": ({"mode": "decoder"}, ("encoder.", "quant_conv.")),
    "encoder-head": ({"mode": "encoder-head"}, BODY),
    "parts": ({"parts": ["encoder.head", "decoder.up.1"]}, (*BODY, "decoder.conv_in", "decoder.mid", "decoder.up_blocks.0",
                                                         "decoder.conv_norm_out", "decoder.conv_out", "post_quant")),
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A saved tiny VAE to begin with."""
    save_vae(tiny_vae(), tmp_path / "source", {})
    return tmp_path / "source"


def config_of(root: Path, pictures: Path, source: Path | None = None, **changes: Any) -> TrainVAE:
    """A run of 48-pixel crops; `changes` may name any key of the config."""
    named = {name: changes.pop(name) for name in ("loss", "optim", "model") if name in changes}
    run = {"warm_start": source, **changes.pop("run", {})}
    base = vae_run(root, pictures, data={"read_size_px": 48}, crops={"size_px": 48, "whole": 1.0}, **named, **run)
    return TrainVAE.model_validate(base.model_dump() | ({} if source is None else {"model": {}}) | changes)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_term_reaches_exactly_the_parameters_of_the_mode(
    tmp_path: Path, pictures: Path, source: Path, mode: str, adaptive: bool
) -> None:
    changes, frozen = MODES[mode]
    if mode == "parts":
        adaptive = False  # the last layer does not train
    config = config_of(tmp_path, pictures, source, loss=EVERY_TERM, adversarial={"weight": 1.0, "width": 8, "adaptive": adaptive},
                       **changes)  # fmt: skip
    vae = build_vae(config, None)
    trainable.choose_stages(vae, config.mode, config.parts)
    with torch.no_grad():  # the scale term acts beyond a limit
        vae.quant_conv.weight *= 30
    names = {name for name, _ in vae.named_parameters() if not name.startswith(frozen)}
    assert names == {name for name, parameter in vae.named_parameters() if parameter.requires_grad}
    objective, images = Objective(config, vae, DistributedContext()), some_images(4, 48)
    noise = torch.randn(4, 4, 24, 24)
    rebuilt, posterior = VAEStage(vae)(images, noise=noise)
    terms = objective(images, rebuilt, posterior, 0, False, None)
    encoder = {name for name in names if name.startswith(("encoder.", "quant_conv."))}
    assert set(terms) == PICTURE_TERMS | ENCODER_TERMS
    for name, term in terms.items():
        wanted = names if name in PICTURE_TERMS else encoder
        reached = _reached(term, vae)
        if not wanted:
            assert not term.requires_grad, name
        elif name in ("spectrum", "scale"):  # of the means: the rows of the log-variance stay
            assert reached == wanted, name
        else:
            assert reached == wanted, f"{name}: {sorted(reached ^ wanted)}"
    assert all(parameter.grad is None for parameter in objective.critic.net.parameters())  # type: ignore[union-attr]


def _reached(term: torch.Tensor, vae: Any) -> set[str]:
    """Names of the parameters that a term has a gradient for which is not zero."""
    named = {name: parameter for name, parameter in vae.named_parameters() if parameter.requires_grad}
    if not term.requires_grad:
        return set()
    gradients = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(named, gradients, strict=True) if grad is not None and bool(grad.abs().sum() > 0)}


def test_the_discriminators_step_leaves_the_vae_untouched(tmp_path: Path, pictures: Path) -> None:
    config = config_of(tmp_path, pictures, loss=EVERY_TERM, adversarial={"weight": 1.0, "width": 8})
    vae = build_vae(config, None)
    objective, images = Objective(config, vae, DistributedContext()), some_images(4, 48)
    rebuilt, posterior = VAEStage(vae)(images)
    torch.stack(list(objective(images, rebuilt, posterior, 0, False, None).values())).sum().backward()
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in vae.named_parameters() if parameter.grad is not None}
    before = {name: value.clone() for name, value in objective.critic.net.state_dict().items()}  # type: ignore[union-attr]
    figures = objective.end_step(0, (images, rebuilt))
    assert {"critic", "critic_real", "critic_fake", "kl_bits_per_latent", "beta"} <= set(figures)
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert all(torch.equal(vae.get_parameter(name).grad, value) for name, value in gradients.items())
    assert any(not torch.equal(value, before[name]) for name, value in objective.critic.net.state_dict().items())  # type: ignore[union-attr]


def test_the_discriminator_waits_and_sits_out_warped_steps(tmp_path: Path, pictures: Path) -> None:
    config = config_of(tmp_path, pictures, loss=EVERY_TERM, adversarial={"weight": 1.0, "width": 8, "start_step": 3})
    vae = build_vae(config, None)
    objective, images = Objective(config, vae, DistributedContext()), some_images(2, 48)
    rebuilt, posterior = VAEStage(vae)(images)
    assert "adversarial" not in objective(images, rebuilt, posterior, 2, False, None)
    assert "adversarial" in objective(images, rebuilt, posterior, 3, False, None)
    assert "adversarial" not in objective(images, rebuilt, posterior, 3, True, None)


@pytest.mark.parametrize("mode", ["decoder", "encoder-head", "parts"])
def test_frozen_weights_are_the_same_bytes_after_the_run(tmp_path: Path, pictures: Path, source: Path, mode: str) -> None:
    changes, frozen = MODES[mode]
    training.train_vae(config_of(tmp_path, pictures, source, loss={"equivariance": 0.5, "kl": 0.1}, **changes))
    before, after = (load_vae(path).state_dict() for path in (source, tmp_path / "vae"))
    for name, value in before.items():
        if name.startswith("quant_conv") or name.startswith("post_quant"):
            continue  # the measured normalization is folded into them where the latents moved
        assert torch.equal(value, after[name]) == name.startswith(frozen), name


def test_decoder_mode_keeps_the_latents_and_says_so(
    tmp_path: Path, pictures: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.train_vae(config_of(tmp_path, pictures, source, mode="decoder"))
    images = some_images(4, 48)
    with torch.no_grad():
        first, second = (VAEStage(load_vae(path)).encode(images) for path in (source, tmp_path / "vae"))
    assert torch.equal(first, second)
    printed = capsys.readouterr().out
    assert "Its latents are those of" in printed
    assert "frozen" in printed
    card = json.loads((tmp_path / "vae" / "card.json").read_text())
    assert card["base"]["content_hash"] == vae_hash(source)
    assert "normalization_measured_on" not in card
    assert card["trained"].startswith("decoder.head")


def test_a_moved_encoder_says_which_denoisers_no_longer_fit(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.train_vae(config_of(tmp_path, pictures, Path("emoji"), parts=["encoder.head"], optim={"steps": 1}))
    assert "the denoiser of emoji no longer fits" in capsys.readouterr().out


def test_a_new_head_takes_over_every_tensor_whose_shape_stays(tmp_path: Path, pictures: Path, source: Path) -> None:
    old = load_vae(source)
    with pytest.warns(LatentpipeWarning, match="new head of 6 channels"):
        new = with_new_head(old, 6)
    assert new.config.latent_channels == 6
    for name, value in old.state_dict().items():
        fresh = name.startswith(("encoder.conv_out", "quant_conv", "post_quant_conv")) or name == "decoder.conv_in.weight"
        assert fresh == (new.state_dict()[name].shape != value.shape), name
        if not fresh:
            assert torch.equal(new.state_dict()[name], value), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LatentpipeWarning)
        training.train_vae(config_of(tmp_path, pictures, source, mode="encoder-head", new_channels=6))
    stage = VAEStage(load_vae(tmp_path / "vae"))
    assert stage.space.channels == 6
    assert stage.space.scale == (1.0,) * 6


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_student_learns_the_latents_of_its_teacher(tmp_path: Path, pictures: Path, kind: str) -> None:
    teacher = tiny_vae(scaling_factor=0.5)  # latents are half the raw values
    save_vae(teacher, tmp_path / "teacher", {})
    model = {"kind": kind, "blocks": (8, 8), "channels": 4, "norm_groups": 4}
    optim = {"steps": 30, "batch_size": 8, "learning_rate": 3e-3}
    config = config_of(tmp_path, pictures, model=model, optim=optim, mode="distil", teacher=tmp_path / "teacher",
                       loss={"equivariance": 0, "kl": 0})  # fmt: skip
    training.train_vae(config)
    rows = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    latent = [row["latent"] for row in rows if "latent" in row]
    assert latent[-1] < 0.5 * latent[0]
    card = json.loads((tmp_path / "vae" / "card.json").read_text())
    assert card["teacher"]["content_hash"] == vae_hash(tmp_path / "teacher")
    assert VAEStage(load_vae(tmp_path / "vae")).space.scale == (1.0,) * 4  # the student's raw values are the latents


def with_noise(config: TrainVAE, deviation: float) -> TrainVAE:
    """The same config with latent noise."""
    return TrainVAE.model_validate(config.model_dump() | {"loss": config.loss.model_dump() | {"latent_noise": deviation}})


def test_a_student_with_a_level_more_draws_twice_the_size_from_the_teachers_latents(tmp_path: Path, pictures: Path) -> None:
    save_vae(tiny_vae(), tmp_path / "teacher", {})
    config = config_of(tmp_path, pictures, model={"blocks": (8, 8, 8), "channels": 4, "norm_groups": 4}, mode="distil",
                       teacher=tmp_path / "teacher", loss={"equivariance": 0, "kl": 0, "edges": 0.5},
                       optim={"steps": 30, "batch_size": 8, "learning_rate": 3e-3, "ema_decay": 0.5},
                       crops={"size_px": 48, "whole": 0.5, "cut_px": 24}, data={"train": pictures, "validation": pictures,
                                                                                "read_size_px": 48})  # fmt: skip
    config = with_noise(config, 0.2)
    training.train_vae(config)
    rows = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert {"l1", "edges", "latent"} <= rows[-1].keys()
    card = json.loads((tmp_path / "vae" / "card.json").read_text())
    student, teacher = (VAEStage(load_vae(tmp_path / name)) for name in ("vae", "teacher"))
    assert (student.space.downscale, teacher.space.downscale) == (4, 2)
    images = some_images(2, 48)
    with torch.no_grad():
        latents = teacher.encode(torch.nn.functional.interpolate(images, size=24, mode="bicubic", antialias=True).clamp(-1, 1))
        assert torch.equal(latents, teacher.encode(as_taught(student, teacher, images)))
        assert student.decode(latents).shape == images.shape
        assert student.encode(images).shape == latents.shape
    assert card["validation"]["psnr_db_of_teachers_latents"] > 0


def test_latent_noise_disturbs_half_of_the_steps_by_up_to_its_deviation(tmp_path: Path, pictures: Path) -> None:
    save_vae(tiny_vae(scaling_factor=0.5), tmp_path / "teacher", {})
    model = {"kind": "kl", "blocks": (8, 8), "channels": 4, "norm_groups": 4}
    config = config_of(tmp_path, pictures, model=model, mode="distil", teacher=tmp_path / "teacher",
                       loss={"equivariance": 0, "kl": 0})  # fmt: skip
    config = with_noise(config, 0.4)
    lesson = Lesson(config, VAEStage(build_vae(config, None)), training.open_teacher(config))  # type: ignore[arg-type]
    drawn = [lesson.draw([("",)] * 50, torch.Generator().manual_seed(seed)).strength for seed in range(60)]
    still = [strength for strength in drawn if not strength.any()]
    assert 15 < len(still) < 45
    moved = torch.cat([strength for strength in drawn if strength.any()])
    assert 0.38 < moved.max() <= 0.4
    assert moved.mean() == pytest.approx(0.2, abs=0.02)
    target, noise = (torch.zeros(2, 4, 24, 24), torch.zeros(2, 4, 24, 24)), torch.randn(2, 4, 24, 24)
    disturbed = lesson.given(target, noise, Draw(torch.tensor([0.0, 0.3])))
    assert torch.equal(disturbed[0], target[0][0])
    assert torch.allclose(lesson.stage.space.normalize(disturbed)[1], 0.3 * noise[1], atol=1e-6)


def test_a_decoder_learns_from_what_a_denoiser_predicts(
    tmp_path: Path, pictures: Path, vae_folder: Path, model_folder: Path
) -> None:
    student = {"kind": "kl", "blocks": (8, 8), "channels": 4, "norm_groups": 4}
    predicted = {"model": model_folder, "share": 0.5, "times": 100}
    config = config_of(tmp_path, pictures, model=student, mode="distil", teacher=vae_folder, loss={"equivariance": 0, "kl": 0},
                       predicted=predicted, crops={"size_px": 16, "whole": 1.0, "flip": False})  # fmt: skip
    lesson = Lesson(config, VAEStage(build_vae(config, None)), training.open_teacher(config))  # type: ignore[arg-type]
    drawn = [lesson.draw([("red bar",)] * 4, torch.Generator().manual_seed(seed)) for seed in range(60)]
    taken = [draw for draw in drawn if draw.times is not None]
    assert 15 < len(taken) < 45
    assert max(int(draw.times.max()) for draw in taken) < 100  # type: ignore[union-attr]
    assert {draw.prompts for draw in taken} == {("red bar",) * 4}
    target = lesson.target(some_images(4, 16))
    noise = torch.randn(target[0].shape)
    predictor = lesson.predictor
    assert predictor is not None
    found = lesson.given(target, noise, taken[0])
    # diffusers' own one-step prediction of the clean sample
    pipe = load_pipeline(model_folder)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, rescale_betas_zero_snr=True)
    ddim.set_timesteps(1000)
    for row, time in enumerate(taken[0].times.tolist()):  # type: ignore[union-attr]
        latents = lesson.stage.space.normalize(target[0])[row : row + 1]
        noisy = ddim.add_noise(latents, noise[row : row + 1], torch.tensor([time]))
        with torch.no_grad():
            states = pipe.text_encoder(token_ids(pipe.tokenizer, ["red bar"]))[0]
            velocity = pipe.unet(noisy, torch.tensor([time]), states, return_dict=False)[0]
        wanted = ddim.step(velocity, time, noisy).pred_original_sample
        assert torch.allclose(lesson.stage.space.normalize(found)[row : row + 1], wanted, atol=1e-4)
    training.train_vae(config)


@pytest.mark.parametrize(("changes", "words"), [({"times": 1001}, "has 1000 timesteps"), ({"model": "nothing"}, "nothing")])
def test_a_denoiser_that_cannot_predict_is_refused(model_folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Predictor(Predicted(**{"model": model_folder, **changes}), 4)
    with pytest.raises(UserError, match="this decoder takes 6"):
        Predictor(Predicted(model=model_folder), 6)


def test_the_teacher_stays_and_the_decoder_learns_from_its_latents(tmp_path: Path, pictures: Path) -> None:
    save_vae(tiny_vae(), tmp_path / "teacher", {})
    before = (tmp_path / "teacher" / VAE_FILE).read_bytes()
    config = config_of(tmp_path, pictures, model={"kind": "tiny", "blocks": (8, 8), "channels": 4}, mode="distil",
                       teacher=tmp_path / "teacher", loss={"equivariance": 0})  # fmt: skip
    vae = build_vae(config, training.open_teacher(config))
    images = some_images(4, 48)
    rebuilt, raw = TrainingPass(VAEStage(vae))(images, given=torch.randn(4, 4, 24, 24))
    terms = Objective(config, vae, DistributedContext())(
        images, rebuilt, raw, 0, False, (torch.randn(4, 4, 24, 24), torch.zeros(1))
    )
    assert set(terms) == {"l1", "l2", "latent"}
    halves = {half: {name for name, _ in vae.named_parameters() if name.startswith(half)} for half in ("encoder", "decoder")}
    assert _reached(terms["latent"], vae) == halves["encoder"]
    assert _reached(terms["l1"], vae) == halves["decoder"]
    training.train_vae(config)
    assert (tmp_path / "teacher" / VAE_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": ["decoder.uo.*"]}, "names no stage"),
        ({"mode": "distil", "teacher": "emoji", "model": {"blocks": (8, 16), "norm_groups": 4}}, "channels at 1/4"),
        ({"parts": ["encoder.head"], "adversarial": {"weight": 1.0}}, "No convolution of the decoder trains"),
    ],
)
def test_what_cannot_train_is_refused(tmp_path: Path, pictures: Path, source: Path, changes: dict[str, Any], words: str) -> None:
    begins = None if changes.get("mode") == "distil" else source
    with pytest.raises(UserError, match=words):
        training.train_vae(config_of(tmp_path, pictures, begins, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "decoder"},
        {"mode": "distil"},
        {"loss": {"latent_noise": 0.1}},
        {"predicted": {"model": "emoji"}},
        {"teacher": "emoji"},
        {"new_channels": 6},
        {"loss": {"l1": 0, "l2": 0}},
        {"loss": {"target_bits": 1.0, "free_bits": 0.5}},
        {"loss": {"l1": 0, "l2": 0, "perceptual": 1.0}},
        {"run": {"out": "a", "work": "b", "patience": 3}},
        {"model": {"kind": "tiny", "blocks": (16, 32)}},
    ],
)
def test_configs_that_contradict_themselves_are_refused(tmp_path: Path, pictures: Path, changes: dict[str, Any]) -> None:
    base = vae_run(tmp_path, pictures).model_dump()
    with pytest.raises(ValueError, match="Value error"):
        TrainVAE.model_validate(base | changes)


def test_the_table_counts_every_parameter() -> None:
    vae = tiny_vae()
    trainable.choose_stages(vae, "decoder")
    lines = trainable.table(vae).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "encoder.in", "encoder.down.0", "encoder.down.1", "encoder.mid", "encoder.head",
        "decoder.head", "decoder.mid", "decoder.up.0", "decoder.up.1", "decoder.out",
    ]  # fmt: skip
    total, training_now = (int(word.replace(",", "")) for word in lines[-1].split()[2:])
    assert total == sum(parameter.numel() for parameter in vae.parameters())
    assert training_now == sum(parameter.numel() for parameter in vae.parameters() if parameter.requires_grad)
    assert [line.split()[-1] == "frozen" for line in lines[1:-1]] == [True] * 5 + [False] * 5


def test_the_stages_of_other_autoencoders_have_names() -> None:
    from latentpipe.train.config import VAEShape

    tiny = new_vae(VAEShape(kind="tiny", blocks=(8, 8)), 16)
    assert {trainable.block_of(name).split(".")[0] for name, _ in tiny.named_parameters()} == {"encoder", "decoder"}
    trainable.choose_stages(tiny, "decoder")
    assert not any(parameter.requires_grad for parameter in tiny.encoder.parameters())
    assert all(parameter.requires_grad for parameter in tiny.decoder.parameters())
    assert not trainable.moves_the_latents(tiny)


def test_a_student_that_declares_a_factor_learns_the_latents_in_its_own_units(tmp_path: Path, pictures: Path) -> None:
    save_vae(tiny_vae(), tmp_path / "teacher", {})
    save_vae(tiny_vae(seed=5, scaling_factor=0.2, shift_factor=0.3), tmp_path / "student", {})
    config = config_of(tmp_path, pictures, tmp_path / "student", mode="distil", teacher=tmp_path / "teacher")
    teacher = training.open_teacher(config)
    vae = build_vae(config, teacher)
    stage = VAEStage(vae, training.training_space(vae, config))
    step = training.VAETraining(
        config, DistributedContext(), stage, teacher, None, Objective(config, vae, DistributedContext()), 1
    )  # type: ignore[arg-type]
    images = some_images(2, 48)
    with torch.no_grad():
        mean, std = step.lesson.target(images)  # type: ignore[union-attr]
        wanted, spread = VAEStage(load_vae(tmp_path / "teacher")).posterior(images)
    assert torch.allclose(stage.space.normalize(mean), wanted, atol=1e-5)
    assert torch.allclose(std * 0.2, spread, atol=1e-6)


@pytest.mark.parametrize("parts", [("encoder.down.0",), ("*norm2.weight",)])
def test_partly_frozen_norms_train(tmp_path: Path, pictures: Path, source: Path, parts: tuple[str, ...]) -> None:
    training.train_vae(config_of(tmp_path, pictures, source, parts=parts, optim={"steps": 1}))
    assert (tmp_path / "vae" / "config.json").is_file()
