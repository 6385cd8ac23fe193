"""Which value of which verb is looked at how, before anything large is imported: tables of `checks`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from latentpipe import checks, targets
from latentpipe.checks import above, within
from latentpipe.defaults import MAX_BATCH, MAX_SEED
from latentpipe.errors import UserError
from latentpipe.places import available, find_model, is_installed, lookup, own_adapters
from latentpipe.targets import ending

COUNT = within(1)
PNG = ending(".png")

# By parameter, or by verb and parameter where it means something else there; None: nothing is asked.
RULES: dict[str, checks.Rule | None] = {
    "adapter": checks.adapter,
    "after": checks.part,
    "auth_file": checks.file,
    "before": checks.part,
    "csv": ending(".csv"),
    "density": above(0, 1),
    "detector": checks.file,
    "device": checks.device,
    "downscale": COUNT,
    "false_alarms": within(0, 1),
    "feather": within(0),
    "features": checks.metric,
    "file": checks.file,
    "folder": checks.folder,
    "font": checks.file,
    "fps": within(1, 60),
    "grid": PNG,
    "guidance": within(0, 100),
    "image": checks.picture,
    "images": checks.folder,
    "lora": checks.loras,
    "mask": checks.picture,
    "measured": within(0),
    "mix": checks.picture,
    "model": checks.model,
    "most": COUNT,
    "n": within(1, 256),
    "noise": within(0, 3),
    "norm_groups": COUNT,
    "normal": checks.folder,
    "picture": checks.picture,
    "port": within(1, 65535),
    "probe": within(0),
    "rank": above(0),
    "rows": COUNT,
    "scale": within(0, 3),
    "scaling_factor": above(0),
    "seed": checks.seed,
    "share": within(0, 1),
    "sheet": PNG,
    "size": COUNT,
    "step": above(0),
    "steps": within(1, 1000),
    "strength": above(0, 1),
    "vae": checks.vae,
    "vaes": checks.vaes,
    # verbs whose parameter means something else
    "anomaly.out": PNG,
    "anomaly.save": targets.written,
    "compare.out": ending(".html", ".htm"),
    "convert.out": targets.new,
    "compress.out": ending(".lpz"),
    "decompress.out": targets.written,
    "edit.out": PNG,
    "emoji.out": targets.empty,
    "emoji.hands": checks.folder,
    "emoji.size": within(8, 1024),
    "encode.out": targets.weights,
    "evaluate prompts.held_out": within(0),
    "evaluate prompts.seen": within(0),
    "fit-adapter.out": targets.weights,
    "fit-adapter.source": checks.vae,
    "fit-adapter.to": checks.vae,
    "fit-codec.size": checks.each(COUNT),
    "fit-codec.step": within(2**-5, 2**5),
    "fit-codec.steps": COUNT,
    "generate.out": targets.drawing,
    "generate.size": checks.drawn,
    "grid.lora": checks.installed_loras,
    "grid.out": PNG,
    "grid.size": checks.drawn,
    "inpaint.out": PNG,
    "interpolate.n": within(2, 48),
    "interpolate.out": targets.written,
    "lora convert.source": checks.found_loras,
    "lora convert.out": targets.new_weights,
    "lora extract.out": targets.new_weights,
    "lora inspect.path": checks.found_loras,
    "lora merge.files": checks.found_loras,
    "lora merge.out": targets.new_weights,
    "lora merge.seed": within(0),
    "ls.fits": checks.model,
    "make-fp16-safe.out": targets.empty,
    "replay.lora": None,
    "replay.out": ending(*targets.PICTURES),
    "sample.n": within(1, 1024),
    "sample.out": PNG,
    "swap.out": targets.new,
    "train-embedded.hands": checks.folder,
    "train-embedded.work": targets.room,
    "traverse.most": within(2),
    "traverse.out": PNG,
}

# What does nothing without another option: it was meant to do something.
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "generate": {
        "adapter": ("vae",),
        "lora_method": ("lora",),
        "strength": ("image",),
    },
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
    from latentpipe.xyaxes import BUILT_IN, MAX_CELLS, read_axis

    axes = [read_axis(values[name]) for name in ("x", "y") if values[name] is not None]
    cells = len(axes[0].values) * (len(axes[1].values) if len(axes) > 1 else 1)
    if cells > MAX_CELLS:
        raise UserError(f"The axes make {cells:,} pictures; at most {MAX_CELLS} are drawn. Take fewer values.")
    for axis in axes:
        if axis.kind == "lora":
            checks.named_lora(axis.name)
        for value in axis.values if axis.kind == "vae" else ():
            if str(value).lower() != BUILT_IN:
                checks.vae("--x", str(value))
        if axis.kind == "prompt":
            axis.put({"prompt": values["prompt"]}, axis.values[0])


def _replayed(values: dict[str, Any]) -> None:
    """The recipe, and what it needs that is not installed."""
    from latentpipe import recipe as recipes

    wrong = [text for text in values["lora"] if not text.partition("=")[2]]
    if wrong:
        raise UserError(f"--lora {wrong[0]}: expected NAME=FILE, with the name that the recipe gives it ('latentpipe inspect').")
    for text in values["lora"]:
        checks.file("--lora", Path(text.partition("=")[2]))
    old = recipes.read(values["picture"])
    if old.source is not None and values["image"] is None:
        raise UserError("This picture began from another one; give it with --image.")
    given = {text.partition("=")[0] for text in values["lora"]}
    for lora in set(old.loras) - given:
        checks.named_lora(lora)
    for kind, option, name in (("models", "model", old.model), ("vae", "vae", old.vae)):
        if name and values[option] is None and lookup(name, available(kind), option) is None and not is_installed(name, kind):
            raise UserError(
                f"The recipe names the {option} '{name}', which is not installed ('latentpipe ls' lists what is); "
                f"give its folder with --{option}."
            )


def _merged(values: dict[str, Any]) -> None:
    """A weight for each file."""
    if values["weights"] and len(values["weights"]) != len(values["files"]):
        raise UserError(f"{len(values['weights'])} weights for {len(values['files'])} LoRA files; expected one for each.")


def _converted(values: dict[str, Any]) -> None:
    """The files or names to convert, and what they shall become."""
    for name in (values["source"], values["source2"]):
        if name is not None and not Path(name).exists():
            if values["to"] == "tensors":
                checks.file("SOURCE", Path(name))
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
    from latentpipe.explore import frames
    from latentpipe.path_verbs import are_pictures

    frames.check(values["out"], values["fps"])
    if are_pictures(values["first"], values["second"]):
        for name in ("first", "second"):
            checks.picture(name.upper(), Path(values[name]))
        checks.vae_size(values)


def _inspected(values: dict[str, Any]) -> None:
    """A name or a path that there is."""
    name = values["path"]
    if Path(name).exists() or name in own_adapters() or any(is_installed(name, kind) for kind in ("vae", "lora")):
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

    text = values["prompt"] + values["negative"]
    if values["out"].suffix.lower() in (".jpg", ".jpeg") and len(dumps(text)) + 4 * len(text) > 50_000:
        raise UserError(f"--out {values['out']}: a JPEG has no room for a prompt of this length; name a .png or a .webp.")


WHOLE: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {
    "generate": (checks.interval, checks.drawn_size, _fits_a_jpeg),
    "grid": (_axes, checks.drawn_size),
    "replay": (_replayed,),
    "emoji": (_rendered,),
    "lora merge": (_merged,),
    "convert": (_converted,),
    "decompress": (_written,),
    "interpolate": (_between,),
    "inspect": (_inspected,),
    "ls": (_listed,),
    "anomaly": (_strange, checks.vae_size),
    "sample": (_measured, checks.vae_size),
    "traverse": (checks.vae_size,),
    "health": (checks.vae_size,),
    "encode": (checks.vae_size, targets.cached),
    "swap": (targets.swapped,),
    "ui": (targets.kept,),
    "fit-codec": (targets.learnt,),
    "fit-adapter": (targets.fitted,),
}
