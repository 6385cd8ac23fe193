"""Train the decoder of the shipped VAE further; its latents stay: python examples/finetune_decoder.py FOLDER [STEPS] [OUT]"""

import sys
from pathlib import Path

from latentpipe import LatentPipeline, check_swap, train_vae


def main(folder: str, steps: str = "200", out: str = "out/examples/decoder") -> None:
    trained = train_vae(
        {
            "mode": "decoder",  # the encoder is frozen, so every latent keeps its meaning
            "data": {"train": folder, "read_size_px": 64},
            "run": {"out": f"{out}/vae", "work": f"{out}/run", "warm_start": "emoji"},
            "optim": {"steps": int(steps), "batch_size": 8, "learning_rate": 3e-4, "warmup_steps": 5, "ema_decay": 0.9},
            "loss": {"l1": 0.5, "l2": 4.0, "kl": 0.0, "equivariance": 0.0},
            "crops": {"size_px": 64, "whole": 1.0, "flip": False},
        }
    )
    print(check_swap(LatentPipeline.from_pretrained("emoji"), trained))
    picture = LatentPipeline.from_pretrained("emoji", vae=trained)("red apple", seed=7)[0]
    print(picture.save(Path(out) / "apple.png"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
