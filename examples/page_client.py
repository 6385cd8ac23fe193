"""Draw through a running page ('latentpipe ui'): python examples/page_client.py [ADDRESS] [OUT]"""

import shutil
import sys
from pathlib import Path

from gradio_client import Client


def main(address: str = "http://127.0.0.1:7860", out: str = "out/examples") -> None:
    client = Client(address, verbose=False)
    print(client.predict(api_name="/health"))
    files, recipes = client.predict("red apple", seed=7, n=2, api_name="/txt2img")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for file, recipe in zip(files, recipes, strict=True):
        print(shutil.copy(file, folder), recipe["seed"], recipe["hashes"]["unet"][:16])


if __name__ == "__main__":
    main(*sys.argv[1:])
