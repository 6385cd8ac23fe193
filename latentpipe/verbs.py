"""What each verb does: one call into the public API, and what it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from latentpipe.defaults import GUIDANCE, STEPS
from latentpipe.errors import UserError, begin, counted
from latentpipe.places import SUFFIXES, available, configs_folder, lookup, own_adapters


def replay(
    picture: Path,
    /,
    model: str | None = None,
    vae: str | None = None,
    adapter: str | None = None,
    lora: tuple[str, ...] = (),
    image: Path | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Draw the picture in a file again from its recipe and compare every pixel.

    Args:
        picture: A PNG, JPEG or WebP that latentpipe wrote.
        model: Name or folder of the model, where the recipe's name is not installed.
        vae: Name or folder of the VAE, likewise.
        adapter: Name or file of the adapter, likewise.
        lora: Files of LoRA that are not installed, each as NAME=FILE with its name in the recipe.
        image: The picture that img2img began from.
        device: cpu, cuda or mps.
        out: Where to save the new picture; left out: only compare.
    """
    from latentpipe import replay as run

    files = {name: Path(file) for name, _, file in (text.partition("=") for text in lora)}
    result = run(picture, model, vae, image, device, adapter, files)
    if out is not None:
        result.picture.save(out)
        print(out)
    if result.difference == 0:
        loss = ", after the new picture was stored as a JPEG too (which loses a little)" if result.kind == "JPEG" else ""
        print(f"identical: every pixel is the same{loss}")
    else:
        cause = "; ".join(result.causes) or "none found: same machine, versions and threads"
        print(f"largest difference: {result.difference} of 255 grey levels. What has changed: {cause}")


def emoji(out: Path = Path("data/emoji"), size: int | None = None, font: Path | None = None, hands: Path | None = None) -> None:
    """Render the emoji set with captions into OUT/train, OUT/validation and OUT/held_out.

    Args:
        out: Folder to write.
        size: Side of the pictures in pixels: 128, at most 136; with --hands 256 (Noto's stay at 128).
        font: NotoColorEmoji.ttf; left out: where the system keeps it.
        hands: Folder with several artists' sets as 'npm pack' fetches them (a missing one is named with the command): their
            pictures too, with style names in the captions, in OUT/cells those that only another artist's hand is known of, in
            OUT/unseen hands that are never trained on.
    """
    if hands is not None:
        _emoji_hands(out, hands, 256 if size is None else size, font)
        return
    from latentpipe.data.emoji import write_folders

    size = 128 if size is None else size
    if not 8 <= size <= 136:
        raise UserError(f"--size is {size}; the font's bitmaps allow 8 to 136 pixels.")
    for name, count in write_folders(out, size, font).items():
        print(f"{out / name}: {counted(count, 'picture')}")


def _emoji_hands(out: Path, hands: Path, size: int, font: Path | None) -> None:
    from tqdm import tqdm

    from latentpipe.data.emoji_hands import open_library, write_hands

    if not 8 <= size <= 1024:
        raise UserError(f"--size is {size}; expected 8 to 1024 pixels.")
    counts = write_hands(out, open_library(hands, font), size, lambda planned: tqdm(planned, unit="picture"))
    for name, by_hand in counts.items():
        shares = ", ".join(f"{hand} {count}" for hand, count in by_hand.items())
        print(f"{out / name}: {counted(sum(by_hand.values()), 'picture')} ({shares})")


def train_embedded(
    hands: Path,
    work: Path = Path("runs/embedded"),
    vae: str = "emoji",
    start: str | None = "emoji",
    denoiser_steps: int | None = None,
    decoder_steps: int | None = None,
    tuning_steps: int | None = None,
    batch_size: int | None = None,
    decay: bool = True,
) -> None:
    """Train the whole chain of the embedded model: pictures, latents, denoiser, decoder. Given again, it goes on.

    Args:
        hands: Folder with several artists' sets, as for 'latentpipe emoji --hands'.
        work: Folder of all parts; the model ends up in WORK/model.
        vae: Name or folder of the VAE whose latents are kept.
        start: Name or folder of the model that the denoiser begins with; None: random weights.
        denoiser_steps: Steps of the denoiser, in place of the config's.
        decoder_steps: Steps of the decoder, in place of the config's.
        tuning_steps: Steps that the decoder then trains on what the denoiser predicts, likewise.
        batch_size: Pictures in each step of both, in place of the configs'.
        decay: Let the denoiser's rate fall over the last quarter; without, the run can be made longer later.
    """
    from latentpipe.train.chain import train_chain

    print(train_chain(hands, work, configs_folder(), vae, start, denoiser_steps, decoder_steps, tuning_steps, batch_size, decay))


def encode(folder: Path, /, vae: str, size: int = 64, out: Path | None = None, caption_column: str | None = None) -> None:
    """Cache the latents of a folder of pictures for train-denoiser.

    Args:
        folder: Pictures with metadata.jsonl or metadata.csv, or with a caption in NAME.txt beside each NAME.png.
        vae: Name or folder of the VAE.
        size: Side that the pictures are resized to, in pixels.
        out: The cache file; left out: FOLDER/.latents/VAEHASH-SIZE.safetensors.
        caption_column: Column of the metadata that holds the captions; left out: text, caption or prompt.
    """
    from tqdm import tqdm

    from latentpipe.data.cache import default_path, encode_folder
    from latentpipe.weights import find_model

    where = find_model(vae, "vae")
    path = out or default_path(folder, where, size)
    encode_folder(folder, where, path, size, progress=lambda parts: tqdm(parts, unit="batch"), column=caption_column)
    print(path)


def evaluate_prompts(
    model: str = "emoji",
    seen: int = 400,
    held_out: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    device: str | None = None,
    grid: Path | None = None,
    styles: int | None = None,
    objects: int | None = None,
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
        styles: Also score a model of several hands: so many held-out cells of emoji and style (0: all), and "any style".
        objects: Also score so many of the training prompts that name no skin tone and no flag; 0: all.
        json: Print one JSON object only.
    """
    from latentpipe.evaluate.prompts import evaluate, table

    result = evaluate(model, seen, held_out, steps, guidance, device, grid, styles, objects)
    print(_json(result) if json else table(result))


def ls(kind: Literal["all", "models", "vae", "lora", "adapters", "configs"] = "all", /, fits: str | None = None) -> None:
    """List the models, VAEs, LoRA files, adapters and configs that names refer to, kind by kind, each by name.

    Args:
        kind: What to list.
        fits: Name or folder of a model: list the VAEs with their verdicts, those that fit it first.
    """
    if fits is not None:
        from latentpipe.verdicts import fitting

        begin(f"measuring every VAE beside that of the model {fits}")

        for name, path, verdict in sorted(fitting(fits), key=lambda row: not row[2].fits):
            print(f"{name:20}{verdict.outcome:26}{path}")
        return

    rows = [("model", available("models")), ("vae", available("vae")), ("lora", available("lora")), ("adapter", own_adapters())]
    rows.append(("config", {path.stem: path for path in configs_folder().glob("*.yaml")}))
    for what, found in rows:
        for entry, path in sorted(found.items()) if kind in ("all", what, f"{what}s") else ():
            print(f"{what:8}{entry:20}{path}")


def inspect(
    path: str,
    /,
    family: str | None = None,
    prediction: Literal["epsilon", "v", "v-zsnr"] | None = None,
    config: Path | None = None,
    parts: tuple[Path, ...] = (),
) -> None:
    """Print what a model, a VAE, a LoRA, an adapter or a picture says about itself, as JSON.

    Args:
        path: A name, a model or VAE folder, a .safetensors file, an .lpz file, or a picture (also of others: A1111, ...).
        family: Of a model's single file, as for 'latentpipe generate'.
        prediction: Likewise.
        config: Likewise.
        parts: Likewise.
    """
    from latentpipe.files import is_safetensors

    file = lookup(path, available("lora"), "LoRA") or own_adapters().get(path) or Path(path)
    if file.is_file() and not (file.suffix in SUFFIXES or is_safetensors(file)):
        print(_of_file(file))
        return
    begin(f"reading {path}")
    from latentpipe.adapters import is_adapter, read_card
    from latentpipe.checkpoints.single_file.describe import describe_file
    from latentpipe.checkpoints.single_file.gather import Stated
    from latentpipe.checkpoints.single_file.refusals import check_kind
    from latentpipe.lora_verbs import facts, is_lora
    from latentpipe.models import describe

    if file.is_file():
        check_kind(file)
    stated = Stated(family, prediction, config, parts)
    if is_lora(file):
        print(_json(facts(file)))
    else:
        card = asdict(read_card(file)) if file.is_file() and is_adapter(file) else None
        print(_json(card or describe_file(available("models").get(path, Path(path)), stated) or describe(path)))


def _of_file(file: Path) -> str:
    """What an .lpz file, a grid or another picture says, as JSON."""
    from latentpipe.codec_verbs import facts, is_lpz
    from latentpipe.metadata import read_info
    from latentpipe.recipe import GRID_CHUNK, text_in

    if is_lpz(file):
        return _json(facts(file))
    if text_in(file, GRID_CHUNK) is not None:
        from latentpipe.xyplot import read_grid

        return read_grid(file).model_dump_json(indent=2)
    info = read_info(file)
    return info.recipe.model_dump_json(indent=2) if info.recipe else _json(asdict(info))


def env() -> None:
    """Print versions, devices and folders, for a bug report."""
    import torch

    from latentpipe.pipeline import best_device
    from latentpipe.recipe import this_machine
    from latentpipe.weights import home, shipped

    machine = this_machine(best_device(), "fp32", torch.get_num_threads()).model_dump()
    print(_json({**machine, "python": sys.version.split()[0], "shipped": str(shipped()), "home": str(home())}))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
