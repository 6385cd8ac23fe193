"""The verb `compare`: several VAEs on the same pictures, as a table and as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def compare(
    vaes: tuple[str, ...],
    /,
    *,
    images: Path,
    out: Path = Path("report.html"),
    size: int | None = None,
    most: int | None = None,
    features: Literal["emoji-words", "squeezenet10", "inception"] = "emoji-words",
    protocol: Literal["latentpipe", "lightningdit", "dc-ae", "coco-5k"] = "latentpipe",
    device: str | None = None,
    json: bool = False,
) -> None:
    """Compare VAEs on the same pictures: paired intervals, a winner only where it is clear, and one self-contained page.

    Args:
        vaes: Two VAEs or more: names, folders or files.
        images: Folder of pictures.
        out: The HTML page to write.
        size: Side of the pictures in pixels; left out: as the protocol or the pictures say.
        most: Use at most so many pictures of the folder.
        features: Network of the Frechet and kernel distances: emoji-words, squeezenet10 or inception.
        protocol: How to measure: latentpipe, lightningdit, dc-ae or coco-5k.
        device: cpu, cuda or mps.
        json: Print one JSON object only.
    """
    import shlex
    from json import dumps

    from latentpipe.evaluate.compare_vaes import compare_vaes
    from latentpipe.evaluate.report.html import write_report
    from latentpipe.pipelines.latent_pipeline import best_device
    from latentpipe.utils.errors import UserError

    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"--out {out}: expected the name of an HTML file, as report.html.")
    given = {"size": size, "most": most, "device": device}
    words = ["latentpipe", "compare", *vaes, "--images", str(images), "--out", str(out), "--features", features]
    words += ["--protocol", protocol, *(word for key, value in given.items() if value for word in (f"--{key}", str(value)))]
    comparison, strips = compare_vaes(
        vaes, images, protocol=protocol, size=size, most=most, features=features, device=device or best_device()
    )
    write_report(out, comparison, strips, shlex.join(words))
    print(dumps(comparison.as_dict(), indent=2, allow_nan=False) if json else f"{comparison}\n\n{out}")
