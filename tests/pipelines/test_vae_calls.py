"""How every pipeline of the installed diffusers calls its VAE: the table, and what `pipelines.families` concludes from it."""

from __future__ import annotations

import pytest
import vae_calls

from latentpipe.pipelines import families
from latentpipe.pipelines.family_table import PATCHED

PICTURES = {"AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL"}
KNOWN = dict(line.split(": ", 1) for line in vae_calls.stored()[1].splitlines())


def field(row: str, name: str) -> str:
    """One column of a row; empty where it has none."""
    return next((part.removeprefix(f"{name} ") for part in row.split("; ") if part.startswith(f"{name} ")), "")


def test_the_table_is_that_of_the_installed_diffusers() -> None:
    """Where it is not: read what differs, then write the table anew (python tests/vae_calls.py)."""
    stamp, rows = vae_calls.stored()
    if vae_calls.stamp(rows) != stamp:
        found = vae_calls.table()
        changed = {name: (KNOWN.get(name), row) for name, row in found.items() if row != KNOWN.get(name)}
        assert (changed, KNOWN.keys() - found.keys()) == ({}, set())


def test_the_pipelines_that_take_raw_values_are_listed() -> None:
    raw = {
        name
        for name, row in KNOWN.items()
        if PICTURES & set(field(row, "vae").split(", "))
        and any("without" in way or "at times" in way for way in field(row, "encodes").split(", "))
    }
    # the first two apply the factor where they call the method that encodes; the third does in the branch that encodes
    elsewhere = {
        "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "AnimateDiffSparseControlNetPipeline",
    }
    assert raw - elsewhere == families.RAW


@pytest.mark.parametrize("name", sorted(families.FAMILY_BY_CLASS))
def test_a_listed_host_honours_what_its_decoding_reads(name: str) -> None:
    host = families.FAMILY_BY_CLASS[name]
    if host.raw:  # its autoencoder is no `vae`
        assert name not in KNOWN
        return
    decodes = field(KNOWN[name], "decodes")
    if host.plain == PATCHED:  # by statistics that are weights
        assert decodes == "bare"
        return
    assert "scaling_factor" in decodes
    named_alone = name == "CogView4ControlPipeline"  # a variable of that name, which is 0
    assert ("shift_factor" in decodes) == ((host.shift and name not in families.WITHOUT_SHIFT) or named_alone)
    left_out = "latents_mean" not in decodes
    assert left_out != host.statistics or (left_out and name in families.WITHOUT_STATISTICS)
