"""What all tabs share: open models, the running job of each visitor, names to choose from, files that are shown."""

from __future__ import annotations

import shutil
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from latentpipe import LatentPipeline, Picture, UserError
from latentpipe.checkpoints.registry import available
from latentpipe.engine.jobs import Cancelled
from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.engine.studio import Names
from latentpipe.pipelines.picture import free_path
from latentpipe.ui.jobs import JOB_NOTES, Jobs
from latentpipe.ui.wording import in_words_of_the_page
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.io import atomic_file
from latentpipe.utils.out_of_memory import is_shortage, sentence

BUILT_IN = "Built-in"
HEAVY: dict[str, Any] = {
    "concurrency_limit": None,
    "api_visibility": "private",
}  # `latentpipe.engine.jobs.JobQueue` keeps the order
LIGHT: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Of handlers that answer at once. They too go through gradio's queue, each with a place of its own, for `gr.Info` reaches the
page as an event of that queue alone: with ``queue=False`` it is printed on the server (gradio 6.31, `helpers.log_message`)."""


@dataclass
class App:
    """One running interface.

    out    folder where pictures are kept by date; None: nothing is kept
    model  the model that is chosen at first
    """

    model: str = "emoji"
    out: Path | None = None
    models: PipelineCache = field(default_factory=PipelineCache)
    jobs: Jobs = field(default_factory=Jobs)
    failure: str = ""
    """Why the model could not be loaded."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why the last job of a visitor failed, by session, until it is shown (`failures`)."""
    shown: Path = field(default_factory=lambda: _folder_for_shown())
    """Inside gradio's own folder: a file there is not copied once more, and is removed after a day (`delete_cache`)."""

    _keeping: threading.Lock = field(default_factory=threading.Lock)

    def names(self, model: str | None = None, vae: str | None = None, adapter: str | None = None) -> Names:
        """What `pipe` opens, as workers are told it."""
        return model or self.model, None if vae in (None, "", BUILT_IN) else vae, adapter or None

    def choices(self, kind: str) -> list[str]:
        """Installed names of a kind ("models", "vae" or "lora")."""
        return list(available(kind))

    def named(self, kind: str, name: str) -> str:
        """The name, where it is an installed one; UserError otherwise. No path gets beyond this."""
        if name not in available(kind):
            known = ", ".join(available(kind)) or "none"
            raise UserError(f"No {kind.removesuffix('s')} '{str(name)[:80]}' is installed; there are: {known}.")
        return name

    def pipe(self, model: str | None = None, vae: str | None = None, adapter: str | None = None) -> LatentPipeline:
        """The open pipeline of a model, and of a VAE where one other than its own is chosen, by installed names only."""
        swapped = None if vae in (None, "", BUILT_IN) else self.named("vae", str(vae))
        if adapter and swapped is None:
            raise UserError(f"The adapter '{adapter[:80]}' leads to another VAE; choose that VAE as well, or no adapter.")
        return self.models.open(self.named("models", model or self.model), swapped, adapter or None)

    def keep(self, picture: Picture) -> str:
        """Write a picture with its recipe for the browser (and into `out`, where there is one); returns the path to show."""
        name = free_path(Path("."), picture.recipe.prompt, picture.recipe.seed).name
        return self.keep_file(picture.save(self.place(name)), picture.recipe.prompt, picture.recipe.seed)

    def keep_file(self, path: Path, prompt: str, seed: int) -> str:
        """Copy a PNG that is shown into `out` as well, where there is one, named by prompt and seed; returns its path."""
        if self.out is not None:
            folder = self.out / date.today().isoformat()
            with self._keeping, atomic_file(free_path(folder, prompt, seed)) as kept:  # two visitors may want one name
                shutil.copyfile(path, kept)
        return str(path)

    def place(self, name: str) -> Path:
        """A new path of that name for a file that is shown in the browser."""
        return Path(tempfile.mkdtemp(dir=self.shown)) / name

    def close(self) -> None:
        """Remove the files that were shown, and end the workers."""
        if self.jobs.studio is not None:
            self.jobs.studio.close()
        shutil.rmtree(self.shown, ignore_errors=True)


def _folder_for_shown() -> Path:
    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="shown-", dir=get_upload_folder()))


def json_field(label: str, value: Any, schema: dict[str, Any]) -> gr.JSON:
    """A field of an endpoint that takes JSON of a shape; gradio itself describes any JSON by a schema that is none."""
    field = gr.JSON(value, label=label)
    field.api_info = lambda: schema  # type: ignore[method-assign]
    return field


def wire_stop(app: App, button: gr.Button) -> None:
    """Let a button stop its visitor's jobs."""

    def halt(request: gr.Request) -> None:
        gr.Info("Stopping ..." if app.jobs.stop(request) else "Nothing is running.", duration=4)

    button.click(halt, None, None, **LIGHT)


def public(error: UserError | str) -> str:
    """An error's or a note's sentence for a page (`wording`)."""
    return in_words_of_the_page(str(error))


@contextmanager
def toast_errors() -> Iterator[list[str]]:
    """What goes wrong inside becomes a toast with its sentence; yields the list that the notes of a job go into.

    Notes are shown as one toast when the block ends well.
    """
    notes: list[str] = []
    try:
        yield notes
        if notes:  # one toast: several would fill a phone's screen
            gr.Info(sentences_of(notes), duration=12)
    except Cancelled:
        gr.Info("Stopped.")
    except UserError as error:
        raise gr.Error(public(error), duration=20, print_exception=False) from None
    except (gr.Error, GeneratorExit):
        raise
    except Exception as error:
        if is_shortage(error):
            raise gr.Error(public(sentence(error)), duration=20, print_exception=False) from None
        traceback.print_exc()
        kind = type(error).__name__
        raise gr.Error(
            f"This failed inside ({kind}); the window that runs the server has the details.", print_exception=False
        ) from None


def sentences_of(notes: Iterable[str]) -> str:
    """Notes as sentences, each once."""
    said = dict.fromkeys(public(note) for note in notes)
    return " ".join(f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in said)


def collect_notes() -> None:
    """Notes (`latentpipe.utils.errors.LatentpipeWarning`) go to the job that they belong to, in place of stderr."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **named: Any) -> None:
        notes = JOB_NOTES.get()
        if issubclass(category, LatentpipeWarning) and notes is not None:
            notes.append(str(message))
        else:
            before(message, category, *rest, **named)

    warnings.simplefilter("always", LatentpipeWarning)
    warnings.showwarning = show
