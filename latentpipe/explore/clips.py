"""Frames to files: a strip (.png), or a clip that goes there and back (.gif, .mp4, .webm)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from latentpipe.utils.errors import UserError
from latentpipe.utils.io import atomic_file

CLIP_PX = 256
GAP_PX = 3
CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
SUFFIXES = (".png", ".gif", *CODECS)
MISSING = "Videos are written by PyAV, which is not installed; run: pip install av. A .gif or .png needs nothing more."


def write_clip(frames: Sequence[Image.Image], path: Path, fps: int = 12) -> None:
    """Write frames of one size, RGB, to `path` atomically; its suffix says how.

    .png         one row of pictures on white, as they are
    .gif         there and back, for ever, small pictures enlarged by a whole number
    .mp4, .webm  there and back once (H.264, VP9); sides that are odd get one more row or column of the same pixels

    fps  frames in a second, 1 to 60; a GIF's are rounded to hundredths of a second
    UserError: another suffix, no frame, frames of several sizes, fps out of range, PyAV missing (see `check`).
    """
    path = Path(path)
    check(path, fps)
    if not frames or len({frame.size for frame in frames}) != 1:
        raise UserError(
            f"Given {len(frames)} frames of {len({frame.size for frame in frames})} sizes; expected some, of one size."
        )
    frames = [frame.convert("RGB") for frame in frames]
    with atomic_file(path) as part:
        if path.suffix.lower() == ".png":
            strip(frames).save(part, format="PNG")
        elif path.suffix.lower() == ".gif":
            shown = there_and_back(frames)
            shown[0].save(part, format="GIF", save_all=True, append_images=shown[1:], duration=round(1000 / fps), loop=0)
        else:
            _video(there_and_back(frames), part, path.suffix.lower(), fps)


def check(path: Path, fps: int = 12) -> None:
    """UserError for what `write_clip` could not write, before the frames are computed."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES or Path(path).is_dir():
        raise UserError(f"{path}: expected the name of a file that ends in one of {', '.join(SUFFIXES)}.")
    if not 1 <= fps <= 60:
        raise UserError(f"Given {fps} frames in a second; expected 1 to 60.")
    if suffix in CODECS:
        _av()


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames side by side in one row on white."""
    width, height = frames[0].size
    page = Image.new("RGB", (len(frames) * (width + GAP_PX) - GAP_PX, height), "white")
    for index, frame in enumerate(frames):
        page.paste(frame, (index * (width + GAP_PX), 0))
    return page


def there_and_back(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames, then those between the ends in reverse; small ones enlarged by a whole number, up to CLIP_PX."""
    width, height = frames[0].size
    times = max(1, CLIP_PX // max(width, height))
    large = [frame.resize((width * times, height * times), Image.Resampling.NEAREST) for frame in frames]
    return [*large, *reversed(large[1:-1])]


def _video(frames: Sequence[Image.Image], part: Path, suffix: str, fps: int) -> None:
    av = _av()
    width, height = frames[0].size
    even = (width + width % 2, height + height % 2)  # colours are stored at half the size
    with av.open(str(part), "w", format=suffix[1:]) as container:
        stream = container.add_stream(CODECS[suffix], rate=fps)
        stream.width, stream.height, stream.pix_fmt = *even, "yuv420p"
        stream.options = {"crf": "18"} if suffix == ".mp4" else {"crf": "24", "b": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(_padded(frame, even))))
        container.mux(stream.encode())


def _padded(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    """At most one more column and row, copies of the last."""
    if frame.size == size:
        return frame
    padded = Image.new("RGB", size)
    for left, top in ((size[0] - frame.width, size[1] - frame.height), (0, size[1] - frame.height), (size[0] - frame.width, 0)):
        padded.paste(frame, (left, top))
    padded.paste(frame, (0, 0))
    return padded


def _av():  # type: ignore[no-untyped-def]
    try:
        import av
    except ImportError:
        raise UserError(MISSING) from None
    return av
