"""The verbs that make data: the emoji set, and the latents of a folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from latentpipe.utils.errors import UserError, counted


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


def encode(
    folder: Path,
    /,
    vae: str,
    size: int = 64,
    out: Path | None = None,
    caption_column: str | None = None,
    shards: Path | None = None,
    workers: int = 1,
    cluster: str | None = None,
    per_shard: int = 1024,
) -> None:
    """Cache the latents of a folder of pictures for train-denoiser: in one file, or in shards that several workers make.

    Args:
        folder: Pictures with metadata.jsonl or metadata.csv, or with a caption in NAME.txt beside each NAME.png; with --shards
            also WebDataset tars, or parquet and arrow files (needs latentpipe[tables]).
        vae: Name or folder of the VAE.
        size: Side that the pictures are resized to, in pixels.
        out: The cache file; left out: FOLDER/.latents/VAEHASH-SIZE.safetensors.
        caption_column: Column of the metadata that holds the captions; left out: text, caption or prompt.
        shards: Folder for a file of each so many pictures, in place of one file; given again, the call makes what is missing.
        workers: Processes, each of one thread or on a GPU of its own.
        cluster: Address of a Ray cluster that the workers run on, or auto (needs latentpipe[cluster]).
        per_shard: Pictures in each shard.
    """
    from tqdm import tqdm

    from latentpipe.checkpoints.registry import find_model

    where = find_model(vae, "vae")
    if shards is None:
        from latentpipe.data.latent_cache import default_path, encode_folder

        path = out or default_path(folder, where, size)
        encode_folder(folder, where, path, size, progress=lambda parts: tqdm(parts, unit="batch"), column=caption_column)
        print(path)
        return
    from latentpipe.data.shards import encode_shards

    with ExitStack() as stack:
        show = _shown(stack)
        made = encode_shards(folder, where, shards, size, workers, cluster, caption_column, per_shard, progress=show)
    print(made.report())
    print(made.folder)


def _shown(stack: ExitStack) -> Callable[[int, int], None]:
    """Shows how many pictures of how many are done, by a bar that comes up with the first call and goes with the stack."""
    from tqdm import tqdm

    bars: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(stack.enter_context(tqdm(total=total, unit="picture")))
        bars[0].update(done - bars[0].n)

    return show
