"""What each verb does: one call into the public API, and what it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from latentpipe.errors import UserError


def generate(
    prompt: str,
    /,
    n: int = 1,
    seed: int | None = None,
    out: Path = Path("out"),
    model: str = "emoji",
    vae: str | None = None,
    negative: str = "",
    steps: int = 20,
    guidance: float = 3.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    scheduler: Literal["dpm++", "ddim", "euler", "unipc"] | None = None,
    size: str | None = None,
    image: Path | None = None,
    strength: float = 0.6,
    device: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    lora: str | None = None,
    adapter: str | None = None,
) -> None:
    """Draw pictures of a prompt and print their paths.

    Args:
        prompt: What to draw.
        n: How many pictures; picture i has the seed SEED + i.
        seed: 0 to 4294967295; left out: a random one.
        out: Folder for the PNG files, each with its recipe inside.
        model: Name ('latentpipe ls') or folder of a diffusers Stable Diffusion model.
        vae: Name or folder of another VAE to decode with.
        negative: What the picture should not show.
        steps: Denoising steps.
        guidance: Classifier-free guidance; 1 turns it off.
        guidance_interval: Share of the steps where guidance begins and ends.
        scheduler: Left out: the model's own.
        size: Side or WIDTHxHEIGHT in pixels; left out: what the model was trained at.
        image: A picture to begin from (img2img).
        strength: How far img2img may move from the picture, over 0 to 1.
        device: cpu, cuda or mps; left out: the best one present.
        dtype: Precision of the weights.
        lora: Reserved for a later version.
        adapter: Reserved for a later version.
    """
    for name, value in (("--lora", lora), ("--adapter", adapter)):
        if value is not None:
            raise UserError(f"{name} {value}: this version cannot load one yet; leave {name} out.")
    # What can be refused without the model is refused before it is loaded.
    shape = _size(size)
    source = _open_picture(image) if image is not None else None
    _writable(out)
    from latentpipe import Engine, LatentPipeline

    pipe = LatentPipeline.from_pretrained(model, vae, device, dtype)
    settings: dict[str, Any] = {
        "negative": negative,
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "scheduler": scheduler,
        "size": shape,
        "image": source,
        "strength": strength,
    }
    pictures, stopped = _watch(Engine(pipe), prompt, {"n": n, "seed": seed, **settings})
    for picture in pictures:
        print(picture.save(_free_path(out, prompt, picture.recipe.seed)))
    if stopped:
        raise KeyboardInterrupt


def replay(
    picture: Path, /, model: str | None = None, image: Path | None = None, device: str | None = None, out: Path | None = None
) -> None:
    """Draw the picture in a PNG again from its recipe and compare every pixel.

    Args:
        picture: A PNG that latentpipe wrote.
        model: Name or folder of the model, where the recipe's name is not installed.
        image: The picture that img2img began from.
        device: cpu, cuda or mps.
        out: Where to save the new picture; left out: only compare.
    """
    from latentpipe import replay as run

    result = run(picture, model, image, device)
    if out is not None:
        result.picture.save(out)
        print(out)
    if result.difference == 0:
        print("identical: every pixel is the same")
    else:
        cause = "; ".join(result.causes) or "none found: same machine, versions and threads"
        print(f"largest difference: {result.difference} of 255 grey levels. What has changed: {cause}")


def emoji(out: Path = Path("data/emoji"), size: int = 128, font: Path | None = None) -> None:
    """Render the emoji set with captions into OUT/train, OUT/validation and OUT/held_out.

    Args:
        out: Folder to write.
        size: Side of the pictures in pixels, at most 136.
        font: NotoColorEmoji.ttf; left out: where the system keeps it.
    """
    from latentpipe.data.emoji import write_folders

    if not 8 <= size <= 136:
        raise UserError(f"--size is {size}; the font's bitmaps allow 8 to 136 pixels.")
    for name, count in write_folders(out, size, font).items():
        print(f"{out / name}: {count} pictures")


def encode(folder: Path, /, vae: str, size: int = 64, out: Path | None = None) -> None:
    """Cache the latents of a folder of pictures for train-denoiser.

    Args:
        folder: Pictures with metadata.jsonl or metadata.csv.
        vae: Name or folder of the VAE.
        size: Side that the pictures are resized to, in pixels.
        out: The cache file; left out: FOLDER/.latents/VAEHASH-SIZE.safetensors.
    """
    from tqdm import tqdm

    from latentpipe.data.cache import default_path, encode_folder
    from latentpipe.weights import find_model

    where = find_model(vae, "vae")
    path = out or default_path(folder, where, size)
    encode_folder(folder, where, path, size, progress=lambda parts: tqdm(parts, unit="batch"))
    print(path)


def evaluate_prompts(
    model: str = "emoji",
    seen: int = 400,
    held_out: int = 0,
    steps: int = 20,
    guidance: float = 3.0,
    device: str | None = None,
    grid: Path | None = None,
    json: bool = False,
) -> None:
    """Does the picture follow the prompt? One picture for each prompt, seed = index, nothing selected.

    Args:
        model: Name or folder of a model that was trained on the emoji set.
        seen: How many prompts of the training split; 0: all.
        held_out: How many held-out combinations; 0: all.
        steps: Denoising steps.
        guidance: Classifier-free guidance.
        device: cpu, cuda or mps.
        grid: Where to save a sheet of the first 16 pictures of either list.
        json: Print one JSON object only.
    """
    from latentpipe.evaluate.prompts import evaluate, table

    result = evaluate(model, seen, held_out, steps, guidance, device, grid)
    print(_json(result) if json else table(result))


def ls(kind: Literal["all", "models", "vae", "configs"] = "all", /) -> None:
    """List the models, VAEs and configs that names refer to.

    Args:
        kind: What to list.
    """
    from latentpipe.weights import available

    for name in ("models", "vae") if kind == "all" else (kind,):
        if name != "configs":
            for entry, path in available(name).items():
                print(f"{name.removesuffix('s'):8}{entry:20}{path}")
    if kind in ("all", "configs"):
        for path in sorted(configs_folder().glob("*.yaml")):
            print(f"{'config':8}{path.stem:20}{path}")


def inspect(path: str, /) -> None:
    """Print what a model, a VAE or a picture says about itself, as JSON.

    Args:
        path: A name, a model or VAE folder, or a PNG.
    """
    from latentpipe.weights import describe

    if Path(path).is_file():
        from latentpipe.recipe import read

        print(read(Path(path)).model_dump_json(indent=2))
        return
    print(_json(describe(path)))


def env() -> None:
    """Print versions, devices and folders, for a bug report."""
    import torch

    from latentpipe.pipeline import best_device
    from latentpipe.recipe import this_machine
    from latentpipe.weights import home, shipped

    machine = this_machine(best_device(), "fp32", torch.get_num_threads()).model_dump()
    print(_json({**machine, "python": sys.version.split()[0], "shipped": str(shipped()), "home": str(home())}))


def _watch(engine: Any, prompt: str, settings: dict[str, Any]) -> tuple[list[Any], bool]:
    """Show a job's steps; the first Ctrl-C stops it and keeps the partial pictures, the second leaves at once."""
    from tqdm import tqdm

    from latentpipe.engine import Finished

    cancel = threading.Event()

    def on_interrupt(*_: Any) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()
        print("stopping after this step; Ctrl-C again to leave at once", file=sys.stderr)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, on_interrupt) if main_thread else None
    try:
        with tqdm(total=settings["steps"], unit="step", disable=None, file=sys.stderr) as bar:
            for event in engine.run(prompt, cancel=cancel, **settings):
                if isinstance(event, Finished):
                    return event.pictures, cancel.is_set()
                bar.total = event.steps
                bar.update(event.step - bar.n)
        raise RuntimeError("the engine ended without a result")
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if not match:
        raise UserError(f"--size is '{text}'; expected a side such as 64, or WIDTHxHEIGHT such as 64x96.")
    return int(match[1]), int(match[2] or match[1])


def _open_picture(path: Path) -> Any:
    from PIL import Image

    from latentpipe.images import flatten

    try:
        with Image.open(path) as picture:
            return flatten(picture)
    except FileNotFoundError:
        raise UserError(f"--image {path}: no such file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path} cannot be read as a picture ({error}).") from None


def _writable(folder: Path) -> None:
    """UserError unless files can be made in `folder`; found out before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made a folder ({(error.strerror or 'error').lower()}).") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {folder}: this folder cannot be written to.")


def _free_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name from prompt and seed that does not exist yet."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
    path, count = folder / f"{slug}-{seed}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{slug}-{seed}-{count}.png"
    return path


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def configs_folder() -> Path:
    """The folder of the shipped configs: in the wheel, or in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
