"""Draw a picture again from the recipe in its file, and compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentpipe.checkpoints.registry import find_model, is_installed, named_embedding, named_lora
from latentpipe.checkpoints.single_file.gather import Stated
from latentpipe.compatibility.latent_adapter import own_adapter
from latentpipe.pipelines.chains import Hires, open_refiner
from latentpipe.pipelines.conditioning import Control, open_control
from latentpipe.pipelines.latent_pipeline import LatentPipeline, Picture
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.metadata.stated import check_completed
from latentpipe.pipelines.sampling import Settings, Step
from latentpipe.utils.errors import UserError, expect
from latentpipe.utils.images import open_picture, picture_file
from latentpipe.utils.progress import ProgressCallback
from latentpipe.utils.system import best_device


@dataclass(frozen=True)
class Replay:
    """A picture drawn again: the largest difference in grey levels to the old one, and its likely causes.

    A JPEG has lost some of its pixels' values: the new picture is stored in the same way before the two are compared, and `kind`
    says so ("PNG", "JPEG", "WEBP").
    """

    picture: Picture
    difference: int
    causes: list[str]
    kind: str = "PNG"


def replay(
    path: Path,
    model: str | Path | None = None,
    vae: str | Path | None = None,
    source: Path | None = None,
    device: str | None = None,
    adapter: str | Path | None = None,
    loras: Mapping[str, Path] | None = None,
    report: ProgressCallback | None = None,
    config: Path | None = None,
    parts: Sequence[Path] = (),
    embeddings: Mapping[str, Path] | None = None,
    controls: Sequence[tuple[Path, Path]] = (),
    refiner: str | Path | None = None,
) -> Replay:
    """Draw the picture in a file again from its recipe and compare.

    `model`, `vae` and `adapter` (names or places) stand in for the recipe's names, which resolve among the shipped and the
    user's own only; `source` is the picture that img2img began from; `loras` and `embeddings` give the files of adapters and of
    textual inversions by their names in the recipe; `report` is called after each step. A single file is opened with the family
    and the prediction that were stated then; `config` and `parts` (`Stated`) are to be given again, and a UserError says where
    they are needed. `controls` are the folders and pictures of its controls, in their order; `refiner` is the model
    that drew the last steps. UserError names every weight that differs.
    """
    expect("path", path, (str, Path), "the path of a picture that latentpipe wrote")
    old = recipes.read(Path(path))
    model = model or _name(old.model)
    stated = _stated(path, old, model, config, parts)
    pipe = _as_then(path, old, model, stated, vae, device, adapter, loras or {}, embeddings or {})

    def on_step(step: Step) -> bool:
        if report is not None:
            report(step.step, step.steps, "draw again")
        return step.step == old.stopped_after

    chosen = pipe.check(
        dataclasses.replace(_settings(pipe, old, source), controls=_controls(path, old, controls), **_second(path, old, refiner))
    )
    pictures = pipe.literal(old.prompt, old.batch_size, old.seed - old.batch_index, on_step, chosen)
    picture = pictures[old.batch_index]
    with picture_file(path) as stored:
        kind = stored.format or "PNG"
        before = np.asarray(stored.convert("RGB"), dtype=np.int16)
    after = np.asarray(recipes.as_stored(picture.image, kind), dtype=np.int16)
    if before.shape != after.shape:
        raise UserError(f"{path} is {before.shape[1]} x {before.shape[0]} pixels, its recipe says {old.width} x {old.height}.")
    causes = _causes(old, picture.recipe)
    if kind == "JPEG":
        causes.append("the file is a JPEG, which another program may have stored anew, with loss")
    return Replay(picture, int(np.abs(before - after).max()), causes, kind)


def _as_then(
    path: Path,
    old: recipes.Recipe,
    model: str | Path,
    stated: Stated,
    vae: str | Path | None,
    device: str | None,
    adapter: str | Path | None,
    loras: Mapping[str, Path],
    embeddings: Mapping[str, Path],
) -> LatentPipeline:
    """The pipeline that drew a picture; UserError names every weight that differs."""
    if old.vae and vae is None:
        vae = _name(old.vae, "vae")
    if old.adapter and adapter is None:
        adapter = own_adapter(old.adapter)
    # The hashes below decide; whether VAE and adapters fitted was decided when the picture was drawn.
    pipe = LatentPipeline.from_pretrained(
        model, vae, device or _device(old), _dtype(old.machine.dtype), adapter, force=True, stated=stated
    )
    for name in old.loras:
        lora = pipe.loras.open(loras.get(name) or named_lora(name))
        pipe.loras.load(dataclasses.replace(lora, name=name), partial=True)
    pipe.set_lora(old.loras, old.lora_fused, old.lora_method)
    brought = pipe.embeddings.on  # by the adapters
    for name in old.embeddings:
        if name in embeddings or name not in brought:
            pipe.embeddings.attach(embeddings.get(name) or named_embedding(name), name)
    now = {**pipe.hashes, **{f"lora:{name}": pipe.loras.fuser.loaded[name].hash for name in old.loras}}
    now |= {f"embedding:{name}": one.hash for name, one in pipe.embeddings.on.items()}
    changed = [
        f"{part} is {now.get(part, 'missing')[:16]}, the picture's was {digest[:16]}"
        for part, digest in old.hashes.items()
        if not part.startswith(("control:", "refiner:")) and now.get(part) != digest and pipe.former(part) != digest
    ]
    if changed:
        kinds = {part.partition(":")[0] if ":" in part else "model" for part in changed}
        options = f"--{kinds.pop()} NAME=FILE" if kinds in ({"lora"}, {"embedding"}) else "--model"
        raise UserError(f"{path} was made with other weights: {'; '.join(changed)}. Give the right ones with {options}.")
    return pipe


def _stated(path: Path, old: recipes.Recipe, model: str | Path, config: Path | None, parts: Sequence[Path]) -> Stated:
    """What is to be said on the model: as then of a single file; a folder with the same weights says it itself."""
    if not find_model(model).is_file():
        return Stated(config=config, parts=tuple(parts))
    check_completed(path, old.stated, config, parts)
    then = old.stated or recipes.StatedModel()
    return Stated(then.family, then.prediction, config, tuple(parts))


def _causes(old: recipes.Recipe, new: recipes.Recipe) -> list[str]:
    """What differs between the two machines, in words."""
    rows = [
        (name, getattr(old.machine, name), getattr(new.machine, name)) for name in ("device", "dtype", "threads", "processor")
    ]
    rows += [(name, version, new.machine.versions.get(name, "not installed")) for name, version in old.machine.versions.items()]
    return [f"{name}: {before} then, {now} now" for name, before, now in rows if before != now]


def _settings(pipe: LatentPipeline, old: recipes.Recipe, source: Path | None) -> Settings:
    """The settings that a picture was drawn with."""
    return Settings(
        negative_prompt=old.negative,
        num_inference_steps=old.steps,
        guidance_scale=old.guidance,
        guidance_interval=old.guidance_interval,
        scheduler=old.scheduler if old.scheduler != type(pipe.host.scheduler).__name__ else None,
        size=(old.width, old.height),
        **_source(old, source),
    )


def _source(old: recipes.Recipe, source: Path | None) -> dict[str, Any]:
    if old.source is None:
        return {}
    if source is None:
        raise UserError("This picture began from another one; give it with --image.")
    image = open_picture(source)
    if recipes.pixel_hash(image) != old.source.sha256:
        raise UserError(
            f"{source} is not the picture that this one began from: {recipes.pixel_hash(image)[:16]}, "
            f"expected {old.source.sha256[:16]}."
        )
    return {"image": image, "strength": old.source.strength}


def _second(path: Path, old: recipes.Recipe, model: str | Path | None) -> dict[str, Any]:
    """The second pass of a picture; UserError where its refiner is another one."""
    then = old.second_pass
    if then is None:
        return {}
    if then.refiner is None:
        return {"hires": Hires(then.scale or 2.0, then.strength or 0.5)}
    found = open_refiner(model or _name(then.refiner), then.at or 0.8, _device(old), _dtype(old.machine.dtype))
    for part, digest in found.hashes.items():
        if old.hashes.get(f"refiner:{part}") != digest:
            raise UserError(
                f"{path} was refined by another {part} than that of '{model or then.refiner}'; give the refiner of then."
            )
    return {"refiner": dataclasses.replace(found, name=then.refiner)}


def _controls(path: Path, old: recipes.Recipe, given: Sequence[tuple[Path, Path]]) -> tuple[Control, ...]:
    """The controls that a picture was drawn with; UserError where others, or none, are given."""
    if len(given) != len(old.controls):
        names = ", ".join(f"{one.name} ({one.kind})" for one in old.controls) or "none"
        raise UserError(f"{path} was drawn with these controls: {names}; give each with --control NET=PICTURE, in this order.")
    found = []
    for at, (then, (net, picture)) in enumerate(zip(old.controls, given, strict=True)):
        one = open_control(net, open_picture(picture), then.weight, then.steps)
        for what, now, was in (
            ("network", one.digest, old.hashes.get(f"control:{at}", "")),
            ("picture", recipes.pixel_hash(one.image), then.sha256),
        ):
            if now != was:
                raise UserError(
                    f"the {what} of control '{then.name}' is {now[:16]}, the picture's was {was[:16]}; give that one."
                )
        found.append(dataclasses.replace(one, name=then.name))
    return tuple(found)


def _name(name: str, kind: str = "models") -> str:
    """A name from a picture: one of the shipped or the user's own, never a path."""
    if not is_installed(name, kind):
        raise UserError(
            f"The recipe names the {kind.removesuffix('s')} '{name}', which is not installed ('latentpipe ls' lists what is); "
            f"give its folder with --{kind.removesuffix('s')}."
        )
    return name


def _device(old: recipes.Recipe) -> str | None:
    """The recipe's kind of device where this machine has it: a picture drawn on a CPU is replayed on one."""
    kind = old.machine.device.split(":")[0]
    return kind if kind in {"cpu", best_device()} else None


def _dtype(name: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, "fp32")
