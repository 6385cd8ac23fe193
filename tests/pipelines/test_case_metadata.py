"""A ComfyUI graph in the EXIF of a JPEG or a WebP, as its savers put it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import draw_shape
from PIL import Image

from latentpipe.cli.app import main
from latentpipe.pipelines.metadata.reader import read_info
from latentpipe.utils.errors import UserError

SAMPLER = {"seed": 12345, "steps": 12, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
LINKS = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
GRAPH: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": SAMPLER | LINKS},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "green apple on a table", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry é", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
}  # fmt: skip
WORKFLOW = '{"nodes": [], "links": []}'
MODEL, MAKE, DESCRIPTION = 0x0110, 0x010F, 0x010E
PLACES = {
    "comfy.webp": {MODEL: "prompt:" + json.dumps(GRAPH), MAKE: "workflow:" + WORKFLOW},
    "comfy.jpg": {MODEL: "prompt:" + json.dumps(GRAPH), MAKE: "workflow:" + WORKFLOW},
    "extended.jpg": {DESCRIPTION: "Workflow:" + WORKFLOW, MAKE: "Prompt: " + json.dumps(GRAPH)},
    "swapped.webp": {MAKE: "PROMPT:" + json.dumps(GRAPH)},
}  # fmt: skip


def saved(path: Path, tags: dict[int, str]) -> Path:
    exif = Image.Exif()
    for tag, text in tags.items():
        exif[tag] = text
    draw_shape("red", "bar", 64).save(path, exif=exif)
    return path


@pytest.mark.parametrize("name", PLACES)
def test_case_08_a_graph_in_exif_is_read(tmp_path: Path, name: str, capsys: Any) -> None:
    path = saved(tmp_path / name, PLACES[name])
    info = read_info(path)
    assert (info.source, info.prompt, info.negative_prompt) == ("ComfyUI", "green apple on a table", "blurry é")
    assert (info.seed, info.settings["num_inference_steps"], info.settings["guidance_scale"]) == (12345, 12, 4.5)
    assert info.model == "tiny.safetensors"
    assert main(["inspect", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 12345


@pytest.mark.parametrize(
    "tags", [{MAKE: "Canon", MODEL: "EOS 5D"}, {DESCRIPTION: "prompt: a word"}, {MAKE: "workflow:" + WORKFLOW}, {MODEL: ""}]
)
def test_case_08_other_exif_is_no_graph(tmp_path: Path, tags: dict[int, str]) -> None:
    with pytest.raises(UserError, match="without settings"):
        read_info(saved(tmp_path / "photo.jpg", tags))


def test_case_08_a_damaged_graph_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="damaged or of an unknown kind"):
        read_info(saved(tmp_path / "x.jpg", {MODEL: "prompt:{"}))
