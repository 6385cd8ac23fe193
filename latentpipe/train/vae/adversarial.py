"""The adversarial term: a patch discriminator, its losses, its weight against the reconstruction, and its own training.

Logits are B 1 h w: one for each patch of a picture, above 0 for "real".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from latentpipe.train.checkpoint import optimizer_tensors, restore_optimizer
from latentpipe.utils.errors import UserError

CLIP_NORM = 1.0
BETAS = (0.5, 0.9)
GROUPS = 8  # of a GroupNorm; widths are multiples of it


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv:1611.07004): 4 x 4 convolutions, a logit for each patch.

    `layers` of them halve the sides and two keep them: with 2 a logit sees 34 pixels and 64-pixel pictures have 14 x 14 logits,
    with 3 it sees 70 and they have 6 x 6. GroupNorm stands for BatchNorm: no statistic is shared between pictures, so none
    between processes, and real and rebuilt pictures may come in one batch.
    """

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        if width % GROUPS or width < GROUPS or layers < 1:
            raise UserError(
                f"A discriminator's width is a multiple of {GROUPS} and its layers 1 or more; given {width}, {layers}."
            )
        self.smallest_px = 3 * 2**layers
        widths = [width * min(2**level, 8) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < layers else 1
            norm = nn.GroupNorm(GROUPS, after)
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=False), norm, nn.LeakyReLU(0.2)]
        parts.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.net = nn.Sequential(*parts)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B 3 H W, [-1, 1]) to logits (B 1 h w); UserError for pictures with no whole patch."""
        if min(images.shape[-2:]) < self.smallest_px:
            raise UserError(
                f"This discriminator takes pictures of {self.smallest_px} pixels a side and more; given "
                f"{tuple(images.shape[-2:])}. Use larger crops or fewer layers."
            )
        return self.net(images)


def hinge_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """``0.5 (mean relu(1 - real) + mean relu(1 + fake))``, means over logits (Lim and Ye, arXiv:1705.02894).

    The half is that of VQGAN's implementation (arXiv:2012.09841).
    """
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def hinge_generator(fake: torch.Tensor) -> torch.Tensor:
    """``- mean fake``, over logits (Lim and Ye, arXiv:1705.02894)."""
    return -fake.mean()


def lecam(real: torch.Tensor, fake: torch.Tensor, anchor_real: float, anchor_fake: float) -> torch.Tensor:
    """``mean (real - anchor_fake)^2 + mean (fake - anchor_real)^2``, means over logits (Tseng et al., arXiv:2104.03310).

    Keeps a discriminator that sees few pictures from running away: each side's logits are tied to the other's moving mean.
    """
    return (real - anchor_fake).square().mean() + (fake - anchor_real).square().mean()


class Anchors:
    """Moving means of the logits of real and rebuilt pictures (arXiv:2104.03310); both begin at 0."""

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self.real = 0.0
        self.fake = 0.0

    def update(self, real: float, fake: float) -> None:
        """``anchor <- decay anchor + (1 - decay) mean``, with the mean logits of one batch, over all processes."""
        self.real = self.decay * self.real + (1 - self.decay) * real
        self.fake = self.decay * self.fake + (1 - self.decay) * fake


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, most: float = 1e4) -> torch.Tensor:
    """``|reconstruction| / (|adversarial| + 1e-4)`` of two gradients of the last layer, at most `most`, without gradient.

    Esser et al., arXiv:2012.09841, equation 7 (1e-4 is their implementation's; the paper prints 1e-6). It is no mean over
    pictures: with several processes both gradients are averaged over all of them before they come here.
    """
    ratio = reconstruction.detach().float().norm() / (adversarial.detach().float().norm() + 1e-4)
    return ratio.clamp(0, most)


def last_layer(vae: Any) -> nn.Parameter:
    """The weight of the decoder's last convolution that trains: where `adaptive_weight` takes its two gradients.

    ``decoder.conv_out`` where there is one, else the last weight with four axes. UserError where none trains.
    """
    decoder = vae.decoder
    found = getattr(getattr(decoder, "conv_out", None), "weight", None)
    if isinstance(found, nn.Parameter) and found.requires_grad and found.ndim == 4:
        return found
    trained = [parameter for parameter in decoder.parameters() if parameter.ndim == 4 and parameter.requires_grad]
    if not trained:
        raise UserError(
            "No convolution of the decoder trains, so the adversarial weight cannot adapt to the last layer's gradient. "
            "Train the decoder, or give the adversarial term a fixed weight."
        )
    return trained[-1]


class DiscriminatorTrainer:
    """A discriminator with its own optimizer: it gives the VAE its adversarial term, and learns from what the VAE rebuilt.

    It computes in float32, outside of autocast. Nothing that it does leaves a gradient in the VAE, and its term leaves none here.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        width: int = 32,
        layers: int = 2,
        learning_rate: float = 2e-4,
        lecam_weight: float = 0.0,
    ) -> None:
        self.net = PatchDiscriminator(width, layers).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), learning_rate, BETAS, weight_decay=0.0)
        self.anchors = Anchors()
        self.lecam_weight = lecam_weight

    def generator_term(self, rebuilt: torch.Tensor) -> torch.Tensor:
        """`hinge_generator` of reconstructions (B 3 H W): its gradient reaches them and not the discriminator."""
        fixed = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        return hinge_generator(functional_call(self.net, fixed, (rebuilt.float(),)))

    def update(
        self,
        images: torch.Tensor,
        rebuilt: torch.Tensor,
        mean: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> dict[str, float]:
        """One step on pictures and their reconstructions (B 3 H W each), whose gradients are cut off; returns what to log.

        `mean` averages a tensor over processes (torch.distributed's all-reduce): gradients, the logged values and the anchors
        go through it, so that equal shards give the step of the whole batch. A gradient that is not finite takes no step.
        """
        real, fake = self.net(torch.cat([images.detach(), rebuilt.detach()]).float()).chunk(2)
        loss = hinge_discriminator(real, fake)
        if self.lecam_weight:
            loss = loss + self.lecam_weight * lecam(real, fake, self.anchors.real, self.anchors.fake)
        parameters = list(self.net.parameters())
        flat = mean(parameters_to_vector(torch.autograd.grad(loss, parameters)))
        logged = mean(torch.stack([loss, real.mean(), fake.mean()]).detach()).tolist()
        norm = flat.norm()
        if norm.isfinite():
            flat = flat * (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0)
            for parameter, part in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.anchors.update(logged[1], logged[2])
        return {"critic": logged[0], "critic_real": logged[1], "critic_fake": logged[2]}

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of everything that a resumed run needs: weights, the optimizer's state, the anchors."""
        parts = {f"net.{name}": value for name, value in self.net.state_dict().items()} | optimizer_tensors(self.optimizer)
        parts["anchors"] = torch.tensor([self.anchors.real, self.anchors.fake], dtype=torch.float64)
        return {f"critic.{name}": value.detach().clone() for name, value in parts.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`; other entries are left alone, and the given tensors are not kept."""
        own = {name.removeprefix("critic."): value.clone() for name, value in tensors.items() if name.startswith("critic.")}
        self.net.load_state_dict({name.removeprefix("net."): own[name] for name in own if name.startswith("net.")})
        restore_optimizer(self.optimizer, own)
        self.anchors.real, self.anchors.fake = own["anchors"].tolist()
