"""The rate term of a codec's VAE: bits of the latents under a context model that learns beside it.

Rounding has no gradient, so a step adds uniform noise of the quantizer's width in its place (Balle, Laparra and Simoncelli,
arXiv:1611.01704, section 3); the model of each latent sees the latents that a decoder has before it (Minnen, Balle and Toderici,
arXiv:1809.02736; in groups of channels at each place as in Minnen and Singh, arXiv:2007.08739).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentpipe.train.checkpoint import optimizer_tensors, restore_optimizer
from latentpipe.vae.entropy_model import ContextModel, bits

LEARNING_RATE = 2e-3


class RateModel:
    """A context model with its own optimizer: it gives the VAE its rate term and learns from the same gradient."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.net = ContextModel(channels).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), LEARNING_RATE, weight_decay=0.0)

    def __call__(self, noisy: torch.Tensor) -> torch.Tensor:
        """Bits of each picture's latents (B C h w, in steps, with their noise): the mean over pictures."""
        with torch.autocast(noisy.device.type, enabled=False):
            noisy = noisy.float()
            return bits(noisy, *self.net(noisy)).sum((1, 2, 3)).mean()

    def update(self, mean: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> None:
        """One step on the gradients that the VAE's backward pass left here; none where one is not finite.

        `mean` averages a tensor over processes. AdamW takes the same step whatever weight the rate has in the loss.
        """
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = mean(parameter.grad)
        if parameters and all(parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of everything that a resumed run needs."""
        parts = {f"net.{name}": value for name, value in self.net.state_dict().items()} | optimizer_tensors(self.optimizer)
        return {f"bits.{name}": value.detach().clone() for name, value in parts.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`; other entries are left alone."""
        own = {name.removeprefix("bits."): value.clone() for name, value in tensors.items() if name.startswith("bits.")}
        self.net.load_state_dict({name.removeprefix("net."): own[name] for name in own if name.startswith("net.")})
        restore_optimizer(self.optimizer, own)
