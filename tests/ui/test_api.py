"""The named endpoints, as a program uses them."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, PngImagePlugin

from latentpipe.pipelines.metadata.recipe import read

pytestmark = pytest.mark.slow

CONTRACT = {
    "/txt2img": [
        "prompt", "negative", "steps", "guidance", "seed", "n", "width", "height", "scheduler", "model", "vae", "loras"
    ],
    "/img2img": [
        "image", "strength", "prompt", "negative", "steps", "guidance", "seed", "n", "width", "height", "scheduler", "model",
        "vae", "loras",
    ],
    "/vae_compare": ["pictures", "vaes", "side"],
    "/png_info": ["image"],
    "/vae_list": [], "/lora_list": [], "/stop": [], "/health": [],
}  # fmt: skip


def test_the_endpoints_are_these_and_no_others(client: Client) -> None:
    found = client.view_api(print_info=False, return_format="dict")
    assert isinstance(found, dict)
    named = {name: [each["parameter_name"] for each in info["parameters"]] for name, info in found["named_endpoints"].items()}
    assert named == CONTRACT
    assert found["unnamed_endpoints"] == {}


def test_a_picture_comes_as_a_png_with_its_recipe(client: Client) -> None:
    files, recipes = client.predict(prompt="red apple", seed=5, n=2, loras={"flat": 0.5}, api_name="/txt2img")
    assert [recipe["seed"] for recipe in recipes] == [5, 6]
    for file, recipe in zip(files, recipes, strict=True):
        assert json.loads(read(Path(file)).model_dump_json()) == recipe
        assert recipe["loras"] == {"flat": 0.5}
    again, _ = client.predict(prompt="red apple", seed=6, api_name="/txt2img")
    plain, _ = client.predict(prompt="red apple", seed=5, api_name="/txt2img")
    assert Image.open(again[0]).tobytes() != Image.open(files[1]).tobytes()  # the LoRA of the first call is off again
    changed, _ = client.predict(image=handle_file(plain[0]), prompt="green apple", seed=5, api_name="/img2img")
    assert read(Path(changed[0])).source is not None


def test_info_lists_and_health(client: Client) -> None:
    files, _ = client.predict(prompt="cat face", seed=1, steps=4, api_name="/txt2img")
    info = client.predict(image=handle_file(files[0]), api_name="/png_info")
    assert info["prompt"] == "cat face"
    assert info["settings"]["steps"] == 4
    assert info["recipe"]["seed"] == 1
    vaes = {each["name"]: each for each in client.predict(api_name="/vae_list")}
    assert vaes["odd"] == {"name": "odd", "channels": 4, "downscale": 2}
    assert {"flat", "pencil", "sharp", "solid"} <= {each["name"] for each in client.predict(api_name="/lora_list")}
    assert client.predict(api_name="/health")["status"] == "ready"


def test_vaes_are_compared_in_figures_and_a_sheet(client: Client) -> None:
    files, _ = client.predict(prompt="red apple", seed=1, n=3, api_name="/txt2img")
    figures, sheet = client.predict(
        pictures=[handle_file(file) for file in files], vaes=["emoji", "emoji-decoder-ft"], api_name="/vae_compare"
    )
    assert figures["n"] == 3
    assert [vae["name"] for vae in figures["vaes"]] == ["emoji", "emoji-decoder-ft"]
    assert all(len(vae["scores"]["PSNR"]) == 3 for vae in figures["vaes"])
    assert Image.open(sheet).format == "PNG"


def test_stop_ends_the_jobs_of_its_own_session_only(address: str) -> None:
    mine, other = Client(address, verbose=False), Client(address, verbose=False)
    job = mine.submit(prompt="red apple", steps=1000, n=16, seed=1, api_name="/txt2img")
    deadline = time.monotonic() + 60
    while not job.outputs() and time.monotonic() < deadline:  # the first comes when steps are done
        time.sleep(0.05)
    assert other.predict(api_name="/stop") == 0
    assert mine.predict(api_name="/stop") == 1
    files, recipes = job.result(timeout=60)
    assert len(files) == 16
    assert all(0 < recipe["stopped_after"] < 1000 for recipe in recipes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": "x", "steps": 0}, "steps is 0"),
        ({"prompt": "x", "steps": 1.5}, "whole number"),
        ({"prompt": "x", "n": 17}, "1 to 16"),
        ({"prompt": "x", "seed": 2**32}, "seed is"),
        ({"prompt": "x", "width": 63, "height": 64}, "multiples of"),
        ({"prompt": "x", "scheduler": "../x"}, "scheduler"),
        ({"prompt": "x", "model": "../../etc"}, "installed"),
        ({"prompt": "x", "vae": "/etc/passwd"}, "installed"),
        ({"prompt": "x", "vae": "odd"}, "4-channel"),
        ({"prompt": "x", "loras": {"../flat": 1.0}}, "installed"),
        ({"prompt": "x", "loras": ["flat"]}, "object"),
        ({"prompt": "x <lora:/etc/passwd:1>"}, "installed"),
        ({"prompt": "x <lora:../../weights/lora/flat.safetensors:1>"}, "installed"),
    ],
)
def test_a_wrong_argument_is_answered_in_a_sentence(client: Client, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(AppError, match=re.escape(words)):
        client.predict(**arguments, api_name="/txt2img")
    assert client.predict(api_name="/health")["jobs"] == 0


def test_curl_is_enough(address: str) -> None:
    """The lines of the README, with this server's address."""
    readme = (Path(__file__).parents[2] / "ui" / "API.md").read_text()
    [block] = re.findall(r"^```bash\n(.*?)^```", readme, re.S | re.M)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.replace("http://127.0.0.1:7860", address)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "event: complete" in done.stdout
    assert ".png" in done.stdout


def test_the_python_example_runs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "ui" / "API.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    exec(compile(block.replace("http://127.0.0.1:7860", address), "API.md", "exec"), {})
    assert Image.open("apple.png").size == (64, 64)


def test_too_much_work_is_refused_before_it_begins(client: Client) -> None:
    with pytest.raises(AppError, match=r"1024 x 1024 pixels x 1000 steps x 16 pictures: .* at most 300 million"):
        client.predict("red apple", steps=1000, n=16, width=1024, height=1024, api_name="/txt2img")
    with pytest.raises(AppError, match="side is 100000; expected 1 to 1024"):
        client.predict([], ["emoji"], 100000, api_name="/vae_compare")


def test_every_handler_of_the_page_can_say_something(address: str) -> None:
    """Messages go through gradio's queue; a handler beside it would speak to the server's terminal (the endpoints raise)."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        events = json.load(answer)["dependencies"]
    beside = [event for event in events if event["backend_fn"] and not event["queue"]]
    assert {event["api_name"] for event in beside} <= {"vae_list", "lora_list", "stop", "health"} | {"load_example"}


# --- hostile files and paths ----------------------------------------------------------------------------------


def bomb(path: Path) -> Path:
    """A picture of 100 million pixels in a few hundred kilobytes."""
    Image.new("1", (10_000, 10_000)).save(path)
    return path


def hostile(folder: Path) -> dict[str, Path]:
    """Files that are no picture, or too much of one."""
    files = {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "html": b"<html><script>alert(1)</script></html>", "empty": b"", "truncated": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "zip": b"PK\x03\x04" + b"\0" * 64, "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }  # fmt: skip
    found = {}
    for name, content in files.items():
        found[name] = folder / f"{name}.png"
        found[name].write_bytes(content)
    found["bomb"] = bomb(folder / "bomb.png")
    return found


def test_hostile_pictures_are_refused_in_a_sentence(client: Client, tmp_path: Path) -> None:
    for name, path in hostile(tmp_path).items():
        for endpoint, arguments in {
            "/png_info": {"image": handle_file(path)},
            "/img2img": {"image": handle_file(path), "prompt": "x"},
            "/vae_compare": {"pictures": [handle_file(path)], "vaes": ["emoji", "emoji-tiny"]},
        }.items():
            with pytest.raises(AppError, match=r"cannot be read|at most|pixels") as error:
                client.predict(**arguments, api_name=endpoint)
            assert "Traceback" not in str(error.value), name
    assert client.predict(api_name="/health")["status"] == "ready"


def test_metadata_loads_no_file(client: Client, tmp_path: Path) -> None:
    files, _ = client.predict(prompt="red apple", seed=1, steps=2, api_name="/txt2img")
    with Image.open(files[0]) as picture:
        recipe = json.loads(picture.info["latentpipe"]) | {"model": "../../../etc", "vae": "/etc/passwd"}
        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt("latentpipe", json.dumps(recipe))
        picture.save(tmp_path / "evil.png", pnginfo=chunk)
    info = client.predict(image=handle_file(tmp_path / "evil.png"), api_name="/png_info")
    assert (info["model"], info["vae"]) == ("etc", "passwd")  # words to show, and no path


def fetch(url: str) -> int:
    """The status that a GET is answered with."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_but_shown_files_can_be_fetched(address: str, ui_home: Path, client: Client) -> None:
    from latentpipe.checkpoints.registry import bundled_weights_dir

    client.predict(prompt="red apple", seed=1, steps=2, api_name="/txt2img")
    kept = next((ui_home / "kept").rglob("*.png"))
    secret = [
        "/etc/passwd", "../../../../etc/passwd", "....//....//etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "\\etc\\passwd",
        str(bundled_weights_dir() / "emoji" / "unet" / "diffusion_pytorch_model.safetensors"),
        str(ui_home / "vae" / "odd" / "config.json"), str(ui_home / "server.log"), str(kept),
    ]  # fmt: skip
    for path in secret:
        quoted = path.replace("\\", "%5C")
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            assert fetch(f"{address}{route}{quoted}") in (403, 404, 405), (route, path)
    given = {"path": str(kept), "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError):  # a file of the server, given as if it had been uploaded
        call(address, "png_info", [given])


def call(address: str, name: str, data: list[Any]) -> Any:
    """POST to an endpoint and read the end of its stream; AppError where that is an error."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{event}", timeout=60) as answer:
        text = answer.read().decode()
    if "event: error" in text:
        raise AppError(text)
    return text


# --- many at once -----------------------------------------------------------------------------------------------


def test_ten_clients_at_once_get_their_own_pictures(address: str) -> None:
    """For ten seconds; each ends in a picture of its own prompt and seed, or with a full queue."""
    end, wrong, drawn = time.monotonic() + 10, [], []

    def visit(number: int) -> None:
        client = Client(address, verbose=False)
        round_ = 0
        while time.monotonic() < end:
            seed = number * 1000 + round_
            try:
                files, recipes = client.predict(prompt="red apple", seed=seed, steps=2, api_name="/txt2img")
            except AppError as error:
                if "queue is full" not in str(error):
                    wrong.append(str(error))
                continue
            own = read(Path(files[0])).seed
            if (recipes[0]["seed"], own) != (seed, seed):
                wrong.append(f"{seed} got {own}")
            drawn.append(seed)
            round_ += 1

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(10)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(120)
    assert wrong == []
    assert len(drawn) >= 10
    assert Client(address, verbose=False).predict(api_name="/health")["jobs"] == 0


def test_the_example_of_a_client(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "page_client.py"
    runpy.run_path(str(script))["main"](address, str(tmp_path))
    assert "ready" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 2
