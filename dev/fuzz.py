"""Damaged files for every reader: each must be read, with finite values, or refused by a UserError, in bounded memory and time.

    python dev/fuzz.py [--n 1000] [--first 0] [READER ...]

Trial i of a reader depends on i alone; a failure is printed with the two, and `--n 1 --first i READER` repeats it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "checkpoints" / "single_file"), str(Path(__file__).parent)]

import mutate  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import denoiser_run, draw_shape, tiny_vae, vae_run, write_pictures  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from latentpipe import UserError  # noqa: E402

LONGEST_S, MOST_MB = 10, 1024  # of one trial; more memory than that beyond what was taken before is a failure


@dataclass(frozen=True)
class Reader:
    """What is damaged and how it is opened.

    make   writes sound files into a folder
    read   opens the folder; returns tensors, numbers or nested ones, which must be finite
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


@dataclass
class Tally:
    """What became of the trials of one reader."""

    accepted: int = 0
    refused: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    most_mb: float = 0.0
    sentences: Counter[str] = field(default_factory=Counter)


def _single_file(at: Path) -> None:
    """A denoiser with its text encoder, a VAE, the YAML that A1111 reads, a config folder; fp16, so that values are looked at."""
    import written

    pipe, half = written.classic(), torch.float16
    pipe.save_pretrained(at / "config")
    for path in [*at.rglob("*.safetensors"), *(at / "config" / "tokenizer").glob("special*")]:
        path.unlink()
    tensors = written.of_sd1(pipe)
    vae = {name: value for name, value in tensors.items() if name.startswith(written.VAE)}
    rest = {name: value for name, value in tensors.items() if name not in vae}
    written.write(rest, at / "model.safetensors", half, {"modelspec.prediction_type": "v"})
    written.write(rest, at / "beside.safetensors", half)
    written.write(vae, at / "vae.safetensors", half)
    (at / "beside.yaml").write_text("model:\n  params:\n    parameterization: v\n    zsnr: true\n")


def _open_single_file(at: Path) -> Any:
    from latentpipe.checkpoints.pipeline_io import hashes, load_pipeline
    from latentpipe.checkpoints.single_file.describe import describe_file
    from latentpipe.checkpoints.single_file.gather import Stated, open_file

    stated = Stated("sd1", None, at / "config", (at / "vae.safetensors",))
    json.dumps([describe_file(at / "model.safetensors", told) for told in (None, stated)], ensure_ascii=False).encode()
    open_file(at / "beside.safetensors", stated)
    pipe = load_pipeline(at / "model.safetensors", torch.float32, stated)
    list(hashes(at / "model.safetensors", stated).values())
    return [list(part.state_dict().values()) for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def _gguf(at: Path) -> None:
    """A tiny transformer whose rows of 32 are in Q8_0, zeros but for its plain values."""
    import gguf_written
    import tiny_hosts
    import written

    tensors = written.flux(tiny_hosts.flux().transformer)
    shapes = gguf_written.shapes(tensors, "Q8_0")
    plain = {name: value for name, value in tensors.items() if shapes[name][1] == "F32"}
    data = {name: value.detach().contiguous().numpy().tobytes() for name, value in plain.items()}
    gguf_written.by_hand(shapes, at / "model.gguf", {"general.architecture": "flux", "general.alignment": 32}, data)


def _open_gguf(at: Path) -> Any:
    from importlib.util import find_spec

    from latentpipe.checkpoints.places.glance import family
    from latentpipe.checkpoints.single_file.describe import describe_file
    from latentpipe.checkpoints.single_file.gguf_tensors import finite_scales, is_packed, read_gguf_tensors
    from latentpipe.utils.gguf_header import FLOATS, read_gguf

    path = at / "model.gguf"
    family(path)
    found = read_gguf(path)
    json.dumps(describe_file(path), ensure_ascii=False).encode()
    names = [name for name in found.places if find_spec("gguf") or found.types[name] in FLOATS]
    tensors = read_gguf_tensors(path, names)
    return [int(finite_scales(value)) if is_packed(value) else list(value.shape) for value in tensors.values()]


def _vae_folder(at: Path) -> None:
    from latentpipe.checkpoints.vae_io import save_vae

    save_vae(tiny_vae(), at / "vae", {"data": "none"}, {"factors": [[0.1] * 3] * 4, "bias": [0.0] * 3})


def _vae_file(at: Path) -> None:
    from latentpipe.checkpoints.convert import convert

    _vae_folder(at)
    convert([at / "vae"], at / "v.safetensors")
    shutil.rmtree(at / "vae")


def _tiny_file(at: Path) -> None:
    """A file without a config: its shapes tell the class."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    save_file(vae.state_dict(), at / "t.safetensors")


def _model(at: Path) -> None:
    from latentpipe.data.latent_cache import encode_folder
    from latentpipe.train.denoiser import train_denoiser

    _vae_folder(at)
    encode_folder(write_pictures(at / "pictures"), at / "vae", at / "c.safetensors", 16)
    model = train_denoiser(denoiser_run(at / "run", at / "c.safetensors", at / "vae"))
    shutil.move(model, at / "model")
    for name in ("vae", "pictures", "run"):
        shutil.rmtree(at / name)
    (at / "c.safetensors").unlink()


def _open_model(at: Path) -> Any:
    from latentpipe import LatentPipeline
    from latentpipe.checkpoints.pipeline_io import describe

    pipe = LatentPipeline.from_pretrained(at / "model", device="cpu")
    json.dumps(describe(at / "model"), ensure_ascii=False).encode()
    return [list(part.state_dict().values()) for part in pipe.host.components.values() if isinstance(part, torch.nn.Module)]


def _open_vae(at: Path) -> Any:
    from latentpipe.checkpoints.pipeline_io import describe
    from latentpipe.checkpoints.vae_io import load_vae, open_vae

    path = next(at.iterdir())
    json.dumps(describe(path), ensure_ascii=False).encode()
    space = open_vae(path).space
    return [list(load_vae(path).state_dict().values()), space.scale, space.shift]


def _lora(at: Path, to: Any = "diffusers") -> None:
    from latentpipe.lora.adapter import Lora, LoraLayer
    from latentpipe.lora.state_dict.io import card, write_lora

    def layer(seed: int, *shape: int) -> LoraLayer:
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            "lora_A": torch.randn(2, 4, *shape, generator=draw),
            "lora_B": torch.randn(6, 2, *[1] * len(shape), generator=draw),
        }
        return LoraLayer("lora", tensors, 2, 3.0)

    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    paths = {f"{block}.to_q": layer(0), f"{block}.to_v": layer(1), "conv_in": layer(2, 3, 3)}
    lora = Lora({"unet": paths, "text_encoder": {"encoder.layers.0.self_attn.q_proj": layer(3)}})
    told = card(lora, title="x", base_hashes={"unet": "ab" * 32}, trigger_words=["x"], training={"steps": 1})
    write_lora(lora, at / "a.safetensors", to, metadata=told)


def _peft(at: Path) -> None:
    from latentpipe.lora.state_dict.io import read_lora
    from latentpipe.lora.state_dict.peft_config import ADAPTER_KEY, write_config

    _lora(at, "peft")
    lora = read_lora(at / "a.safetensors")
    tensors = {name: value for name, value in load_file(at / "a.safetensors").items() if ".text_encoder" not in name}
    (at / "a.safetensors").unlink()
    save_file(tensors, at / "adapter_model.safetensors")
    (at / "adapter_config.json").write_text(json.dumps(write_config("unet", lora.parts["unet"])))
    assert ADAPTER_KEY


def _open_lora(at: Path) -> Any:
    from latentpipe.lora.state_dict.describe import is_lora, lora_facts
    from latentpipe.lora.state_dict.io import read_lora, stated_base, trigger_words

    path = at if (at / "adapter_config.json").exists() or (at / "adapter_model.safetensors").exists() else at / "a.safetensors"
    lora = read_lora(path, {"unet": ["conv_in"], "text_encoder": []})
    stated_base(lora), trigger_words(lora), lora.hash
    if is_lora(path):
        json.dumps(lora_facts(path), ensure_ascii=False)
    return [[*layer.tensors.values(), layer.alpha, layer.scale] for _, _, layer in lora.layers()]


def _adapter(at: Path) -> None:
    from latentpipe.compatibility.latent_adapter import AdapterCard, LatentAdapter, save_adapter

    torch.manual_seed(0)
    adapter = LatentAdapter((4, 8), (4, 4), "convolution")
    save_adapter(adapter, AdapterCard("ab" * 32, "cd" * 32, (4, 8), (4, 4), "convolution", {"r": 1.0}), at / "a.safetensors")


def _open_adapter(at: Path) -> Any:
    from latentpipe.compatibility.latent_adapter import open_adapter

    return list(open_adapter(at / "a.safetensors", ["ab" * 32], ["cd" * 32]).state_dict().values())


def _cache(at: Path) -> None:
    from latentpipe.data.latent_cache import encode_folder

    _vae_folder(at)
    shutil.move(at / "vae", at.parent / f"{at.name}-vae")
    encode_folder(write_pictures(at / "pictures"), at.parent / f"{at.name}-vae", at / "c.safetensors", 16)
    shutil.rmtree(at / "pictures")


def _open_cache(at: Path) -> Any:
    from latentpipe.data.latent_cache import open_cache

    cache = open_cache(at / "c.safetensors", at.parent / "sound-vae")
    return [cache.mean, cache.std, cache.size_px]


def _codec(at: Path) -> Any:
    from latentpipe.explore.codec.codec import compress, open_codec
    from latentpipe.explore.codec.fit import integers, write_codec
    from latentpipe.vae.entropy_model import ContextModel

    _vae_folder(at)
    torch.manual_seed(0)
    write_codec(integers(ContextModel(4, hidden=16), 1.0), at / "vae")
    shutil.copytree(at / "vae", at.parent / "sound-codec", dirs_exist_ok=True)
    (at / "p.lpz").write_bytes(compress(draw_shape("red", "circle", 20), open_codec(at / "vae")))
    for name in ("config.json", "card.json", "latent_rgb.json"):
        shutil.move(at / "vae" / name, at.parent / "sound-codec" / name)
    shutil.copy(at / "vae" / "codec.safetensors", at / "codec.safetensors")
    shutil.rmtree(at / "vae")


def _open_codec(at: Path) -> Any:
    from latentpipe.cli.codec import lpz_facts, read_lpz
    from latentpipe.explore.codec.codec import decompress, open_codec
    from latentpipe.explore.codec.static_model import read as read_weights

    global _known_codec
    _known_codec = _known_codec or open_codec(at.parent / "sound-codec")
    read_weights(at / "codec.safetensors")
    lpz_facts(at / "p.lpz")
    return np.asarray(decompress(read_lpz(at / "p.lpz"), _known_codec)).sum().item()


_known_codec: Any = None


def _configs(at: Path) -> None:
    from latentpipe.cli.inspect import configs_folder
    from latentpipe.train.config import dump

    for path in sorted(configs_folder().glob("*.yaml"))[:6]:
        shutil.copy(path, at)
    (at / "all.yaml").write_text(dump(vae_run(at, at)))


def _open_configs(at: Path) -> Any:
    from latentpipe.train.config import TrainDenoiser, TrainLora, TrainVAE, load

    for path in sorted(at.iterdir()):
        text = path.read_text(errors="replace") if path.is_file() and path.stat().st_size < 10**6 else ""
        name = path.stem
        schema = TrainLora if "lora" in name else TrainDenoiser if "\nunet:" in text or "cache:" in text else TrainVAE
        try:
            _numbers(load(path, schema).model_dump())
        except UserError:
            if "unknown key" not in str(sys.exc_info()[1]) or not text:
                raise
    return None


def _numbers(value: Any) -> None:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _numbers(inner)
    assert not isinstance(value, float) or np.isfinite(value), "a float that is not finite was accepted"


def _yaml(at: Path) -> None:
    (at / "y.yaml").write_text(
        "a: 1\nb: [1, 2.5, x]\nc: &c {d: null, e: [true, 2024-01-01]}\nf:\n  <<: *c\n  g: 'h'\nk: |\n  text\n"
    )


def _open_yaml(at: Path) -> Any:
    from latentpipe.utils.reading import read_yaml

    str(read_yaml(at / "y.yaml"))[:1000]


def _recipes(at: Path) -> None:
    from latentpipe.pipelines.metadata.recipe import Machine, Recipe, Source, save_png

    machine = Machine(device="cpu", dtype="float32", threads=1, processor="x", versions={"torch": "2"})
    recipe = Recipe(
        prompt="red circle", negative="bar", seed=7, steps=20, guidance=3.5, scheduler="ddim", width=16, height=16, batch_size=3,
        model="emoji", vae="other", loras={"x": 1.0, "y": {"unet": 0.5}}, source=Source(sha256="ab" * 32, strength=0.4),
        hashes={"unet": "12" * 32, "vae": "34" * 32}, machine=machine,
    )  # fmt: skip
    save_png(draw_shape("red", "circle", 16), at / "ours.png", recipe)
    node = {"inputs": {"ckpt_name": "m.safetensors"}, "class_type": "CheckpointLoaderSimple"}
    words = {"inputs": {"text": "cat", "clip": ["1", 1]}, "class_type": "CLIPTextEncode"}
    inputs = {"seed": 5, "steps": 20, "cfg": 7.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["4", 0]}
    empty = {"inputs": {"width": 16, "height": 16, "batch_size": 1}, "class_type": "EmptyLatentImage", "is_changed": None}
    graph = {"1": node, "2": words, "3": {"inputs": inputs | links, "class_type": "KSampler"}, "4": empty}
    save_png(draw_shape("red", "bar", 16), at / "comfy.png", None, {"prompt": json.dumps(graph)})
    lines = "a cat <lora:x:0.5>\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 16x16"
    save_png(draw_shape("red", "bar", 16), at / "a1111.png", None, {"parameters": lines})


def _open_recipes(at: Path) -> Any:
    from dataclasses import asdict

    from latentpipe.engine.xy_grid.plot import is_grid
    from latentpipe.pipelines.metadata.reader import read_info
    from latentpipe.pipelines.metadata.recipe import read

    found = []
    for path in sorted(at.iterdir()):
        assert not is_grid(path)
        info = asdict(read_info(path))
        json.dumps(info | {"recipe": None}, ensure_ascii=False).encode()
        found += [value for value in info["settings"].values() if isinstance(value, float)] + list(info["loras"].values())
        if path.name == "ours.png":
            read(path).model_dump_json()
    return found


def _pictures(at: Path) -> None:
    picture = draw_shape("green", "square", 24)
    clear = picture.convert("RGBA")
    clear.putalpha(90)
    for name, one in {
        "a.png": picture,
        "b.jpg": picture,
        "c.webp": clear,
        "d.gif": picture,
        "e.bmp": picture,
        "f.tif": picture,
    }.items():
        one.save(at / name)
    clear.save(at / "g.png")
    picture.convert("P").save(at / "h.png", transparency=0)
    Image.fromarray(np.linspace(0, 65535, 576).reshape(24, 24).astype(np.uint16)).save(at / "i.png")
    Image.fromarray(np.linspace(0, 1, 576).reshape(24, 24).astype(np.float32)).save(at / "j.tif")
    picture.save(at / "k.gif", save_all=True, append_images=[picture.rotate(90)])


def _open_pictures(at: Path) -> Any:
    from latentpipe.data.image_folder import read_pictures
    from latentpipe.utils.images import dropped, open_picture

    read_pictures(at, 8)
    for path in sorted(at.iterdir()):
        open_picture(path)
        dropped(path)


def _folder(at: Path) -> None:
    write_pictures(at / "pictures")
    for path in list((at / "pictures").glob("*.png"))[1:]:
        path.unlink()
    (path,) = (at / "pictures").glob("*.png")
    (at / "pictures" / "metadata.jsonl").write_text(json.dumps({"file_name": path.name, "text": "x", "score": 1.0}))


def _open_folder(at: Path) -> Any:
    from latentpipe.data.image_folder import read_pictures

    return float(read_pictures(at / "pictures", 8).pixels.mean())


def _pickle(at: Path) -> None:
    tensors = {f"model.layer.{name}.weight": torch.randn(3, 4) for name in range(3)}
    torch.save({"state_dict": tensors, "global_step": 3}, at / "new.ckpt")
    torch.save(tensors, at / "old.pt", _use_new_zipfile_serialization=False)


def _open_pickle(at: Path) -> Any:
    from latentpipe.checkpoints.pickles.unpickle import unpickled

    names = []
    for path in (at / "new.ckpt", at / "old.pt"):
        with unpickled(path) as found:
            names.append(found.names)
    return names


def _embedding(at: Path) -> None:
    save_file({"emb_params": torch.randn(3, 8)}, at / "one.safetensors")
    save_file({"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 12).half()}, at / "two.safetensors")
    save_file({"<a>": torch.randn(8), "<b>": torch.randn(2, 8)}, at / "words.safetensors")


def _open_embedding(at: Path) -> Any:
    from latentpipe.checkpoints.embedding import describe_embedding, read_embedding

    found = []
    for path in sorted(at.glob("*.safetensors")):
        one = read_embedding(path)
        describe_embedding(path)
        found += [rows for vectors in one.words.values() for rows in vectors.values()]
    return found


def _tools(at: Path) -> None:
    import sqlite3
    from contextlib import closing

    for place in ("comfy/models/loras", "comfy/mine", "invoke/models/a", "hub/models--o--n/refs", "hub/models--o--n/snapshots"):
        (at / place).mkdir(parents=True)
    save_file({"lora_unet_a.lora_down.weight": torch.ones(2, 3)}, at / "comfy/models/loras/a.safetensors")
    (at / "comfy/extra_model_paths.yaml").write_text("mine:\n  base_path: mine\n  loras: |\n    .\n    deeper\n")
    (at / "invoke/databases").mkdir()
    with closing(sqlite3.connect(at / "invoke/databases/invokeai.db")) as made, made:
        made.execute("CREATE TABLE models (id TEXT PRIMARY KEY, config TEXT)")
        made.execute('INSERT INTO models VALUES (\'a\', \'{"type": "lora", "path": "a", "name": "b"}\')')
    snapshot = at / "hub/models--o--n/snapshots" / ("a" * 40)
    snapshot.mkdir()
    (at / "hub/models--o--n/refs/main").write_text("a" * 40)
    (snapshot / "model_index.json").write_text('{"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}')
    (snapshot / "vae").mkdir()
    (snapshot / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file({"a": torch.ones(2)}, snapshot / "vae/diffusion_pytorch_model.safetensors")


def _open_tools(at: Path) -> Any:
    from latentpipe.checkpoints.places import glance
    from latentpipe.checkpoints.places.hub_cache import cached
    from latentpipe.checkpoints.places.tool_folders import Import, entries

    rows = [(tool, at / place) for tool, place in (("comfyui", "comfy"), ("invokeai", "invoke"), ("diffusers-cache", "hub"))]
    found = [entry for tool, path in rows for entry in entries(Import(tool, path, tool))]
    for entry in found:
        glance.family(entry.path)
    cached("o/n", [at / "hub"])
    return len(found)


def _shards(at: Path) -> None:
    from helpers import write_shards

    from latentpipe.checkpoints.vae_io import save_vae, vae_hash
    from latentpipe.data.latent_cache import LatentCache

    save_vae(tiny_vae(), at / "vae", {})
    std, captions = torch.full((7, 4, 8, 8), 0.5).half(), [("a red bar",), (), *[("x", "y")] * 5]
    cache = LatentCache(torch.randn(7, 4, 8, 8).half(), std, captions, 16, vae_hash(at / "vae"), ("a", "b", *[""] * 5))
    write_shards(at / "shards", cache, 3)
    os.rename(at / "vae", _sound_vae(at))


def _sound_vae(at: Path) -> Path:
    """A place beside a reader's folders, where nothing is damaged."""
    return at.parent / "vae-of-shards"


def _open_shards(at: Path) -> Any:
    from latentpipe.data.sharded_latents import open_latents

    found = open_latents(at / "shards", _sound_vae(at))
    assert len(list(found.captions)) == len(found)
    return [found.captioned(), found.weights({}), found.sample(torch.arange(len(found)), torch.Generator().manual_seed(0))]


def _tars(at: Path) -> None:
    import tarfile

    with tarfile.open(at / "set.tar", "w") as archive:
        for number in range(3):
            data = io.BytesIO()
            draw_shape("red", "circle", 24).save(data, format="PNG")
            for ending, content in (("png", data.getvalue()), ("json", b'{"text": "a red circle"}')):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _open_tars(at: Path) -> Any:
    from latentpipe.data.image_folder import read_square
    from latentpipe.data.sources import Reader as Bytes
    from latentpipe.data.sources import as_line, entries, from_line

    listed, reader, found = list(entries(at)), Bytes(at), []
    if not listed:
        raise UserError("no picture")
    for entry in listed:
        assert from_line(as_line(entry)) == entry
        data = reader.bytes_of(entry)
        if isinstance(data, bytes):
            with suppress(UserError):  # broken pictures are listed
                found.append(read_square(Path("x"), 16, data).astype(np.float32))
    return found


READERS: dict[str, Reader] = {
    "vae-folder": Reader(_vae_folder, _open_vae),
    "vae-file": Reader(_vae_file, _open_vae),
    "tiny-vae-file": Reader(_tiny_file, _open_vae),
    "model": Reader(_model, _open_model),
    "single-file": Reader(_single_file, _open_single_file),
    "gguf": Reader(_gguf, _open_gguf),
    "lora": Reader(_lora, _open_lora),
    "lora-kohya": Reader(lambda at: _lora(at, "kohya"), _open_lora),
    "embedding": Reader(_embedding, _open_embedding),
    "peft": Reader(_peft, _open_lora),
    "adapter": Reader(_adapter, _open_adapter),
    "cache": Reader(_cache, _open_cache),
    "shards": Reader(_shards, _open_shards),
    "tars": Reader(_tars, _open_tars),
    "codec": Reader(_codec, _open_codec),
    "config": Reader(_configs, _open_configs),
    "yaml": Reader(_yaml, _open_yaml),
    "recipe": Reader(_recipes, _open_recipes),
    "pictures": Reader(_pictures, _open_pictures),
    "folder": Reader(_folder, _open_folder),
    "pickle": Reader(_pickle, _open_pickle),
    "tool-folders": Reader(_tools, _open_tools),
}


def run(name: str, seeds: range, root: Path, longest_s: int = LONGEST_S) -> Tally:
    """The trials `seeds` of one reader, with their files below `root`."""
    reader, sound, tally = READERS[name], root / "sound", Tally()
    sound.mkdir()
    with _silent():
        reader.make(sound)
        reader.read(sound)
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())
    for seed in seeds:
        random = Random(f"{name}/{seed}")
        at = root / "trial"
        shutil.copytree(sound, at)
        mutate.mutate(at / random.choice(files), random)
        _reset_peak()
        before, begin = _peak_mb(), time.monotonic()
        with _silent(), _within(longest_s):
            outcome = _trial(reader, at)
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - begin)
        tally.most_mb = max(tally.most_mb, _peak_mb() - before)
        if _peak_mb() - before > MOST_MB:
            outcome = f"took {_peak_mb() - before:.0f} MB"
        if outcome is None:
            tally.accepted += 1
        elif isinstance(outcome, UserError):
            tally.refused += 1
            tally.sentences[str(outcome).replace(str(at), "")] += 1
        else:
            tally.failed[seed] = outcome
        shutil.rmtree(at)
    return tally


def _trial(reader: Reader, at: Path) -> UserError | str | None:
    try:
        return None if _finite(reader.read(at)) else "a value that is not finite was accepted"
    except UserError as error:
        if error.__context__ is not None and not error.__suppress_context__ and not isinstance(error.__context__, UserError):
            return "chained: " + "".join(traceback.format_exception(error))
        return error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "".join(traceback.format_exception(error))


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or bool(np.isfinite(value))


class Slow(BaseException):
    """A trial took longer than its limit."""


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Slow(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return 0.0


def main() -> int:
    """Run the readers named, or all; 1 where a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", nargs="*", choices=[[], *READERS])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--sentences", type=int, default=0, help="show so many of the sentences")
    parser.add_argument("--gb", type=float, default=4, help="address space beyond what is taken at the start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    bad = 0
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(options.gb * 2**30), -1))
    for name in options.reader or READERS:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            tally = run(name, range(options.first, options.first + options.n), Path(folder))
        print(
            f"{name:14} {tally.accepted:5} accepted {tally.refused:5} refused {len(tally.failed):4} failed; slowest "
            f"{tally.slowest_s:.2f} s, most {tally.most_mb:.0f} MB, {time.monotonic() - begin:.0f} s in all",
            flush=True,
        )
        for seed, text in tally.failed.items():
            print(f"--- {name} {seed}\n{text}", flush=True)
        for text, count in tally.sentences.most_common(options.sentences):
            print(f"{count:5} {text[:300]}")
        bad += len(tally.failed)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
