"""latentpipe train-vae."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from latentpipe.train.config.base import Layers, Optimization, PictureData, Positive, Run, Side, Strict, Weight, Width, Widths


class Parts(Optimization):
    """As for the denoiser, in parts that fit into memory."""

    accumulate: Width | Literal["auto"] = 1
    """Parts that a step's pictures are computed in; auto: as many as the free memory asks for."""


class VAERun(Run):
    """As for the denoiser, and how memory and time are traded."""

    patience: int = Field(0, ge=0, le=10**9)
    """Stop after so many validation figures in a row without a better one, and keep the best weights; 0: never."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile: faster steps after a slow first one; needs a C++ compiler."""


class VAEShape(Strict):
    """An AutoencoderKL, or an AutoencoderTiny; downscale is 2 ** (blocks - 1)."""

    kind: Literal["kl", "tiny"] = "kl"
    """kl: AutoencoderKL; tiny: AutoencoderTiny (TAESD), which has no posterior."""
    channels: Width = 4
    """Latent channels."""
    blocks: Widths = (32, 64, 128)
    """Width of each resolution level."""
    layers_per_block: Layers = 1
    """Residual blocks at each level."""
    full_size_blocks: int = Field(1, ge=0, le=128)
    """Residual blocks of the decoder at the picture's full size, where they cost most (tiny)."""
    attention: bool = False
    """Self-attention in the middle block (kl)."""
    norm_groups: Width = 8
    """Groups of GroupNorm; divides every width (kl)."""

    @model_validator(mode="after")
    def _widths_fit(self) -> VAEShape:
        odd = [width for width in self.blocks if width % self.norm_groups]
        if self.kind == "kl" and odd:
            raise ValueError(f"norm_groups {self.norm_groups} does not divide block widths {odd}")
        if self.kind == "tiny" and len(set(self.blocks)) > 1:
            raise ValueError(f"a tiny autoencoder has one width at every level; given {list(self.blocks)}")
        return self


class VAELoss(Strict):
    """Weights of the loss terms; each is a mean over pictures, and over pixel values (3HW) where nothing else is said."""

    l1: Weight = 1.0
    """Mean absolute error of [-1, 1] values."""
    l2: Weight = 1.0
    """Mean squared error of [-1, 1] values."""
    charbonnier: Weight = 0.0
    """Mean of sqrt(error^2 + 1e-6): L1 that is smooth at zero."""
    structure: Weight = 0.0
    """1 - MS-SSIM (three scales below 176 px), a mean over windows."""
    edges: Weight = 0.0
    """Mean absolute error of the differences between neighbouring pixels, and between those two apart."""
    perceptual: Weight = 0.0
    """Distance of `perceptual_net`, one value for each picture."""
    perceptual_net: Literal["nlpd", "lpips-alex", "lpips-vgg", "lpips-squeeze", "dists"] = "nlpd"
    """nlpd needs no weights; the others read theirs from LATENTPIPE_HOME/metrics."""
    perceptual_weights: Path | None = None
    """Its weights, a safetensors file, in place of the installed ones."""
    kl: Weight = 1e-4
    """Beta: KL to N(0, I), summed over latents and divided by 3HW (not in mode distil, nor without a posterior)."""
    schedule: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    """How beta rises from 0 to `kl`."""
    ramp: float = Field(0.5, gt=0, le=1)
    """Share of the steps, or of each cycle, in which beta rises."""
    cycles: Positive = 4
    """Cycles of the cyclical schedule."""
    free_bits: Weight = 0.0
    """Bits for each latent value of a channel that cost nothing."""
    target_bits: float | None = Field(None, gt=0)
    """Steer beta (from `kl`) so that the rate is so many bits for each latent value."""
    rate: Weight = 0.0
    """For a codec: weight of the latents' bits for each pixel, with uniform noise in place of rounding."""
    step: float = Field(1.0, gt=0)
    """Width of a codec's rounding, in the VAE's own units."""
    equivariance: float = Field(0.25, ge=0, le=1)
    """Share of the steps that decode warped latents and compare with pictures that are warped alike."""
    warps: Annotated[tuple[Literal["half", "scale", "rotate", "flip"], ...], Field(min_length=1)] = ("half",)
    """The warps: half size, a random smaller size, quarter turns, mirrored."""
    spectrum: Weight = 0.0
    """Share of the latents' energy above half of Nyquist."""
    scale: Weight = 0.0
    """Mean square by which latent values exceed their bound."""
    latent: Weight = 1.0
    """Mean squared error to the teacher's latents, over latent values (mode distil)."""
    latent_noise: Weight = 0.0
    """Half of the steps decode latents with noise, of a deviation up to this one, picture by picture (in normalized units)."""

    @model_validator(mode="after")
    def _pictures_count(self) -> VAELoss:
        # structure has no gradient where a picture opposes its target, and small warped pictures are compared by these alone
        if not any((self.l1, self.l2, self.charbonnier)):
            raise ValueError("l1, l2 and charbonnier are all 0; give one of them a weight: the other terms do not teach alone")
        return self

    @model_validator(mode="after")
    def _one_rate(self) -> VAELoss:
        if self.rate and (self.kl or self.free_bits):
            raise ValueError("rate is the bits of rounded latents, kl those of a posterior's samples; set kl and free_bits to 0")
        return self

    @model_validator(mode="after")
    def _one_control(self) -> VAELoss:
        if self.target_bits is not None and (self.schedule != "constant" or self.free_bits or not self.kl):
            raise ValueError("target_bits steers a constant beta above 0; leave out schedule and free_bits")
        if self.target_bits is not None and not 1e-8 <= self.kl <= 1e4:
            raise ValueError(f"target_bits steers beta from kl, which is between 1e-8 and 1e4; given {self.kl}")
        return self


class Adversarial(Strict):
    """A patch discriminator (hinge loss)."""

    weight: Weight = 0.0
    """Weight of its term; 0: no discriminator."""
    start_step: int = Field(0, ge=0, le=10**9)
    """First step that it takes part in."""
    adaptive: bool = True
    """Multiply by the ratio of reconstruction gradient to adversarial gradient at the last layer."""
    width: Width = 32
    """Channels of its first layer."""
    layers: Layers = 2
    """Halving convolutions."""
    learning_rate: float = Field(2e-4, gt=0)
    """Of its own AdamW."""
    lecam: Weight = 0.001
    """Weight of the LeCam regularization."""


class Predicted(Strict):
    """Latents as a denoiser predicts them in one step from slightly noised ones: what a decoder meets in a pipeline."""

    model: Path | None = None
    """Name or folder of a model of the teacher's latents; left out: none."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the steps that decode them (mode distil)."""
    times: Positive = 250
    """Timesteps that they are noised to, uniform from 0 up to this one."""


class Crops(Strict):
    """Random crops: a share of whole pictures, else a square of random side, resized to `size_px`; or of `cut_px`, as it is."""

    size_px: Side = 64
    """Side of the training pictures."""
    whole: float = Field(0.6, ge=0, le=1)
    """Share of the steps that see whole pictures."""
    cut_px: Positive | None = None
    """Cut squares of this side without resizing: cheaper steps beside a share of whole pictures at `size_px`."""
    flip: bool = True
    """Mirror half of the pictures."""


class TrainVAE(Strict):
    """latentpipe train-vae"""

    data: PictureData
    run: VAERun
    optim: Parts
    mode: Literal["all", "decoder", "encoder-head", "distil"] = "all"
    """What trains: all; decoder (the latents stay); encoder-head (all but the encoder's body); distil (onto `teacher`).

    With a level more than the teacher, distil learns its latents of pictures of half the size: a decoder that enlarges."""
    parts: tuple[str, ...] = ()
    """Stages or parameters that train in place of the mode's, with * and ? (encoder.head, decoder.up.*)."""
    teacher: Path | None = None
    """Name or folder of the VAE whose latents mode distil learns."""
    new_channels: Width | None = None
    """Give the VAE of run.warm_start a new head with so many latent channels."""
    model: VAEShape = VAEShape()
    loss: VAELoss = VAELoss()
    adversarial: Adversarial = Adversarial()
    crops: Crops = Crops()
    predicted: Predicted = Predicted()

    @model_validator(mode="after")
    def _mode_is_complete(self) -> TrainVAE:
        if (self.mode == "distil") != (self.teacher is not None):
            raise ValueError("mode distil and a teacher belong together; give both or neither")
        if self.loss.rate and self.mode != "all":
            raise ValueError("loss.rate shapes the latents, so all must train; leave out mode, or the rate")
        if self.predicted.model is not None and (self.mode != "distil" or self.crops.whole < 1 or self.crops.flip):
            raise ValueError(
                "predicted.model draws whole pictures as captions say; give mode distil, crops.whole 1, crops.flip false"
            )
        if self.loss.latent_noise and self.mode != "distil":
            raise ValueError("loss.latent_noise disturbs a teacher's latents; leave it out, or give mode distil and a teacher")
        if self.mode == "distil" and not self.loss.latent:
            raise ValueError("mode distil learns the teacher's latents; give loss.latent a weight")
        if self.model.kind == "tiny" and (self.loss.target_bits or self.loss.free_bits or self.loss.schedule != "constant"):
            raise ValueError("a tiny autoencoder has no posterior; leave out loss.target_bits, free_bits and schedule")
        if self.run.warm_start is None and (self.mode in ("decoder", "encoder-head") or self.parts):
            asked = "parts" if self.parts else f"mode {self.mode}"
            raise ValueError(f"{asked} trains a part of an earlier VAE; give run.warm_start")
        if self.new_channels and (self.run.warm_start is None or self.mode not in ("all", "encoder-head")):
            raise ValueError("new_channels gives the VAE of run.warm_start a new head, which mode all or encoder-head trains")
        if self.run.patience and self.data.validation is None:
            raise ValueError("run.patience waits for validation figures; give data.validation")
        return self
