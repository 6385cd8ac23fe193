"""What all tabs share: open models, the running job of each visitor, names to choose from, files that are shown."""

from __future__ import annotations

import contextvars
import shutil
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from latentpipe import Engine, Finished, LatentPipeline, Picture, StepDone, UserError
from latentpipe.checkpoints.registry import available
from latentpipe.engine.jobs import Cancelled, Done, Progress, Waiting, device, run_job
from latentpipe.engine.pipeline_cache import PipelineCache
from latentpipe.pipelines.picture import free_path
from latentpipe.ui.listeners import Listeners
from latentpipe.ui.wording import in_words_of_the_page
from latentpipe.utils.defaults import STEPS
from latentpipe.utils.errors import LatentpipeWarning
from latentpipe.utils.io import atomic_file
from latentpipe.utils.out_of_memory import is_shortage, sentence
from latentpipe.utils.progress import ProgressCallback

BUILT_IN = "Built-in"
HEAVY: dict[str, Any] = {
    "concurrency_limit": None,
    "api_visibility": "private",
}  # `latentpipe.engine.jobs.JobQueue` keeps the order
LIGHT: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Of handlers that answer at once. They too go through gradio's queue, each with a place of its own, for `gr.Info` reaches the
page as an event of that queue alone: with ``queue=False`` it is printed on the server (gradio 6.31, `helpers.log_message`)."""
MAX_WORK = 300.0  # millions of pixels x steps x pictures in one request: 1024 x 1024 pixels, 28 steps, 10 pictures
_notes: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


class Jobs:
    """The jobs of each visitor, by session, so that Stop ends one's own only.

    max_work   the most that one request may ask for: pixels x steps x pictures, in millions
    listeners  who reads the events of a visitor; None: nobody looks, and every job goes on to its end
    """

    def __init__(self, max_work: float = MAX_WORK, listeners: Listeners | None = None) -> None:
        self.max_work, self.listeners = max_work, listeners
        self._tokens: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def allow(self, width: float, height: float, steps: float, count: float) -> None:
        """UserError where a request asks for more than `max_work`."""
        work = width * height * steps * count / 1e6
        if not work <= self.max_work:
            raise UserError(
                f"This asks for {width:g} x {height:g} pixels x {steps:g} steps x {count:g} pictures: {work:,.6g} million; "
                f"at most {self.max_work:,.6g} million are drawn at once here. Choose fewer steps or pictures, or a smaller size."
            )

    def run(
        self, request: gr.Request, work: Callable[[ProgressCallback], Any], notes: list[str] | None = None
    ) -> Iterator[Waiting | Progress | Done]:
        """Events of `latentpipe.engine.jobs.run_job` for this visitor: `Waiting` ..., `Progress` ..., `Done` with `.result`.

        The first one is ``Waiting(0)``, at once.

        notes  of `toast_errors()`: where the job's notes go
        """
        with self._token(request) as token:
            yield Waiting(0)  # so that a click is seen at once, and Stop has something to stop from here on
            _notes.set(notes)  # the job's thread, which starts below, inherits it
            yield from self._read(run_job(work, token), token, request)

    def draw(
        self,
        request: gr.Request,
        open_pipe: Callable[[], LatentPipeline],
        prompt: str,
        notes: list[str] | None = None,
        previews: bool = True,
        **settings: Any,
    ) -> Iterator[Waiting | StepDone | Finished]:
        """Events of `latentpipe.Engine.run` for this visitor; UserError where that is too much work."""
        with self._token(request) as token:
            yield Waiting(0)
            pipe = open_pipe()
            if token.is_set():
                raise Cancelled("stopped while the model was opened")
            width, height = settings.get("size") or pipe.native_size
            self.allow(width, height, settings.get("num_inference_steps", STEPS), settings.get("n", 1))
            _notes.set(notes)
            yield from self._read(Engine(pipe).run(prompt, cancel=token, previews=previews, **settings), token, request)

    def stop(self, request: gr.Request) -> int:
        """Stop this visitor's jobs; returns how many there were."""
        with self._lock:
            tokens = list(self._tokens.get(request.session_hash or "", ()))
        for token in tokens:
            token.set()
        return len(tokens)

    def leave(self, request: gr.Request) -> None:
        """A visitor has closed the page: nobody waits for the jobs."""
        self.stop(request)

    def close(self, seconds: float = 5.0) -> None:
        """Stop everybody's jobs, begin no more, and wait until those at work have left their step."""
        with self._lock:
            self._closed = True
            tokens = [token for every in self._tokens.values() for token in every]
        for token in tokens:
            token.set()
        device.wake()
        until = time.monotonic() + seconds
        for thread in threading.enumerate():
            if thread.name == "latentpipe_work":
                thread.join(max(0.0, until - time.monotonic()))

    def _read(self, events: Generator[Any, None, None], token: threading.Event, request: gr.Request) -> Iterator[Any]:
        """The events of a job, which stops when nobody reads the visitor's events any more."""
        session, since = request.session_hash or "", time.monotonic()
        for event in _left_at_once(events, token):
            if self.listeners is not None and self.listeners.gone(session, since):
                token.set()
            yield event

    @contextmanager
    def _token(self, request: gr.Request) -> Generator[threading.Event, None, None]:
        token, session = threading.Event(), request.session_hash or ""
        with self._lock:
            if self._closed:
                raise UserError("The server is about to end; nothing more is begun.")
            self._tokens.setdefault(session, []).append(token)
        try:
            yield token
        finally:
            token.set()
            with self._lock:
                self._tokens[session].remove(token)
                if not self._tokens[session]:
                    del self._tokens[session]


def _left_at_once(events: Generator[Any, None, None], token: threading.Event) -> Iterator[Any]:
    """The events of a job. Closing stops it without waiting for its step: gradio closes on the thread that serves everybody."""
    try:
        for event in events:  # noqa: UP028 - the close of `yield from` waits
            yield event
    except GeneratorExit:
        token.set()
        threading.Thread(target=events.close, name="latentpipe_close", daemon=True).start()
        raise


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
        """Remove the files that were shown."""
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
        notes = _notes.get()
        if issubclass(category, LatentpipeWarning) and notes is not None:
            notes.append(str(message))
        else:
            before(message, category, *rest, **named)

    warnings.simplefilter("always", LatentpipeWarning)
    warnings.showwarning = show
