"""The verb that finds pictures a VAE does not know: what it reads, prints and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentpipe.utils.errors import counted

if TYPE_CHECKING:
    import torch

    from latentpipe.data.image_set import GivenPictures
    from latentpipe.explore.anomaly.detector import Detector, Scores

MOST_SHOWN = 60  # pictures on the sheet


@dataclass(frozen=True)
class Found:
    """A detector, what it was shown, and what it says: scores and heat maps (N H W) in the order of `given`."""

    detector: Detector
    given: GivenPictures
    scores: Scores
    heat: torch.Tensor


def anomaly(
    pictures: tuple[Path, ...],
    /,
    normal: Path | None = None,
    vae: str = "emoji",
    false_alarms: float = 0.05,
    size: int | None = None,
    most: int | None = None,
    detector: Path | None = None,
    save: Path | None = None,
    out: Path = Path("anomaly.png"),
    csv: Path | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Find pictures that are unlike normal ones, and where in them: a sheet of scores and heat maps, the strangest first.

    A score joins the error of the reconstruction by a VAE (pixels, coarse scales, the worst place, features) and its KL.
    A VAE that rebuilds everything detects little: see benchmarks/anomaly.png for latent size against AUROC.

    Args:
        pictures: Picture files, or folders of pictures.
        normal: Folder of normal pictures, none of which the VAE should have seen; left out: unseen emoji of the bank that ships.
        vae: Name, folder or file of the VAE.
        false_alarms: Share of normal pictures that may raise an alarm.
        size: Side in pixels; left out: 64, or the next multiple that the VAE takes.
        most: Use at most so many pictures of each folder.
        detector: Use this file (see --save) in place of NORMAL; the VAE must be the one it was made with.
        save: Write the detector here, as JSON.
        out: The PNG file to write.
        csv: Write scores, parts and verdicts here too.
        device: cpu, cuda or mps.
        json: Print one JSON object only.
    """
    from latentpipe.cli.common import check_png, print_result, save_png
    from latentpipe.utils.errors import UserError

    check_png(out)
    if detector is not None and (normal is not None or size is not None or save is not None):
        raise UserError("--detector brings its normal pictures and size along; leave out --normal, --size and --save.")
    if not pictures or (most is not None and most < 1):
        raise UserError(f"Given {counted(len(pictures), 'file')} or folders, --most {most}; expected 1 or more.")
    found = _find(pictures, normal, vae, false_alarms, size, most, detector, device)
    if save is not None:
        found.detector.save(save)
    save_png(_sheet(found), out)
    facts = _facts(found, vae) | {"out": str(out), "pictures": _rows(found), "skipped": found.given.skipped}
    if csv is not None:
        _write_csv(facts["pictures"], csv)
    print_result(facts, _table(facts, found.detector), out, json)


def _find(
    pictures: tuple[Path, ...],
    normal: Path | None,
    vae: str,
    false_alarms: float,
    size: int | None,
    most: int | None,
    saved: Path | None,
    device: str | None,
) -> Found:
    """Read, calibrate or load, score."""
    import warnings

    import torch

    from latentpipe.cli.common import open_stage, progress_bar
    from latentpipe.data.image_set import read_given_pictures, read_set
    from latentpipe.explore.anomaly import detector as run
    from latentpipe.utils.errors import LatentpipeWarning

    with progress_bar() as report:
        stage, _, side = open_stage(vae, size, device)
        if saved is not None:
            detector = run.load(saved, stage)
            given = read_given_pictures(pictures, detector.side, detector.normal == run.BANK, most, report)
        else:
            given = read_given_pictures(pictures, side, normal is None, most, report)
            if normal is None:
                known = torch.cat([read_set(None, side, None, split).images for split in ("validation", "held_out")])
            else:
                read = read_given_pictures([normal], side, False, most, report)
                known = read.images
                for name, reason in read.skipped.items():
                    warnings.warn(LatentpipeWarning(f"normal picture {name} was skipped: {reason}"), stacklevel=2)
            name = run.BANK if normal is None else normal.resolve().name
            detector = run.calibrate(stage, known, false_alarms, name, report)
        for name, reason in given.skipped.items():
            warnings.warn(LatentpipeWarning(f"{name} was skipped: {reason}"), stacklevel=2)
        scores, heat = detector.both(given.images, report)
    return Found(detector, given, scores, heat)


def _order(found: Found) -> list[int]:
    """Indices of the pictures, the strangest first."""
    return sorted(range(len(found.given.names)), key=lambda index: -found.scores.total[index])


def _sheet(found: Found) -> Any:
    """The page of the strangest pictures."""
    from latentpipe.explore.anomaly.heatmap import heatmap_page

    shown = _order(found)[:MOST_SHOWN]
    labels = [
        f"{found.given.names[row]}: {found.scores.total[row]:+.2f}, p {found.scores.p[row]:.3f}, "
        + ("ANOMALY" if found.scores.anomalous[row] else "normal")
        for row in shown
    ]
    return heatmap_page(found.given.images[shown], found.heat[shown], labels)


def _rows(found: Found) -> list[dict[str, Any]]:
    """One row for each picture, the strangest first."""
    scores = found.scores
    return [
        {
            "picture": found.given.names[row],
            "score": float(scores.total[row]),
            "p": float(scores.p[row]),
            "anomaly": bool(scores.anomalous[row]),
            **{part: float(values[row]) for part, values in scores.parts.items()},
        }
        for row in _order(found)
    ]


def _facts(found: Found, vae: str) -> dict[str, Any]:
    detector = found.detector
    rate, low, high = detector.rate()
    return {
        "vae": vae,
        "normal": detector.normal,
        "size_px": detector.side,
        "n": len(found.given.names),
        "flagged": int(found.scores.anomalous.sum()),
        "threshold": detector.threshold,
        "false_alarms": detector.false_alarms,
        "calibrated_on": len(detector.calibration),
        "measured_false_alarms": {"rate": rate, "low": low, "high": high, "n": detector.checked},
    }


def _table(facts: dict[str, Any], detector: Detector) -> str:
    """What people read."""
    measured = facts["measured_false_alarms"]
    lines = [
        "{flagged} of {n} pictures are unlike '{normal}' (VAE {vae}, {size_px} px)".format(**facts),
        f"threshold {detector.threshold:+.3f}: at most {detector.false_alarms:g} of normal pictures raise an alarm "
        f"(calibrated on {facts['calibrated_on']});",
        f"measured on {measured['n']} others: {measured['rate']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]",
    ]
    for row in facts["pictures"][:20]:
        verdict = "ANOMALY" if row["anomaly"] else "normal"
        lines.append(f"  {row['score']:+7.2f}  p {row['p']:.3f}  {verdict:8} {row['picture']}")
    if len(facts["pictures"]) > 20:
        lines.append(f"  ... and {len(facts['pictures']) - 20} more (--csv FILE or --json lists all)")
    return "\n".join(lines)


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    from csv import DictWriter

    from latentpipe.utils.io import atomic_file

    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
