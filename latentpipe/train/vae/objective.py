"""What a VAE is trained for: the weighted terms by name, whose sum is minimized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latentpipe.evaluate.health import watch
from latentpipe.train import losses
from latentpipe.train.config import TrainVAE, VAELoss
from latentpipe.train.distributed import DistributedContext
from latentpipe.train.loop import Losses
from latentpipe.train.vae.adversarial import DiscriminatorTrainer, adaptive_weight, last_layer
from latentpipe.train.vae.kl import BetaController, beta_at, kl_channels, per_pixel_value, with_free_bits
from latentpipe.train.vae.perceptual import perceptual
from latentpipe.train.vae.rate import RateModel
from latentpipe.vae.latent_space import LatentSpace

Taught = tuple[torch.Tensor, torch.Tensor]
SMALLEST_PX = {"structure": 11, "perceptual": 32}  # sides of warped pictures below which a term sits the step out

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Objective:
    """The loss terms of a config, and what they carry from step to step: beta's controller and the discriminator.

    critic  the discriminator; None where the config gives its term no weight
    """

    def __init__(self, config: TrainVAE, vae: Any, team: DistributedContext) -> None:
        self.loss, self.steps, self.vae, self.team = config.loss, config.optim.steps, vae, team
        self.downscale = LatentSpace.of(vae).downscale
        self.terms = picture_terms(config.loss, team.device)
        self.rate = BetaController(config.loss.target_bits, config.loss.kl) if config.loss.target_bits is not None else None
        self.bits = RateModel(LatentSpace.of(vae).channels, team.device) if config.loss.rate else None
        self.adversarial = config.adversarial
        self.critic: DiscriminatorTrainer | None = None
        if config.adversarial.weight:
            if config.adversarial.adaptive:
                last_layer(vae)  # refused now where it does not train
            torch.manual_seed(config.run.seed)  # the same discriminator in every process, and after every resume
            shape = config.adversarial
            self.critic = DiscriminatorTrainer(team.device, shape.width, shape.layers, shape.learning_rate, shape.lecam)
        self.watched: list[dict[str, float]] = []  # the posteriors of the step's parts

    def beta(self, step: int) -> float:
        """The weight of the KL at a step."""
        if self.rate is not None:
            return self.rate.beta
        return beta_at(self.loss.schedule, self.loss.kl, step, self.steps, self.loss.ramp, self.loss.cycles)

    def discriminator_active(self, step: int) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.critic is not None and step >= self.adversarial.start_step

    def __call__(
        self,
        images: torch.Tensor,
        rebuilt: torch.Tensor,
        posterior: Any,
        step: int,
        warped: bool,
        teacher: Taught | None,
        rounded: torch.Tensor | None = None,
    ) -> Losses:
        """The weighted terms.

        images, rebuilt  B 3 H W, both warped on a step of the equivariance term (the discriminator sits those out)
        posterior        of the pictures before any warp, or raw latents
        teacher          mean and standard deviation that they should have (distillation; the prior has no say then)
        rounded          a codec's raw latents with their uniform noise, before any warp
        """
        rebuilt = rebuilt.float()
        found = {
            name: weight * term(images, rebuilt)
            for name, (weight, term) in self.terms.items()
            if not warped or images.shape[-1] >= SMALLEST_PX.get(name, 0)
        }
        mean = posterior if isinstance(posterior, torch.Tensor) else posterior.mean
        if self.discriminator_active(step) and not warped:
            found["adversarial"] = self._adversarial(rebuilt, torch.stack(list(found.values())).sum())
        if teacher is not None:
            match = losses.latent_match(mean, teacher[0])
            if not isinstance(posterior, torch.Tensor):
                match = match + losses.latent_match(posterior.std, teacher[1])
            found["latent"] = self.loss.latent * match
        elif not isinstance(posterior, torch.Tensor) and (self.loss.kl or self.loss.free_bits):
            found["kl"] = self._kl(posterior, step)
        if self.bits is not None and rounded is not None:
            pixels = rounded.shape[-1] * rounded.shape[-2] * self.downscale**2
            found["rate"] = self.loss.rate * self.bits(rounded / self.loss.step) / pixels
        for name, term in (("spectrum", losses.spectrum), ("scale", losses.outliers)):
            weight = getattr(self.loss, name)
            if weight:
                found[name] = weight * term(mean)
        return found

    def end_step(self, step: int, pair: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, float]:
        """What follows the VAE's backward pass: the controller and the discriminator learn; figures for the log.

        pair  the step's pictures and reconstructions, B 3 H W each; None where the discriminator sat the step out
        """
        figures: dict[str, float] = {}
        if self.watched:
            names = list(self.watched[0])
            parts = torch.tensor([list(part.values()) for part in self.watched], device=self.team.device)
            figures = dict(zip(names, self.team.mean(parts.mean(0)).tolist(), strict=True)) | {"beta": self.beta(step)}
            self.watched.clear()
            if self.rate is not None:
                self.rate.update(figures["kl_bits_per_latent"])
        if self.bits is not None:
            self.bits.update(self.team.mean)
        if self.critic is not None and pair is not None:
            figures |= self.critic.update(*pair, self.team.mean)
        return figures

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        found = self.critic.tensors() if self.critic is not None else {}
        found |= self.bits.tensors() if self.bits is not None else {}
        if self.rate is not None:
            found["rate.beta"] = torch.tensor([self.rate.state()], dtype=torch.float64)
        return found

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        if self.critic is not None:
            self.critic.restore(tensors)
        if self.bits is not None:
            self.bits.restore(tensors)
        if self.rate is not None:
            self.rate.restore(tensors["rate.beta"].item())

    def _kl(self, posterior: Any, step: int) -> torch.Tensor:
        """Beta times the KL, summed over latents (a channel below its free bits counts as those) and divided by 3HW."""
        channels = kl_channels(posterior.mean, posterior.logvar)
        self.watched.append(watch(posterior.mean.detach(), posterior.logvar.detach()))
        total = with_free_bits(channels, self.loss.free_bits, self.team.mean(channels)) if self.loss.free_bits else channels.sum()
        return self.beta(step) * per_pixel_value(total, 1, 3 * self.downscale**2)

    def _adversarial(self, rebuilt: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        assert self.critic is not None
        term = self.critic.generator_term(rebuilt)
        if not self.adversarial.adaptive:
            return self.adversarial.weight * term
        last = last_layer(self.vae)
        # of all processes' pictures, so that every process takes the weight that one alone would
        gradients = [self.team.mean(torch.autograd.grad(loss, last, retain_graph=True)[0]) for loss in (reconstruction, term)]
        return self.adversarial.weight * adaptive_weight(gradients[0], gradients[1]) * term


def picture_terms(loss: VAELoss, device: torch.device) -> dict[str, tuple[float, Term]]:
    """Weight and function of every term that compares two pictures and has a weight."""
    named: dict[str, Term] = {"l1": losses.l1, "l2": losses.l2, "charbonnier": losses.charbonnier}
    named |= {"structure": losses.ms_ssim_loss, "edges": losses.edges}
    found = {name: (getattr(loss, name), term) for name, term in named.items() if getattr(loss, name)}
    if loss.perceptual:
        distance = perceptual(loss.perceptual_net, loss.perceptual_weights, device)
        found["perceptual"] = (loss.perceptual, lambda images, rebuilt: distance(images, rebuilt).mean())
    return found
