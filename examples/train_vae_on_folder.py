"""Train a small VAE on a folder of pictures and measure it: python examples/train_vae_on_folder.py FOLDER [STEPS] [OUT]"""

import sys
from pathlib import Path

from latentpipe import diagnose_vae, evaluate_vae, train_vae


def main(folder: str, steps: str = "300", out: str = "out/examples/small-vae") -> None:
    # the keys of configs/small-vae.yaml; a path of such a file does as well
    trained = train_vae(
        {
            "data": {"train": folder, "read_size_px": 64},
            "run": {"out": f"{out}/vae", "work": f"{out}/run"},
            "optim": {"steps": int(steps), "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
            "model": {"channels": 4, "blocks": [16, 32, 64]},
            "loss": {"kl": 1e-4, "equivariance": 0.0},
            "crops": {"size_px": 64, "whole": 1.0, "flip": False},
        }
    )
    print(evaluate_vae(trained, Path(folder), max_images=64).scores["PSNR"])
    for sentence in diagnose_vae(trained, Path(folder), size=64, max_images=64).alarms:
        print("ALARM:", sentence)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
