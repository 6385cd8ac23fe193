"""Train emoji-words: ``python -m latentpipe.evaluate.metrics.train_emoji_words DATA OUT`` (minutes on one core).

DATA holds train/ and validation/ of the emoji set; OUT becomes a folder with model.safetensors (fp16) and card.json.
The network learns which words a picture's captions hold (several may be right: one binary cross-entropy for each).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from latentpipe.data.image_folder import read_pictures
from latentpipe.evaluate.metrics.emoji_words import WordNetwork, resize
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import to_images
from latentpipe.utils.io import atomic_folder, content_hash

LEAST = 20  # pictures whose captions hold a word, for it to be learnt
STEPS = 4000
BATCH = 64
RATE = 3e-3
SHIFT = 6  # pixels of 64 that a crop may move; what comes in is white
READ_PX = 128


def train_words(data: Path, out: Path, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Train on DATA/train, write OUT, and return the card with the accuracy on DATA/validation.

    Pictures with none of the words are left out of the accuracy; `word_scores` says what is counted.
    """
    images, captions = read_captioned(data / "train")
    words = vocabulary(captions)
    if not words:
        raise UserError(f"{data / 'train'}: no word is in the captions of {LEAST} pictures; expected the emoji set ('emoji').")
    network = fit_words(images, labels(captions, words), steps, seed)
    half = network.half()
    tensors = {name: tensor.contiguous() for name, tensor in half.state_dict().items()}
    seen, texts = read_captioned(data / "validation")
    truth = labels(texts, words)
    known = truth.any(1)
    with torch.no_grad():
        logits = half.float().eval()(seen[known])
    frequency = -torch.arange(len(words), dtype=torch.float32).expand_as(logits)
    card = {
        "data": "emoji, train",
        "pictures": len(images),
        "words": words,
        "steps": steps,
        "batch_size": BATCH,
        "seed": seed,
        "command": "python -m latentpipe.evaluate.metrics.train_emoji_words data/emoji weights/features/emoji-words",
        "validation": {
            "pictures": int(known.sum()),
            "network": word_scores(logits, truth[known]),
            "most_frequent_words": word_scores(frequency, truth[known]),
        },
        "content_hash": content_hash(tensors),
    }
    write(out, tensors, card)
    return card


def word_scores(logits: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """`top_word`: the highest logit is of one of the picture's words; `words`: share of its k words among the k highest."""
    ranked = truth.gather(1, logits.argsort(1, descending=True))
    counts = truth.sum(1, keepdim=True)
    among = ranked * (torch.arange(truth.shape[1]) < counts)
    return {"top_word": float(ranked[:, 0].mean()), "words": float((among.sum(1) / counts[:, 0]).mean())}


def read_captioned(folder: Path) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
    """Images (N, 3, 64, 64) of a folder, and their captions."""
    pictures = read_pictures(folder, READ_PX)
    parts = [resize(to_images(pictures.pixels[first : first + 256])) for first in range(0, len(pictures.names), 256)]
    return torch.cat(parts), pictures.captions


def vocabulary(captions: Sequence[Sequence[str]]) -> list[str]:
    """Words of at least LEAST pictures, the most frequent first."""
    counts = Counter(word for texts in captions for word in set(" ".join(texts).split()))
    return [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= LEAST]


def labels(captions: Sequence[Sequence[str]], words: Sequence[str]) -> torch.Tensor:
    """(N, words): 1 where a picture's captions hold the word."""
    held = [set(" ".join(texts).split()) for texts in captions]
    return torch.tensor([[float(word in one) for word in words] for one in held])


def fit_words(images: torch.Tensor, truth: torch.Tensor, steps: int, seed: int) -> WordNetwork:
    """AdamW with a one-cycle rate and binary cross-entropy; fp32 weights, bf16 products."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = WordNetwork(truth.shape[1])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from its stubs
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="emoji-words", unit="step", disable=None, file=sys.stderr):
        rows = random.integers(0, len(images), BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(augment(images[rows], random).contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(logits.float(), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network


def augment(images: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Each image of B 3 64 64 mirrored or not, moved by up to SHIFT pixels, its colours scaled and shifted a little."""
    n, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, value=1.0)
    moved = []
    for image, flip, (top, left) in zip(padded, random.random(n) < 0.5, random.integers(0, 2 * SHIFT + 1, (n, 2)), strict=True):
        crop = image[:, top : top + height, left : left + width]
        moved.append(crop.flip(-1) if flip else crop)
    gain = torch.from_numpy(random.uniform(0.9, 1.1, (n, 3, 1, 1)).astype(np.float32))
    offset = torch.from_numpy(random.uniform(-0.05, 0.05, (n, 3, 1, 1)).astype(np.float32))
    return (torch.stack(moved) * gain + offset).clamp(-1, 1)


def write(out: Path, tensors: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
    """The folder OUT, atomically."""
    from safetensors.torch import save_file

    with atomic_folder(out) as part:
        save_file(tensors, part / "model.safetensors")
        (part / "card.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python -m latentpipe.evaluate.metrics.train_emoji_words DATA OUT")
    print(json.dumps(train_words(Path(sys.argv[1]), Path(sys.argv[2]))["validation"]))
