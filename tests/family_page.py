"""docs/reference/families.md, made of the table of families and of what its tests try: `python tests/family_page.py`."""

from __future__ import annotations

from pathlib import Path

from tiny_families import ROUNDED, UNTRIED, UNTRIED_CLASSES

from latentpipe.pipelines.family_table import FAMILIES, OUT_OF_SCOPE, TASKS, PipelineFamily

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
COLUMNS = {"text": "text", "image": "img2img", "inpaint": "inpaint", "control": "control"}
HEAD = """# Families of pipelines

Made by `python tests/family_page.py`; `tests/pipelines/test_every_family.py` tries each cell on tiny random parts and fails where
the page says something else.

- **equal**: the pipeline with the stage in the place of its VAE, and the latents decoded by the stage, give the picture of
  diffusers, bit for bit; **1e-6**: but for the order of rounding. The column *control* holds ControlNets for text, img2img and
  inpainting.
- **swap**: the VAE of the family, with its latents rescaled, is judged 'same space', and one of other weights is refused
- **LoRA**: an adapter on every layer of the denoiser changes the picture, and taken off leaves the weights as they were, to the
  byte
- **save**: what was saved with the stage in place opens in diffusers and draws the same picture
- –: diffusers has no such pipeline of this family

"""


def cell(name: str) -> str:
    """What the tests say of one class."""
    if not name:
        return "–"
    if name in UNTRIED_CLASSES:
        return f"not tried: {UNTRIED_CLASSES[name]}"
    return "1e-6" if name in ROUNDED else "equal"


def line(family: PipelineFamily) -> str:
    """The row of a family."""
    if family.name in UNTRIED:
        return f"| {family.name} | declared, not tried: {UNTRIED[family.name]} | | | | | | |\n"
    cells = [cell(getattr(family, task)) for task in ("text", "image", "inpaint")]
    control = [cell(name) for task in TASKS[3:] if (name := getattr(family, task))]
    cells.append(", ".join(dict.fromkeys(control)) or "–")
    return f"| {family.name} | {' | '.join(cells)} | yes | yes | yes |\n"


def page() -> str:
    """The page as it should stand."""
    found = HEAD + "| family | text | img2img | inpaint | control | swap | LoRA | save |\n|---|---|---|---|---|---|---|---|\n"
    found += "".join(map(line, FAMILIES))
    found += "\n## Further pipelines of these families\n\n| class | family | picture |\n|---|---|---|\n"
    for family in FAMILIES:
        for name in family.more:
            said = f"not tried: {UNTRIED[family.name]}" if family.name in UNTRIED else cell(name)
            found += f"| `{name}` | {family.name} | {said} |\n"
    found += "\n## Out of scope\n\nEvery other pipeline class of diffusers, and why it is in no family.\n\n"
    for reason in dict.fromkeys(OUT_OF_SCOPE.values()):
        names = sorted(name for name, why in OUT_OF_SCOPE.items() if why == reason)
        found += f"- **{reason}**: {', '.join(f'`{name}`' for name in names)}\n"
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
