"""train-lora: what trains and what stays, exact resume, what the file says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_hosts
import torch
from helpers import edit_json, grey_levels, write_pictures
from safetensors.torch import load_file, save_file

from latentpipe import LatentPipeline, UserError
from latentpipe.checkpoints.pipeline_io import hashes, load_pipeline
from latentpipe.checkpoints.registry import configs_folder
from latentpipe.data.latent_cache import default_path, encode_folder
from latentpipe.lora.adapter import Lora
from latentpipe.lora.injection import attach, wrappers
from latentpipe.lora.state_dict.io import read_lora, stated_base, trigger_words
from latentpipe.train.config import TrainLora, load
from latentpipe.train.distributed import DistributedContext
from latentpipe.train.lora import parameters as lora_parts
from latentpipe.train.lora import train as verb
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.io import content_hash, read_header, read_tensors

EVERYWHERE = ("unet.attention", "text", "vae.decoder")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures in a folder that keeps its latents."""
    return write_pictures(tmp_path_factory.mktemp("drawn") / "shapes")


def lora_run(root: Path, model: Path, pictures: Path, **run: Any) -> TrainLora:
    """A TrainLora config of two tiny steps, which writes below `root`."""
    optim = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "ema_decay": 0.5} | run.pop("optim", {})
    data = {"train": pictures} | run.pop("data", {})
    adapter = {"rank": 2} | run.pop("adapter", {})
    rest = {name: run.pop(name) for name in ("loss", "prior", "distillation", "sample_prompts") if name in run}
    places = {"out": root / "style.safetensors", "work": root / "work", "precision": "fp32", "save_every_steps": 100}
    raw = {"model": model, "data": data, "run": places | {"sample_every_steps": 100} | run, "optim": optim, "adapter": adapter}
    return TrainLora.model_validate(raw | rest)


def log_of(root: Path, name: str) -> list[float]:
    """One figure of every step."""
    rows = [json.loads(line) for line in (root / "work" / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def in_halves(root: Path, model: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> tuple[Path, Path]:
    """The files of a run at once, and of the same run that was stopped in its third step and resumed."""
    whole = verb.train_lora(lora_run(root / "a", model, drawn, **more))
    original, count = verb.LoraTraining._predicted, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and next(count) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(verb.LoraTraining, "_predicted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verb.train_lora(lora_run(root / "b", model, drawn, **more))
    assert not (root / "b" / "style.safetensors").exists()
    torch.rand(7)
    return whole, verb.train_lora(lora_run(root / "b", model, drawn, resume=True, **more))


# --- the run as a whole -------------------------------------------------------------------------------------


def test_the_file_fits_its_base_and_says_where_it_comes_from(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    before = hashes(model_folder)
    config = lora_run(tmp_path, model_folder, drawn, adapter={"sites": EVERYWHERE}, data={"trigger": "in wax"})
    out = verb.train_lora(config)
    assert out == tmp_path / "style.safetensors"
    assert hashes(model_folder) == before
    made = read_lora(out)
    assert not made.unread
    host = load_pipeline(model_folder)
    plan = lora_parts.choose_trained(config, host)
    assert {name: sorted(layers) for name, layers in made.parts.items()} == {
        name: sorted(paths) for name, paths in plan.paths.items()
    }
    assert all(layer.tensors["lora_B"].abs().max() > 0 for _, _, layer in made.layers())
    assert stated_base(made) == {part: before[part] for part in ("unet", "text_encoder", "vae")}
    assert trigger_words(made) == ["in wax"]
    result = json.loads((tmp_path / "work" / "result.json").read_text())
    parts = {name: content_hash(getattr(host, name).state_dict()) for name in ("unet", "text_encoder", "vae")}
    assert result["frozen_base"] == parts
    assert not list(tmp_path.glob(".*"))


def test_the_file_is_attached_to_its_base_and_refused_on_another(tmp_path: Path, model_copy: Path, drawn: Path) -> None:
    out = verb.train_lora(lora_run(tmp_path, model_copy, drawn, optim={"learning_rate": 1e-2}))
    pipe = LatentPipeline.from_pretrained(model_copy, device="cpu")
    plain = pipe("red circle", seed=0, num_inference_steps=2)[0].image
    pipe.attach_lora(out)
    assert grey_levels(pipe("red circle", seed=0, num_inference_steps=2)[0].image, plain) > 0
    pipe.detach_lora()
    assert grey_levels(pipe("red circle", seed=0, num_inference_steps=2)[0].image, plain) == 0
    weights = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in read_tensors(weights).items()}, weights)
    with pytest.raises(UserError, match="style"):
        LatentPipeline.from_pretrained(model_copy, device="cpu").attach_lora(out)


def test_diffusers_reads_the_file_as_we_do(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    optim = {"steps": 6, "learning_rate": 3e-2}
    adapter = {"sites": ("unet.all",), "rank": 3, "alpha": 6.0}
    out = verb.train_lora(lora_run(tmp_path, model_folder, drawn, optim=optim, adapter=adapter))
    ours, theirs = load_pipeline(model_folder), load_pipeline(model_folder)
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, ours.unet.config.cross_attention_dim)
    with torch.no_grad():
        plain = ours.unet(latents, 500, states).sample
        attach(ours.unet, read_lora(out).parts["unet"], "a")
        theirs.load_lora_weights(str(out.parent), weight_name=out.name)
        first, second = (pipe.unet(latents, 500, states).sample for pipe in (ours, theirs))
    assert (first - plain).abs().max() > 1e-2
    assert (first - second).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("sites", "kind"), [(("unet.attention",), "lora"), (EVERYWHERE, "dora")], ids=["unet", "all three, DoRA"]
)
def test_k_steps_are_k_half_stop_resume_k_half_bit_for_bit(
    tmp_path: Path, model_folder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, sites: tuple[str, ...], kind: str
) -> None:
    more: dict[str, Any] = {"optim": {"steps": 4}, "adapter": {"sites": sites, "kind": kind, "rank": 2}}
    whole, halves = in_halves(tmp_path, model_folder, drawn, monkeypatch, more)
    assert content_hash(read_tensors(whole)) == content_hash(read_tensors(halves))
    assert read_lora(whole).hash == read_lora(halves).hash


def test_gradient_checkpointing_changes_nothing_but_the_memory(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    adapter = {"sites": ("unet.attention", "vae.decoder")}
    plain, saving = (
        read_lora(verb.train_lora(lora_run(tmp_path / str(on), model_folder, drawn, adapter=adapter, gradient_checkpointing=on)))
        for on in (False, True)
    )
    for (_, path, one), (_, _, other) in zip(plain.layers(), saving.layers(), strict=True):
        for name, value in one.tensors.items():
            assert torch.allclose(value.float(), other.tensors[name].float(), atol=1e-4), path


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    verb.train_lora(lora_run(tmp_path, model_folder, drawn))
    (folder,) = (tmp_path / "work" / "checkpoints").iterdir()
    held = {name: value for name, value in load_file(folder / "state.safetensors").items() if name.startswith("module.")}
    assert held
    assert all("lora_" in name for name in held)
    assert sum(value.numel() for value in held.values()) == sum(
        layer.parameters for _, _, layer in read_lora(tmp_path / "style.safetensors").layers()
    )


def test_drawing_sheets_does_not_change_the_training(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    more: dict[str, Any] = {"adapter": {"sites": ("unet.attention", "vae.decoder")}, "sample_prompts": ("red circle",)}
    plain = verb.train_lora(lora_run(tmp_path / "a", model_folder, drawn, **more))
    shown = verb.train_lora(lora_run(tmp_path / "b", model_folder, drawn, sample_every_steps=1, **more))
    assert content_hash(read_tensors(plain)) == content_hash(read_tensors(shown))
    for name in ("samples", "rebuilt"):
        assert (tmp_path / "b" / "work" / f"{name}-000001.png").is_file()


def test_it_learns_what_it_sees(tmp_path: Path, model_folder: Path) -> None:
    """The latents of every picture are one pattern: what is left to learn is the noise."""
    folder = write_pictures(tmp_path / "one")
    path = default_path(folder, model_folder / "vae", 16)
    encode_folder(folder, model_folder / "vae", path, 16)
    mean = read_tensors(path)["mean"]
    pattern = torch.linspace(-1.5, 1.5, mean[0].numel()).view(mean[0].shape).half().expand(mean.shape).contiguous()
    save_file({"mean": pattern, "std": torch.zeros_like(pattern)}, path, metadata=read_header(path).metadata)
    optim = {"steps": 50, "batch_size": 12, "learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.0}
    verb.train_lora(lora_run(tmp_path, model_folder, folder, optim=optim, adapter={"sites": ("unet.all",), "rank": 4}))
    seen = log_of(tmp_path, "v")
    assert sum(seen[-10:]) < 0.75 * sum(seen[:10])


def test_a_decoder_adapter_rebuilds_better(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    optim = {"steps": 40, "batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.0}
    more: dict[str, Any] = {"optim": optim, "adapter": {"sites": ("vae.decoder",), "rank": 3}, "loss": {"l1": 1.0, "l2": 1.0}}
    out = verb.train_lora(lora_run(tmp_path, model_folder, drawn, **more))
    assert set(read_lora(out).parts) == {"vae"}
    rows = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert "v" not in rows[0]
    seen = log_of(tmp_path, "pixel")
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    host = load_pipeline(model_folder)
    assert not any(path.startswith("encoder") for path in read_lora(out).parts["vae"])
    attach(host.vae, read_lora(out).parts["vae"], "a")


def test_stable_diffusion_xl_trains_with_its_two_text_encoders(tmp_path: Path, drawn: Path) -> None:
    pipe = tiny_hosts.complete("sdxl")
    pipe.save_pretrained(tmp_path / "xl", safe_serialization=True)
    sites = ("unet.attention", "text", "vae.decoder")
    config = lora_run(tmp_path, tmp_path / "xl", drawn, adapter={"sites": sites}, loss={"caption_dropout": 0.5})
    made = read_lora(verb.train_lora(config))
    assert set(made.parts) == {"unet", "text_encoder", "text_encoder_2", "vae"}
    assert len(log_of(tmp_path, "noise")) == 2
    moved = [path for _, path, layer in made.layers() if layer.tensors["lora_B"].abs().max() > 0]
    assert len(moved) > 0.9 * len(list(made.layers()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dora_and_rslora_train(tmp_path: Path, model_folder: Path, drawn: Path, precision: str) -> None:
    adapter = {"kind": "dora", "rslora": True, "rank": 4, "alpha": 2.0, "rank_pattern": {r"unet\..*to_q": 1}}
    made = read_lora(verb.train_lora(lora_run(tmp_path, model_folder, drawn, adapter=adapter, precision=precision)))
    for _, path, layer in made.layers():
        assert layer.dora
        assert layer.rank == (1 if path.endswith("to_q") else 4)
        assert layer.scale == pytest.approx(layer.alpha / layer.rank**0.5)
        assert layer.alpha / layer.rank == pytest.approx(0.5)


def test_a_warm_start_begins_with_the_other_adapter(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    first = verb.train_lora(lora_run(tmp_path / "a", model_folder, drawn, adapter={"rank": 2, "alpha": 4.0}))
    still = {"steps": 1, "learning_rate": 1e-12, "ema_decay": 0.0, "weight_decay": 0.0}
    config = lora_run(tmp_path / "b", model_folder, drawn, optim=still, warm_start=first, adapter={"alpha": 1.0})
    one, two = read_lora(first), read_lora(verb.train_lora(config))
    for (_, _, old), (_, _, new) in zip(one.layers(), two.layers(), strict=True):
        pair = [layer.scale * layer.tensors["lora_B"].float() @ layer.tensors["lora_A"].float() for layer in (old, new)]
        assert torch.allclose(*pair, atol=1e-4)
        assert (old.scale, new.scale) == (2.0, 0.5)
    with pytest.raises(UserError, match=r"other layers than this run .*rank 2 there and .*rank 4 here"):
        verb.train_lora(lora_run(tmp_path / "c", model_folder, drawn, warm_start=first, adapter={"rank": 4}))
    with pytest.raises(UserError, match="is in one of them alone"):
        verb.train_lora(lora_run(tmp_path / "d", model_folder, drawn, warm_start=first, adapter={"sites": ("unet.all",)}))


# --- what trains and what stays -----------------------------------------------------------------------------


def prepared(root: Path, model: Path, pictures: Path, **more: Any) -> tuple[verb.LoraTraining, torch.nn.ParameterDict]:
    """A run just before its first step."""
    config = lora_run(root, model, pictures, **more)
    host = load_pipeline(model)
    plan = lora_parts.choose_trained(config, host)
    own, prior = verb._pictures(config, host, model, plan, 16, DistributedContext())
    training = verb.LoraTraining(config, host, plan, own, prior, DistributedContext())
    adapter = lora_parts.inject_trainable(config, plan)
    with torch.no_grad():
        for name, parameter in adapter.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # at zero nothing would reach A
    return training, adapter


def test_every_term_reaches_exactly_the_adapters_it_is_meant_for(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    training, adapter = prepared(
        tmp_path, model_folder, drawn, adapter={"sites": EVERYWHERE, "kind": "dora"}, prior={"train": drawn}
    )
    terms = training.step(0, torch.Generator().manual_seed(0)).losses(0)
    assert list(terms) == ["v", "prior", "pixel"]
    names, parameters = list(adapter.keys()), list(adapter.values())
    for term, wanted in (("v", ("unet/", "text_encoder/")), ("prior", ("unet/", "text_encoder/")), ("pixel", ("vae/",))):
        found = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
        reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None and gradient.abs().max() > 0}
        assert reached == {name for name in names if name.startswith(wanted)}, term
    own = {id(parameter) for parameter in parameters}
    for model in training.plan.models.values():
        assert all(parameter.requires_grad == (id(parameter) in own) for parameter in model.parameters())


def test_the_priors_weight_scales_its_term_and_nothing_else(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    found = []
    for weight in (1.0, 3.0):
        training, _ = prepared(tmp_path, model_folder, drawn, prior={"train": drawn, "weight": weight}, data={"trigger": "wax"})
        assert training.prior is not None
        assert training.prior.captions[0] == ("red circle",)
        assert training.pictures.captions[0] == ("wax red circle",)
        terms = training.step(1, torch.Generator().manual_seed(4)).losses(0)
        found.append({name: value.item() for name, value in terms.items()})
    assert found[1]["prior"] == pytest.approx(3 * found[0]["prior"], rel=1e-5)
    assert found[1]["v"] == found[0]["v"]


def test_pixel_weights_are_those_of_the_config(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    found = []
    for loss in ({"l1": 1.0, "l2": 0.0}, {"l1": 0.0, "l2": 1.0}, {"l1": 0.5, "l2": 4.0}):
        training, _ = prepared(tmp_path, model_folder, drawn, adapter={"sites": ("vae.decoder",)}, loss=loss)
        torch.manual_seed(0)
        with torch.no_grad():
            for _, wrapper in wrappers(training.host.vae):
                wrapper.lora_B["lora"].weight.zero_()
        found.append(training.step(0, torch.Generator().manual_seed(0)).losses(0)["pixel"].item())
    assert found[2] == pytest.approx(0.5 * found[0] + 4.0 * found[1], rel=1e-5)
    assert found[0] != found[1]


def test_a_changed_base_is_found_and_nothing_is_written(
    tmp_path: Path, model_folder: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verb.LoraTraining.step

    def careless(self: Any, step: int, generator: torch.Generator) -> Any:
        with torch.no_grad():
            self.host.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
        return original(self, step, generator)

    monkeypatch.setattr(verb.LoraTraining, "step", careless)
    with pytest.raises(UserError, match="unet changed while the adapter was trained"):
        verb.train_lora(lora_run(tmp_path, model_folder, drawn))
    assert not (tmp_path / "style.safetensors").exists()


def test_the_bases_hash_does_not_see_the_adapter(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    config = lora_run(tmp_path, model_folder, drawn, adapter={"sites": EVERYWHERE, "kind": "dora"})
    host = load_pipeline(model_folder)
    plan = lora_parts.choose_trained(config, host)
    plain = {name: content_hash(model.state_dict()) for name, model in plan.models.items()}
    assert lora_parts.base_hashes(plan) == plain
    adapter = lora_parts.inject_trainable(config, plan)
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.add_(1.0)
    assert lora_parts.base_hashes(plan) == plain


def test_the_same_seed_begins_the_same(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    begun = []
    for _ in range(2):
        torch.rand(5)
        config = lora_run(tmp_path, model_folder, drawn)
        adapter = lora_parts.inject_trainable(config, lora_parts.choose_trained(config, load_pipeline(model_folder)))
        begun.append(content_hash(dict(adapter.items())))
    assert begun[0] == begun[1]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adapter": {"sites": ("vae.encoder",)}}, "reach the VAE's encoder .* train-vae"),
        ({"adapter": {"sites": ("vae.all",)}}, "reach the VAE's encoder"),
        ({"adapter": {"sites": ("unet.nothing",)}}, "matches no Linear or Conv2d"),
        (
            {"adapter": {"sites": ("unet.attention",), "rank_pattern": {"vae.decoder": 4}}},
            "rank_pattern 'vae.decoder' matches none",
        ),
        ({"adapter": {"sites": ("vae.decoder",)}, "loss": {"l1": 0.0}}, "l1 and loss.l2 are both 0"),
        ({"data": {"size_px": 20}}, "size_px is 20; this model needs a multiple of 8"),
        ({"data": {"train": Path("nowhere")}}, "nowhere is not a folder"),
        ({"prior": {"train": Path("nowhere")}}, "nowhere is not a folder"),
        ({"warm_start": Path("nowhere.safetensors")}, "No LoRA 'nowhere.safetensors'"),
        ({"data": {"exclude": Path("nowhere.txt")}}, "data.exclude nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, model_folder: Path, drawn: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        verb.train_lora(lora_run(tmp_path, model_folder, drawn, **more))
    assert not (tmp_path / "style.safetensors").exists()


def test_a_prior_for_the_decoder_alone_is_refused(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    with pytest.raises(UserError, match="leave prior out"):
        verb.train_lora(lora_run(tmp_path, model_folder, drawn, adapter={"sites": ("vae.decoder",)}, prior={"train": drawn}))


def test_other_families_train_their_decoder_alone(tmp_path: Path, drawn: Path) -> None:
    tiny_hosts.complete("sprint").save_pretrained(tmp_path / "sprint", safe_serialization=True)
    size = {"size_px": 64}
    with pytest.raises(UserError, match=r"The model is a SanaSprintPipeline; .*Stable Diffusion 3, FLUX\.1, Sana, PixArt-alpha"):
        verb.train_lora(lora_run(tmp_path, tmp_path / "sprint", drawn, data=size))
    decoder = {"sites": ("vae.decoder",)}
    made = read_lora(verb.train_lora(lora_run(tmp_path, tmp_path / "sprint", drawn, data=size, adapter=decoder)))
    assert set(made.parts) == {"vae"}


def test_a_large_rank_is_noted(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    config = lora_run(tmp_path, model_folder, drawn, adapter={"sites": (r"unet\.conv_out",), "rank": 5})
    with pytest.warns(LatentpipeWarning, match=r"larger than the full rank of 1 layer, such as unet.conv_out \(4\)"):
        lora_parts.choose_trained(config, load_pipeline(model_folder))


def test_another_prediction_type_is_refused(tmp_path: Path, model_copy: Path, drawn: Path) -> None:
    edit_json(model_copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type sample"):
        verb.train_lora(lora_run(tmp_path, model_copy, drawn))


def test_what_stands_in_the_files_place_is_not_replaced(tmp_path: Path, model_folder: Path, drawn: Path) -> None:
    out = tmp_path / "style.safetensors"
    save_file({"weight": torch.zeros(2)}, out)
    with pytest.raises(UserError, match="is no LoRA, and would be replaced"):
        verb.train_lora(lora_run(tmp_path, model_folder, drawn))
    assert list(read_header(out).shapes) == ["weight"]
    out.unlink()
    out.mkdir()
    for model in (model_folder, tmp_path / "none"):  # said before the model is opened
        with pytest.raises(UserError, match="is a folder"):
            verb.train_lora(lora_run(tmp_path, model, drawn))
    out.rmdir()
    verb.train_lora(lora_run(tmp_path, model_folder, drawn))
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        verb.train_lora(lora_run(tmp_path, model_folder, drawn))
    verb.train_lora(lora_run(tmp_path, model_folder, drawn, work=tmp_path / "other", optim={"steps": 3}))  # an earlier LoRA is


def test_a_wrong_ending_is_refused_by_the_config(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {train: x}\nrun: {out: y.bin, work: z}\noptim: {steps: 1}\nadapter: {rank: 0}\n")
    with pytest.raises(UserError, match=r"adapter.rank"):
        load(path, TrainLora)
    path.write_text("data: {train: x}\nrun: {out: y.bin, work: z}\noptim: {steps: 1}\n")
    with pytest.raises(UserError, match=r"give it the ending .safetensors"):
        load(path, TrainLora)


def test_the_shipped_config_is_one() -> None:
    config = load(configs_folder() / "small-lora.yaml", TrainLora)
    assert config.adapter.sites == ("unet.attention",)
    assert isinstance(Lora({}), Lora)
