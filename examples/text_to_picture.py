"""Draw pictures of a prompt with the embedded model: python examples/text_to_picture.py ["red apple"] [OUT]"""

import sys
from pathlib import Path

from latentpipe import LatentPipeline, replay


def main(prompt: str = "red apple", out: str = "out/examples") -> None:
    pipe = LatentPipeline.from_pretrained("emoji")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pipe(prompt, n=2, seed=7):
        path = picture.save(folder / f"{picture.recipe.seed}.png")
        print(path, picture.recipe.model, picture.recipe.steps, "steps", *picture.notes)
    # the file says how it was made: draw it again and compare every pixel
    again = replay(folder / "7.png")
    print("largest difference to the replay:", again.difference)


if __name__ == "__main__":
    main(*sys.argv[1:])
