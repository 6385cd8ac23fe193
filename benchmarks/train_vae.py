"""Pictures per second of train-vae: python benchmarks/train_vae.py [--rounds 5] [--steps 12] [--warmup 3] [--json FILE]

One process, the contenders one after the other in every round, the same AutoencoderKL (that of configs/emoji-vae.yaml) and
the same batch. The ratios are taken within each round.

ours            `latentpipe train-vae` with that config, from the first step's reading to the last step's log line: pictures
                of 128 px, cropped and resized, EMA, spike guard, log. A quarter of its steps decode at half the size (loss.
                equivariance 0.25); every round counts exactly that share.
ours, no warps  the same with loss.equivariance 0: every step decodes at the full size, as the others do
ours, fp32      no warps and run.precision fp32: what a processor without bf16 units gets
plain           fp32, L1 + L2 + KL of a posterior sample, AdamW; pictures in memory, no EMA, no clipping
peer            the work of diffusers' train_autoencoderkl.py at its defaults, before its discriminator starts (step 50,001):
                fp32, summed L2, LPIPS (vgg) under no_grad, KL, the discriminator's forward pass, two autograd.grad passes to
                the last layer, the backward pass through both, clipping, EMA; pictures in memory, no dataloader. LPIPS has
                its architecture and random weights: the time is the same. Afterwards it is slower still: only every second
                step then trains the VAE.

Not in the figures: warm-up steps, checkpoints and sheets. train-vae measures gradient shares every 50 steps; a 50th of what
its first step takes longer than the others is charged to every step of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from latentpipe.evaluate.metrics.lpips import LPIPS
from latentpipe.train.config import TrainVAE, load
from latentpipe.train.loop import generator_for, has_bf16_units
from latentpipe.train.vae.adversarial import PatchDiscriminator, adaptive_weight, hinge_generator
from latentpipe.train.vae.augment import draw_crop
from latentpipe.train.vae.model import new_vae
from latentpipe.train.vae.train import SHARES_EVERY, train_vae
from latentpipe.utils.images import bytes_to_images

CONFIG = Path(__file__).parent.parent / "configs" / "emoji-vae.yaml"
FILES = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AGAINST = ("plain", "peer")

Step = Callable[[], None]


def pictures(side: int) -> torch.Tensor:
    """FILES smooth pictures with some noise, uint8 N 3 side side."""
    numbers = torch.Generator().manual_seed(0)
    coarse = torch.rand(FILES, 3, 8, 8, generator=numbers)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic") + 0.03 * torch.randn(FILES, 3, side, side, generator=numbers)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def variant(config: TrainVAE, **values: Any) -> TrainVAE:
    """The config with some values replaced: variant(config, loss__equivariance=0.0)."""
    plain = config.model_dump()
    for name, value in values.items():
        section, key = name.split("__")
        plain[section][key] = value
    return TrainVAE.model_validate(plain)


def warped_steps(config: TrainVAE, steps: range) -> int:
    """How many of a run's steps decode warped latents: the draws that train-vae makes for a step, in its order."""
    found = 0
    for step in steps:
        generator = generator_for(config.run.seed, step)
        draw_crop(config.optim.batch_size, config.data.read_size_px, config.crops, generator)
        found += torch.rand((), generator=generator).item() < config.loss.equivariance
    return found


def with_usual_share(config: TrainVAE, steps: range, first: int) -> TrainVAE:
    """The config with the next seed from `first` whose counted steps hold the usual share of warped ones."""
    wanted = round(config.loss.equivariance * len(steps))
    for seed in itertools.count(first):
        found = variant(config, run__seed=seed)
        if warped_steps(found, steps) == wanted:
            return found
    raise AssertionError


def ours(config: TrainVAE, folder: Path, warmup: int, number: int) -> float:
    """Seconds for each step of a run of train-vae, read from its log."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        counted = range(warmup, config.optim.steps)
        config = variant(config, run__out=Path(place) / "vae", run__work=Path(place) / "work")
        config = with_usual_share(config, counted, 1000 * number)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            train_vae(config)
        rows = [json.loads(line) for line in (config.run.work / "log.jsonl").read_text().splitlines()]
    at = [0.0, *(row["seconds"] for row in rows if "seconds" in row)]
    mean = (at[-1] - at[warmup]) / len(counted)
    return mean + max(0.0, at[1] - mean) / SHARES_EVERY


def timed(step: Step, steps: int, warmup: int) -> float:
    """Seconds for each step after the warm-up."""
    for _ in range(warmup):
        step()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


def plain_step(config: TrainVAE, images: torch.Tensor) -> Step:
    """A straightforward loop's step; as a loop does, it reads the loss."""
    vae = new_vae(config.model, config.crops.size_px).to(DEVICE).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)

    def step() -> None:
        x = images[torch.randint(len(images), (config.optim.batch_size,))].to(DEVICE)
        posterior = vae.encode(x).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        loss = config.loss.l1 * F.l1_loss(rebuilt, x) + config.loss.l2 * F.mse_loss(rebuilt, x) + config.loss.kl * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def peer_step(config: TrainVAE, images: torch.Tensor) -> Step:
    """The work of a step of train_autoencoderkl.py before its discriminator starts (the module's docstring lists it)."""
    from diffusers.training_utils import EMAModel

    vae = new_vae(config.model, config.crops.size_px).to(DEVICE).train()
    critic = with_batch_norm(PatchDiscriminator(64, 3)).to(DEVICE).train()
    lpips = LPIPS("vgg").to(DEVICE).eval()
    for module in lpips.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # activations stay of usual size, so no slow tiny numbers
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4.5e-6, weight_decay=1e-2)
    average = EMAModel(vae.parameters())
    average.to(DEVICE)

    def step() -> None:
        x = images[torch.randint(len(images), (config.optim.batch_size,))].to(DEVICE)
        posterior = vae.encode(x).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        with torch.no_grad():
            distance = lpips(rebuilt, x).view(-1, 1, 1, 1)
        reconstruction = (F.mse_loss(rebuilt, x, reduction="none") + 0.5 * distance).sum() / len(x)
        kl = posterior.kl().sum() / len(x)
        adversarial = hinge_generator(critic(rebuilt))
        last = vae.decoder.conv_out.weight
        gradients = [torch.autograd.grad(term, last, retain_graph=True)[0] for term in (reconstruction, adversarial)]
        loss = reconstruction + 1e-6 * kl + 0.0 * adaptive_weight(*gradients) * adversarial
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(vae.parameters())
        loss.item()

    return step


def with_batch_norm(critic: PatchDiscriminator) -> PatchDiscriminator:
    """The discriminator with the normalization that the peer's has."""
    for index, module in enumerate(critic.net):
        if isinstance(module, nn.GroupNorm):
            critic.net[index] = nn.BatchNorm2d(module.num_channels)
    return critic


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Pictures per second of every contender in every round."""
    config = variant(load(CONFIG, TrainVAE), data__train=folder, data__validation=None, optim__steps=args.warmup + args.steps)
    for index, picture in enumerate(pictures(config.data.read_size_px)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
    images = bytes_to_images(pictures(config.crops.size_px))
    unwarped = variant(config, loss__equivariance=0.0)
    runs = {"ours": config, "ours, no warps": unwarped, "ours, fp32": variant(unwarped, run__precision="fp32")}
    steps = {"plain": plain_step(config, images), "peer": peer_step(config, images)}
    with tempfile.TemporaryDirectory() as work:
        contenders: dict[str, Any] = {
            name: lambda number, run=run: ours(run, Path(work), args.warmup, number) for name, run in runs.items()
        } | {name: lambda number, step=step: timed(step, args.steps, args.warmup) for name, step in steps.items()}
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(args.rounds):
            for name, contender in contenders.items():
                found[name].append(config.optim.batch_size / contender(number))
    return found


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def spread(values: list[float], digits: int) -> str:
    """Median (least to most)."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each contender in a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.warmup) < 1:
        parser.error("--rounds, --steps and --warmup are 1 or more")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(args, Path(folder))
    ratios = {
        f"{name} / {other}": [a / b for a, b in zip(rates[name], rates[other], strict=True)]
        for name in rates
        for other in AGAINST
        if name not in AGAINST
    }
    config = load(CONFIG, TrainVAE)
    print(f"batches of {config.optim.batch_size} at {config.crops.size_px} px; median (least to most) of {args.rounds} rounds\n")
    print("| | images/s | / plain | / peer |")
    print("|---|---|---|---|")
    for name, values in rates.items():
        versus = [spread(ratios[f"{name} / {other}"], 2) if name not in AGAINST else "" for other in AGAINST]
        print(f"| {name} | {spread(values, 1)} | {' | '.join(versus)} |")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor()
    units = "with" if has_bf16_units() else "without"
    print(f"\nLPIPS of the peer: its architecture, random weights. {units} bf16 units: precision auto is ", end="")
    print("bf16" if has_bf16_units() else "fp32")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}")
    if args.json:
        about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "bf16": has_bf16_units()}
        about |= {"batch": config.optim.batch_size, "size_px": config.crops.size_px, "steps": args.steps}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "images_per_second": rates, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
