"""Which value of which verb is looked at how, before anything large is imported: tables of `argument_checks`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from latentpipe.checkpoints.registry import available, find_model, is_installed, is_installed_embedding, lookup, own_adapters
from latentpipe.cli import argument_checks, controls, output_paths, prompt_file, replayed
from latentpipe.cli.argument_checks import above, within
from latentpipe.cli.output_paths import ending
from latentpipe.utils.defaults import MAX_BATCH, MAX_SEED
from latentpipe.utils.errors import UserError

COUNT, PNG = within(1), ending(".png")

# By parameter, or by verb and parameter where it means something else there; None: nothing is asked.
RULES: dict[str, argument_checks.Rule | None] = {
    "adapter": argument_checks.adapter,
    "after": argument_checks.part,
    "auth_file": argument_checks.file,
    "before": argument_checks.part,
    "control": controls.rule,
    "csv": ending(".csv"),
    "density": above(0, 1),
    "detector": argument_checks.file,
    "device": argument_checks.device,
    "downscale": COUNT,
    "embedding": argument_checks.embeddings,
    "false_alarms": within(0, 1),
    "feather": within(0),
    "features": argument_checks.metric,
    "file": argument_checks.file,
    "folder": argument_checks.folder,
    "font": argument_checks.file,
    "fps": within(1, 60),
    "grid": PNG,
    "guidance": within(0, 100),
    "hires": above(1, 8),
    "hires_strength": above(0, 1),
    "image": argument_checks.picture,
    "images": argument_checks.folder,
    "lora": argument_checks.loras,
    "mask": argument_checks.picture,
    "measured": within(0),
    "mix": argument_checks.picture,
    "model": argument_checks.model,
    "most": COUNT,
    "n": within(1, 256),
    "noise": within(0, 3),
    "norm_groups": COUNT,
    "normal": argument_checks.folder,
    "per_shard": within(1, 2**20),
    "picture": argument_checks.picture,
    "port": within(1, 65535),
    "probe": within(0),
    "prompts": argument_checks.file,
    "rank": above(0),
    "refiner": argument_checks.model,
    "refiner_at": above(0, 1),
    "rows": COUNT,
    "scale": within(0, 3),
    "scaling_factor": above(0),
    "seed": argument_checks.seed,
    "share": within(0, 1),
    "sheet": PNG,
    "size": COUNT,
    "step": above(0),
    "steps": within(1, 1000),
    "strength": above(0, 1),
    "vae": argument_checks.vae,
    "vaes": argument_checks.vaes,
    "workers": within(1, 1024),
    # verbs whose parameter means something else
    "anomaly.out": PNG,
    "anomaly.save": output_paths.written,
    "compare.out": ending(".html", ".htm"),
    "convert.out": output_paths.new,
    "compress.out": ending(".lpz"),
    "decompress.out": output_paths.written,
    "distil.batch_size": COUNT,
    "distil.guidance": above(1, 100),
    "distil.pictures": argument_checks.folder,
    "distil.steps": within(1, 100),
    "distil.out": output_paths.weights,
    "distil.training_steps": COUNT,
    "edit.out": PNG,
    "emoji.out": output_paths.empty,
    "emoji.hands": argument_checks.folder,
    "emoji.size": within(8, 1024),
    "encode.out": output_paths.weights,
    "encode.shards": output_paths.sharded,
    "evaluate prompts.held_out": within(0),
    "evaluate prompts.seen": within(0),
    "fit-adapter.out": output_paths.weights,
    "fit-adapter.source": argument_checks.vae,
    "fit-adapter.to": argument_checks.vae,
    "fit-codec.size": argument_checks.each(COUNT),
    "fit-codec.step": within(2**-5, 2**5),
    "fit-codec.steps": COUNT,
    "generate.out": output_paths.drawing,
    "generate.size": argument_checks.drawn,
    "grid.lora": argument_checks.installed_loras,
    "grid.out": PNG,
    "grid.size": argument_checks.drawn,
    "inpaint.out": PNG,
    "interpolate.n": within(2, 48),
    "interpolate.out": output_paths.written,
    "lora convert.source": argument_checks.found_loras,
    "lora convert.out": output_paths.new_weights,
    "lora extract.out": output_paths.new_weights,
    "lora inspect.path": argument_checks.found_loras,
    "lora merge.files": argument_checks.found_loras,
    "lora merge.out": output_paths.new_weights,
    "lora merge.seed": within(0),
    "ls.fits": argument_checks.model,
    "make-fp16-safe.out": output_paths.empty,
    "replay.embedding": None,
    "replay.lora": None,
    "replay.out": ending(*output_paths.PICTURES),
    "sample.n": within(1, 1024),
    "sample.out": PNG,
    "swap.out": output_paths.new,
    "train-embedded.hands": argument_checks.folder,
    "train-embedded.work": output_paths.room,
    "traverse.most": within(2),
    "traverse.out": PNG,
}

# What does nothing without another option: it was meant to do something.
SECOND = {"hires_strength": ("hires",), "refiner_at": ("refiner",)}
CONTROLLED = dict.fromkeys(("control_weight", "control_steps"), ("control",)) | SECOND
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "generate": {"adapter": ("vae",), "lora_method": ("lora",), "strength": ("image",), **CONTROLLED},
    "encode": {"workers": ("shards",), "cluster": ("shards",), "per_shard": ("shards",)},
    "ui": {"cluster": ("workers",)},
    "edit": {"share": ("mix",), "amount": ("along",), "feather": ("mask",)},
    "lora convert": {"rank": ("plain",)},
}


def prepare(verb: str, values: dict[str, Any], given: Collection[str], flags: Mapping[str, str]) -> None:
    """UserError for the first value of a verb's call that cannot be right; a seed that is to be drawn is drawn, and told.

    given  the names of the values that the call states itself; flags: what people call each, "--seed" or "PICTURE"
    """
    for name, needed in NEEDS.get(verb, {}).items():
        if name in given and not set(needed) & set(given):
            others = " or ".join(flags[one] for one in needed)
            raise UserError(f"{verb}: {flags[name]} does something only with {others}; add it, or leave this out.")
    for name, value in values.items():
        rule = RULES.get(f"{verb}.{name}", RULES.get(name))
        if rule is not None and value is not None:
            rule(flags[name], value)
    for whole in WHOLE.get(verb, ()):
        whole(values)
    if "seed" in values and values["seed"] in (None, -1):
        values["seed"] = secrets.randbelow(MAX_SEED + 1 - MAX_BATCH)
        print(f"latentpipe: seed {values['seed']}", file=sys.stderr, flush=True)


# --- several values -----------------------------------------------------------------------------------------


def _axes(values: dict[str, Any]) -> None:
    """The axes of a grid, and the names on them."""
    from latentpipe.engine.xy_grid.axes import BUILT_IN, MAX_CELLS, read_axis

    axes = [read_axis(values[name]) for name in ("x", "y") if values[name] is not None]
    cells = len(axes[0].values) * (len(axes[1].values) if len(axes) > 1 else 1)
    if cells > MAX_CELLS:
        raise UserError(f"The axes make {cells:,} pictures; at most {MAX_CELLS} are drawn. Take fewer values.")
    for axis in axes:
        if axis.kind == "lora":
            argument_checks.named_lora(axis.name)
        for value in axis.values if axis.kind == "vae" else ():
            if str(value).lower() != BUILT_IN:
                argument_checks.vae("--x", str(value))
        if axis.kind == "prompt":
            axis.put({"prompt": values["prompt"]}, axis.values[0])


def _merged(values: dict[str, Any]) -> None:
    """A weight for each file."""
    if values["weights"] and len(values["weights"]) != len(values["files"]):
        raise UserError(f"{len(values['weights'])} weights for {len(values['files'])} LoRA files; expected one for each.")


def _converted(values: dict[str, Any]) -> None:
    """The files or names to convert, and what they shall become."""
    for name in (values["source"], values["source2"]):
        if name is not None and not Path(name).exists():
            if values["to"] == "tensors":
                argument_checks.file("SOURCE", Path(name))
            find_model(name, "vae")
    if values["to"] in ("ldm", "tensors") and values["out"].suffix != ".safetensors":
        raise UserError(f"--out {values['out']}: --to {values['to']} writes a safetensors file; give it that ending.")


def _written(values: dict[str, Any]) -> None:
    """A picture's ending that Pillow writes."""
    from PIL import Image

    Image.init()
    out = values["out"]
    if Image.EXTENSION.get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{out}: '{out.suffix}' is no kind of picture that is written here; expected .png, .webp, .jpg ...")


def _between(values: dict[str, Any]) -> None:
    """Two pictures or two prompts, and a file for the frames."""
    from latentpipe.cli.edit import are_pictures
    from latentpipe.explore import clips

    clips.check(values["out"], values["fps"])
    if are_pictures(values["first"], values["second"]):
        for name in ("first", "second"):
            argument_checks.picture(name.upper(), Path(values[name]))
        argument_checks.vae_size(values)


def _inspected(values: dict[str, Any]) -> None:
    """A name or a path that there is."""
    name = values["path"]
    if Path(name).exists() or name in own_adapters() or lookup(name, available("lora"), "LoRA"):
        return
    if any(is_installed(name, kind) for kind in ("vae", "lora")) or is_installed_embedding(name):
        return
    find_model(name)  # says what there is


def _strange(values: dict[str, Any]) -> None:
    """What anomaly looks at, and a detector alone or what makes one."""
    for path in values["pictures"]:
        if not path.exists():  # what cannot be read is skipped, and told
            raise UserError(f"PICTURES {path}: no such file or folder.")
    if values["detector"] is not None and any(values[name] is not None for name in ("normal", "size", "save")):
        raise UserError("--detector brings its normal pictures and size along; leave out --normal, --size and --save.")


def _listed(values: dict[str, Any]) -> None:
    """Verdicts are of VAEs."""
    if values["fits"] is not None and values["kind"] != "vae":
        raise UserError("--fits lists VAEs; write 'latentpipe ls vae --fits MODEL'.")


def _rendered(values: dict[str, Any]) -> None:
    """Noto's pictures are 136 pixels at most; those of other artists are drawn at any size."""
    if values["size"] is not None and values["hands"] is None:
        within(8, 136)("--size", values["size"])


def _measured(values: dict[str, Any]) -> None:
    """One picture has no distance."""
    if values["measured"] == 1:
        raise UserError("--measured is 1; expected 0 (measure nothing), or 2 pictures and more.")


def _fits_a_jpeg(values: dict[str, Any]) -> None:
    """A JPEG holds a recipe of 64 KB."""
    from json import dumps

    text = (values["prompt"] or "") + values["negative"]
    if values["out"].suffix.lower() in (".jpg", ".jpeg") and len(dumps(text)) + 4 * len(text) > 50_000:
        raise UserError(f"--out {values['out']}: a JPEG has no room for a prompt of this length; name a .png or a .webp.")


WHOLE: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {
    "generate": (
        prompt_file.prompted,
        argument_checks.interval,
        argument_checks.drawn_size,
        argument_checks.tagged,
        controls.counted,
        _fits_a_jpeg,
    ),
    "grid": (_axes, argument_checks.drawn_size, argument_checks.tagged),
    "inpaint": (argument_checks.tagged,),
    "replay": (replayed.check,),
    "emoji": (_rendered,),
    "lora merge": (_merged,),
    "convert": (_converted,),
    "decompress": (_written,),
    "interpolate": (_between,),
    "inspect": (_inspected,),
    "ls": (_listed,),
    "anomaly": (_strange, argument_checks.vae_size),
    "sample": (_measured, argument_checks.vae_size),
    "traverse": (argument_checks.vae_size,),
    "health": (argument_checks.vae_size,),
    "encode": (argument_checks.vae_size, output_paths.cached),
    "swap": (output_paths.swapped,),
    "ui": (output_paths.kept,),
    "fit-codec": (output_paths.learnt,),
    "fit-adapter": (output_paths.fitted,),
}
