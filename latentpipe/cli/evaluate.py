"""The verb that evaluates VAEs: one call into the public API, and what it prints and writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from latentpipe.evaluate.results import Evaluation


def evaluate_vae(
    vae: str,
    /,
    images: Path,
    size: int | None = None,
    most: int | None = None,
    protocol: Literal["latentpipe", "lightningdit", "dc-ae", "coco-5k"] = "latentpipe",
    posterior: Literal["mode", "sample"] | None = None,
    rounding: Literal["nearest", "truncate"] | None = None,
    features: Literal["emoji-words", "squeezenet10", "inception"] = "emoji-words",
    full: bool = False,
    probe: int = 64,
    device: str | None = None,
    csv: Path | None = None,
    sheet: Path | None = None,
    json: bool = False,
) -> None:
    """Measure a VAE on a folder of pictures: quality, rate and latents, each with its interval; with --full robustness and cost.

    Args:
        vae: Name, folder or file of the VAE.
        images: Folder of pictures of any size; broken ones are skipped and named.
        size: Side of the pictures in pixels; left out: the protocol's, or what the folder suggests (it is said).
        most: Use at most so many files of the folder.
        protocol: How pictures are cropped, encoded, rounded and compared; the other names repeat published scripts.
        posterior: Decode the posterior's mode or one sample, whatever the protocol says.
        rounding: How reconstructions become bytes, whatever the protocol says.
        features: Network for Frechet and kernel distances; only inception makes an FID. All but emoji-words need weights.
        full: Measure round trips, equivariance, interpolation, time and memory as well: a dozen times the work.
        probe: With --full: pictures for round trips and equivariance.
        device: cpu, cuda or mps.
        csv: Write the values of each picture to this file.
        sheet: Write a PNG of the best, median and worst picture: original, rebuilt, difference.
        json: Print one JSON object only.
    """
    from latentpipe.evaluate.protocol import find_protocol
    from latentpipe.evaluate.reconstruction import evaluate_vae as run
    from latentpipe.pipelines.latent_pipeline import best_device

    _check_file(csv, "--csv", ".csv")
    _check_file(sheet, "--sheet", ".png")
    way, where = find_protocol(protocol, posterior, rounding, size), device or best_device()
    found = run(vae, images, protocol=way, most=most, features=features, full=full, probe=probe, device=where, sheet=sheet)
    _tell(found, csv, sheet, json)


def _tell(found: Evaluation, csv: Path | None, sheet: Path | None, json: bool) -> None:
    """Write the CSV file, and print the table or the JSON object."""
    from json import dumps

    from latentpipe.evaluate.report.text import table, write_csv

    if csv is not None:
        write_csv(found, csv)
    print(dumps(found.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) if json else table(found))
    for path in (csv, sheet):
        if path is not None and not json:
            print(path)


def _check_file(path: Path | None, option: str, ending: str) -> None:
    """Refuse before the measurement what could not be written after it."""
    from latentpipe.utils.errors import UserError

    if path is not None and (path.suffix.lower() != ending or path.is_dir()):
        raise UserError(f"{option} {path}: expected the name of a file that ends in {ending}.")
