"""Paths between two pictures, latents or prompts: straight (lerp), over the sphere (slerp), or where real latents are dense.

picture -> encode -> path in latents -> decode -> pictures;   prompts -> path in text embeddings -> denoise -> decode
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from latentpipe.data.image_set import decode, encode, read_set, side_for
from latentpipe.evaluate.metrics.latents import slerp
from latentpipe.explore.directions import components
from latentpipe.lora.prompt_tags import refuse_tags
from latentpipe.pipelines import prompt_weighting
from latentpipe.pipelines.denoise import host_for, is_classic
from latentpipe.pipelines.latent_pipeline import LatentPipeline
from latentpipe.pipelines.sampling import GuidanceCallback, Settings, Step
from latentpipe.utils.defaults import GUIDANCE, STEPS
from latentpipe.utils.errors import UserError
from latentpipe.utils.images import fit_square, to_images, to_pixels
from latentpipe.utils.logging import quiet
from latentpipe.utils.progress import ProgressCallback
from latentpipe.utils.setting_names import takes_settings
from latentpipe.vae.protocol import Stage

LINES = ("slerp", "lerp")  # they need nothing but the ends
WAYS = (*LINES, "density")
MAX_BETWEEN = 48
BANK = 600  # emoji whose latents tell where a space is dense
KEPT = 32  # principal components that the density is of
NEIGHBOURS = 8
ROUNDS = 60


@dataclass(frozen=True)
class Density:
    """How dense latents lie, in the `KEPT` first principal components of a bank.

    mean, axes  D and K D: the components of latents, as vectors of D numbers
    rows        N K: the bank's latents in them
    width       of the Gaussian around each: the median distance to the bank's NEIGHBOURS-th neighbour
    """

    mean: torch.Tensor
    axes: torch.Tensor
    rows: torch.Tensor
    width: float

    def cost(self, points: torch.Tensor) -> torch.Tensor:
        """What a step at each of `points` (M K) costs, from about 1 near the bank: 1 less the log density over that of one row.

        The log density is that of a Gaussian kernel estimate (Parzen 1962), set to 0 on a row that has no neighbours.
        """
        squares = torch.cdist(points, self.rows).square() / (2 * self.width**2)
        return 1 + torch.nn.functional.softplus(-torch.logsumexp(-squares, 1))


def density(bank: torch.Tensor) -> Density:
    """The density of a bank of latents, N C h w; UserError for fewer than NEIGHBOURS + 2, or latents that are all the same."""
    if len(bank) < NEIGHBOURS + 2:
        raise UserError(f"A path by density needs the latents of {NEIGHBOURS + 2} pictures and more; given {len(bank)}.")
    rows = bank.flatten(1).double()
    axes, variances = components(rows)
    axes = axes[:KEPT][variances[:KEPT] > 1e-9 * variances.sum()]
    near = (rows - rows.mean(0)) @ axes.T
    width = torch.cdist(near, near).kthvalue(NEIGHBOURS + 1).values.median().item()
    if not width > 0:
        raise UserError("The latents of the bank are all the same; give pictures that differ.")
    return Density(rows.mean(0), axes, near, width)


def path(
    first: torch.Tensor,
    second: torch.Tensor,
    n: int = 9,
    way: str = "slerp",
    bank: torch.Tensor | Density | None = None,
    report: ProgressCallback | None = None,
) -> torch.Tensor:
    """Latents n C h w from the first to the second (1 C h w each); the ends are these themselves, to the bit.

    way   slerp (Shoemake 1985), lerp, or density: see `dense`
    bank  what `density` goes by: latents N C h w, or their `Density`

    UserError: n outside 2 to MAX_BETWEEN, another way, no bank for density.
    """
    if way not in WAYS or not 2 <= n <= MAX_BETWEEN:
        raise UserError(f"{n} pictures by '{str(way)[:20]}'; expected 2 to {MAX_BETWEEN} by one of {', '.join(WAYS)}.")
    if first.shape != second.shape or len(first) != 1:
        raise ValueError(f"Expected the latents of one picture each, 1 C h w; given {first.shape} and {second.shape}.")
    if way == "density":
        if bank is None:
            raise UserError("A path by density needs a bank of latents to go by; give one, or go by slerp or lerp.")
        return dense(first, second, n, bank if isinstance(bank, Density) else density(bank), report)
    return torch.cat([mixed(first, second, index / (n - 1), way) for index in range(n)])


def dense(
    first: torch.Tensor, second: torch.Tensor, n: int, known: Density, report: ProgressCallback | None = None
) -> torch.Tensor:
    """A line of n latents (ends 1 C h w) pulled towards where latents are dense: a geodesic under a density-based metric.

    Lengths count more where the density p is low, sum of ``cost(p) |step|^2`` is made least from the straight line on (Bousquet,
    Chapelle and Hein, NIPS 2003, section 4; Sajama and Orlitsky, ICML 2005; with the discrete energy of Arvanitidis et al.,
    arXiv:1710.11379) by L-BFGS. Only the principal components of `known` are moved; all else goes straight.
    """
    ends = torch.cat([first, second]).flatten(1).double().cpu()
    line = torch.stack([torch.lerp(ends[0], ends[1], index / (n - 1)) for index in range(n)])
    start = (line - known.mean) @ known.axes.T
    rest = ((line[-1] - line[0]).square().sum() - (start[-1] - start[0]).square().sum()).clamp_min(0) / (n - 1) ** 2
    inner = start[1:-1].clone().requires_grad_()
    if not inner.numel() or not (start[-1] - start[0]).any():
        return torch.cat([mixed(first, second, index / (n - 1), "lerp") for index in range(n)])
    unit = (line[-1] - line[0]).square().sum() / (n - 1)
    optimizer = torch.optim.LBFGS([inner], max_iter=1, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        value = energy(torch.cat([start[:1], inner, start[-1:]]), known, float(rest)) / unit
        optimizer.zero_grad()
        value.backward()
        return value.detach()

    with torch.enable_grad():
        for done in range(ROUNDS):
            optimizer.step(closure)  # type: ignore[arg-type]
            if report is not None:
                report(done + 1, ROUNDS, "path")
    line[1:-1] += (inner.detach() - start[1:-1]) @ known.axes
    found = line.view(n, *first.shape[1:]).to(first)
    return torch.cat([first, found[1:-1], second])


def energy(points: torch.Tensor, known: Density, rest: float = 0.0) -> torch.Tensor:
    """What a path through points (n K, in the components of `known`) costs: each squared step times the cost at its middle.

    rest  squared length of each step in what the components leave out
    """
    steps = points.diff(dim=0).square().sum(1) + rest
    return (known.cost((points[1:] + points[:-1]) / 2) * steps).sum()


def between_pictures(
    stage: Stage,
    first: Image.Image,
    second: Image.Image,
    n: int = 9,
    way: str = "slerp",
    report: ProgressCallback | None = None,
    bank: torch.Tensor | Density | None = None,
    size_px: int | None = None,
) -> list[Image.Image]:
    """`n` pictures from the first to the second (their centred squares), decoded along a `path` between their latents.

    bank     for way density; None: the latents of BANK emoji
    size_px  side; None: that of `image_set.side_for`
    """
    ends = latents_of(stage, first, size_px), latents_of(stage, second, size_px)
    if way == "density" and bank is None:
        bank = encode(stage, read_set(None, side_for(stage.space.downscale, size_px), BANK).images, report)
    return to_pixels(decode(stage, path(*ends, n, way, bank, report), report))


@takes_settings
@torch.no_grad()
def between_prompts(
    pipe: LatentPipeline,
    first: str,
    second: str,
    n: int = 9,
    way: str = "slerp",
    seed: int = 0,
    num_inference_steps: int = STEPS,
    report: ProgressCallback | None = None,
    guidance_scale: float = GUIDANCE,
) -> list[Image.Image]:
    """`n` pictures from one prompt to the other: the text embeddings are mixed, the noise is that of `seed` throughout.

    The ends are what the pipeline draws of the two prompts alone. UserError for families other than Stable Diffusion 1/2, and
    for a way that is not of LINES: no bank tells where text embeddings are dense.
    """
    if way not in LINES or not 2 <= n <= MAX_BETWEEN:
        raise UserError(f"{n} pictures by '{str(way)[:20]}'; expected 2 to {MAX_BETWEEN} by one of {', '.join(LINES)}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; expected 0 to {2**32 - 1}.")
    if not is_classic(pipe.host):
        raise UserError("Prompts are interpolated with Stable Diffusion 1 and 2 only; this model is of another family.")
    for text in (first, second):
        refuse_tags(text, "a path between prompts")
    settings = pipe.check(Settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale))
    assert settings.size is not None
    pipe.loras.check_free()
    twin = host_for(pipe.host, pipe.stage, settings)
    with quiet():
        texts, none = prompt_weighting.encode(twin, [first, second], guidance_scale > 1, "")
    found = []
    for index in range(n):

        def watch(step: Step, before: int = index * settings.num_inference_steps) -> None:
            if report is not None:
                report(before + step.step, n * settings.num_inference_steps, "draw")

        words = mixed(texts[:1], texts[1:], index / (n - 1), way)
        guide = GuidanceCallback(settings, words, None if none is None else none[:1], num_inference_steps, watch)
        found.append(
            twin(
                **guide.start(), callback_on_step_end=guide, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                num_inference_steps=num_inference_steps, output_type="latent",
                generator=[torch.Generator("cpu").manual_seed(seed)],
                width=settings.size[0], height=settings.size[1],
            ).images
        )  # fmt: skip
    return [picture for latents in found for picture in to_pixels(pipe.stage.decode(latents))]


def latents_of(stage: Stage, picture: Image.Image, size_px: int | None = None) -> torch.Tensor:
    """The latents (1 C h w, on the CPU) of a picture's centred square, at `size_px` or the side of `image_set.side_for`."""
    return encode(stage, to_images(fit_square(picture, side_for(stage.space.downscale, size_px))))


def mixed(first: torch.Tensor, second: torch.Tensor, share: float, way: str = "slerp") -> torch.Tensor:
    """Two tensors (B ...) mixed by a way of LINES, `share` of the second from 0 to 1; the ends are themselves, to the bit."""
    if share in (0.0, 1.0):
        return second if share else first
    return slerp(first, second, share).to(first) if way == "slerp" else torch.lerp(first, second, share)
