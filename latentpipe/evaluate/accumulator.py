"""What one pass over the pictures adds up: values for each picture, and sums where values would be too many."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latentpipe.evaluate.metrics.features import Features, metric_names, open_features
from latentpipe.evaluate.metrics.frechet import frechet_score, kernel_score
from latentpipe.evaluate.metrics.latents import decibels, powers, rate_bits
from latentpipe.evaluate.metrics.lpips import open_dists, open_lpips
from latentpipe.evaluate.metrics.spectrum import high_energy
from latentpipe.evaluate.metrics.ssim import WINDOW, ms_ssim, ms_ssim_name, ssim
from latentpipe.evaluate.preprocessing import radial_spectrum
from latentpipe.evaluate.protocol import Protocol, round_images
from latentpipe.evaluate.results import Better, Score
from latentpipe.evaluate.statistics import RESAMPLES
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import bytes_to_images
from latentpipe.vae.latent_space import LatentSpace

NEIGHBOURS = 2**30  # bytes of latents (fp16) that are kept to look for neighbours in
MANY = 10_000  # of them at most: distances of all pairs
KERNEL = 2000  # pictures of a kernel distance at most: it holds the kernels of all pairs

# Unit and better end by how a metric's name begins.
UNITS: dict[str, tuple[str, Better]] = {
    "PSNR": ("dB", "higher"),
    "equivariance PSNR": ("dB", "higher"),
    "equivariance error": ("", "lower"),
    "SSIM": ("", "higher"),
    "MS-SSIM": ("", "higher"),
    "L1": ("of 255", "lower"),
    "LPIPS": ("", "lower"),
    "DISTS": ("", "lower"),
}


@dataclass
class MetricNetworks:
    """Networks that were found, which of SSIM and MS-SSIM the size allows, and the reason for what is missing."""

    features: Features | None = None
    networks: list[Any] = field(default_factory=list)  # (first, second) B 3 H W in [-1, 1] -> (B), with a name
    ssim: bool = False
    ms_ssim: str = ""
    missing: dict[str, str] = field(default_factory=dict)

    def describe(self, images: torch.Tensor) -> np.ndarray:
        """Features of images, B D, float32."""
        assert self.features is not None
        return self.features(images).astype(np.float32)

    def distances(
        self, real: list[np.ndarray], made: list[np.ndarray], prefix: str = "", kernel: bool = True
    ) -> dict[str, Score]:
        """Frechet and kernel distance between features (batches of B D) of the same pictures; the kernel's of at most KERNEL."""
        assert self.features is not None
        names = [prefix + name for name in metric_names(self.features.name)]
        first, second = np.concatenate(real), np.concatenate(made)
        n = len(first)
        if n < 2:
            self.missing[names[0]] = "a distance between sets needs 2 pictures"
            return {}
        found = {names[0]: Score(*frechet_score(first, second), n, "", "lower")}
        if kernel:
            found[names[1]] = Score(*kernel_score(first[:KERNEL], second[:KERNEL]), min(n, KERNEL), "", "lower")
        return found


def open_networks(protocol: Protocol, features: str, height: int, width: int) -> MetricNetworks:
    """Whatever can be measured at this size with the weights that are installed."""
    tools = MetricNetworks()
    blank = torch.zeros(1, 3, height, width)

    def attempt(metric: str, run: Any) -> Any:
        try:
            return run()
        except UserError as error:
            tools.missing[metric] = str(error)
            return None

    tools.ssim = attempt("SSIM", lambda: ssim(blank, blank, 2.0)) is not None
    tools.ms_ssim = attempt("MS-SSIM", lambda: ms_ssim_name(height, width)) or ""
    for metric, opener in ((f"LPIPS ({protocol.lpips_net})", lambda: open_lpips(protocol.lpips_net)), ("DISTS", open_dists)):
        network = attempt(metric, opener)
        if network is not None and attempt(metric, lambda network=network: network(blank, blank)) is not None:
            tools.networks.append(network)
    found = open_features(features)  # a wrong or missing name was asked for: that is an error
    if attempt(f"distances on {features}", lambda: found(blank)) is not None:
        tools.features = found
    return tools


@dataclass
class Accumulator:
    """Sums of the main pass.

    values     by metric, one for each picture;  errors: mean squared error of uint8 values
    moments    `latents.powers` of the latents;  rate, rate_normalized: bits for each channel (B C) in the VAE's own units and
               in latents; empty without a posterior
    latents    fp16, of the first pictures (NEIGHBOURS);  features of the pictures and of the reconstructions, B D each
    energy     above half the Nyquist frequency, of picture and reconstruction;  spectra: their summed radial spectra
    """

    space: LatentSpace
    names: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    moments: list[np.ndarray] = field(default_factory=list)
    rate: list[np.ndarray] = field(default_factory=list)
    rate_normalized: list[np.ndarray] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    rebuilt_features: list[np.ndarray] = field(default_factory=list)
    energy: list[tuple[float, float]] = field(default_factory=list)
    spectra: list[torch.Tensor] = field(default_factory=list)
    positions: int = 1
    digest: Any = field(default_factory=hashlib.sha256)
    kept: int = 0  # bytes of latents

    def add(
        self, names: Sequence[str], images: torch.Tensor, rebuilt: torch.Tensor, protocol: Protocol, tools: MetricNetworks
    ) -> None:
        """Take in pictures and their reconstructions (B 3 H W, on the CPU, not clamped)."""
        before, after = round_images(images, "nearest"), protocol.to_bytes(rebuilt)
        self.names += names
        for pixels in before.permute(0, 2, 3, 1).contiguous().numpy():
            self.digest.update(repr(pixels.shape).encode() + pixels.tobytes())
        difference = before.double() - after.double()
        self.errors += difference.square().flatten(1).mean(1).tolist()
        self._append("PSNR", decibels(after, before))
        self._append("L1", difference.abs().flatten(1).mean(1))
        rounded = (bytes_to_images(before), bytes_to_images(after))
        floats = (images, rebuilt.clamp(-1, 1))
        # SSIM is not invariant to a shift, so that [-1, 1] and 0..255 give different values
        grey = (before.float(), after.float())
        if tools.ssim:
            first, second = grey if protocol.ssim_on == "bytes" else floats
            if protocol.ssim_mirrored:
                first, second = (torch.nn.functional.pad(part, (WINDOW // 2,) * 4, mode="reflect") for part in (first, second))
            self._append("SSIM", ssim(first, second, 255.0 if protocol.ssim_on == "bytes" else 2.0))
        if tools.ms_ssim:
            self._append(tools.ms_ssim, ms_ssim(*grey, 255.0))
        for network in tools.networks:
            self._append(network.name, network(*(rounded if protocol.lpips_on == "bytes" else floats)))
        if tools.features is not None:
            self.features.append(tools.describe(rounded[0]))
            self.rebuilt_features.append(tools.describe(rounded[1]))
        for one, other in zip(*rounded, strict=True):
            self.energy.append((float(high_energy(one[None])), float(high_energy(other[None]))))
        sums = torch.stack([radial_spectrum(before).sum(0), radial_spectrum(after).sum(0)])
        self.spectra = [self.spectra[0] + sums] if self.spectra else [sums]

    def add_latents(self, latents: torch.Tensor, normalized: Any, raw: Any) -> None:
        """Take in latents (B C h w) and their posteriors (mean, std), normalized and raw.

        The KL of a posterior with std 0 is infinite, so one such value is enough for the VAE to count as deterministic.
        """
        normalized, raw = ([part.cpu() for part in pair] for pair in (normalized, raw))  # some devices have no fp64
        self.positions = latents.shape[-1] * latents.shape[-2]
        self.moments.append(powers(*normalized).numpy())
        if bool((raw[1] > 0).all()):
            self.rate.append(rate_bits(*raw).numpy())
            self.rate_normalized.append(rate_bits(*normalized).numpy())
        self._keep(latents.half().cpu())

    def _keep(self, half: torch.Tensor) -> None:
        size = half.numel() * 2
        if self.kept + size <= NEIGHBOURS and sum(map(len, self.latents)) + len(half) <= MANY:
            self.latents.append(half)
            self.kept += size
        else:
            self.kept = NEIGHBOURS  # the first pictures only, without gaps

    def given(self) -> dict[str, torch.Tensor]:
        """All of it but names, digest and pixels as tensors, of a tally of one batch; `take` is the inverse."""
        found = {f"value.{metric}": torch.tensor(row, dtype=torch.float64) for metric, row in self.values.items()}
        found |= {"errors": torch.tensor(self.errors, dtype=torch.float64), "positions": torch.tensor(self.positions)}
        found |= {"energy": torch.tensor(self.energy, dtype=torch.float64)}
        arrays = {"moments": self.moments, "rate": self.rate, "rate_normalized": self.rate_normalized}
        arrays |= {"features": self.features, "rebuilt_features": self.rebuilt_features}
        found |= {name: torch.from_numpy(parts[0]) for name, parts in arrays.items() if parts}
        found |= {name: parts[0] for name, parts in (("latents", self.latents), ("spectra", self.spectra)) if parts}
        return found

    def take(self, names: Sequence[str], found: dict[str, torch.Tensor]) -> None:
        """Take in the tally of another batch: `given`, with the pictures' "bytes" (B H W 3, uint8)."""
        self.names += names
        for pixels in found["bytes"].numpy():
            self.digest.update(repr(pixels.shape).encode() + pixels.tobytes())
        for name, part in found.items():
            if name.startswith("value."):
                self._append(name.removeprefix("value."), part)
        self.errors += found["errors"].tolist()
        self.energy += [(one, other) for one, other in found["energy"].tolist()]
        for name in ("moments", "rate", "rate_normalized", "features", "rebuilt_features"):
            if name in found:
                getattr(self, name).append(found[name].numpy())
        self.spectra = [self.spectra[0] + found["spectra"]] if self.spectra else [found["spectra"]]
        self.positions = int(found["positions"])
        if "latents" in found:
            self._keep(found["latents"])

    def rates(self, area: int, missing: dict[str, str]) -> dict[str, Score]:
        """KL to N(0, I) in bits; `area`: pixels of a picture. For a VAE without a posterior the reason goes to `missing`."""
        if len(self.rate) < len(self.moments):
            missing["rate"] = "this VAE is deterministic: it has no posterior whose KL would be a rate"
            return {}
        own, normalized = (np.concatenate(parts).sum(1) for parts in (self.rate, self.rate_normalized))
        return {
            "rate": Score.of((own / area).tolist(), "bits per pixel"),
            "rate per picture": Score.of(own.tolist(), "bits"),
            "rate of normalized latents": Score.of((normalized / area).tolist(), "bits per pixel"),
        }

    def detail(self) -> dict[str, Score]:
        """High-frequency energy of all reconstructions over that of all pictures; 1: as much detail as there was."""
        energy = np.asarray(self.energy)
        if not energy[:, 0].sum() > 0:
            return {}
        n = len(energy)
        random = np.random.default_rng(0)
        sums = np.stack([energy[random.integers(0, n, n)].sum(0) for _ in range(RESAMPLES)])
        low, high = np.quantile(sums[:, 1] / np.maximum(sums[:, 0], 1e-12), (0.025, 0.975))
        value = energy[:, 1].sum() / energy[:, 0].sum()
        return {"high-frequency energy ratio": Score(float(value), float(low), float(high), n)}

    def curves(self) -> dict[str, list[float]]:
        """Mean radial spectra, and KL per channel in bits for each latent value, in the VAE's own units."""
        mean = self.spectra[0] / len(self.names)
        found = {"spectrum of pictures": mean[0].tolist(), "spectrum of reconstructions": mean[1].tolist()}
        if len(self.rate) == len(self.moments):
            found["KL per channel"] = (np.concatenate(self.rate).mean(0) / self.positions).tolist()
        return found

    def _append(self, metric: str, values: torch.Tensor) -> None:
        self.values.setdefault(metric, []).extend(values.double().tolist())
