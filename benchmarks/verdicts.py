"""The verdict on every third-party VAE at hand, beside several hosts, as a Markdown table.

    python benchmarks/verdicts.py [--files FOLDER]

FOLDER holds the original files of the TAESD family (github.com/madebyollin/taesd): taef2_encoder.pth, taef2_decoder.pth,
taesana_encoder.pth; default: weights/taesd in $LATENTPIPE_ASSETS. The hosts: the embedded model, and Stable Diffusion 1.5 and
FLUX.1 as tiny random pipelines of the real classes, so that their own VAE rebuilds nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def hosts() -> dict[str, Any]:
    """Names and pipelines."""
    import tiny_hosts

    from latentpipe.checkpoints.pipeline_io import load_pipeline
    from latentpipe.checkpoints.registry import find_model

    return {
        "embedded model": load_pipeline(find_model("emoji")),
        "tiny SD 1.5": tiny_hosts.sd15(),
        "tiny FLUX.1": tiny_hosts.flux(),
    }


def vaes(files: Path, work: Path) -> dict[str, Any]:
    """Names and stages of the third-party VAEs, and of the embedded one."""
    from latentpipe import VAEStage
    from latentpipe.checkpoints.convert import convert
    from latentpipe.checkpoints.registry import find_model
    from latentpipe.checkpoints.vae_file import StatedConfig
    from latentpipe.checkpoints.vae_io import load_vae

    convert([files / "taef2_encoder.pth", files / "taef2_decoder.pth"], work / "taef2", None, StatedConfig(), None)
    convert([files / "taesana_encoder.pth"], work / "taesana", None, StatedConfig(downscale=32), None)
    return {
        "TAEF2 (FLUX.2, encoder and decoder)": VAEStage(load_vae(work / "taef2")),
        "TAESANA (DC-AE f32c32, encoder)": VAEStage(load_vae(work / "taesana")),
        "embedded VAE": VAEStage(load_vae(find_model("emoji", "vae"))),
    }


def rows(files: Path) -> list[tuple[str, str, str, str]]:
    """(VAE, host, outcome, reason) of every pair."""
    from latentpipe import check_swap

    with tempfile.TemporaryDirectory() as work:
        given = vaes(files, Path(work))
        return [
            (name, host, verdict.outcome, verdict.reason)
            for name, vae in given.items()
            for host, pipe in hosts().items()
            for verdict in [check_swap(pipe, vae)]
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("LATENTPIPE_ASSETS", ".")) / "weights" / "taesd"
    parser.add_argument("--files", type=Path, default=default)
    warnings.simplefilter("ignore")
    print("| VAE | host | verdict | why |\n|---|---|---|---|")
    for row in rows(parser.parse_args().files):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
