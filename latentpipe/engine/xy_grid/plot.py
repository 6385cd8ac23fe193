"""X/Y plots: one picture for each pair of values of two axes, on one sheet that can be drawn again from its own file.

prompt, settings + axes -> setups -> [VAE by VAE, LoRA weight by LoRA weight] -> pictures -> sheet
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentpipe.checkpoints.registry import is_installed
from latentpipe.engine.jobs import Cancelled
from latentpipe.engine.xy_grid.axes import MAX_CELLS, Axis
from latentpipe.engine.xy_grid.sheet import draw_sheet, size_of
from latentpipe.lora.prompt_tags import partial_tags, split_tags
from latentpipe.pipelines import prompt_weighting
from latentpipe.pipelines.latent_pipeline import LatentPipeline, Picture
from latentpipe.pipelines.metadata import recipe as recipes
from latentpipe.pipelines.metadata.recipe import MAX_PROMPT, MAX_SEED, Recipe, Unit
from latentpipe.pipelines.sampling import Settings, Step
from latentpipe.utils.defaults import GUIDANCE, STEPS
from latentpipe.utils.errors import UserError, counted
from latentpipe.utils.images import picture_file
from latentpipe.utils.progress import ProgressCallback
from latentpipe.utils.setting_names import IN_PYTHON, in_python, refuse_short, shortened

CHUNK = recipes.GRID_CHUNK
MAX_PIXELS = 2**26  # of a sheet: Pillow and browsers open it without complaint

OpenPipe = Callable[[str | None], LatentPipeline]
"""Opens the pipeline that decodes by a VAE (None: the model's own), or raises UserError with the verdict."""


class Setup(BaseModel):
    """What decides a picture but the model, as a sheet keeps it: prompt, seed, VAE, LoRA, `latentpipe.Settings` (short names)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    prompt: str = Field(max_length=MAX_PROMPT)
    seed: int = Field(ge=0, le=MAX_SEED)
    vae: str | None = Field(None, max_length=200)
    loras: dict[str, float] = Field(default_factory=dict, max_length=64)
    negative: str = Field("", max_length=MAX_PROMPT)
    steps: int = STEPS
    guidance: float = GUIDANCE
    guidance_interval: tuple[Unit, Unit] = (0.0, 1.0)
    scheduler: str | None = Field(None, max_length=64)
    size: tuple[int, int] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `latentpipe.Settings`."""
        return in_python(self.model_dump(exclude={"prompt", "seed", "vae", "loras"}))


class GridRecipe(BaseModel):
    """What made a sheet: the axes, what all pictures share, and the recipe of each picture (row by row; None: not drawn)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    version: Literal[1] = recipes.VERSION
    model: str = Field(max_length=200)
    x: Axis
    y: Axis | None = None
    base: Setup
    cells: list[Recipe | None] = Field(max_length=MAX_CELLS)

    @model_validator(mode="after")
    def _fits_together(self) -> GridRecipe:
        if len(self.cells) != len(self.x.values) * (len(self.y.values) if self.y else 1):
            raise ValueError("the axes and the number of pictures contradict each other")
        return self


@dataclass(frozen=True)
class Grid:
    """A plot: its sheet, the pictures row by row (None: stopped before it was drawn), and the recipe of it all."""

    image: Image.Image
    pictures: list[Picture | None]
    recipe: GridRecipe

    @property
    def captions(self) -> list[str]:
        """What each picture shows, in words."""
        x, y = self.recipe.x, self.recipe.y
        heads = [x.said(label) for label in x.labels]
        return [f"{head}, {y.said(label)}" for label in y.labels for head in heads] if y else heads

    def save(self, path: str | Path) -> Path:
        """Write the sheet as a PNG that carries the recipe."""
        recipes.save_png(self.image, Path(path), texts={CHUNK: self.recipe.model_dump_json()})
        return Path(path)


def plot(
    open_pipe: OpenPipe,
    prompt: str,
    x: Axis,
    y: Axis | None = None,
    seed: int | None = None,
    vae: str | None = None,
    loras: Mapping[str, float] | None = None,
    report: ProgressCallback | None = None,
    lora_partial: bool = False,
    **settings: Any,
) -> Grid:
    """Draw a picture for each value of `x` (columns) and of `y` (rows); each is the one that it would be alone.

    seed      of all pictures (None: a random one), where it is no axis; so are `vae`, `loras` and `settings`
    settings  negative_prompt, num_inference_steps, guidance_scale, guidance_interval, scheduler, size
    report    called after each step; where it raises `Cancelled`, the pictures that are done are kept
    lora_partial  take LoRA files that fit in part; what is left out is told in a warning

    Whatever axis they lie on, VAEs change outermost, then LoRA weights: each VAE is put in once. UserError before anything
    is drawn: a VAE that does not fit (its verdict), a LoRA or setting that is wrong, more than MAX_CELLS pictures.
    """
    seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
    refuse_short(settings)
    known = list(in_python(Setup.model_fields))
    if extra := set(settings) - set(known):
        raise UserError(f"A plot takes no {', '.join(sorted(extra))}; expected some of {', '.join(known)}.")
    base = {"prompt": prompt, "seed": seed, "vae": vae, "loras": dict(loras or {}), **shortened(settings)}
    setups = _setups(base, x, y)
    tell = report or (lambda done, total, what: None)
    pipes = _checked(open_pipe, setups, tell, lora_partial)
    first = pipes[setups[0].vae]
    size = setups[0].size or first.native_size
    if (area := size_of(size, x, y)) > MAX_PIXELS:
        raise UserError(
            f"The sheet would have {area:,} pixels; at most {MAX_PIXELS:,} are drawn. Take fewer values, or a smaller size."
        )
    pictures = _draw(pipes, setups, tell, lora_partial)
    kept = GridRecipe(model=first.name, x=x, y=y, base=Setup(**base), cells=[one.recipe if one else None for one in pictures])
    sheet = draw_sheet([one.image if one else None for one in pictures], size, x, y, _legend(kept))
    return Grid(sheet, pictures, kept)


def is_grid(path: Path) -> bool:
    """Whether a file is a picture that carries the recipe of a plot; nothing is decoded."""
    with suppress(UserError), picture_file(path) as picture:
        return CHUNK in picture.info
    return False


def read_grid(path: Path) -> GridRecipe:
    """The recipe in a sheet; UserError where the file has none, or a damaged one."""
    text = recipes.text_in(path, CHUNK)
    if text is None:
        raise UserError(f"{path} carries no grid; expected a PNG that 'latentpipe grid' wrote.")
    return recipes.parsed(path, text, GridRecipe)


def redraw(path: Path, open_model: Callable[[str, str | None], LatentPipeline], report: ProgressCallback | None = None) -> Grid:
    """Draw the plot in a sheet again; a stopped one is finished.

    open_model  opens the pipeline of a model and a VAE (`latentpipe.engine.pipeline_cache.PipelineCache.open`)

    The names in the file resolve among the installed ones only. UserError where weights are not those of then.
    """
    old = read_grid(path)

    def open_pipe(vae: str | None) -> LatentPipeline:
        for kind, name in (("models", old.model), ("vae", vae)):
            if name is not None and not is_installed(name, kind):
                raise UserError(f"{path} names the {kind.removesuffix('s')} '{name}', which is not installed ('latentpipe ls').")
        return open_model(old.model, vae)

    base = old.base
    grid = plot(open_pipe, base.prompt, old.x, old.y, base.seed, base.vae, base.loras, report, True, **base.settings)
    for before, now in zip(old.cells, grid.recipe.cells, strict=True):
        if before is not None and now is not None and before.hashes != now.hashes:
            parts = [part for part in before.hashes if before.hashes[part] != now.hashes.get(part)]
            raise UserError(f"{path} was made with other weights: {', '.join(parts)} differ. Install those of then.")
    return grid


def _setups(base: Mapping[str, Any], x: Axis, y: Axis | None) -> list[Setup]:
    """What decides each picture, row by row; UserError for axes that do not go together."""
    if y is not None and (x.kind, x.name, x.values[:1] if x.kind == "prompt" else ()) == (
        y.kind, y.name, y.values[:1] if y.kind == "prompt" else (),
    ):  # fmt: skip
        raise UserError(f"Both axes are {x.title}; choose two different ones.")
    count = len(x.values) * (len(y.values) if y else 1)
    if count > MAX_CELLS:
        raise UserError(f"The plot would have {count} pictures; at most {MAX_CELLS} are drawn. Take fewer values.")
    rows = [y.put(dict(base), value) for value in y.values] if y else [dict(base)]
    found = [x.put(row, value) for row in rows for value in x.values]
    try:
        return [Setup(**one) for one in found]
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"The plot's {'.'.join(IN_PYTHON.get(str(part), str(part)) for part in problem['loc'])}: {problem['msg'].lower()}."
        ) from None


def _checked(
    open_pipe: OpenPipe, setups: Sequence[Setup], tell: ProgressCallback, partial: bool
) -> dict[str | None, LatentPipeline]:
    """The open pipeline of each VAE, tried with all that will be asked of it; nothing is drawn yet."""
    total = sum(setup.steps for setup in setups)
    pipes: dict[str | None, LatentPipeline] = {}
    for setup in setups:
        if setup.vae not in pipes:
            tell(0, total, f"open {setup.vae or 'the model'}")
            pipes[setup.vae] = open_pipe(setup.vae)
    for setup in setups:
        pipe = pipes[setup.vae]
        prompt, _ = split_tags(setup.prompt)
        for text in (prompt, setup.negative):
            prompt_weighting.refuse(pipe.host, text)
        size = pipe.check(Settings(**setup.settings)).size
        assert size is not None
        pipe.stage.check_memory(1, *reversed(size))
    for vae, pipe in pipes.items():
        own = [setup for setup in setups if setup.vae == vae]
        names = {name for setup in own for name in (setup.loras | split_tags(setup.prompt)[1])}
        with pipe.loras.more(dict.fromkeys(names, 0.0), _partial(own, names if partial else ())):
            pass  # a LoRA that does not fit is told of now
    return pipes


def _partial(setups: Sequence[Setup], names: Collection[str]) -> set[str]:
    """Names of LoRA that may fit in part: these, and those whose tags say so."""
    return {*names, *(name for setup in setups for name in partial_tags(setup.prompt))}


def _draw(
    pipes: Mapping[str | None, LatentPipeline], setups: Sequence[Setup], tell: ProgressCallback, partial: bool
) -> list[Picture | None]:
    """The pictures in the order of `setups`, drawn in that of VAEs, then LoRA weights; None from a stop on."""
    pictures: list[Picture | None] = [None] * len(setups)
    total, done = sum(setup.steps for setup in setups), 0
    groups: dict[Any, list[int]] = {}
    for index, setup in enumerate(setups):
        groups.setdefault((setup.vae, tuple(sorted(setup.loras.items()))), []).append(index)
    vaes = list(pipes)
    drawn = 0
    try:
        for (vae, loras), indices in sorted(groups.items(), key=lambda group: vaes.index(group[0][0])):
            pipe = pipes[vae]
            with pipe.loras.more(dict(loras), dict(loras) if partial else ()):
                for index in indices:
                    setup, before, what = setups[index], done, f"picture {drawn + 1} of {len(setups)}"

                    def on_step(step: Step, before: int = before, what: str = what) -> None:
                        tell(before + step.step, total, what)

                    text, tagged = split_tags(setup.prompt) if partial else (setup.prompt, {})
                    with pipe.loras.more(tagged, tagged):
                        (pictures[index],) = pipe(text, seed=setup.seed, on_step=on_step, **setup.settings)
                    done, drawn = done + setup.steps, drawn + 1
    except Cancelled:
        if not drawn:
            raise
    return pictures


def _legend(recipe: GridRecipe) -> list[str]:
    """What all pictures share, in words: the prompt, then the settings that are on no axis."""
    base, axes = recipe.base, [axis for axis in (recipe.x, recipe.y) if axis is not None]
    own = {axis.kind for axis in axes}
    parts = [f"model {recipe.model}"]
    parts += [f"VAE {base.vae or 'built in'}"] * ("vae" not in own)
    parts += [f"seed {base.seed}"] * ("seed" not in own) + [f"{counted(base.steps, 'step')}"] * ("steps" not in own)
    parts += [f"guidance {base.guidance:g}"] * ("guidance" not in own)
    parts += [f"scheduler {base.scheduler}"] * ("scheduler" not in own and base.scheduler is not None)
    shown = {axis.name for axis in axes if axis.kind == "lora"}
    parts += [f"LoRA {name} {weight:g}" for name, weight in base.loras.items() if name not in shown]
    lines = [base.prompt] + ([f"not: {base.negative}"] if base.negative else [])
    return [*lines, ", ".join(parts)]
