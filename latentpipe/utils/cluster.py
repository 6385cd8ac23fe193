"""Where workers run: on this machine, a process on each of its devices in turn; or on a Ray cluster (extra `cluster`).

Of Ray only actors are used. Its usage statistics are off, and it starts no dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from latentpipe.utils.errors import UserError
from latentpipe.utils.worker_process import Job, answer, open_job
from latentpipe.utils.workers import Died, LocalWorker, Worker, check_version
from latentpipe.version import VERSION

ANSWERS_S = 5.0  # that a cluster has to answer in
LOOK_S = 0.2  # between two looks at what an actor has to tell


def devices() -> list[str]:
    """The devices of this machine that a worker can have alone; the processor where there is no other."""
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else ["cpu"]


@contextmanager
def opened_on(
    cluster: str | None, opener: str, arguments: Any, threads: int, device: str | None = None
) -> Iterator[Callable[[int], Worker]]:
    """What makes the worker of a number, for `workers.Pool`.

    cluster    address of a Ray cluster (HOST:PORT), "auto" for the one that this machine belongs to; None: this machine
    opener     "module:function", of arguments and device
    threads    of torch in each worker
    device     that all workers compute on; None: the devices of the machine, in turn
    """
    if cluster is None:
        own = [device] if device else devices()
        yield lambda number: LocalWorker(opener, arguments, own[number % len(own)], threads)
        return
    with connected(cluster) as ray:
        gpus = 1 if device is None and ray.cluster_resources().get("GPU") else 0
        made = ray.remote(Actor).options(num_cpus=1, num_gpus=gpus, max_concurrency=2, max_restarts=0)
        where = device or ("cuda:0" if gpus else "cpu")
        yield lambda number: ActorWorker(ray, made.remote(opener, arguments, where, threads))


def kind_of_devices(cluster: str | None) -> str:
    """ "cuda" or "cpu": what workers compute on, where nobody says a device."""
    if cluster is None:
        return devices()[0].partition(":")[0]
    with connected(cluster) as ray:
        return "cuda" if ray.cluster_resources().get("GPU") else "cpu"


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster inside; UserError where it is not installed or no cluster answers there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported, and by what it starts
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("A cluster is reached through Ray, which is not installed: pip install 'latentpipe[cluster]'.") from None
    if ray.is_initialized():
        yield ray
        return
    _must_answer(address)
    try:
        ray.init(address=address, include_dashboard=None, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, by what is wrong
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"The Ray cluster at {address} cannot be joined ({reason}). {_START}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


_START = "'ray start --head' on one machine starts one, and 'ray start --address HOST:6379' on each other one joins it."


def _must_answer(address: str) -> None:
    """UserError at once where nothing listens; Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise UserError(f"The cluster is '{address[:80]}'; expected its address as HOST:PORT, or auto. {_START}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWERS_S):
            pass
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or "no answer").lower()
        raise UserError(f"No Ray cluster answers at {address} ({reason}). {_START}") from None


def facts_of(address: str | None) -> dict[str, Any]:
    """What there is of Ray: its version, and, of the cluster at an address, nodes, processors, GPUs and bytes of memory."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found: dict[str, Any] = {"ray": version("ray")}
    except PackageNotFoundError:
        return {"ray": "not installed (pip install 'latentpipe[cluster]')"}
    if address is None:
        return found
    with connected(address) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        has = ray.cluster_resources()
        counts = {name.lower(): int(has.get(name, 0)) for name in ("CPU", "GPU", "memory")}
        return {**found, "address": address, "nodes": len(nodes), **counts}


class Actor:
    """A worker within Ray: the same job as a `worker_process`, with the same answers."""

    def __init__(self, opener: str, arguments: Any, device: str, threads: int) -> None:
        self._given = (opener, arguments, device, threads)
        self._job: Job | None = None
        self._events: list[Any] = []
        self._cancel = threading.Event()

    def hello(self) -> dict[str, Any]:
        """Open the job; {"ready": version, "host"}, or what went wrong."""

        def opened() -> None:
            self._job = open_job(*self._given)

        told = answer(opened)
        if told.get("kind") == "user":
            told["error"] = f"{socket.gethostname()}: {told['error']}"
        return told if "error" in told else {"ready": VERSION, "host": socket.gethostname()}

    def ask(self, task: Any) -> dict[str, Any]:
        """Do a task."""
        self._cancel.clear()
        self._events.clear()
        job = self._job
        assert job is not None
        return answer(lambda: job(task, self._events.append, self._cancel))

    def events(self) -> list[Any]:
        """What the task in work has told since the last call."""
        found, self._events[:] = list(self._events), []
        return found

    def cancel(self) -> None:
        """Tell the task in work to stop."""
        self._cancel.set()


class ActorWorker:
    """The driver's end of an `Actor`."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor, self._ready = ray, actor, False

    def ask(self, task: Any, on_event: Callable[[Any], None] | None = None) -> dict[str, Any]:
        """As `Worker.ask`."""
        with self._alive():
            if not self._ready:
                hello = self._ray.get(self._actor.hello.remote())
                if "error" in hello:
                    return hello
                check_version(hello["ready"], hello["host"])
                self._ready = True
            asked = self._actor.ask.remote(task)
            done = on_event is None
            while not done:
                done = bool(self._ray.wait([asked], timeout=LOOK_S)[0])
                for event in self._ray.get(self._actor.events.remote()):  # once more after the end, for the last ones
                    on_event(event)  # type: ignore[misc]
            return self._ray.get(asked)

    def cancel(self) -> None:
        """Tell the task in work to stop."""
        with contextlib.suppress(Died), self._alive():
            self._ray.get(self._actor.cancel.remote())

    def end(self) -> None:
        """Kill the actor."""
        with contextlib.suppress(Exception):  # it may be gone, and the cluster too
            self._ray.kill(self._actor)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except self._ray.exceptions.RayActorError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise Died((lines or ["its node is gone"])[0][:200].rstrip(".")) from None
