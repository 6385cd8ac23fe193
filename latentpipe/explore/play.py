"""What a playground shows: pictures in, pictures out, the latents between them moved a little at each call.

picture -> encode -> mix, move along directions, scale, add noise -> decode -> picture
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from PIL import Image, ImageDraw, ImageFont

from latentpipe import emphasis
from latentpipe.defaults import STEPS
from latentpipe.denoise import host_for, is_classic
from latentpipe.errors import UserError
from latentpipe.evaluate.bank import SIDE, open_bank
from latentpipe.evaluate.latent import slerp
from latentpipe.explore import traverse
from latentpipe.explore.directions import Direction, Report
from latentpipe.explore.sets import decode, encode, read_set, side_for
from latentpipe.files import atomic_file
from latentpipe.images import fit_square, to_images, to_pixels
from latentpipe.pipeline import LatentPipeline
from latentpipe.sampling import Guide, Settings, Step
from latentpipe.vae import VAEStage
from latentpipe.weights import quiet

PICTURES = 200  # of the emoji bank that directions are learned from
LIMIT_SD = 10.0
WAYS = ("slerp", "lerp")
MAX_BETWEEN = 48
CLIP_PX = 256
TITLE_PX = 18
_known: WeakKeyDictionary[VAEStage, dict[str, Direction]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Edit:
    """What is done to the latents of a picture, in this order; the defaults do nothing.

    share  of another picture, 0 to 1, mixed in by slerp
    moves  how far along each direction by name, in standard deviations (`directions`)
    scale  what the latents are multiplied by, 0 to 3
    noise  standard deviation of normal noise that is added, 0 to 3 (the latents' own is about 1), drawn from `seed`
    """

    share: float = 0.0
    moves: Mapping[str, float] | None = None
    scale: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float, float]] = {
            "share": (self.share, 0, 1),
            "scale": (self.scale, 0, 3),
            "noise": (self.noise, 0, 3),
        }
        ranges |= {f"the move along {name}": (far, -LIMIT_SD, LIMIT_SD) for name, far in (self.moves or {}).items()}
        ranges |= {"noise": (self.noise, 0, 3), "seed": (self.seed, 0, 2**32 - 1)}
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:  # also where it is not a number
                raise UserError(f"{name} is {value}; expected {low:g} to {high:g}.")


def edited(stage: VAEStage, first: Image.Image, second: Image.Image | None, edit: Edit) -> Image.Image:
    """A picture (its centred square, at the side of `sets.side_for`) after an edit of its latents.

    second  what `edit.share` mixes in; UserError where it is missing, or for a direction that is not known
    """
    latents = latents_of(stage, first)
    if edit.share and second is None:
        raise UserError("There is no second picture to mix in; drop one, or set the share to 0.")
    if edit.share and second is not None:
        latents = slerp(latents, latents_of(stage, second), edit.share)
    for name, far in (edit.moves or {}).items():
        latents = traverse.moved(latents, direction(stage, name), [far])
    latents = latents * edit.scale
    if edit.noise:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(edit.seed))
        latents = latents + edit.noise * noise
    return to_pixels(decode(stage, latents))[0]


def directions(stage: VAEStage, report: Report = None) -> list[str]:
    """Names of the directions that are known of a VAE, those that change pictures most first.

    Channels, principal components and captions' words, learned once from PICTURES emoji.
    """
    if stage not in _known:
        known = read_set(None, side_for(stage.space.downscale), PICTURES)
        latents = encode(stage, known.images, report)
        found = traverse.candidates(latents, known.captions, report=report)
        _known[stage] = {one.name: one for one, _ in traverse.ranked(stage, latents[:2], found, report=report)}
    return list(_known[stage])


def direction(stage: VAEStage, name: str) -> Direction:
    """A direction by its name; UserError where it is not known yet (`directions` learns them)."""
    known = _known.get(stage, {})
    if name not in known:
        raise UserError(f"No direction '{name[:80]}' is known of this VAE; known: {', '.join(known) or 'none yet'}.")
    return known[name]


def traversal(
    stage: VAEStage, picture: Image.Image, names: Sequence[str], columns: int = 7, most: float = 3.0, report: Report = None
) -> Image.Image:
    """A sheet: each direction in a row, from `-most` to `most` standard deviations."""
    rows = [direction(stage, name) for name in names]
    return traverse.sheet(stage, latents_of(stage, picture), rows, _amounts(columns, most), report)


def plane(
    stage: VAEStage, picture: Image.Image, names: tuple[str, str], side: int = 5, most: float = 3.0, report: Report = None
) -> Image.Image:
    """A square sheet of a plane: the first direction from left to right, the second from top to bottom."""
    amounts = _amounts(side, most)
    across, down = (direction(stage, name) for name in names)
    start = latents_of(stage, picture)
    batch = torch.cat([traverse.moved(row[None], across, amounts) for row in traverse.moved(start, down, amounts)])
    pictures = to_pixels(decode(stage, batch, report))
    rows = [pictures[first : first + side] for first in range(0, len(pictures), side)]
    sheet = traverse.page(rows, [f"{far:+.2g} sd" for far in amounts], [f"{far:+.2g} sd" for far in amounts])
    titled = Image.new("RGB", (sheet.width, sheet.height + TITLE_PX), "white")
    titled.paste(sheet, (0, TITLE_PX))
    text = f"across: {across.name}, down: {down.name}"
    ImageDraw.Draw(titled).text((4, 2), text, fill=(60, 60, 60), font=ImageFont.load_default(12))
    return titled


def between_pictures(
    stage: VAEStage, first: Image.Image, second: Image.Image, n: int, way: str, report: Report = None
) -> list[Image.Image]:
    """`n` pictures from the first to the second, decoded along a way of WAYS between their latents."""
    ends = latents_of(stage, first), latents_of(stage, second)
    return to_pixels(decode(stage, torch.cat([_mixed(*ends, share, way) for share in _shares(n, way)]), report))


@torch.no_grad()
def between_prompts(
    pipe: LatentPipeline, first: str, second: str, n: int, way: str, seed: int = 0, steps: int = STEPS, report: Report = None
) -> list[Image.Image]:
    """`n` pictures from one prompt to the other: the text embeddings are mixed, the noise is that of `seed` throughout.

    The ends are what the pipeline draws of the two prompts alone. UserError for families other than Stable Diffusion 1/2.
    """
    if not is_classic(pipe.host):
        raise UserError("Prompts are interpolated with Stable Diffusion 1 and 2 only; this model is of another family.")
    settings = pipe.check(Settings(steps=steps))
    assert settings.size is not None
    pipe.loras.check_free()
    twin = host_for(pipe.host, pipe.stage, settings)
    with quiet():
        texts, none = emphasis.encode(twin, [first, second], True, "")
    assert none is not None  # guided
    shares = _shares(n, way)
    found = []
    for index, share in enumerate(shares):

        def watch(step: Step, before: int = index * steps) -> None:
            if report is not None:
                report(before + step.step, n * steps, "draw")

        guide = Guide(settings, _mixed(texts[:1], texts[1:], share, way), none[:1], steps, watch)
        found.append(
            twin(
                **guide.start(), callback_on_step_end=guide, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                num_inference_steps=steps, generator=[torch.Generator("cpu").manual_seed(seed)], output_type="latent",
                width=settings.size[0], height=settings.size[1],
            ).images
        )  # fmt: skip
    return [picture for latents in found for picture in to_pixels(pipe.stage.decode(latents))]


def write_clip(pictures: Sequence[Image.Image], path: Path, fps: int = 12) -> None:
    """A GIF that goes there and back, for ever, small pictures enlarged by a whole number; atomically."""
    width, height = pictures[0].size
    times = max(1, CLIP_PX // max(width, height))
    large = [one.resize((width * times, height * times), Image.Resampling.NEAREST) for one in pictures]
    frames = [*large, *reversed(large[1:-1])]
    with atomic_file(path) as part:
        frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def page(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures by their names; the columns are shares of the second end."""
    count = len(next(iter(rows.values())))
    return traverse.page(list(rows.values()), list(rows), [f"{index / (count - 1):.0%}" for index in range(count)])


def latents_of(stage: VAEStage, picture: Image.Image) -> torch.Tensor:
    """The latents (1 C h w, on the CPU) of a picture's centred square."""
    return encode(stage, to_images(fit_square(picture, side_for(stage.space.downscale))))


def bank_picture(caption: str) -> Image.Image:
    """An emoji of the bank by its caption, enlarged to 128 pixels; UserError where there is none."""
    bank = open_bank()
    for pixels, captions in zip(bank.pixels, bank.captions, strict=True):
        if caption in captions:
            small = Image.fromarray(pixels.reshape(SIDE, SIDE, 3).astype("uint8"))
            return small.resize((128, 128), Image.Resampling.BICUBIC)
    raise UserError(f"The emoji bank has no picture of '{caption[:80]}'.")


def _mixed(first: torch.Tensor, second: torch.Tensor, share: float, way: str) -> torch.Tensor:
    if share in (0.0, 1.0):
        return second if share else first  # the ends themselves, to the bit
    return slerp(first, second, share).to(first) if way == "slerp" else torch.lerp(first, second, share)


def _shares(n: int, way: str) -> list[float]:
    if way not in WAYS or not 2 <= n <= MAX_BETWEEN:
        raise UserError(f"{n} pictures by '{str(way)[:20]}'; expected 2 to {MAX_BETWEEN} by one of {', '.join(WAYS)}.")
    return [index / (n - 1) for index in range(n)]


def _amounts(count: int, most: float) -> list[float]:
    if not 2 <= count <= 15 or not 0 < most <= LIMIT_SD:
        raise UserError(f"{count} pictures up to {most:g} standard deviations; expected 2 to 15, and at most {LIMIT_SD:g}.")
    return torch.linspace(-most, most, count).tolist()
