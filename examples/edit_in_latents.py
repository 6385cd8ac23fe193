"""Move a picture along a direction of the latent space: python examples/edit_in_latents.py [PICTURE] [OUT]

The direction is the difference of the mean latents of pictures drawn for two prompts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from latentpipe import LatentPipeline
from latentpipe.utils.images import to_images, to_pixels

FROM, TO = "thumbs up light skin tone", "thumbs up dark skin tone"


@torch.no_grad()
def main(picture: str = "", out: str = "out/examples/edit.png") -> None:
    pipe = LatentPipeline.from_pretrained("emoji")
    stage = pipe.stage

    def latents_of(pictures: Sequence[Image.Image]) -> torch.Tensor:
        return stage.encode(to_images([one.convert("RGB").resize(pipe.native_size) for one in pictures]))  # B C h w

    first, second = (latents_of([one.image for one in pipe(prompt, n=4, seed=1)]).mean(0) for prompt in (FROM, TO))
    given = [Image.open(picture)] if picture else [pipe("clapping hands light skin tone", seed=1)[0].image]
    strengths = torch.linspace(0, 1.5, 4).view(-1, 1, 1, 1)
    moved = to_pixels(stage.decode(latents_of(given) + strengths * (second - first)))
    sheet = Image.new("RGB", (sum(one.width for one in moved), moved[0].height))
    for index, one in enumerate(moved):
        sheet.paste(one, (index * one.width, 0))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
