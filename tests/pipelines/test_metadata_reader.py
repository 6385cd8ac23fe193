"""Settings read from pictures of this and other programs, and from files made to do harm."""

from __future__ import annotations

import io
import json
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from helpers import draw_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_recipe import some_recipe

from latentpipe import Settings, UserError
from latentpipe.pipelines.metadata import recipe
from latentpipe.pipelines.metadata.reader import MAX_RAW, MAX_TEXT, SAMPLERS, Info, read_info
from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED, Source
from latentpipe.pipelines.metadata.third_party import MAX_LINES
from latentpipe.pipelines.sampling import MAX_SIDE, SCHEDULERS, check_settings
from latentpipe.utils.errors import LatentpipeWarning

LINES = (
    "red (circle:1.2), <lora:pencil:0.7>\nsecond line\nNegative prompt: bar,\nbad\n"
    "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 64x48, Model hash: 45a21ea00a, "
    'Model: sub/dir/my model, VAE: "C:\\\\vae\\\\ft-mse.safetensors", Clip skip: 2, Version: v1.10.1'
)
FOOOCUS = {
    "prompt": "red circle", "negative_prompt": "bar", "prompt_expansion": "", "styles": "[]", "resolution": "(64, 48)",
    "steps": 30, "guidance_scale": 4.0, "sharpness": 2.0,
    "base_model": "../up/juggernaut.safetensors", "base_model_hash": "aeb7e9e689",
    "sampler": "ddim", "scheduler": "karras", "vae": "Default (model)", "seed": "7", "version": "Fooocus v2.5.5",
    "loras": [["sdxl/offset.safetensors", 0.1, "4852686128"]],
}  # fmt: skip
INVOKE = {
    "positive_prompt": "red circle", "negative_prompt": "bar", "width": 64, "height": 48, "seed": 5, "cfg_scale": 7.5,
    "steps": 12, "scheduler": "euler", "model": {"key": "k", "name": "dreamshaper", "base": "sd-1"}, "vae": {"name": "mse"},
    "loras": [{"model": {"name": "pencil"}, "weight": 0.5}], "app_version": "5.0.0",
}  # fmt: skip
COMFY: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15\\base.safetensors"}},
    "2": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "p/pencil.safetensors", "strength_model": 0.6, "model": ["1", 0], "clip": ["1", 1]},
    },
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "red circle", "clip": ["2", 1]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "bar", "clip": ["2", 1]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 1}},
    "6": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 9, "steps": 15, "cfg": 5.5, "sampler_name": "uni_pc", "scheduler": "normal", "denoise": 1.0,
            "model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0],
        },
    },
    "7": {"class_type": "VAELoader", "inputs": {"vae_name": "ft-mse.pt"}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["7", 0]}},
    "9": {"class_type": "FaceDetailer", "inputs": {"image": ["8", 0]}},
}  # fmt: skip
NOVELAI = {
    "Title": "AI generated image", "Description": "red circle", "Software": "NovelAI", "Source": "Stable Diffusion 81274D13",
    "Comment": json.dumps(
        {"steps": 28, "sampler": "k_euler_ancestral", "seed": 3, "strength": 0.7, "noise": 0.2, "scale": 11.0, "uc": "bar"}
    ),
}  # fmt: skip


def png(path: Path, *, late: bool = False, latin: bool = False, **texts: str) -> Path:
    """A PNG of 64 x 48 with text chunks; `late`: behind the pixels, `latin`: as tEXt in UTF-8."""
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        if latin:
            info.add(b"tEXt", key.encode() + b"\0" + text.encode(), after_idat=late)
        else:
            info.add(b"iTXt", key.encode() + b"\0\0\0\0\0" + text.encode(), after_idat=late)
    Image.new("RGB", (64, 48), "red").save(path, pnginfo=info)
    return path


def jpeg(path: Path, comment: bytes | str, *, inner: bool = True, **options: Any) -> Path:
    """A JPEG (or WebP) whose EXIF has a UserComment, in its own folder or, as some write it, in the first one."""
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if inner else exif)[0x9286] = comment
    Image.new("RGB", (64, 48), "red").save(path, exif=exif.tobytes(), **options)
    return path


def usable(info: Info) -> Settings:
    """The settings as the pipeline takes them."""
    with warnings.catch_warnings(category=LatentpipeWarning, action="ignore"):  # of a size that is not the model's
        return check_settings(Settings(negative_prompt=info.negative_prompt, **info.settings), (64, 48), 1)


def test_a_path_may_be_text(tmp_path: Path) -> None:
    recipe.save_png(draw_shape("red", "circle"), tmp_path / "a.png", some_recipe())
    assert read_info(str(tmp_path / "a.png")) == read_info(tmp_path / "a.png")


def test_our_own_picture_gives_its_recipe_back_to_the_letter(tmp_path: Path) -> None:
    old = some_recipe(prompt=" red\tcircle ", loras={"pencil": 0.5, "ink": {"unet": 1.0}}, width=64, height=48)
    recipe.save_png(draw_shape("red", "circle", 64).resize((64, 48)), tmp_path / "a.png", old)
    info = read_info(tmp_path / "a.png")
    assert info.recipe == old
    assert (info.source, info.prompt, info.negative_prompt, info.seed) == ("latentpipe", old.prompt, old.negative, old.seed)
    assert info.settings == {
        "num_inference_steps": 20, "guidance_scale": 3.5, 
        "scheduler": "ddim", "size": (64, 48), "strength": 0.4, "guidance_interval": (0.1, 0.9),
    }  # fmt: skip
    assert (info.model, info.vae, info.loras) == ("emoji", "other", {"pencil": 0.5, "ink": {"unet": 1.0}})
    assert len(info.changed) == 1, info.changed
    assert "not in the file" in info.changed[0]
    usable(info)


def test_our_recipe_without_our_chunk_is_read_as_others_read_it(tmp_path: Path) -> None:
    old = some_recipe(prompt="red", loras={"pencil": 0.5}, source=Source(sha256="ab" * 32, strength=0.4))
    info = read_info(png(tmp_path / "a.png", parameters=recipe.a1111_text(old)))
    assert (info.source, info.prompt, info.negative_prompt, info.seed) == ("A1111", "red <lora:pencil:0.5>", "bar", 7)
    assert info.settings == {
        "num_inference_steps": 20,
        "guidance_scale": 3.5,
        "scheduler": "ddim",
        "size": (64, 48),
        "strength": 0.4,
    }
    assert (info.model, info.vae, info.loras, info.recipe) == ("emoji", "other", {"pencil": 0.5}, None)


def test_a_damaged_recipe_of_ours_is_one_sentence(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000, '{"version": 2}', '{"version": 1, "steps": 9}'):
        with pytest.raises(UserError, match="recipe"):
            read_info(png(tmp_path / "a.png", latentpipe=text, parameters=LINES))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("latin", [False, True])
def test_a1111(tmp_path: Path, late: bool, latin: bool) -> None:
    info = read_info(png(tmp_path / "a.png", late=late, latin=latin, parameters=LINES.replace("second", "テスト é")))
    assert info.source == "A1111"
    assert info.prompt == "red (circle:1.2), <lora:pencil:0.7>\nテスト é line"
    assert info.negative_prompt == "bar,\nbad"
    assert info.settings == {"num_inference_steps": 25, "guidance_scale": 6.5, "scheduler": "dpm++", "size": (64, 48)}
    assert (info.seed, info.model, info.vae, info.loras) == (42, "my model", "ft-mse.safetensors", {"pencil": 0.7})
    assert (info.width, info.height) == (64, 48)
    assert [line for line in info.changed if "Karras" in line]
    assert [line for line in info.changed if "Clip skip 2" in line]
    assert len(info.changed) == 2
    assert "テスト" in info.raw
    usable(info)


def test_what_stands_in_quotes_is_no_setting(tmp_path: Path) -> None:
    text = LINES.replace("Clip skip: 2", 'Hires prompt: "x, Steps: 3, Seed: 1, Size: 8x8", Lora hashes: "a: 12, Model: 34"')
    info = read_info(png(tmp_path / "a.png", parameters=text))
    assert (info.settings["num_inference_steps"], info.seed, info.settings["size"], info.model) == (25, 42, (64, 48), "my model")


def test_two_headings_of_a_negative_prompt(tmp_path: Path) -> None:
    info = read_info(png(tmp_path / "a.png", parameters=LINES.replace("bar,", "bar, Negative prompt: twice")))
    assert info.negative_prompt == "bar, Negative prompt twice\nbad"


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize(
    ("code", "prefix"),
    [("utf-16-be", b"UNICODE\0"), ("utf-16-le", b"UNICODE\0"), ("ascii", b"ASCII\0\0\0"), ("utf-8", b"\0" * 8)],
)
def test_a_comment_in_exif(tmp_path: Path, suffix: str, code: str, prefix: bytes) -> None:
    text = LINES if code == "ascii" else LINES.replace("second", "テスト")
    info = read_info(jpeg(tmp_path / f"a.{suffix}", prefix + text.encode(code)))
    assert (info.source, info.settings["num_inference_steps"], info.negative_prompt) == ("A1111", 25, "bar,\nbad")
    assert "テスト" in info.prompt or code == "ascii"


def test_a_graph_in_exif_of_the_first_folder(tmp_path: Path) -> None:
    info = read_info(jpeg(tmp_path / "a.jpg", json.dumps({"prompt": COMFY, "workflow": {}}), inner=False))
    assert (info.source, info.prompt, info.seed) == ("ComfyUI", "red circle", 9)


def test_fooocus(tmp_path: Path) -> None:
    info = read_info(png(tmp_path / "a.png", parameters=json.dumps(FOOOCUS), fooocus_scheme="fooocus"))
    assert (info.source, info.prompt, info.negative_prompt, info.seed) == ("Fooocus", "red circle", "bar", 7)
    assert info.settings == {"num_inference_steps": 30, "guidance_scale": 4.0, "scheduler": "ddim", "size": (64, 48)}
    assert (info.model, info.loras) == ("juggernaut.safetensors", {"offset.safetensors": 0.1})
    assert [line for line in info.changed if "sharpness 2" in line]


def test_invokeai(tmp_path: Path) -> None:
    info = read_info(png(tmp_path / "a.png", invokeai_metadata=json.dumps(INVOKE), invokeai_graph="{}"))
    assert (info.source, info.prompt, info.negative_prompt, info.seed) == ("InvokeAI", "red circle", "bar", 5)
    assert info.settings == {"num_inference_steps": 12, "guidance_scale": 7.5, "scheduler": "euler", "size": (64, 48)}
    assert (info.model, info.vae, info.loras, info.changed) == ("dreamshaper", "mse", {"pencil": 0.5}, [])
    old = read_info(png(tmp_path / "b.png", Dream='"red circle [bar]" -s 12 -S 5 -W 64 -H 48 -C 7.5 -A ddim'))
    assert (old.source, old.prompt, old.negative_prompt, old.seed) == ("InvokeAI", "red circle", "bar", 5)
    assert old.settings == {"num_inference_steps": 12, "guidance_scale": 7.5, "scheduler": "ddim", "size": (64, 48)}


@pytest.mark.parametrize("workflow", [None, "{}", "no JSON"])
def test_comfyui_needs_the_graph_only(tmp_path: Path, workflow: str | None) -> None:
    beside = {} if workflow is None else {"workflow": workflow}
    info = read_info(png(tmp_path / "a.png", prompt=json.dumps(COMFY), **beside))
    assert (info.source, info.prompt, info.negative_prompt, info.seed) == ("ComfyUI", "red circle", "bar", 9)
    assert info.settings == {"num_inference_steps": 15, "guidance_scale": 5.5, "scheduler": "unipc", "size": (64, 48)}
    assert (info.model, info.vae, info.loras) == ("base.safetensors", "ft-mse.pt", {"pencil.safetensors": 0.6})
    assert info.changed == ["These nodes have no counterpart here: FaceDetailer."]


def test_comfyui_without_a_known_sampler_gives_what_it_can(tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux/dev.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "red circle", "clip": ["9", 0]}},
        "3": {"class_type": "RandomNoise", "inputs": {"noise_seed": 11}},
        "4": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 8, "denoise": 1.0, "model": ["1", 0]}},
        "5": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["3", 0], "sigmas": ["4", 0]}},
    }
    info = read_info(png(tmp_path / "a.png", prompt=json.dumps(graph)))
    assert (info.prompt, info.seed, info.settings, info.model) == (
        "red circle",
        11,
        {"num_inference_steps": 8},
        "dev.safetensors",
    )


def test_comfyui_with_two_samplers_says_whose_settings_these_are(tmp_path: Path) -> None:
    second = {"class_type": "KSampler", "inputs": COMFY["6"]["inputs"] | {"steps": 4, "denoise": 0.5}}
    info = read_info(png(tmp_path / "a.png", prompt=json.dumps(COMFY | {"66": second})))
    assert info.settings["num_inference_steps"] == 15
    assert [line for line in info.changed if "2 samplers" in line]


def test_novelai(tmp_path: Path) -> None:
    info = read_info(png(tmp_path / "a.png", **NOVELAI))
    assert (info.source, info.prompt, info.negative_prompt, info.seed) == ("NovelAI", "red circle", "bar", 3)
    assert info.settings == {"num_inference_steps": 28, "guidance_scale": 11.0, "strength": 0.7}
    assert info.model == "Stable Diffusion"
    assert [line for line in info.changed if "k_euler_ancestral" in line]


def test_a_format_that_fails_leaves_the_word_to_the_next(tmp_path: Path) -> None:
    info = read_info(png(tmp_path / "a.png", parameters="only words", prompt=json.dumps(COMFY)))
    assert info.source == "ComfyUI"
    with pytest.raises(UserError, match=r"damaged or of an unknown kind \(A1111"):
        read_info(png(tmp_path / "b.png", parameters="only words"))


@pytest.mark.parametrize(
    ("sampler", "ours"),
    [
        ("DPM++ 2M", "dpm++"), ("DPM++ 2M Karras", "dpm++"), ("dpmpp_2m", "dpm++"), ("dpmpp_2m_k", "dpm++"), ("Euler", "euler"),
        ("k_euler", "euler"), ("euler_simple", "euler"), ("DDIM", "ddim"), ("UniPC", "unipc"), ("uni_pc_bh2", "unipc"),
        ("EulerDiscreteScheduler", "euler"), ("Euler a", None), ("euler_ancestral", None), ("DPM++ 2M SDE", None),
        ("DPM++ SDE Karras", None), ("DPM++ 3M SDE", None), ("LCM", None), ("karras", None), ("k", None),
    ],
)  # fmt: skip
def test_samplers_that_mean_the_same(tmp_path: Path, sampler: str, ours: str | None) -> None:
    text = LINES.replace("DPM++ 2M", sampler).replace(", Schedule type: Karras", "")
    info = read_info(png(tmp_path / "a.png", parameters=text))
    assert info.settings.get("scheduler") == ours
    told = [line for line in info.changed if f"'{sampler}' has no counterpart" in line]
    assert bool(told) == (ours is None or "arras" in sampler or sampler[-2:] == "_k" or "simple" in sampler)


def test_every_sampler_is_one_of_ours() -> None:
    assert set(SAMPLERS.values()) == set(SCHEDULERS)


@pytest.mark.parametrize(
    ("old", "new", "key", "value"),
    [
        ("Steps: 25", "Steps: 5000", "num_inference_steps", 1000), ("Steps: 25", "Steps: -3", "num_inference_steps", 1),
        ("Steps: 25", "Steps: 1e9", "num_inference_steps", 1000),
        ("scale: 6.5", "scale: 1e6", "guidance_scale", 100), ("scale: 6.5", "scale: -1", "guidance_scale", 0),
        ("64x48", "8192x4096", "size", (MAX_SIDE, MAX_SIDE // 2)), ("64x48", "999999x1", "size", (MAX_SIDE, 8)),
    ],
)  # fmt: skip
def test_numbers_are_clamped_and_it_is_said(tmp_path: Path, old: str, new: str, key: str, value: Any) -> None:
    before = read_info(png(tmp_path / "a.png", parameters=LINES))
    info = read_info(png(tmp_path / "b.png", parameters=LINES.replace(old, new)))
    assert info.settings[key] == value
    assert len(info.changed) > len(before.changed)
    assert "was set to" in " ".join(info.changed)
    usable(info)


@pytest.mark.parametrize(("old", "key"), [("Steps: 25", "num_inference_steps"), ("scale: 6.5", "guidance_scale")])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "1e999", "many", "9" * 50])
def test_what_is_no_number_is_left_out_and_it_is_said(tmp_path: Path, old: str, key: str, bad: str) -> None:
    info = read_info(png(tmp_path / "a.png", parameters=LINES.replace(old, f"{old.split(': ')[0]}: {bad}")))
    assert key not in info.settings
    assert [line for line in info.changed if "is no number" in line]


@pytest.mark.parametrize(("seed", "kept"), [(0, 0), (MAX_SEED, MAX_SEED), (MAX_SEED + 1, None), (-1, None), ("1.5", None)])
def test_seeds(tmp_path: Path, seed: Any, kept: int | None) -> None:
    info = read_info(png(tmp_path / "a.png", parameters=LINES.replace("Seed: 42", f"Seed: {seed}")))
    assert info.seed == kept
    assert bool([line for line in info.changed if str(seed) in line]) == (kept is None)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\..\\passwd", "\\\\host\\share\\passwd", "a/../passwd"])
def test_paths_are_reduced_to_their_last_part(tmp_path: Path, name: str) -> None:
    data = FOOOCUS | {"base_model": name, "vae": name, "loras": [[name, 1.0, ""]], "prompt": f"x <lora:{name}:0.5>"}
    info = read_info(png(tmp_path / "a.png", parameters=json.dumps(data)))
    assert (info.model, info.vae, info.loras) == ("passwd", "passwd", {"passwd": 0.5})


@pytest.mark.parametrize("name", ["..", "/", "a/..", "", " ", "\x00"])
def test_what_is_no_name_is_none(tmp_path: Path, name: str) -> None:
    info = read_info(png(tmp_path / "a.png", parameters=json.dumps(FOOOCUS | {"base_model": name, "loras": [[name, 1]]})))
    assert (info.model, info.loras) == (None, {})


def test_text_is_bounded_and_fit_to_be_sent(tmp_path: Path) -> None:
    data = FOOOCUS | {"prompt": "a\ud800\x00\x1b[31m" + "b" * 50_000, "negative_prompt": "c" * 80_000}
    info = read_info(png(tmp_path / "a.png", parameters=json.dumps(data)))
    assert info.prompt.startswith("a?[31mbb")
    assert max(len(info.prompt), len(info.negative_prompt)) == MAX_PROMPT
    assert len(info.raw) == MAX_RAW
    assert [line for line in info.changed if "cut to" in line]
    json.dumps(vars(info)).encode()


def test_a_picture_without_settings_says_what_it_is(tmp_path: Path) -> None:
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WebP")):
        Image.new("RGB", (64, 48)).save(tmp_path / name)
        with pytest.raises(UserError, match=f"is a {kind} picture of 64 x 48 pixels without settings"):
            read_info(tmp_path / name)
    with pytest.raises(UserError, match="without settings"):
        read_info(png(tmp_path / "b.png", Comment="Created with GIMP", Software="GIMP"))


def test_what_is_no_picture(tmp_path: Path) -> None:
    bodies: dict[str, bytes] = {
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "b.png": b"", "c.png": b"PK\x03\x04" + b"\0" * 90, "d.png": b"GIF89a" + b"\1" * 90,
        "e.jpg": b"%PDF-1.7 %!PS-Adobe-3.0 EPSF",
        "f.png": b"<html>" + png(tmp_path / "x.png", parameters=LINES).read_bytes(),
    }  # fmt: skip
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body)
        with pytest.raises(UserError, match=r"cannot be read as a picture \(expected PNG, JPEG or WebP"):
            read_info(tmp_path / name)
    for place in (tmp_path, tmp_path / "none.png", tmp_path / ("n" * 300), Path("a\0b")):
        with pytest.raises(UserError):
            read_info(place)


def test_a_picture_with_a_zip_behind_it_is_the_picture(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", parameters=LINES)
    before = read_info(path)
    path.write_bytes(path.read_bytes() + b"PK\x03\x04<script>" + b"\0" * 999)
    assert read_info(path) == before


def test_cut_off_files(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    for name in ("a.png", "a.jpg", "a.webp"):
        noise.save(tmp_path / name)
        body = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(body[: len(body) // 2])
        with pytest.raises(UserError, match="cannot be read"):
            read_info(tmp_path / name)


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of any stated size with any chunks before its (far too few) pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(400))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 10_000, 60_000, 2**31 - 1])
def test_bombs_of_pixels(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(raw_png(side, side))
    begin = time.thread_time()
    with pytest.raises(UserError, match=r"too large|cannot be read"):
        read_info(tmp_path / "a.png")
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_bombs_of_text(tmp_path: Path, kind: str) -> None:
    packed = zlib.compress(b"a" * (30 * MAX_TEXT), 9)
    body = {"zTXt": b"\0\0" + packed, "iTXt": b"\0\1\0\0\0" + packed, "tEXt": b"\0" + b"a" * (2 * MAX_TEXT)}[kind]
    (tmp_path / "a.png").write_bytes(raw_png(4, 4, chunk(kind.encode(), b"parameters" + body)))
    with pytest.raises(UserError, match=f"more text than the {MAX_TEXT} bytes"):
        read_info(tmp_path / "a.png")


def test_a_huge_exif(tmp_path: Path) -> None:
    path = jpeg(tmp_path / "a.webp", b"ASCII\0\0\0" + b"a" * (5 * MAX_TEXT))
    with pytest.raises(UserError, match=f"more text than the {MAX_TEXT} bytes"):
        read_info(path)


COMB = {str(i): {"class_type": "A", "inputs": {"x": [str(i + 1), 0]}} for i in range(950)} | {
    "950": {"class_type": "A", "inputs": {f"x{i}": [f"leaf{i}", 0] for i in range(4000)}},
    **{f"leaf{i}": {"class_type": "A", "inputs": {}} for i in range(4000)},
    "k": COMFY["6"] | {"inputs": COMFY["6"]["inputs"] | {"model": ["0", 0], "positive": ["0", 0], "negative": ["0", 0]}},
}
DEEP = "[" * 100_000
HOSTILE = {
    "parameters": [
        '{"a":' * 50_000, "{" + DEEP, "{}", '{"prompt": ' + "9" * 5000 + "}", '{"sui_image_params": {}}',
        '{"extraMetadata": "[]"}',
        '{"extraMetadata": "' + DEEP + '"}', '{"software": "RuinedFooocus"}', "{\"x\": __import__('os').system('false')}",
        "Hashes:{" * 8000, ", : " * 16000, "\n" * MAX_LINES, "Steps: 1, Sampler: a, Seed: 1" + ', a: "' * 9000, "[" * MAX_TEXT,
        "a" * (MAX_LINES + 1), "<lora:" * 9000 + "\nSteps: 1, Sampler: x, Seed: 2, CFG scale: 3",
        json.dumps(FOOOCUS | {"loras": [[["x"]], {}, [], None, 7, [None, "x"], {"model": {"name": 4}, "weight": {}}]}),
        json.dumps(FOOOCUS | {"steps": [1], "seed": {}, "resolution": {"a": 1}, "sampler": 7, "base_model": ["a"]}),
        json.dumps(FOOOCUS | {"prompt": 3}), json.dumps(FOOOCUS | {"seed": True, "steps": False}),
    ],
    "prompt": [
        DEEP, "{}", "[]", "3", '"x"', '{"1": 2}', '{"1": {"inputs": 3, "class_type": []}}', "red circle",
        json.dumps(COMFY | {"6": COMFY["6"] | {"inputs": COMFY["6"]["inputs"] | {"model": ["6", 0], "positive": ["6", 0]}}}),
        json.dumps(COMFY | {"6": COMFY["6"] | {"inputs": COMFY["6"]["inputs"] | {"sampler_name": ["1", 0], "model": [[], {}]}}}),
        json.dumps({str(i): COMFY["6"] for i in range(2000)} | COMFY),
        json.dumps(COMB),
        json.dumps({str(i): {"class_type": "A", "inputs": {"x": [str(i + 1), 0]}} for i in range(4900)} | {"k": COMFY["6"]}),
    ],
    "invokeai_metadata": [DEEP, "3", "{}", json.dumps(INVOKE | {"model": "x"}),
        json.dumps(INVOKE | {"model": {"model_name": []}})],
    "sd-metadata": [DEEP, "{}", '{"image": 3}', '{"image": {"sampler": "ddim", "prompt": [3]}}'],
    "Dream": ['"' * MAX_LINES, '"a"' + " " * 60_000 + "-", '"' + "[" * 60_000 + '"', '"a" -s many -A ddim'],
}  # fmt: skip


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in HOSTILE.items() for text in texts], ids=lambda x: x[:24])
def test_hostile_text_is_one_sentence_or_information_and_soon(tmp_path: Path, key: str, text: str) -> None:
    path = png(tmp_path / "a.png", **{key: text})
    begin = time.thread_time()
    said = ""
    try:
        info = read_info(path)
    except UserError as error:
        said = str(error)
    else:
        json.dumps(vars(info)).encode()
        usable(info)
    assert len(said) < 400 + len(str(path))
    assert time.thread_time() - begin < 3


def seeds() -> list[bytes]:
    """Files to mutate: every format's, text before and after the pixels."""
    found = []
    for texts in (
        {"parameters": LINES}, {"parameters": json.dumps(FOOOCUS)}, {"invokeai_metadata": json.dumps(INVOKE)}, NOVELAI,
        {"prompt": json.dumps(COMFY)}, {"latentpipe": some_recipe().model_dump_json()},
    ):  # fmt: skip
        info = PngImagePlugin.PngInfo()
        for index, (key, text) in enumerate(texts.items()):
            info.add_itxt(key, text, zip=bool(index % 2))
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + LINES.encode("utf-16-be")
        file = io.BytesIO()
        Image.new("RGB", (8, 6), "red").save(file, "PNG", pnginfo=info, exif=exif.tobytes())
        found.append(file.getvalue())
    return found


def chunks(body: bytes) -> list[tuple[bytes, bytes]]:
    """The kinds and bodies of a PNG's chunks."""
    found, at = [], 8
    while at < len(body):
        length = struct.unpack(">I", body[at : at + 4])[0]
        found.append((body[at + 4 : at + 8], body[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def spoilt(body: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    """Bytes with others put in, and some taken out, at some places."""
    for at, new, gone in changes:
        at %= len(body) + 1
        body = body[:at] + new + body[at + gone :]
    return body


CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=6)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=500)
@given(body=st.sampled_from(seeds()), changes=CHANGES, inside=st.booleans())
@pytest.mark.slow
def test_mutated_files_are_one_sentence_or_information(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, changes: list[tuple[int, bytes, int]], inside: bool
) -> None:
    if inside:  # the text and the EXIF only, with lengths and checksums right, so that damage gets to the readers
        kept = {b"IHDR", b"IDAT", b"IEND"}
        parts = [(kind, text, len(text) if kind in kept else text.find(b"\0") + 5) for kind, text in chunks(body)]
        body = body[:8] + b"".join(chunk(kind, text[:head] + spoilt(text[head:], changes)) for kind, text, head in parts)
    else:
        body = spoilt(body, changes)
    path = tmp_path_factory.getbasetemp() / "mutated.png"
    path.write_bytes(body)
    try:
        info = read_info(path)
    except UserError:
        return
    json.dumps(vars(info) | {"recipe": None}).encode()
    usable(info)
    assert info.source


REAL = {
    "civitai-upscale.jpg": ("Civitai", 25, 5.0, None, 1311178179, None),
    "comfyui-comfy-image-saver.jpeg": ("A1111", 20, 8.0, "euler", 0, "JANKUV5NSFWTrainedNoobai_v50"),
    "comfyui-saveimage-plus.jpg": ("ComfyUI", 20, 5.0, None, None, "waiIllustriousSDXL_v160.safetensors"),
    "comfyui.png": ("ComfyUI", 20, 5.0, None, None, "waiIllustriousSDXL_v160.safetensors"),
    "forge-classic.jpeg": ("A1111", 20, 6.0, "dpm++", 2547514258, "waiIllustriousSDXL_v160"),
    "invokeai-en.png": ("InvokeAI", 24, 6.0, None, 1860920704, "waiIllustriousSDXL_v160"),
    "reforge.jpeg": ("A1111", 20, 6.0, "dpm++", 584157617, "waiIllustriousSDXL_v160"),
    "ruined-fooocus.png": ("RuinedFooocus", 30, 8.0, None, 2020047614, "waiNSFWIllustrious_v150.safetensors"),
    "sd-next.jpg": ("A1111", 20, 6.0, None, 899700607, "waiIllustriousSDXL_v160"),
    "sd-webui.png": ("A1111", 20, 7.0, "dpm++", 3782896554, "waiIllustriousSDXL_v160"),
    "swarmui.jpg": ("SwarmUI", 20, 7.0, None, 697543491, "waiIllustriousSDXL_v160"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_pictures_of_other_programs(assets: Path, name: str) -> None:
    info = read_info(assets / "data" / "ai_images" / name)
    stated = info.settings
    assert (
        info.source,
        stated["num_inference_steps"],
        stated["guidance_scale"],
        stated.get("scheduler"),
        info.seed,
        info.model,
    ) == REAL[name]
    saver = "comfy-image-saver" in name  # it wrote "unknown"
    assert info.prompt.startswith("unknown" if saver else "general, masterpiece, best quality, amazing quality,")
    assert info.negative_prompt.startswith("unknown" if saver else "bad quality, worst quality")
    assert "counterpart here" in " ".join(info.changed)
    usable(info)


@pytest.mark.parametrize("name", ["empty.jpg", "empty.png", "gimp.jpg"])
def test_real_pictures_without_settings(assets: Path, name: str) -> None:
    with pytest.raises(UserError, match="without settings"):
        read_info(assets / "data" / "ai_images" / name)
