"""latentpipe generate: the options, and drawing with a step bar that Ctrl-C stops."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentpipe.cli.argument_checks import size_of, weighted
from latentpipe.cli.argument_parser import Positional
from latentpipe.cli.lora import Method
from latentpipe.cli.output_paths import is_picture
from latentpipe.utils.defaults import STEPS, STRENGTH
from latentpipe.utils.errors import counted
from latentpipe.utils.setting_names import in_python
from latentpipe.utils.signals import interruption, signals_to
from latentpipe.utils.threads import run_in_thread


@dataclass(frozen=True)
class Generate:
    """Draw pictures of a prompt and print their paths."""

    prompt: Positional[str | None] = None
    """What to draw."""
    prompts: Path | None = None
    """Instead: a text file with one prompt a line, or SEED<TAB>PROMPT; lines without a seed count on from SEED."""
    n: int = 1
    """How many pictures (also -n), of each prompt; picture i has the seed SEED + i."""
    seed: int | None = None
    """0 to 4294967295; left out, or -1: a random one, which is told."""
    out: Path = Path("out")
    """Folder for the PNG files, each with its recipe inside; or the file to write, .png, .jpg or .webp."""
    model: str = "emoji"
    """Name ('latentpipe ls'), diffusers folder or single .safetensors file of a model."""
    vae: str | None = None
    """Name, folder or file of another VAE to decode with; refused with the reason where it does not fit."""
    force: bool = False
    """Decode with that VAE whatever the verdict, as long as the shapes agree; take LoRA files of another base, likewise."""
    negative: str = ""
    """What the picture should not show."""
    steps: int | None = None
    """Denoising steps; left out: 20, with --turbo those that it was made for."""
    guidance: float | None = None
    """Classifier-free guidance; 1 turns it off. Left out: 3, with --turbo 1."""
    turbo: bool = False
    """Draw in few steps without guidance, with the LoRA that was distilled from the model ('latentpipe distil')."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Share of the steps where guidance begins and ends."""
    scheduler: Literal["dpm++", "ddim", "euler", "unipc"] | None = None
    """Left out: the model's own."""
    size: str | None = None
    """Side or WIDTHxHEIGHT in pixels; left out: what the model was trained at."""
    image: Path | None = None
    """A picture to begin from (img2img)."""
    strength: float = STRENGTH
    """How far img2img may move from the picture, over 0 to 1."""
    device: str | None = None
    """cpu, cuda or mps; left out: the best one present."""
    dtype: Literal["fp32", "bf16", "fp16", "stored", "auto"] = "fp32"
    """Precision of the weights; stored: as the file has them; auto: bf16 where the device has units for it, else fp32, less where
    that does not fit into memory."""
    offload: Literal["none", "model", "sequential"] = "none"
    """On CUDA: parts (model) or layers (sequential) are on the GPU only while they compute."""
    family: str | None = None
    """Family of a single file whose shapes fit several: flux-dev or flux-kontext, ..."""
    prediction: Literal["epsilon", "v", "v-zsnr"] | None = None
    """What the denoiser of a single file predicts, over what the file says; zsnr: with zero terminal SNR."""
    config: Path | None = None
    """A diffusers folder with the configs of a single file that fits no known family."""
    parts: tuple[Path, ...] = ()
    """Names, files or diffusers folders of what a single file lacks: a VAE, text encoders."""
    lora: tuple[str, ...] = ()
    """Names or files of LoRA adapters, each with its weight: flat=0.7 (1 where none is given)."""
    lora_method: Literal["sum", Method] = "sum"
    """How several are put together: sum (at once, exactly), or a method of 'latentpipe lora merge', such as ties_svd."""
    lora_partial: bool = False
    """Take LoRA files (of --lora and of tags in the prompt) that fit in part; what is left out is told."""
    embedding: tuple[str, ...] = ()
    """Names or files of embeddings (textual inversion) that the prompts name, as <NAME> or as a plain word; installed ones
    need no option as <NAME>."""
    adapter: str | None = None
    """Name or file of an adapter from the model's VAE to --vae ('latentpipe fit-adapter')."""


def run_generate(options: Generate) -> None:
    """Draw, save and print the paths; KeyboardInterrupt (`Terminated`) after partial pictures were saved."""
    loras = [weighted(text) for text in options.lora]
    from latentpipe.utils.images import open_picture

    names = ("negative", "steps", "guidance", "guidance_interval", "scheduler", "strength", "lora_partial")
    given = {name: getattr(options, name) for name in names}
    settings = in_python({name: value for name, value in given.items() if value is not None})
    settings["size"] = size_of(options.size)
    settings["image"] = open_picture(options.image) if options.image is not None else None
    from latentpipe import LatentPipeline
    from latentpipe.checkpoints.single_file.gather import Stated

    stated = Stated(options.family, options.prediction, options.config, options.parts)

    def opened() -> LatentPipeline:
        pipe = LatentPipeline.from_pretrained(
            options.model,
            options.vae,
            options.device,
            options.dtype,
            options.adapter,
            options.force,
            stated,
            options.offload,
            options.turbo,
        )
        for source, weight in loras:
            print(pipe.attach_lora(source, weight, partial=options.lora_partial, force=options.force), file=sys.stderr)
        for source in options.embedding:
            one = pipe.attach_embedding(source)
            print(f"{one.name}: {counted(one.length, 'vector')}, in the prompt as <{one.name}>", file=sys.stderr)
        if options.lora_method != "sum":
            pipe.set_lora(pipe.loras.weights, method=options.lora_method)
        return pipe

    _draw(options, run_in_thread(opened), settings)


def _draw(options: Generate, pipe: Any, settings: dict[str, Any]) -> None:
    """Draw batch after batch, and save each as it is done."""
    from tqdm import tqdm

    from latentpipe import Engine

    parts = _parts(options, pipe, settings)
    engine, count, last = Engine(pipe), sum(len(part) for part in parts), None
    with (
        stop_on_interrupt() as stop,
        tqdm(
            total=options.steps or pipe.defaults.get("num_inference_steps", STEPS), unit="step", disable=None, file=sys.stderr
        ) as bar,
    ):
        for number, part in enumerate(parts):
            stop.token = threading.Event()  # a job sets its token when it ends
            if stop.number:
                break
            own = {**settings, "n": len(part), "seed": part[0][1]} if options.prompts is None else settings
            asked = part[0][0] if options.prompts is None else part
            pictures = _watch(engine, asked, own, stop, bar, (number, len(parts)))
            bar.clear()
            for picture in pictures:
                print(picture.save(_place(options.out, picture.recipe, count)), flush=True)
            last = pictures[0].recipe.stopped_after
    if last is not None:
        what = "it is" if len(pictures) == 1 else "they are"
        print(f"latentpipe: {counted(len(pictures), 'unfinished picture')} kept: {what} of step {last}", file=sys.stderr)
    stop.heed()


def _parts(options: Generate, pipe: Any, settings: dict[str, Any]) -> list[list[tuple[str, int]]]:
    """Prompt and seed of each picture, in batches; UserError names the line of a prompt that this model cannot draw."""
    from latentpipe.cli.prompt_file import prompted_pictures, read_prompts, told
    from latentpipe.pipelines import prompt_weighting
    from latentpipe.pipelines.batches import batches

    assert options.seed is not None  # it was drawn where the call gives none
    if options.prompts is None:
        found = [(options.prompt or "", options.seed + i) for i in range(options.n)]
    else:
        lines = read_prompts(options.prompts, options.n)
        for line in lines:
            with told(options.prompts, line.number):
                prompt_weighting.check(pipe.host, pipe.embeddings.spell(line.prompt), options.negative)
        found = prompted_pictures(lines, options.n, options.seed)
    return list(batches(found, settings["size"] or pipe.native_size))


def _watch(engine: Any, prompt: Any, settings: dict[str, Any], stop: Stop, bar: Any, part: tuple[int, int]) -> list[Any]:
    """Show a job's steps; the first Ctrl-C (or SIGTERM) stops it and keeps the partial pictures, the second leaves at once."""
    from latentpipe.engine.engine import Finished, StepDone
    from latentpipe.utils.errors import Cancelled

    try:
        for event in engine.run(prompt, cancel=stop.token, **settings):
            if isinstance(event, Finished):
                return event.pictures
            if isinstance(event, StepDone):
                bar.total = part[1] * event.steps
                bar.update(part[0] * event.steps + event.step - bar.n)
    except Cancelled:
        stop.heed()
        raise
    raise RuntimeError("the engine ended without a result")


@dataclass
class Stop:
    """A cancel token, and the signal that has set it (0: none has)."""

    token: threading.Event
    number: int = 0

    def heed(self) -> None:
        """KeyboardInterrupt or `Terminated` where a signal has come."""
        if self.number:
            raise interruption(self.number)


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """A cancel token that the first Ctrl-C or SIGTERM inside sets; the second one is raised."""
    stop = Stop(threading.Event())

    def on_signal(number: int, _: Any) -> None:
        if stop.number:
            raise interruption(number)
        stop.number = number
        stop.token.set()
        print("latentpipe: stopping in this step; Ctrl-C again to leave at once", file=sys.stderr)

    with signals_to(on_signal):
        yield stop


def _place(out: Path, recipe: Any, n: int) -> Path:
    """Where a picture goes: a new file in the folder `out`; or the file `out`, of several each with its seed behind the name."""
    if is_picture(out):
        return out if n == 1 else out.with_stem(f"{out.stem}-{recipe.seed}")
    from latentpipe.pipelines.picture import free_path

    return free_path(out, recipe.prompt, recipe.seed)


def replay(
    picture: Path,
    /,
    model: str | None = None,
    vae: str | None = None,
    adapter: str | None = None,
    lora: tuple[str, ...] = (),
    embedding: tuple[str, ...] = (),
    image: Path | None = None,
    device: str | None = None,
    out: Path | None = None,
    config: Path | None = None,
    parts: tuple[Path, ...] = (),
) -> None:
    """Draw the picture in a file again from its recipe and compare every pixel.

    Args:
        picture: A PNG, JPEG or WebP that latentpipe wrote.
        model: Name or folder of the model, where the recipe's name is not installed.
        vae: Name or folder of the VAE, likewise.
        adapter: Name or file of the adapter, likewise.
        lora: Files of LoRA that are not installed, each as NAME=FILE with its name in the recipe.
        embedding: Files of embeddings (textual inversion), likewise.
        image: The picture that img2img began from.
        device: cpu, cuda or mps.
        out: Where to save the new picture; left out: only compare.
        config: The diffusers folder with the configs of a single file, where it was drawn with one.
        parts: Files or diffusers folders that complete a single file, where it was drawn with some.
    """
    from latentpipe import replay as run

    loras, embeddings = (
        {name: Path(file) for name, _, file in (text.partition("=") for text in given)} for given in (lora, embedding)
    )
    result = run(picture, model, vae, image, device, adapter, loras, config=config, parts=parts, embeddings=embeddings)
    if out is not None:
        result.picture.save(out)
        print(out)
    if result.difference == 0:
        loss = ", after the new picture was stored as a JPEG too (which loses a little)" if result.kind == "JPEG" else ""
        print(f"identical: every pixel is the same{loss}")
    else:
        cause = "; ".join(result.causes) or "none found: same machine, versions and threads"
        print(f"largest difference: {result.difference} of 255 grey levels. What has changed: {cause}")
