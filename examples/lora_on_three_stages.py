"""LoRA on text encoder, UNet and VAE decoder: python examples/lora_on_three_stages.py FOLDER [STEPS] [OUT]

FOLDER holds pictures with captions: a file NAME.txt beside each NAME.png, or metadata.jsonl.
"""

import sys
from pathlib import Path

from latentpipe import LatentPipeline, train_lora

STAGES = {"words": ["text"], "strokes": ["unet.attention"], "pixels": ["vae.decoder"]}


def main(folder: str, steps: str = "100", out: str = "out/examples/lora") -> None:
    pipe = LatentPipeline.from_pretrained("emoji")
    for name, sites in STAGES.items():
        trained = train_lora(
            {
                "model": "emoji",
                "data": {"train": folder},
                "run": {"out": f"{out}/{name}.safetensors", "work": f"{out}/{name}"},
                "optim": {"steps": int(steps), "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 5, "ema_decay": 0.9},
                "adapter": {"sites": sites, "rank": 2},
            }
        )
        # attach_lora proves that every layer fits and that the adapter moves the output
        print(name, pipe.attach_lora(trained, weight=0.8), sep="\n")
    print(pipe("red apple", seed=7)[0].save(Path(out) / "apple.png"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
