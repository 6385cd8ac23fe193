"""From evidence to a verdict: which of the five outcomes, in which words."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from latentpipe.compatibility.measure import (
    DAMAGE_DB,
    DECODE_LOSS_DB,
    DECODER_DB,
    SAME_ENCODER,
    SAME_SPACE,
    Linear,
    Outcome,
    SwapMeasurements,
    Verdict,
    comparable,
)
from latentpipe.utils.errors import short
from latentpipe.vae.latent_space import LatentSpace

FIT = "latentpipe fit-adapter --from HOST_VAE --to THIS_VAE --images DIR"
SWAP = "swap it."
BLIND_DB = 20.0  # likeness of two decodings where the pictures themselves cannot tell
COPY = 0.998  # R^2 of a per-channel map between the latents of two copies of one encoder
REPAIR = "fetch or export this VAE again, or correct scaling_factor, shift_factor, latents_mean, latents_std in its config.json."


@dataclass(frozen=True)
class SameShapeMeasurements(SwapMeasurements):
    """Of two VAEs that both encode and decode: what the rules for one shape of latents read is always there."""

    vae: float
    vae_of_host: float = field(kw_only=True)
    linear: Linear = field(kw_only=True)

    @classmethod
    def of(cls, seen: SwapMeasurements) -> SameShapeMeasurements:
        """The same measurements; ValueError where a VAE that does not work left some of them out."""
        if seen.vae is None or seen.vae_of_host is None or seen.linear is None:
            raise ValueError("A VAE without an encoder or a decoder was measured; there is nothing to compare it by.")
        return cls(**vars(seen))


def decide_by_shapes(host: LatentSpace, vae: LatentSpace) -> Verdict | None:
    """The verdict where channels and downscale alone decide, so that nothing need be read or measured; else None."""
    if comparable((host.channels, host.downscale), (vae.channels, vae.downscale)):
        return None
    return Verdict(
        "other shape",
        f"it makes {vae.channels}-channel latents at 1/{vae.downscale} size; this denoiser takes {host.channels} channels at "
        f"1/{host.downscale}.",
        f"choose a VAE of the same space ('latentpipe ls vae --fits MODEL'), fit an adapter that changes channels and scale "
        f"({FIT}), or train a denoiser for this one.",
        host,
        vae,
    )


def decide_verdict(host: LatentSpace, vae: LatentSpace, seen: SwapMeasurements) -> Verdict:
    """The verdict on a VAE of space `vae` beside a host whose own VAE has the space `host`, of the same shape."""
    outcome, reason, step = _faulty(host, vae, seen) or _compared(host, vae, SameShapeMeasurements.of(seen))
    return Verdict(outcome, reason + _size_remark(host, vae) + _remark(seen, outcome), step, host, vae, seen)


Answer = tuple[Outcome, str, str]
Found = Answer | None


def _compared(host: LatentSpace, vae: LatentSpace, seen: SameShapeMeasurements) -> Answer:
    """The answer of the first rule that has one, on two VAEs that both work."""
    for rule in (_normalization, _decoder, _same, _decoder_alone):
        if found := rule(host, vae, seen):
            return found
    return _other(host, vae, seen)


def _faulty(host: LatentSpace, vae: LatentSpace, seen: SwapMeasurements) -> Found:
    """VAEs that do not work by themselves, whatever the host."""
    if not all(value == value for value in (*seen.vae_mean, *seen.vae_std)):
        return "broken", "it encodes pictures to values that are not finite.", "load it in fp32, or fetch it again."
    if seen.vae is None:
        return "broken", "it has an encoder alone, so nothing decodes with it.", "add its decoder ('latentpipe convert')."
    if seen.unit_range is not None and seen.unit_range > max(seen.vae, seen.flat) + 3:
        return (
            "broken",
            f"it takes and gives images in [0, 1] instead of [-1, 1]: {seen.unit_range:.1f} dB in that range, "
            f"{seen.vae:.1f} dB as diffusers calls it.",
            "fold the range into its first and last convolution, or export it again for [-1, 1].",
        )
    if seen.vae < seen.flat and not _blind(seen):
        return (
            "broken",
            f"it does not rebuild pictures: {seen.vae:.1f} dB, where one colour for each picture gives {seen.flat:.1f} dB and "
            f"the host's VAE {seen.host:.1f} dB; its weights look random or belong to another architecture.",
            "fetch it again; check that every tensor was loaded.",
        )
    return None


def _normalization(host: LatentSpace, vae: LatentSpace, seen: SameShapeMeasurements) -> Found:
    """The same latents up to a gain and an offset in each channel: the declared normalization is off."""
    fit = seen.linear
    if fit.affine < COPY:
        return None
    tolerance = 0.02
    scale = [max(std, 1e-6) for std in seen.host_std]
    offset = [value / std for value, std in zip(fit.offset, scale, strict=True)]
    if all(abs(gain - 1) <= tolerance for gain in fit.gain) and all(abs(value) <= tolerance for value in offset):
        return None
    return "broken", f"{_diagnosis(vae, fit, tolerance)}; its raw values are those of the host's VAE.", REPAIR


def _diagnosis(vae: LatentSpace, fit: Linear, tolerance: float) -> str:
    """Name what went wrong, from the gains and offsets against the host's latents."""
    gains, offsets = fit.gain, fit.offset
    near = 3 * tolerance

    def close(first: list[float], second: Any) -> bool:
        return all(abs(a - b) <= near * max(1.0, abs(b)) for a, b in zip(first, second, strict=True))

    common = statistics.fmean(gains)
    uniform = close(gains, [common] * vae.channels)
    if uniform and abs(common - 1) > tolerance and close(offsets, [0.0] * vae.channels):
        return (
            f"its latents come out {short(common)} times as large as the host's: the declared scale "
            f"{short(vae.scale[0], 5)} should be "
            f"{short(vae.scale[0] / common, 5)}"
        )
    twice = [-shift * scale for shift, scale in zip(vae.shift, vae.scale, strict=True)]
    nontrivial = not close(list(vae.scale), [1.0] * vae.channels) or not close(twice, [0.0] * vae.channels)
    if nontrivial and close(gains, vae.scale) and close(offsets, twice):
        return (
            "its normalization (mean and std) is applied twice: the weights contain it already and the config declares it again "
            "(scaling_factor 1 and no shift or statistics would be right)"
        )
    if uniform and abs(common - 1) <= tolerance:
        raw = statistics.fmean(value / scale for value, scale in zip(offsets, vae.scale, strict=True))
        off = statistics.fmean(offsets)
        if any(vae.shift):
            shift = statistics.fmean(vae.shift)
            right = short(shift + raw, 4)
            return f"its latents lie off the host's by {off:+.3g}: the declared shift {short(shift, 4)} should be {right}"
        return f"its latents lie off the host's by {off:+.3g}: a shift of {short(raw, 4)} (raw units) is missing from its config"
    return (
        f"its normalization is not what the weights do: against the host's, its channels have gains {_range(gains)} "
        f"and offsets {_range(offsets)}"
    )


def _decoder(host: LatentSpace, vae: LatentSpace, seen: SameShapeMeasurements) -> Found:
    """The host's encoder, but a decoder that makes less of the host's latents than a smaller one would."""
    fit = seen.linear
    if fit.identity < SAME_SPACE or seen.host is None:
        return None
    if _blind(seen) and (seen.decoders or 0) < BLIND_DB:
        return (
            "same shape, other space",
            f"its latents are the host's (R^2 {fit.identity:.3f}), but the two decoders make different pictures of them "
            f"({seen.decoders:.1f} dB from each other).",
            "measure on pictures that the host's VAE can rebuild (--images DIR).",
        )
    if not _blind(seen) and seen.vae_of_host < seen.host - DAMAGE_DB:
        return (
            "broken",
            f"its latents are the host's (R^2 {fit.identity:.3f}), but its decoder is damaged, or another VAE's: it decodes the "
            f"host's latents at {seen.vae_of_host:.1f} dB, the host's own at {seen.host:.1f} dB.",
            "fetch or export this VAE again; to use it all the same, force the swap.",
        )
    return None


def _blind(seen: SwapMeasurements) -> bool:
    """Whether the host's own VAE rebuilds these pictures no better than one colour for each would."""
    return seen.host is not None and seen.host < seen.flat


def _same(host: LatentSpace, vae: LatentSpace, seen: SameShapeMeasurements) -> Found:
    """The same encoder (to rounding), or one near it with a decoder that reads the host's latents as well as its own."""
    fit = seen.linear
    loss = seen.vae - seen.vae_of_host
    reads = loss <= DECODE_LOSS_DB and seen.vae_of_host >= seen.flat
    if fit.identity >= SAME_ENCODER and loss <= DECODE_LOSS_DB:
        reason = f"its latents are the host's (R^2 {fit.identity:.4f}), and it decodes them at {seen.vae_of_host:.1f} dB."
        return "same space", reason, SWAP
    if fit.identity >= SAME_SPACE and reads and all(abs(gain - 1) <= 0.15 for gain in fit.gain):
        reason = (
            f"its latents are nearly the host's (R^2 {fit.identity:.3f}), and it decodes the host's at "
            f"{seen.vae_of_host:.1f} dB, its own at {seen.vae:.1f} dB."
        )
        return "same space", reason, SWAP
    return None


def _decoder_alone(host: LatentSpace, vae: LatentSpace, seen: SameShapeMeasurements) -> Found:
    """Another encoder, but a decoder that makes of the host's latents nearly what the host's own makes of them."""
    fit = seen.linear
    if seen.host is None or _blind(seen):
        return None
    if seen.vae_of_host < max(seen.host - DECODER_DB, seen.flat):
        return None
    return (
        "decoder fits",
        f"it decodes the host's latents at {seen.vae_of_host:.1f} dB, the host's own decoder at {seen.host:.1f} dB; its encoder "
        f"makes other latents (R^2 {max(0.0, fit.identity):.2f} as they are, {max(0.0, fit.full):.2f} by a linear map), so "
        "pictures to begin from are encoded by the host's own VAE.",
        SWAP,
    )


def _other(host: LatentSpace, vae: LatentSpace, seen: SameShapeMeasurements) -> Answer:
    fit = seen.linear
    if fit.permutation is not None:
        reason = f"its channels are the host's in another order: {fit.permutation}."
        return "same shape, other space", reason, f"reorder them; the linear rung of an adapter does it exactly ({FIT})."
    numbers = f"R^2 {max(0.0, fit.identity):.2f} as they are, {max(0.0, fit.full):.2f} by a linear map"
    step = f"fit an adapter ({FIT}), or tune the denoiser's first and last layer."
    moved = "its encoder has moved away from the host's" if fit.affine > 0.4 else "its latents are not the host's"
    reason = f"{moved} ({numbers}); it decodes the host's latents at {seen.vae_of_host:.1f} dB, its own at {seen.vae:.1f} dB."
    return "same shape, other space", reason, step


def _size_remark(host: LatentSpace, vae: LatentSpace) -> str:
    if host.downscale == vae.downscale:
        return ""
    times = vae.downscale / host.downscale
    return f" Its pictures are {short(times)} times as wide as the host's, from the same latents; they were compared at one size."


def _remark(seen: SwapMeasurements, outcome: Outcome) -> str:
    """What weakens a verdict, or should be looked at besides."""
    remarks = []
    blind = _blind(seen)
    if blind and seen.linear is not None:
        remarks.append(f"The host's own VAE does not rebuild these pictures ({seen.host:.1f} dB): the two were compared only.")
    if outcome == "same space" and not blind and seen.host is not None and (lost := seen.host - (seen.vae_of_host or 0)) > 1:
        remarks.append(f"It decodes them {lost:.1f} dB worse than the host's own.")
    ours, theirs = statistics.fmean(seen.vae_std), statistics.fmean(seen.host_std)
    if outcome == "same shape, other space" and not blind and not 0.4 < ours / max(theirs, 1e-6) < 2.5:
        remarks.append(
            f"Its latents have a standard deviation of {ours:.2f}, the host's {theirs:.2f}: its scaling_factor may be wrong too."
        )
    return "".join(f" {remark}" for remark in remarks)


def _range(values: list[float]) -> str:
    return f"{short(min(values))} to {short(max(values))}"
