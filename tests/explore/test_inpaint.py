"""A part is redrawn: the rest keeps its bytes, the latents put back are the picture's, and what cannot be done is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentpipe import LatentPipeline, UserError
from latentpipe.cli.app import main
from latentpipe.data.image_set import encode
from latentpipe.explore import edit, inpaint
from latentpipe.pipelines.metadata.recipe import text_in
from latentpipe.pipelines.sampling import Settings
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.images import to_images

RED = draw_shape("red", "circle", 16)


def hole(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def draw(pipe: LatentPipeline, picture: Image.Image, mask: Image.Image, **options: Any) -> Image.Image:
    with pytest.warns(LatentpipeWarning) if picture.size != (16, 16) else _nothing():
        return inpaint.inpaint(pipe, picture, mask, "blue bar", num_inference_steps=2, **options)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@settings(max_examples=25)
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]),
    seed=st.integers(0, 999),
    strength=st.sampled_from([1.0, 0.5]),
    feather=st.sampled_from([None, 0, 2]),
)
@pytest.mark.filterwarnings("ignore::latentpipe.utils.errors.LatentpipeWarning")
@pytest.mark.slow
def test_bytes_outside_the_mask_stay(
    pipe: LatentPipeline, width: int, height: int, mode: str, seed: int, strength: float, feather: int | None
) -> None:
    random = np.random.default_rng(seed)
    picture = Image.fromarray(random.integers(0, 256, (height, width, 4), np.uint8))
    picture = picture if mode == "RGBA" else picture.convert("RGB").convert(mode)
    values = random.random((height, width)) < 0.05
    values.flat[seed % values.size] = True
    mask = Image.fromarray(values.astype(np.uint8) * 255)
    found = inpaint.inpaint(pipe, picture, mask, "red", seed, 2, strength=strength, feather=feather)
    outside = np.asarray(edit.feathered(mask, feather)) == 0
    assert np.array_equal(np.asarray(found)[outside], np.asarray(picture.convert(found.mode))[outside])
    assert found.size == picture.size


def test_the_hole_is_drawn_from_prompt_and_seed(pipe: LatentPipeline) -> None:
    mask = hole((16, 16), (4, 4, 12, 12))
    first = draw(pipe, RED, mask, seed=1)
    assert first.tobytes() == draw(pipe, RED, mask, seed=1).tobytes()
    assert first.tobytes() != draw(pipe, RED, mask, seed=2).tobytes()
    assert first.tobytes() != inpaint.inpaint(pipe, RED, mask, "red circle", seed=1, num_inference_steps=2).tobytes()
    assert first.tobytes() != RED.tobytes()


def test_a_mask_that_is_all_white_draws_the_prompt_alone(pipe: LatentPipeline) -> None:
    found = draw(pipe, RED, Image.new("L", (16, 16), 255), seed=3)
    assert found.tobytes() == pipe("blue bar", seed=3, num_inference_steps=2)[0].image.tobytes()
    again = draw(pipe, RED, Image.new("L", (16, 16), 255), seed=3, strength=0.5)
    assert again.tobytes() == pipe("blue bar", seed=3, num_inference_steps=2, image=RED, strength=0.5)[0].image.tobytes()


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "euler", "unipc"])
@pytest.mark.parametrize("strength", [1.0, 0.75])
def test_the_unet_sees_the_picture_at_the_noise_of_each_step(pipe: LatentPipeline, scheduler: str, strength: float) -> None:
    """Outside the mask: the closed form of the forward process after the first step, and the picture's latents at the end."""
    known = encode(pipe.stage, to_images(RED))
    free = torch.zeros(1, 1, *known.shape[-2:])
    free[..., 2:5, 2:5] = 0.3
    inputs: list[tuple[int, torch.Tensor]] = []
    hook = pipe.host.unet.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((int(args[1]), args[0][:1].clone())), with_kwargs=True
    )
    image = None if strength == 1 else RED
    chosen = pipe.check(Settings(num_inference_steps=4, guidance_scale=1.0, scheduler=scheduler, image=image, strength=strength))
    try:
        with torch.no_grad():
            found = inpaint._denoised(pipe, known, free, "blue bar", 5, chosen, None)
    finally:
        hook.remove()
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(5))
    outside = (free == 0).expand_as(known)
    kept = pipe.host.scheduler.alphas_cumprod
    assert len(inputs) == chosen.steps_to_run
    for timestep, entered in inputs[1:]:
        wanted = kept[timestep].sqrt() * known + (1 - kept[timestep]).sqrt() * noise
        assert torch.allclose(entered[outside], wanted[outside], atol=1e-3)
        assert not torch.allclose(entered[~outside], wanted[~outside], atol=1e-3)
    assert torch.equal(found[outside], known[outside])
    assert not torch.allclose(found[~outside], known[~outside])


def test_large_pictures_are_drawn_small(pipe: LatentPipeline) -> None:
    assert inpaint.draw_size(pipe, (16, 16)) == (16, 16)
    assert inpaint.draw_size(pipe, (160, 40)) == (32, 8)
    assert max(inpaint.draw_size(pipe, (100_000, 1))) <= 8 * 16
    with pytest.warns(LatentpipeWarning, match="enlarged to 64 x 64"):
        inpaint.inpaint(pipe, RED.resize((64, 64)), hole((64, 64), (16, 16, 32, 32)), "blue", num_inference_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"feather": -1}, "feather is -1"),
    ],
)
def test_what_cannot_be_done_is_told(pipe: LatentPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(pipe, RED, hole((16, 16), (4, 4, 8, 8)), **options)


def test_steps_are_reported(pipe: LatentPipeline) -> None:
    calls: list[tuple[int, int, str]] = []
    draw(pipe, RED, hole((16, 16), (4, 4, 8, 8)), report=lambda *call: calls.append(call))
    assert calls == [(1, 2, "draw"), (2, 2, "draw")]


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: str) -> None:
    monkeypatch.chdir(tmp_path)
    RED.save("a.png")
    hole((16, 16), (4, 4, 8, 8)).save("m.png")
    clear = RED.convert("RGBA")
    clear.putalpha(Image.eval(hole((16, 16), (4, 4, 8, 8)), lambda level: 255 - level))
    clear.save("clear.png")
    base = ["--model", installed, "--steps", "1", "--feather", "0"]
    for given_file, extra, said in (("a.png", ["--mask", "m.png"], ""), ("a.png", [], "the middle"), ("clear.png", [], "")):
        assert main(["inpaint", given_file, "--prompt", "blue bar", *base, *extra]) == 0
        out, error = capsys.readouterr()
        assert out == "inpaint.png\n"
        notes = error.replace(f"latentpipe: opening the model {installed} ...\n", "")
        assert said in notes
        assert bool(notes) == bool(said)
        with Image.open("inpaint.png") as found:
            assert found.size == (16, 16)
            assert found.convert("RGB").crop((0, 0, 16, 4)).tobytes() == RED.crop((0, 0, 16, 4)).tobytes()
            if found.mode == "RGBA":
                assert found.getchannel("A").getextrema() == (255, 255)  # the hole is filled
        assert text_in(Path("inpaint.png"), "parameters") is None
        assert text_in(Path("inpaint.png"), "latentpipe") is None
    for extra, message in ((["--mask", "none.png"], "none.png: no such file"), (["--out", "x.gif"], "ends in .png")):
        assert main(["inpaint", "a.png", *base, *extra]) == 2
        assert message in capsys.readouterr().err
