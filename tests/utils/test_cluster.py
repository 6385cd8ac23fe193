"""Workers in actors: their answers, what an unreachable cluster says, and the bytes of shards from two nodes of Ray."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import opened_in_threads

from latentpipe import UserError
from latentpipe.utils import cluster
from latentpipe.utils.errors import Cancelled, LatentpipeWarning
from latentpipe.utils.workers import check_version, unpacked
from latentpipe.version import VERSION

os.environ.setdefault("RAY_raylet_start_wait_time_s", "600")  # read when ray is imported; a busy machine starts it slowly
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def open_nothing(arguments: Any, device: str) -> Any:
    """A job that tells two events and returns its task."""

    def work(task: Any, emit: Any, cancel: threading.Event) -> Any:
        emit("begun")
        emit(device)
        if cancel.is_set():
            raise Cancelled("stopped")
        return [arguments, task]

    return work


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> cluster.Actor:
    """One outside of Ray."""
    from latentpipe.utils import system

    monkeypatch.setattr(system, "open_nothing", open_nothing, raising=False)
    return cluster.Actor("latentpipe.utils.system:open_nothing", {"a": 1}, "cpu", 1)


def test_an_actor_answers_as_a_process_does(actor: cluster.Actor) -> None:
    assert actor.hello() == {"ready": VERSION, "host": socket.gethostname()}
    assert actor.ask(3) == {"result": [{"a": 1}, 3]}
    assert actor.events() == ["begun", "cpu"]
    assert actor.events() == []


def test_a_job_that_does_not_open_says_where() -> None:
    told = cluster.Actor(
        "latentpipe.data.shard_worker:open_shards", {"folder": "x", "out": "nowhere", "vae": "emoji"}, "cpu", 1
    ).hello()
    assert told["kind"] == "user"
    assert told["error"].startswith(f"{socket.gethostname()}: nowhere")
    with pytest.raises(UserError, match="nowhere"):
        unpacked(told, "Shard 0")


def test_a_worker_of_another_version_is_refused() -> None:
    check_version(VERSION, "here")
    with pytest.raises(UserError, match=f"The worker on node-3 has latentpipe 9.9, and this is {VERSION}.*Install"):
        check_version("9.9", "node-3")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://somewhere:10001", "expected its address as HOST:PORT"),
        ("somewhere", "HOST:PORT"),
        ("127.0.0.1:0", "No Ray cluster"),
    ],
)
def test_a_cluster_that_is_none_is_one_sentence(address: str, words: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=words), cluster.connected(address):
        pass


def test_a_closed_port_is_told_at_once() -> None:
    pytest.importorskip("ray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"No Ray cluster answers at {address}"), cluster.connected(address):
            pass


def test_without_ray_a_cluster_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'latentpipe.cluster.'"), cluster.connected("auto"):
        pass


@pytest.mark.slow
def test_two_nodes_write_the_bytes_of_one_process(
    pictures: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    from latentpipe.data import shards

    with monkeypatch.context() as patch:
        patch.setattr(shards, "opened_on", opened_in_threads)
        shards.encode_shards(pictures, vae_folder, tmp_path / "here", 16, per_shard=2)
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        nodes.add_node(**node)
        killed: list[int] = []

        def show(done: int, total: int) -> None:
            if done and not killed:
                killed.append(actors()[0])
                os.kill(killed[0], signal.SIGKILL)

        with pytest.warns(LatentpipeWarning, match="died"):
            found = shards.encode_shards(
                pictures, vae_folder, tmp_path / "there", 16, 2, nodes.address, per_shard=2, progress=show
            )
        assert (found.rows, found.deaths) == (12, 1)
        assert cluster.facts_of(nodes.address) | {"memory": 0} == {
            "ray": sys.modules["ray"].__version__,
            "address": nodes.address,
            "nodes": 2,
            "cpu": 2,
            "gpu": 0,
            "memory": 0,
        }
    finally:
        nodes.shutdown()
    names = [path.name for path in sorted((tmp_path / "here").glob("shard-*"))]
    assert len(names) == 6
    assert all((tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes() for name in names)


def actors() -> list[int]:
    """The processes of this user's actors."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = status.read_bytes()
        except OSError:
            continue
        if text.startswith(b"ray::Actor"):
            found.append(int(status.parent.name))
    return found
