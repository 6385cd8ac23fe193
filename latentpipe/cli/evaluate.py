"""The verbs that measure: VAEs alone, beside each other, their health, and whether pictures follow prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentpipe.cli.common import as_json
from latentpipe.utils.defaults import GUIDANCE, STEPS

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
    workers: int | None = None,
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
        workers: Processes of one thread that share the pictures, with the figures of one; left out: this process, all threads.
    """
    from latentpipe.evaluate.protocol import find_protocol
    from latentpipe.evaluate.reconstruction import evaluate_vae as run
    from latentpipe.utils.system import best_device

    _check_file(csv, "--csv", ".csv")
    _check_file(sheet, "--sheet", ".png")
    way, where = find_protocol(protocol, posterior, rounding, size), device or best_device()
    rest: dict[str, Any] = {"max_images": most, "features": features, "full": full, "probe": probe, "workers": workers}
    _tell(run(vae, images, protocol=way, device=where, sheet=sheet, **rest), csv, sheet, json)


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
    workers: int | None = None,
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
        workers: Processes of one thread that share the prompts, with the figures of one; left out: this process, all threads.
    """
    from latentpipe.evaluate.prompt_adherence import adherence_table, evaluate

    result = evaluate(model, seen, held_out, steps, guidance, device, grid, styles, objects, workers)
    print(as_json(result) if json else adherence_table(result))


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
    workers: int | None = None,
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
        workers: Processes of one thread that share the pictures, with the figures of one; left out: this process, all threads.
    """
    import shlex
    from json import dumps

    from latentpipe.evaluate.compare_vaes import compare_vaes
    from latentpipe.utils.system import best_device

    given = {"size": size, "most": most, "device": device, "workers": workers}
    words = ["latentpipe", "compare", *vaes, "--images", str(images), "--out", str(out), "--features", features]
    words += ["--protocol", protocol, *(word for key, value in given.items() if value for word in (f"--{key}", str(value)))]
    where, command = device or best_device(), shlex.join(words)
    way: dict[str, Any] = {"protocol": protocol, "size": size, "max_images": most, "features": features, "workers": workers}
    comparison = compare_vaes(vaes, images, **way, device=where, out=out, command=command)
    print(dumps(comparison.as_dict(), indent=2, allow_nan=False) if json else f"{comparison}\n\n{out}")


def health(
    vae: str,
    /,
    images: Path,
    size: int | None = None,
    most: int = 256,
    json: bool = False,
) -> None:
    """Measure how much each latent channel says; tell in plain words what is wrong. Exit status 1 where something is.

    Args:
        vae: Name, folder or file of the VAE.
        images: Folder of pictures to measure on.
        size: Side in pixels that the pictures are measured at; left out: 128, or the next multiple that the VAE takes.
        most: Use at most so many pictures of the folder.
        json: Print one JSON object only.
    """
    from json import dumps

    from latentpipe.evaluate.diagnosis import diagnose_vae

    found = diagnose_vae(vae, images, size, most)
    print(dumps(found.as_dict(), indent=2) if json else found)
    if found.alarms:
        raise SystemExit(1)
