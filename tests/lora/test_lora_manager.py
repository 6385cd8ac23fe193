"""Adapters on a LatentPipeline: by name, checked against the base, in the recipe, replayed."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import random_lora

from latentpipe import LatentPipeline, replay
from latentpipe.cli.app import main
from latentpipe.lora.adapter import Lora
from latentpipe.lora.state_dict.io import card, write_lora
from latentpipe.pipelines.metadata.recipe import a1111_text
from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.io import content_hash


def digests(pipe: LatentPipeline) -> dict[str, str]:
    return {name: content_hash(model.state_dict()) for name, model in pipe.loras.fuser.components.items()}


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture.image, np.int16)


def install(
    pipe: LatentPipeline, home: Path, name: str, sites: list[str], base: dict[str, str] | None = None, **how: Any
) -> Path:
    """A random adapter as a file among the user's own."""
    lora = random_lora(pipe.loras.fuser.components, sites, name, **how)
    path = home / "lora" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_lora(lora, path, metadata=card(lora, title=name, base_hashes=pipe.base if base is None else base))
    return path


@pytest.fixture
def home(pipe: LatentPipeline, own_home: Path) -> Path:
    """Three installed adapters."""
    install(pipe, own_home, "bright", ["unet.all", "text"])
    install(pipe, own_home, "soft", ["unet.attention"], rank=3, alpha=1.0)
    install(pipe, own_home, "sharp", ["vae.decoder"])
    return own_home


def test_an_attached_adapter_is_reported_moves_the_picture_and_leaves_no_trace(pipe: LatentPipeline, home: Path) -> None:
    before, plain = digests(pipe), pipe("red circle", seed=1, num_inference_steps=2)[0]
    report = pipe.attach_lora("bright", 0.5)
    assert set(report.parts) == {"unet", "text_encoder"}
    assert report.base_checked
    assert not report.left_out
    assert all(part.matched == part.layers and part.output_delta and part.output_delta > 1e-4 for part in report.parts.values())
    drawn = pipe("red circle", seed=1, num_inference_steps=2)[0]
    assert np.abs(pixels(drawn) - pixels(plain)).max() > 0
    assert drawn.recipe.loras == {"bright": 0.5}
    assert not plain.recipe.loras
    assert drawn.recipe.hashes["lora:bright"] == pipe.loras.fuser.loaded["bright"].hash
    assert "<lora:bright:0.5>" in a1111_text(drawn.recipe)
    assert "Lora hashes: " in a1111_text(drawn.recipe)
    pipe.detach_lora("bright")
    assert digests(pipe) == before
    assert np.array_equal(pixels(pipe("red circle", seed=1, num_inference_steps=2)[0]), pixels(plain))


def test_adapters_go_on_all_three_stages_at_once(pipe: LatentPipeline, home: Path) -> None:
    before = digests(pipe)
    pipe.attach_lora("bright")
    report = pipe.attach_lora(home / "lora" / "sharp.safetensors", {"vae": 0.8})
    assert report.parts["vae"].output_delta
    after = digests(pipe)
    assert all(after[name] != before[name] for name in ("unet", "text_encoder", "vae"))
    assert pipe("x", seed=1, num_inference_steps=1)[0].recipe.loras == {"bright": 1.0, "sharp": {"vae": 0.8}}
    pipe.set_lora({"soft": 0.3})
    assert {name for name in before if digests(pipe)[name] != before[name]} == {"unet"}
    pipe.set_lora({})
    assert digests(pipe) == before


def test_a_tag_switches_an_adapter_on_for_one_call(pipe: LatentPipeline, home: Path) -> None:
    before = digests(pipe)
    pipe.attach_lora("sharp", 0.2)
    tagged = pipe("red circle <lora:bright:0.5>", seed=1, num_inference_steps=2)[0]
    assert tagged.recipe.prompt == "red circle"
    assert tagged.recipe.loras == {"sharp": 0.2, "bright": 0.5}
    assert pipe.loras.weights == {"sharp": 0.2}
    pipe.set_lora({"sharp": 0.2, "bright": 0.5})
    assert np.array_equal(pixels(pipe("red circle", seed=1, num_inference_steps=2)[0]), pixels(tagged))
    pipe.detach_lora()
    assert digests(pipe) == before


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("x <lora:nobody:1>", "No LoRA 'nobody' is installed; there are: flat, pencil, sharp, solid, bright, soft"),
        ("x <lora:../lora/bright:1>", "No LoRA '../lora/bright' is installed"),
        ("x <lora:bright:99>", "from -10 to 10"),
        ("x <lora:bright:nan>", "is nan"),
        ("x <lora:bright> <lora:bright>", "twice"),
    ],
)
def test_a_bad_tag_is_one_sentence_and_changes_nothing(pipe: LatentPipeline, home: Path, prompt: str, said: str) -> None:
    before = digests(pipe)
    with pytest.raises(UserError, match=said) as error:
        pipe(prompt, seed=1, num_inference_steps=1)
    assert "\n" not in str(error.value)
    assert digests(pipe) == before
    assert not pipe.loras.weights


def test_a_picture_with_adapters_is_replayed(installed: str, pipe: LatentPipeline, home: Path, tmp_path: Path) -> None:
    model = LatentPipeline.from_pretrained(installed)
    model.set_lora({"bright": 0.5, "sharp": {"vae": 0.8}})
    path = model("red circle", seed=1, num_inference_steps=2)[0].save(tmp_path / "a.png")
    model.detach_lora()
    assert replay(path).difference == 0
    install(pipe, home, "bright", ["unet.all", "text"], scale=0.11)
    with pytest.raises(UserError, match="other weights: lora:bright is"):
        replay(path)
    (home / "lora" / "bright.safetensors").unlink()
    with pytest.raises(UserError, match="No LoRA 'bright' is installed"):
        replay(path)


def test_an_adapter_of_another_base_is_refused_and_can_be_forced(pipe: LatentPipeline, own_home: Path) -> None:
    before = digests(pipe)
    install(pipe, own_home, "other", ["unet.attention"], {"unet": "0" * 64, "vae": pipe.base["vae"]})
    install(pipe, own_home, "latents", ["unet.attention"], {"unet": pipe.base["unet"], "vae": "1" * 64})
    install(pipe, own_home, "text", ["text"], {"text_encoder": pipe.base["text_encoder"], "vae": "1" * 64})
    for name, component in (("other", "unet"), ("latents", "vae")):
        with pytest.raises(UserError, match=f"was trained with {component}"):
            pipe.attach_lora(name)
        with pytest.raises(UserError, match=f"was trained with {component}"):
            pipe.set_lora({name: 1.0})
        with pytest.raises(UserError, match=f"was trained with {component}"):
            pipe(f"x <lora:{name}>", num_inference_steps=1)
        assert digests(pipe) == before
        assert not pipe.loras.fuser.loaded
    assert pipe.attach_lora("text").base_checked  # latents do not concern it
    assert pipe.attach_lora("other", force=True).parts


def test_an_adapter_on_the_encoder_gets_a_verdict(pipe: LatentPipeline) -> None:
    before = digests(pipe)
    components = pipe.loras.fuser.components
    with pytest.raises(UserError, match="changes the VAE's encoder"):
        pipe.attach_lora(random_lora(components, ["vae.encoder"], "new", scale=0.5))
    assert digests(pipe) == before
    assert not pipe.loras.fuser.loaded
    report = pipe.attach_lora(random_lora(components, ["vae.encoder"], "new", scale=0.5), force=True)
    assert report.verdict is not None
    assert not report.verdict.fits
    assert report.verdict.outcome in str(report)
    pipe.detach_lora()
    slight = pipe.attach_lora(random_lora(components, ["vae.encoder"], "slight", scale=1e-4))
    assert slight.verdict.fits
    assert pipe.attach_lora(random_lora(components, ["vae.decoder"], "decoder")).verdict is None


def test_one_that_does_nothing_says_so(pipe: LatentPipeline) -> None:
    idle = random_lora(pipe.loras.fuser.components, ["unet.attention"], "idle", scale=0.0)
    with pytest.warns(LatentpipeWarning, match="'idle' changes nothing"):
        assert pipe.attach_lora(idle).parts["unet"].output_delta == 0


def test_pipelines_that_share_a_network_do_not_mix(pipe: LatentPipeline, home: Path) -> None:
    twin = LatentPipeline(pipe.host, hashes=pipe.hashes)
    before = digests(pipe)
    pipe.attach_lora("soft")
    shared = "shared with another pipeline that has LoRA on it"
    with pytest.raises(UserError, match=shared):
        twin("x", num_inference_steps=1)
    with pytest.raises(UserError, match=shared):
        twin.attach_lora("bright")
    with pytest.raises(UserError, match=shared):
        twin.set_lora({"bright": 1.0})
    pipe.detach_lora()
    twin.attach_lora("bright")
    del twin
    gc.collect()
    assert digests(pipe) == before  # a pipeline that is dropped leaves its host as it was


def test_names_once_and_only_what_is_attached_comes_off(pipe: LatentPipeline, home: Path) -> None:
    pipe.attach_lora("soft")
    with pytest.raises(UserError, match="'soft' is attached already"):
        pipe.attach_lora("soft")
    pipe.attach_lora("soft", 0.1, name="again")
    with pytest.raises(UserError, match="No LoRA 'bright' is attached; attached: soft, again"):
        pipe.detach_lora("bright")
    with pytest.raises(UserError, match="No LoRA 'nobody': neither a file nor one of flat, pencil, sharp, solid, bright, soft"):
        pipe.attach_lora("nobody")


def test_it_works_on_other_families(home: Path) -> None:
    from tiny_hosts import complete

    for family in ("sdxl", "sd3", "flux", "sana"):
        pipe = LatentPipeline(complete(family))
        before = digests(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LatentpipeWarning)
            report = pipe.attach_lora(random_lora(pipe.loras.fuser.components, ["unet.attention"], family, scale=0.3))
        part = next(iter(report.parts.values()))
        assert part.matched == part.layers, family
        assert part.output_delta, family
        pipe.detach_lora()
        assert digests(pipe) == before


@pytest.mark.slow
def test_generate_takes_names_files_and_weights(
    installed: str, pipe: LatentPipeline, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from latentpipe.pipelines.metadata.recipe import read

    file = str(home / "lora" / "sharp.safetensors")
    call = ["generate", "red circle", "--model", installed, "--steps", "1", "--seed", "1", "--out", str(tmp_path)]
    assert main([*call, "--lora", "bright=0.5", file]) == 0
    shown = capsys.readouterr()
    assert "bright: unet" in shown.err
    assert "moves one step by" in shown.err
    assert read(Path(shown.out.strip())).loras == {"bright": 0.5, "sharp": 1.0}
    assert main([*call, "--lora", "bright=0.5", "soft", "--lora-method", "ties_svd"]) == 0
    drawn = read(Path(capsys.readouterr().out.strip()))
    assert (drawn.loras, drawn.lora_method) == ({"bright": 0.5, "soft": 1.0}, "ties_svd")
    tagged = ["generate", "red circle <lora:soft:0.3>", *call[2:]]
    assert main(tagged) == 0
    assert Path(capsys.readouterr().out.strip()).name.startswith("red-circle-1")  # the tag is no part of the name
    assert main([*call, "--lora", "bright", "--lora-method", "mean"]) == 2
    assert "--lora-method is 'mean'" in capsys.readouterr().err
    for given, said in (("bright=x", "'x' is no number"), ("nobody", "No LoRA 'nobody'"), ("bright=99", "from -10 to 10")):
        assert main([*call, "--lora", given]) == 2
        assert said in capsys.readouterr().err


def test_a_wrapped_network_is_never_written(pipe: LatentPipeline, home: Path, tmp_path: Path) -> None:
    from latentpipe.checkpoints.pipeline_io import save_pipeline
    from latentpipe.checkpoints.vae_io import save_vae

    pipe.attach_lora("soft")
    pipe.set_lora({"soft": 1.0, "sharp": 1.0}, fuse=False)
    for write in (
        lambda: save_pipeline(pipe.host, tmp_path / "model", {}, tmp_path),
        lambda: save_vae(pipe.stage.vae, tmp_path / "vae", {}),
    ):
        with pytest.raises(UserError, match="has adapters attached"):
            write()
    assert not list(tmp_path.iterdir())


def test_an_empty_adapter_is_refused(pipe: LatentPipeline) -> None:
    with pytest.raises(UserError, match="none of its 0 layers fits"):
        pipe.attach_lora(Lora({}, "empty"))


def test_torch_random_numbers_are_left_alone(pipe: LatentPipeline, home: Path) -> None:
    state = torch.get_rng_state()
    pipe.attach_lora("soft")
    pipe.set_lora({"soft": 1.0, "sharp": 0.5}, fuse=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_decoder_that_fits_takes_no_adapter_away(tmp_path: Path, own_home: Path) -> None:
    """An adapter on the denoiser concerns the latents, whatever decodes them; one on the VAE concerns the VAE in use."""
    swapped = LatentPipeline.from_pretrained("emoji", vae="emoji-decoder-ft")
    components = swapped.loras.fuser.components
    for name, sites in (("style", ["unet.attention"]), ("look", ["vae.decoder"])):
        lora = random_lora(components, sites, name, scale=0.02)
        path = tmp_path / f"{name}.safetensors"
        write_lora(lora, path, metadata=card(lora, title=name, base_hashes=swapped.base))
        if name == "style":
            assert swapped.attach_lora(path).base_checked
        else:
            with pytest.raises(UserError, match="was trained with vae"):
                swapped.attach_lora(path)


def test_a_picture_with_a_file_that_is_not_installed_is_replayed_with_it(
    installed: str, pipe: LatentPipeline, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = random_lora(pipe.loras.fuser.components, ["unet.attention"], "far")
    layers = dict(whole.parts["unet"])
    part = Lora({"unet": {**layers, "elsewhere": next(iter(layers.values()))}}, "far")
    file = tmp_path / "far.safetensors"
    write_lora(part, file, metadata=card(part, title="far", base_hashes={"unet": "0" * 64}))
    call = ["generate", "red circle", "--model", installed, "--steps", "1", "--seed", "1", "--out", str(tmp_path)]
    assert main([*call, "--lora", f"{file}=0.5"]) == 2
    assert main([*call, "--lora", f"{file}=0.5", "--lora-partial"]) == 2
    assert main([*call, "--lora", f"{file}=0.5", "--lora-partial", "--force"]) == 0
    picture = capsys.readouterr().out.strip()
    assert main(["replay", picture]) == 2
    assert "No LoRA 'far' is installed" in capsys.readouterr().err
    assert main(["replay", picture, "--lora", f"far={file}"]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["replay", picture, "--lora", str(file)]) == 2
    assert "expected NAME=FILE" in capsys.readouterr().err


def test_a_swap_asks_to_take_adapters_off_first(pipe: LatentPipeline, home: Path) -> None:
    from latentpipe import swap_vae

    pipe.attach_lora("soft")
    with pytest.raises(UserError, match="take it off first"):
        swap_vae(pipe, pipe.host.vae)


def test_no_way_of_drawing_uses_anothers_adapters(pipe: LatentPipeline, home: Path) -> None:
    from dataclasses import replace

    from latentpipe.pipelines.sampling import Settings

    twin = replace(pipe, name="twin")
    pipe.attach_lora("soft")
    with pytest.raises(UserError, match="shared with another pipeline"):
        twin.draw(["x"], [0], Settings(num_inference_steps=1))


def test_threads_with_different_tags_take_turns(pipe: LatentPipeline, home: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = digests(pipe)
    prompts = [f"red circle <lora:{name}:{weight}>" for name in ("bright", "soft") for weight in (0.3, 1)]
    alone = [pixels(pipe(prompt, seed=1, num_inference_steps=2)[0]) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: pixels(pipe(prompt, seed=1, num_inference_steps=2)[0]), prompts))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert digests(pipe) == before


def test_a_file_that_was_replaced_is_opened_again(pipe: LatentPipeline, home: Path) -> None:
    pipe("x <lora:soft>", num_inference_steps=1)
    first = pipe.loras.fuser.loaded["soft"].hash
    install(pipe, home, "soft", ["unet.attention"], rank=5)
    assert pipe("x <lora:soft>", num_inference_steps=1)[0].recipe.hashes["lora:soft"] != first
    pipe.detach_lora("soft")
    assert pipe.attach_lora("soft").parts["unet"].ranks == (5, 5)


def test_the_probe_is_made_again_after_a_move(pipe: LatentPipeline) -> None:
    components = pipe.loras.fuser.components
    pipe.attach_lora(random_lora(components, ["unet.attention"], "one"))
    pipe.detach_lora()
    pipe.host.to(torch.bfloat16)
    with pytest.warns(LatentpipeWarning, match="changes nothing"):
        pipe.attach_lora(random_lora(components, ["unet.attention"], "idle", scale=0.0))
