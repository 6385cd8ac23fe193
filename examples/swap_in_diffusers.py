"""Another VAE in a diffusers pipeline, after a verdict: python examples/swap_in_diffusers.py [VAE] [OUT]"""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from latentpipe import check_swap, find_model, swap_vae


def main(vae: str = "emoji-decoder-ft", out: str = "out/examples") -> None:
    # any diffusers pipeline; here the one that ships with latentpipe
    pipe = StableDiffusionPipeline.from_pretrained(find_model("emoji"), safety_checker=None)
    verdict = check_swap(pipe, vae)
    print(verdict)
    if not verdict.fits:
        raise SystemExit(f"{vae} does not fit; nothing was swapped")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in (("own", pipe), ("swapped", swap_vae(pipe, vae))):
        seeded = torch.Generator().manual_seed(7)
        picture = drawn("red apple", num_inference_steps=20, guidance_scale=3.0, generator=seeded).images[0]
        picture.save(folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
