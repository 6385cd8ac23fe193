"""What a VAE's health means, in words: which figure is wrong, and which key of the training config turns it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import find_model
from latentpipe.checkpoints.tensor_source import CARD_FILE
from latentpipe.checkpoints.vae_io import open_vae
from latentpipe.data.image_folder import read_pictures
from latentpipe.evaluate.health import Health, measure
from latentpipe.utils.errors import LatentpipeWarning, UserError, counted, short
from latentpipe.utils.images import to_images
from latentpipe.utils.io import read_json
from latentpipe.vae.stage import VAEStage

COLLAPSED_SHARE = 0.9  # of channels active: below, beta is to blame; above, single channels are
UNUSED_DB = 0.01  # 0.2 % of the squared error: a decoder that loses less without a channel does not listen to it
FREE_BITS = 0.25  # a latent value of that rate has sigma 0.84 and a mean of variance 0.29, far from inactive
SMALL_SIGMA = 0.02  # of the std of the latents: noise 34 dB below the signal
WANTED_SIGMA = 0.1  # of the std: 20 dB below, enough to fill the space between pictures
BLURRED = 0.5  # of the pictures' energy above half Nyquist: 3 dB of detail gone, plain to see
LARGEST_STD = 10.0  # raw; twice the largest published one (5.5, Stable Diffusion 1.x)
LARGEST_KURTOSIS = 10.0  # excess; a Laplace distribution has 3: outliers that no noise schedule covers
LARGEST_SIGMA = 2.0  # the prior has 1: beyond it costs KL and carries nothing

Training = Mapping[str, Any]
SIDE_PX = 128
BATCH = 8  # pictures at once


@dataclass(frozen=True)
class Diagnosis:
    """What was measured on pictures of `size_px`, what is wrong with it, and what is worth knowing, in sentences."""

    health: Health
    size_px: int
    alarms: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return self.health.as_dict() | {"size_px": self.size_px, "alarms": self.alarms, "notes": self.notes}

    def __str__(self) -> str:
        lines = [f"note: {sentence}" for sentence in self.notes] + [f"ALARM: {sentence}" for sentence in self.alarms]
        return "\n".join([f"{self.health}\nmeasured at {self.size_px} px", *lines])


def diagnose_vae(vae: str | Path, folder: Path, size: int | None = None, max_images: int = 256) -> Diagnosis:
    """Measure how much each latent channel of a VAE says, on pictures of a folder, and judge it.

    vae     name, folder or file
    folder  pictures; those that cannot be read are told in a warning
    size    side in pixels that they are measured at; None: 128, or the next multiple that the VAE takes
    max_images    the first so many files only
    """
    path = find_model(vae, "vae")
    file = open_vae(path)
    unit = file.space.downscale
    side = -(-SIDE_PX // unit) * unit if size is None else size
    if side % unit or side < 1 or max_images < 1:
        raise UserError(
            f"Given --size {side}, --most {max_images}; expected a size that is a multiple of {unit} (this VAE's "
            f"downscale), and at least one picture."
        )
    pictures = read_pictures(Path(folder), side, max_images)
    if pictures.skipped:
        warnings.warn(LatentpipeWarning(f"{folder}: {pictures.report()}"), stacklevel=2)
    found = measure(VAEStage(file.build(), file.space), to_images(pictures.pixels).split(BATCH))
    training = _training_of(path)
    return Diagnosis(found, side, alarms(found, training), notes(found, training))


def _training_of(path: Path) -> dict[str, float]:
    """The loss weights that a VAE's card names, by their config keys; empty where there is no card."""
    card = path / CARD_FILE
    if not card.is_file():
        return {}
    weights = read_json(card).get("loss")
    known = weights.items() if isinstance(weights, dict) else ()
    return {f"loss.{name}": value for name, value in known if isinstance(value, int | float)}


def alarms(health: Health, training: Training | None = None) -> list[str]:
    """What is wrong, one sentence each, with the numbers and the knob to turn; empty for a healthy VAE.

    training  the run's settings by their config keys ("loss.kl", "loss.l2", ...), for advice with numbers
    """
    training = training or {}
    found = [_inactive(health, training), _ignored(health), _blur(health), _unbounded(health), _exploding(health)]
    return [sentence for sentence in found if sentence]


def notes(health: Health, training: Training | None = None) -> list[str]:
    """What is worth knowing and wrong only for some uses: posteriors that are points.

    Those serve latent diffusion well, whose prior is learnt afterwards; they are nothing to sample from directly.
    """
    if health.sigma is None:
        return []
    relative = max(sigma / max(std, 1e-12) for sigma, std in zip(health.sigma, health.std, strict=True))
    if relative >= SMALL_SIGMA or not any(health.active):
        return []
    # in a linear VAE sigma^2 = beta * decoder variance / eigenvalue, so beta goes with the square
    raise_by = (WANTED_SIGMA / relative) ** 2
    beta = (training or {}).get("loss.kl")
    to = f"from {beta:.3g} to about {_rounded(beta * raise_by)}" if beta else f"about {_rounded(raise_by)}-fold"
    kl = sum(health.kl_bits or ()) / len(health.sigma)
    return [
        f"this posterior is a point: sigma is at most {relative:.2g} of the std of the latents, {kl:.1f} bits for each latent "
        f"value. z ~ N(0, I) will give no pictures; a denoiser trained on these latents will. Where that is not what they are "
        f"for, raise loss.kl {to}."
    ]


def linear_threshold(health: Health, training: Training) -> float | None:
    """The loss.kl above which a linear VAE would leave a channel inactive; None where the weights are not known.

    A linear VAE with decoder variance s^2 drops the mode of eigenvalue l where ``beta s^2 >= l`` (Lucas et al.,
    arXiv:1911.02469). Here the modes are those of the pictures' patches and the smallest of the C largest decides. The loss
    ``l1 |e| + l2 e^2 + kl KL`` per pixel value has ``1 / (2 s^2) = l2 + l1 / (sqrt(2 pi) r)``: for a Gaussian error of
    variance v = r^2, E|e| = sqrt(2 v / pi) has that slope in v; r is the error at hand.
    """
    if not health.patch_variances or not health.rms or "loss.kl" not in training:
        return None
    weight = training.get("loss.l2", 0.0) + training.get("loss.l1", 0.0) / (math.sqrt(2 * math.pi) * health.rms)
    found = 2 * weight * health.patch_variances[-1]
    return found if found > 0 else None


def _inactive(health: Health, training: Training) -> str:
    dead = [index for index, active in enumerate(health.active) if not active]
    c = len(health.active)
    if not dead:
        return ""
    if health.kl_bits is None:
        return (
            f"{_channels(dead)} of {c} {_are(dead)} constant over pictures, in an autoencoder without a posterior: lower "
            f"optim.learning_rate, or train with fewer channels."
        )
    kl = max(health.kl_bits[index] for index in dead)
    if health.active_share >= COLLAPSED_SHARE:
        return (
            f"{_channels(dead)} of {c} {_are(dead)} dead (KL at most {kl:.2g} bits): use loss.free_bits {FREE_BITS}, "
            f"or train with {counted(c - len(dead), 'channel')}."
        )
    cures = f"or use loss.free_bits {FREE_BITS}, or loss.target_bits {FREE_BITS}"
    return f"{len(dead)} of {c} channels are inactive (KL at most {kl:.2g} bits each): {_lower(health, training)}, {cures}."


def _lower(health: Health, training: Training) -> str:
    """How far beta is to fall: under the linear threshold, and to a tenth where that says nothing."""
    beta = training.get("loss.kl")
    if not beta:
        return "lower beta (loss.kl) tenfold"
    threshold = linear_threshold(health, training)
    under = beta / 10 if threshold is None or threshold >= beta else threshold
    return f"lower beta (loss.kl) from {beta:.3g} to under {_rounded(under)}"


def _ignored(health: Health) -> str:
    if health.use_db is None:
        return ""
    pairs = zip(health.active, health.use_db, strict=True)
    unused = [index for index, (active, use) in enumerate(pairs) if active and use < UNUSED_DB]
    if not unused:
        return ""
    return (
        f"the decoder does not use {_channels(unused)}, although {_are(unused, 'it varies', 'they vary')}: without, PSNR falls "
        f"by less than {UNUSED_DB:g} dB. Train longer, or with a higher optim.learning_rate, or with fewer channels."
    )


def _blur(health: Health) -> str:
    ratio = health.high_frequency
    if ratio is None or ratio >= BLURRED:
        return ""
    return (
        f"the reconstruction is blurred: it has {ratio:.0%} of the pictures' energy above half the Nyquist frequency "
        f"(expected {BLURRED:.0%} and more). Lower loss.kl, or add loss.structure, loss.perceptual or adversarial.weight."
    )


def _unbounded(health: Health) -> str:
    std, kurtosis = max(health.std), max(health.kurtosis)
    if std <= LARGEST_STD and kurtosis <= LARGEST_KURTOSIS:
        return ""
    worst, what = (health.std, "std") if std > LARGEST_STD else (health.kurtosis, "excess kurtosis")
    limit = LARGEST_STD if what == "std" else LARGEST_KURTOSIS
    return (
        f"the latents are not bounded: channel {worst.index(max(worst))} has {what} {short(max(worst))} (usual: "
        f"at most {limit:g}). "
        f"Raise loss.kl, or lower optim.learning_rate."
    )


def _exploding(health: Health) -> str:
    if health.sigma is None or max(health.sigma) <= LARGEST_SIGMA:
        return ""
    worst = health.sigma.index(max(health.sigma))
    return (
        f"sigma explodes: channel {worst} has {short(health.sigma[worst])}, the prior has 1 and more than "
        f"{LARGEST_SIGMA:g} carries "
        f"nothing. Raise loss.kl, which pulls it back, or lower optim.learning_rate."
    )


def _channels(indices: list[int]) -> str:
    return f"channel{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _are(indices: list[int], one: str = "is", several: str = "are") -> str:
    return one if len(indices) == 1 else several


def _rounded(value: float) -> str:
    """Two digits, without an exponent where that is short: 260, 0.0042, 3e-06."""
    return f"{float(f'{value:.2g}'):g}"
