"""The verbs that go between pictures and change them in latents: what each reads, prints and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentpipe.cli.argument_parser import Positional
from latentpipe.utils.defaults import GUIDANCE, STEPS

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def interpolate(
    first: str,
    second: str,
    /,
    n: int = 9,
    way: Literal["slerp", "lerp", "density"] = "slerp",
    vae: str = "emoji",
    model: str = "emoji",
    images: Path | None = None,
    size: int | None = None,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    fps: int = 12,
    out: Path = Path("interpolate.png"),
    device: str | None = None,
) -> None:
    """Go from one picture or prompt to another through latents: a strip, or a clip that goes there and back.

    Args:
        first: A picture file, or a prompt where there is no such file.
        second: Likewise; both of one kind.
        n: How many pictures, the ends included: 2 to 48.
        way: slerp, lerp, or density: a line that is pulled towards where latents of real pictures are dense (pictures only).
        vae: Pictures: name, folder or file of the VAE.
        model: Prompts: name or folder of the model.
        images: Pictures, way density: folder of real pictures; left out: the emoji bank that ships.
        size: Pictures: side in pixels; left out: 64, or the next multiple that the VAE takes.
        seed: Prompts: of the noise, the same for all.
        steps: Prompts: denoising steps of each picture.
        guidance: Prompts: classifier-free guidance.
        fps: Frames in a second of a clip.
        out: .png: a strip; .gif, .mp4, .webm: a clip (the last two need 'pip install av').
        device: cpu, cuda or mps.
    """
    from latentpipe.cli.common import progress_bar
    from latentpipe.explore import clips
    from latentpipe.explore import interpolate as run
    from latentpipe.pipelines.latent_pipeline import LatentPipeline

    clips.check(out, fps)
    if are_pictures(first, second):
        found = _of_pictures(Path(first), Path(second), n, way, vae, images, size, device)
    else:
        pipe = LatentPipeline.from_pretrained(model, device=device)
        with progress_bar() as report:
            found = run.between_prompts(pipe, first, second, n, way, seed, steps, report, guidance)
    clips.write_clip(found, out, fps)
    print(out)


def _of_pictures(
    first: Path, second: Path, n: int, way: str, vae: str, images: Path | None, size: int | None, device: str | None
) -> list[Image.Image]:
    """The frames between two picture files."""
    from latentpipe.cli.common import open_stage, progress_bar
    from latentpipe.data.image_set import encode, read_set
    from latentpipe.explore import interpolate as run
    from latentpipe.utils.images import open_picture

    ends = [open_picture(path) for path in (first, second)]
    stage, _, side = open_stage(vae, size, device)
    with progress_bar() as report:
        bank = None
        if way == "density" and images is not None:
            bank = encode(stage, read_set(images, side, run.BANK).images, report)
        return run.between_pictures(stage, ends[0], ends[1], n, way, report, bank, side)


@dataclass(frozen=True)
class Edit:
    """Change a picture in its latents: mix another one in, move along a direction, scale, add noise; everywhere or in a mask."""

    picture: Positional[Path]
    """The picture, of any size."""
    mix: Path | None = None
    """Another picture to mix in."""
    share: float = 0.5
    """How much of it, 0 to 1."""
    along: str | None = None
    """A direction by its name: 'channel 0', 'component 1', a word of captions. The centred square, 64 pixels, is moved."""
    amount: float = 2.0
    """How far, in standard deviations."""
    scale: float = 1.0
    """What the latents are multiplied by, 0 to 3."""
    noise: float = 0.0
    """Standard deviation of noise to add, 0 to 3; the latents' own is about 1."""
    seed: int = 0
    """Of the noise."""
    mask: Path | None = None
    """A picture of the same size: only what is white (or painted, or the hole in a copy of the picture) changes."""
    feather: int | None = None
    """Pixels over which the change fades out around the mask; left out: a sixteenth of the shorter side."""
    vae: str = "emoji"
    """Name, folder or file of the VAE."""
    out: Path = Path("edit.png")
    """The PNG file to write."""
    device: str | None = None
    """cpu, cuda or mps."""


def edit(options: Edit) -> None:
    """Write the edited picture and print its path."""
    import warnings

    from latentpipe.cli.common import check_png, open_stage, progress_bar, save_png
    from latentpipe.data.image_set import encode, side_for
    from latentpipe.explore import edit as run
    from latentpipe.explore import playground
    from latentpipe.utils.errors import LatentpipeWarning
    from latentpipe.utils.images import open_picture, to_images

    check_png(options.out)
    moves = {options.along: options.amount} if options.along else {}
    playground.Edit(options.share, moves, options.scale, options.noise, options.seed)  # its limits, before the work
    given = run.open_canvas(options.picture)
    other = None if options.mix is None else open_picture(options.mix)
    hole = None if options.mask is None else run.hole_of(run.open_mask(options.mask), given.size)
    if other is None and not moves and options.scale == 1 and not options.noise:
        warnings.warn(
            LatentpipeWarning("nothing was asked for: the picture is encoded and decoded (see --mix, --noise)"), stacklevel=2
        )
    stage, _, _ = open_stage(options.vae, None, options.device)
    with progress_bar() as report:
        if moves:
            playground.directions(stage, report)
            given, hole = _squares(given, hole, side_for(stage.space.downscale))
        size = run.work_size(stage, given.size)

        def change(latents: Any) -> Any:
            if other is not None:
                latents = run.mix(latents, encode(stage, to_images(run.fitted(other, size))), options.share)
            for name, far in moves.items():
                latents = run.add(latents, playground.direction(stage, name), far)
            return run.noise(run.scale(latents, options.scale), options.noise, options.seed)

        save_png(run.edited(stage, given, change, hole, options.feather, report), options.out)
    print(options.out)


def _squares(picture: Image.Image, hole: Image.Image | None, side: int) -> tuple[Image.Image, Image.Image | None]:
    """The centred squares of a picture and its mask, `side` pixels wide."""
    from latentpipe.explore.edit import hole_of
    from latentpipe.utils.images import fit_square, flatten

    return fit_square(flatten(picture), side), None if hole is None else hole_of(fit_square(hole, side), (side, side))


def inpaint(
    picture: Path,
    /,
    mask: Path | None = None,
    prompt: str = "",
    negative: str = "",
    strength: float = 1.0,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    feather: int | None = None,
    model: str = "emoji",
    vae: str | None = None,
    out: Path = Path("inpaint.png"),
    device: str | None = None,
) -> None:
    """Redraw a part of a picture from a prompt; outside the feathered mask every pixel keeps its bytes.

    Args:
        picture: The picture, of any size.
        mask: A picture of the same size: white where it is redrawn, or strokes on transparency, or a copy of the picture with
            a transparent hole; left out: what is transparent in the picture, else the middle.
        prompt: What to draw there.
        negative: What should not be there.
        strength: 1: from noise; less, over 0: from what is there.
        seed: 0 to 4294967295.
        steps: Denoising steps.
        guidance: Classifier-free guidance; 1 turns it off.
        feather: Pixels over which the new part fades into the old; left out: a sixteenth of the shorter side.
        model: Name ('latentpipe ls') or folder of a diffusers Stable Diffusion model.
        vae: Name, folder or file of another VAE to encode and decode with.
        out: The PNG file to write.
        device: cpu, cuda or mps.
    """
    from latentpipe.cli.common import check_png, progress_bar, save_png
    from latentpipe.explore import edit as edits
    from latentpipe.explore import inpaint as run
    from latentpipe.pipelines.latent_pipeline import LatentPipeline

    check_png(out)
    given = edits.open_canvas(picture)
    hole = _some_hole(given) if mask is None else edits.hole_of(edits.open_mask(mask), given.size)
    pipe = LatentPipeline.from_pretrained(model, vae, device)
    with progress_bar() as report:
        found = run.inpaint(pipe, given, hole, prompt, seed, steps, guidance, strength, feather, negative, report)
    save_png(found, out)
    print(out)


def are_pictures(first: str, second: str) -> bool:
    """Whether two names are of picture files; UserError where one is and the other is not, or where a file is missing."""
    from latentpipe.utils.errors import UserError

    there = [_is_file(name) for name in (first, second)]
    for name, found in zip((first, second), there, strict=True):
        if not found and Path(name).suffix.lower() in PICTURE_SUFFIXES:
            raise UserError(f"{name}: no such file.")
    if any(there) and not all(there):
        prompt = second if there[0] else first
        raise UserError(f"One is a picture and '{prompt[:80]}' is no file; give two pictures or two prompts.")
    return all(there)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: a prompt
        return False


def _some_hole(picture: Image.Image) -> Image.Image:
    """The transparent part of a picture, else the square in its middle, which a warning says."""
    import warnings

    from PIL import Image, ImageDraw

    from latentpipe.explore.edit import clear_part
    from latentpipe.utils.errors import LatentpipeWarning

    clear = clear_part(picture)
    if clear is not None:
        return clear
    warnings.warn(LatentpipeWarning("no --mask was given: the middle of the picture is redrawn"), stacklevel=3)
    hole = Image.new("L", picture.size)
    width, height = picture.size
    ImageDraw.Draw(hole).rectangle((width // 4, height // 4, (3 * width - 1) // 4, (3 * height - 1) // 4), fill=255)
    return hole
