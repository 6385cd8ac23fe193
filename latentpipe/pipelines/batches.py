"""Many pictures in batches: as many at once as keep the processors busy, and no more than memory is bounded by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from latentpipe.lora.prompt_tags import partial_tags, split_tags

MOST_PICTURES = 16  # beyond it a picture takes no less time (dev/LOG.md)
MOST_PIXELS = 2**20  # of one batch: the activations of its denoiser grow with it


def batch_size(size: tuple[int, int]) -> int:
    """How many pictures of a width and height in pixels are drawn at once."""
    return max(1, min(MOST_PICTURES, MOST_PIXELS // (size[0] * size[1])))


def batches(pictures: Sequence[tuple[str, int]], size: tuple[int, int]) -> Iterator[list[tuple[str, int]]]:
    """Prompts and seeds in batches, in their order; what prompts say of LoRA adapters is the same within one."""
    now: list[tuple[str, int]] = []
    for picture in pictures:
        if now and (len(now) == batch_size(size) or _adapters(picture[0]) != _adapters(now[0][0])):
            yield now
            now = []
        now.append(picture)
    if now:
        yield now


def _adapters(prompt: str) -> tuple[dict[str, float], frozenset[str]]:
    return split_tags(prompt)[1], partial_tags(prompt)
