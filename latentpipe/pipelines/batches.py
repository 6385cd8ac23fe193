"""Many pictures in batches: as many at once as keep the processors busy, and no more than memory is bounded by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from latentpipe.lora.prompt_tags import partial_tags, split_tags
from latentpipe.pipelines import prompt_weighting
from latentpipe.pipelines.sampling import OnStep, Settings, Step
from latentpipe.utils.errors import LatentpipeWarning

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


def drawn(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], on_step: OnStep | None, chosen: Settings
) -> tuple[list[Image.Image], dict[str, tuple[str, ...]], int | None]:
    """A picture of each prompt and seed that a LatentPipeline draws in one batch, its adapters and embeddings as they are.

    Returns the pictures, the notes on each prompt, and the step after which they were stopped (None: they were not).
    """
    texts = [*dict.fromkeys(prompts), chosen.negative_prompt]
    prompt_weighting.check(pipe.host, *map(pipe.embeddings.spell, texts))
    assert chosen.size is not None
    pipe.stage.check_memory(len(prompts), *reversed(chosen.size))  # now, not after the sampling
    done, cut = 0, False

    def watch(step: Step) -> bool:
        nonlocal done, cut
        done, cut = step.step, bool(on_step and on_step(step))
        return cut

    against = pipe.notes_on(chosen.negative_prompt, "negative prompt") + pipe.embeddings.idle(*texts)
    notes = {prompt: (*pipe.notes_on(prompt), *against) for prompt in texts[:-1]}
    for note in dict.fromkeys(note for each in notes.values() for note in each):
        warnings.warn(note, LatentpipeWarning, stacklevel=4)
    images = pipe.draw(prompts, seeds, chosen, watch)
    ended = cut if chosen.refiner is not None else done < chosen.all_steps  # whose passes divide the steps by timesteps
    return images, notes, done if ended else None


def _adapters(prompt: str) -> tuple[dict[str, float], frozenset[str]]:
    return split_tags(prompt)[1], partial_tags(prompt)
