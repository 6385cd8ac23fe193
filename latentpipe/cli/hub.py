"""The verbs for checkpoints of others: fetch one from the hub, use those that other tools keep."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from latentpipe.checkpoints.places.hub_cache import parse_id
from latentpipe.cli.argument_parser import arg
from latentpipe.utils.errors import UserError

if TYPE_CHECKING:
    from latentpipe.checkpoints.places.hub_cache import HubId


def wanted_id(repository: str, revision: str | None) -> HubId:
    """The id that a call of pull names; UserError where it is none, or names two revisions."""
    found = parse_id(repository)
    if found is None:
        raise UserError(f"'{repository[:120]}' is no id of the hub; expected ORG/NAME, ORG/NAME/FOLDER or either with @REVISION.")
    if revision is None:
        return found
    named = parse_id(f"{found.repo}@{revision}")
    if named is None or (found.revision or revision) != revision:
        given = f"{repository} and --revision {revision}"
        raise UserError(f"{given[:160]}: expected one revision, a branch, a tag or a commit.")
    return replace(found, revision=revision)


def pull(repository: str, /, revision: str | None = None, token: str | None = None) -> None:
    """Fetch a model, a VAE or a LoRA from the hub into its local cache; the only verb that reaches out.

    Says size and licence first, takes one copy of each part (safetensors, the smallest), goes on where it was stopped, and checks
    every hash. HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and proxies count. Afterwards the id is a name for every verb.

    Args:
        repository: ORG/NAME, or ORG/NAME/FOLDER, ORG/NAME/FILE; with @REVISION, where it is not main.
        revision: A branch, a tag or a commit.
        token: Environment variable that holds the token; left out: HF_TOKEN, where it is set.
    """
    from tqdm import tqdm

    from latentpipe.checkpoints.hub.client import open_hub
    from latentpipe.checkpoints.hub.pull import notes_of, plan
    from latentpipe.checkpoints.hub.pull import pull as run

    hub = open_hub(token)
    planned = plan(hub, wanted_id(repository, revision))
    print(f"latentpipe: {planned}", file=sys.stderr, flush=True)
    for note in notes_of(planned):
        print(f"latentpipe: note: {note}", file=sys.stderr, flush=True)
    with tqdm(total=planned.total, unit="B", unit_scale=True, disable=None) as bar:
        place = run(hub, planned, bar.update)
    print(place)


def import_(
    path: Path, /, *, tool: Annotated[Literal["comfyui", "a1111", "invokeai", "diffusers-cache"], arg(name="from")]
) -> None:
    """Use the models, VAEs, LoRA, embeddings and upscalers of another tool where they lie; nothing is copied or written there.

    The folder is noted in folders.yaml (in $LATENTPIPE_HOME, else ~/.config/latentpipe), and looked through anew each time: what
    the tool adds is there at once. 'latentpipe ls' lists all; the names begin with the tool's. To undo it, delete its lines.

    Args:
        path: The tool's folder; of ComfyUI also an extra_model_paths.yaml.
        tool: Whose folder it is.
    """
    from latentpipe.checkpoints.hub.importing import note

    for line in note(tool, path):
        print(line)
