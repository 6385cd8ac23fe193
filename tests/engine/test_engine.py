"""The engine's events, cancelling, and replay."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import draw_shape, edit_json, grey_levels, tiny_vae
from PIL import Image, PngImagePlugin

from latentpipe import Engine, Finished, LatentPipeline, StepDone, UserError, replay
from latentpipe.engine.jobs import device

PROMPT = "red circle"


def workers() -> list[threading.Thread]:
    """Threads beside the main one that still run a job."""
    return [thread for thread in threading.enumerate() if "_work" in thread.name]


# --- events -------------------------------------------------------------------------------------------------


def test_events_come_in_order_and_finished_is_last(pipe: LatentPipeline) -> None:
    *steps, last = Engine(pipe).run(PROMPT, seed=3, num_inference_steps=6)
    assert isinstance(last, Finished)
    assert last.seconds >= 0
    assert all(isinstance(event, StepDone) for event in steps)
    numbers = [event.step for event in steps if isinstance(event, StepDone)]
    assert numbers == sorted(set(numbers))
    assert {event.steps for event in steps if isinstance(event, StepDone)} <= {6}
    assert all(event.eta_s >= 0 for event in steps if isinstance(event, StepDone))
    assert grey_levels(last.pictures[0].image, pipe(PROMPT, seed=3, num_inference_steps=6)[0].image) == 0


def test_previews_are_pictures_of_the_estimate(pipe: LatentPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe.engine import engine

    monkeypatch.setattr(engine, "PREVIEW_SECONDS", 0.0)
    *steps, last = Engine(pipe).run(PROMPT, previews=True, seed=3, num_inference_steps=3)
    shown = [event.preview for event in steps if isinstance(event, StepDone)]
    assert shown  # a slow reader misses some, but never the newest
    assert all(picture is not None and picture.size == (256, 256) for picture in shown)
    kept: list[torch.Tensor] = []
    pipe(PROMPT, seed=3, num_inference_steps=3, on_step=lambda step: kept.append(step.latents.clone()))
    assert grey_levels(shown[-1], pipe.preview(kept[-1])) == 0  # type: ignore[arg-type]
    assert isinstance(last, Finished)
    plain = list(Engine(pipe).run(PROMPT, seed=3, num_inference_steps=3))
    assert all(event.preview is None for event in plain if isinstance(event, StepDone))


def test_previews_are_rationed(pipe: LatentPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentpipe.engine import engine

    drawn: list[Any] = []
    original = LatentPipeline.preview
    monkeypatch.setattr(engine, "PREVIEW_SECONDS", 1e9)
    monkeypatch.setattr(LatentPipeline, "preview", lambda self, latents: drawn.append(1) or original(self, latents))
    list(Engine(pipe).run(PROMPT, previews=True, seed=3, num_inference_steps=5))
    assert len(drawn) <= 1


def test_cancel_keeps_the_partial_pictures(pipe: LatentPipeline) -> None:
    cancel = threading.Event()
    cancel.set()
    events = list(Engine(pipe).run(PROMPT, cancel=cancel, n=2, seed=3, num_inference_steps=50))
    last = events[-1]
    assert isinstance(last, Finished)
    assert len(last.pictures) == 2
    assert [picture.recipe.stopped_after for picture in last.pictures] == [1, 1]


def test_cancel_between_steps_stops_soon(pipe: LatentPipeline) -> None:
    cancel = threading.Event()
    last: Any = None
    for event in Engine(pipe).run(PROMPT, cancel=cancel, seed=3, num_inference_steps=1000):
        cancel.set()
        last = event
    assert isinstance(last, Finished)
    assert last.pictures[0].recipe.stopped_after < 1000


def test_closing_the_iterator_ends_the_worker(pipe: LatentPipeline) -> None:
    events = Engine(pipe).run(PROMPT, seed=3, num_inference_steps=1000)
    assert isinstance(next(events), StepDone)
    assert workers()
    events.close()  # type: ignore[attr-defined]
    assert not workers()
    assert device.length == 0
    assert isinstance(list(Engine(pipe).run(PROMPT, seed=3, num_inference_steps=1))[-1], Finished)


def test_an_exception_in_the_reader_ends_the_worker(pipe: LatentPipeline) -> None:
    def read() -> None:
        for _ in Engine(pipe).run(PROMPT, seed=3, num_inference_steps=1000):
            raise KeyError("the reader's own")

    with pytest.raises(KeyError, match="own"):
        read()
    assert not workers()


def test_an_error_in_the_worker_is_raised_at_the_reader(pipe: LatentPipeline) -> None:
    with pytest.raises(UserError, match="steps is 0"):
        list(Engine(pipe).run(PROMPT, seed=3, num_inference_steps=0))
    with pytest.raises(UserError, match="no setting 'colour'"):
        list(Engine(pipe).run(PROMPT, colour="red"))
    assert not workers()
    assert device.length == 0


def test_one_job_at_a_time(pipe: LatentPipeline) -> None:
    running, most = 0, 0
    guard = threading.Lock()

    class Counting(LatentPipeline):
        def draw(self, *arguments: Any, **named: Any) -> list[Image.Image]:
            nonlocal running, most
            with guard:
                running += 1
                most = max(most, running)
            try:
                return super().draw(*arguments, **named)
            finally:
                with guard:
                    running -= 1

    counting = Counting(pipe.host)
    ended: dict[int, Any] = {}

    def job(seed: int) -> None:
        ended[seed] = list(Engine(counting).run(PROMPT, seed=seed, num_inference_steps=8))[-1]

    threads = [threading.Thread(target=job, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    for seed, last in ended.items():
        assert grey_levels(last.pictures[0].image, pipe(PROMPT, seed=seed, num_inference_steps=8)[0].image) == 0


# --- replay -------------------------------------------------------------------------------------------------


def save(installed: str, path: Path, index: int = 0, **settings: Any) -> Path:
    """A picture of the installed model."""
    pipe = LatentPipeline.from_pretrained(installed, device="cpu")
    return pipe(PROMPT, **{"seed": 3, "num_inference_steps": 3} | settings)[index].save(path)


def rewrite(path: Path, **changes: Any) -> Path:
    """The picture with other values in its recipe."""
    with Image.open(path) as picture:
        picture.load()
        raw = json.loads(picture.info["latentpipe"]) | changes
    info = PngImagePlugin.PngInfo()
    info.add_itxt("latentpipe", json.dumps(raw))
    picture.save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 5.0, "guidance_interval": (0.3, 0.9), "negative_prompt": "blue, bar"},
        {"scheduler": "euler"},
        {"scheduler": "dpm++"},
        {"size": (24, 16)},
        {"on_step": lambda step: step.step == 2},
    ],
)
@pytest.mark.filterwarnings("ignore:the model was trained at")
def test_a_replay_is_identical(installed: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    path = save(installed, tmp_path / "x.png", **settings)
    result = replay(path, device="cpu")
    assert result.difference == 0
    assert result.causes == []
    with Image.open(path) as picture:
        assert grey_levels(result.picture.image, picture) == 0


def test_any_picture_of_a_batch_is_replayed(installed: str, tmp_path: Path) -> None:
    for index in range(3):
        path = save(installed, tmp_path / f"{index}.png", index, n=3)
        result = replay(path, device="cpu")
        assert result.difference == 0
        assert result.picture.recipe.batch_index == index


def test_a_changed_picture_is_noticed(installed: str, tmp_path: Path) -> None:
    path = save(installed, tmp_path / "x.png")
    with Image.open(path) as picture:
        picture.load()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("latentpipe", picture.info["latentpipe"])
    old = picture.getpixel((3, 3))
    picture.putpixel((3, 3), tuple((value + 40) % 256 for value in old))
    picture.save(path, pnginfo=info)
    assert replay(path, device="cpu").difference >= 40


def test_causes_name_what_differs(installed: str, tmp_path: Path) -> None:
    path = save(installed, tmp_path / "x.png")
    with Image.open(path) as picture:
        machine = json.loads(picture.info["latentpipe"])["machine"]
    machine |= {"threads": 64, "processor": "Abacus 3000", "versions": machine["versions"] | {"torch": "0.1"}}
    result = replay(rewrite(path, machine=machine), device="cpu")
    assert result.difference == 0
    assert result.causes == [
        f"threads: 64 then, {torch.get_num_threads()} now",
        f"processor: Abacus 3000 then, {result.picture.recipe.machine.processor} now",
        f"torch: 0.1 then, {torch.__version__} now",
    ]


def test_the_model_can_be_given(model_folder: Path, installed: str, own_home: Path, tmp_path: Path) -> None:
    path = save(installed, tmp_path / "x.png")
    shutil.rmtree(own_home / "models")
    with pytest.raises(UserError, match="tiny"):
        replay(path, device="cpu")
    assert replay(path, model=model_folder, device="cpu").difference == 0


def test_another_vae_by_name_is_replayed(installed: str, own_home: Path, tmp_path: Path) -> None:
    from latentpipe.checkpoints.vae_io import save_vae

    save_vae(tiny_vae(8), own_home / "vae" / "second", {})
    pipe = LatentPipeline.from_pretrained(installed, vae="second", device="cpu", force=True)
    path = pipe(PROMPT, seed=1, num_inference_steps=2)[0].save(tmp_path / "x.png")
    assert replay(path, device="cpu").difference == 0


def test_a_models_own_vae_by_name_is_replayed(installed: str, tmp_path: Path) -> None:
    pipe = LatentPipeline.from_pretrained(installed, vae=installed, device="cpu")
    path = pipe(PROMPT, seed=1, num_inference_steps=2)[0].save(tmp_path / "x.png")
    assert replay(path, device="cpu").difference == 0


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_other_weights_are_named(installed: str, own_home: Path, tmp_path: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    from latentpipe.checkpoints.pipeline_io import PARTS, hashes
    from latentpipe.checkpoints.tensor_source import CARD_FILE

    path = save(installed, tmp_path / "x.png")
    folder = own_home / "models" / "tiny"
    before = hashes(folder)
    tensors = load_file(folder / part / PARTS[part])
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / part / PARTS[part], metadata={"format": "pt"})
    edit_json(folder / CARD_FILE, vae_hash=None)
    with pytest.raises(UserError, match="other weights") as error:
        replay(path, device="cpu")
    text = str(error.value)
    assert before[part][:16] in text
    assert hashes(folder)[part][:16] in text
    assert not any(before[other][:16] in text for other in before if other != part)


def test_img2img_needs_its_picture(installed: str, tmp_path: Path) -> None:
    source = draw_shape("blue", "square")
    source.save(tmp_path / "source.png")
    draw_shape("blue", "bar").save(tmp_path / "other.png")
    path = save(installed, tmp_path / "x.png", image=source, strength=0.7)
    with pytest.raises(UserError, match="--image"):
        replay(path, device="cpu")
    with pytest.raises(UserError, match="is not the picture"):
        replay(path, source=tmp_path / "other.png", device="cpu")
    assert replay(path, source=tmp_path / "source.png", device="cpu").difference == 0
    for wrong in (tmp_path / "none.png", tmp_path):
        with pytest.raises((UserError, OSError)):
            replay(path, source=wrong, device="cpu")


@pytest.mark.parametrize("name", ["../tiny", "/tmp", "a/b", "", ".", "..", "~", "models/tiny"])
@pytest.mark.parametrize("key", ["model", "vae"])
def test_a_recipe_with_a_path_for_a_name_is_refused(installed: str, tmp_path: Path, name: str, key: str) -> None:
    path = rewrite(save(installed, tmp_path / "x.png", num_inference_steps=1), **{key: name})
    if (key, name) == ("vae", ""):  # no VAE is named
        assert replay(path, device="cpu").difference == 0
        return
    with pytest.raises(UserError, match="recipe names"):
        replay(path, device="cpu")


def test_a_recipe_never_reads_the_current_folder(
    model_folder: Path, installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rewrite(save(installed, tmp_path / "x.png", num_inference_steps=1), model="local")
    shutil.copytree(model_folder, tmp_path / "local")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="local"):
        replay(path, device="cpu")


@pytest.mark.filterwarnings("ignore:the model was trained at")
def test_damaged_recipes_are_user_errors(installed: str, tmp_path: Path) -> None:
    for change in (
        {"batch_index": 3, "batch_size": 2},
        {"scheduler": "nonsense"},
        {"adapter": "x"},
        {"loras": {"y": 1.0}},
        {"width": 24, "height": 24},
        {"width": 10_000},
    ):
        path = rewrite(save(installed, tmp_path / "x.png", num_inference_steps=1), **change)
        with pytest.raises(UserError):
            replay(path, device="cpu")


def test_a_vae_outside_the_home_can_be_given(installed: str, tmp_path: Path) -> None:
    from latentpipe.checkpoints.vae_io import save_vae

    save_vae(tiny_vae(8), tmp_path / "second", {})
    pipe = LatentPipeline.from_pretrained(installed, vae=tmp_path / "second", device="cpu", force=True)
    path = pipe(PROMPT, seed=1, num_inference_steps=2)[0].save(tmp_path / "x.png")
    with pytest.raises(UserError, match="second"):
        replay(path, device="cpu")
    assert replay(path, vae=tmp_path / "second", device="cpu").difference == 0
