"""Many clients at once: part of ui.py.

A third waits for its picture, a third stops or cancels at a random moment, a third vanishes at a random moment (the socket of its
event stream is closed, at times by a reset, at times it never listens). Right ends: a picture whose recipe has the client's own
prompt, seed and steps; a partial one, or none, after a stop; the sentence of a full queue. Anything else is counted as wrong, as
is memory that grows, a thread or a job that stays, and a traceback on the server. A sample of the pictures is drawn again here:
the pixels must agree.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from latentpipe.pipelines.metadata.recipe import read

KINDS = ("wait", "stop", "cancel", "vanish", "reset", "deaf")
WEIGHTS = (6, 3, 3, 3, 2, 1)
COLOURS = ("red", "green", "blue", "yellow", "purple")
THINGS = ("apple", "heart", "circle", "book", "square", "car", "cat face")
LONGEST_S = 300  # a request over this has hung
SETTLE_S = 60
WARM_UP = 1 / 6
GROWTH = 0.03  # of the resident memory, from the first to the last third after the warm-up
REDRAWN = 40


@dataclass
class Tally:
    """What all clients saw."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Visit:
    """One request from its own address, session and random settings to its end."""

    def __init__(self, address: str, fn_index: int, seed: int, random_: random.Random) -> None:
        self.host, self.fn_index, self.seed, self.random = urlsplit(address).netloc, fn_index, seed, random_
        self.kind = random_.choices(KINDS, WEIGHTS)[0]
        self.prompt = f"{random_.choice(COLOURS)} {random_.choice(THINGS)}"
        self.steps = random_.randint(1, 40)
        self.session = uuid.uuid4().hex[:12]
        self.left = False  # stopped, cancelled or vanished
        self.stream: http.client.HTTPConnection | None = None

    def run(self) -> tuple[str, bytes | None]:
        """How it ended, and the picture of an undisturbed end; AssertionError where that is wrong."""
        data = [self.prompt, "", self.steps, 3, self.seed, 1, 0, 0, "", "", "", {}]
        event = self._post("call/txt2img", {"data": data, "session_hash": self.session})["event_id"]
        if self.kind == "deaf":
            return "vanished", None
        actions = {"stop": self._stop, "cancel": lambda: self._cancel(event), "vanish": self._vanish, "reset": self._vanish}
        timer = None
        if self.kind in actions:
            timer = threading.Timer(self.random.expovariate(1 / 3), self._leave, [actions[self.kind]])
            timer.daemon = True
            timer.start()
        try:
            kind, data = self._listen(event)
        finally:
            if timer is not None:
                timer.cancel()
        return self._judge(kind, data)

    def _judge(self, kind: str, data: Any) -> tuple[str, bytes | None]:
        if kind == "closed":
            assert self.left, "the server closed the stream"
            assert self.kind in ("vanish", "reset"), "the server closed the stream after a stop"
            return "vanished", None
        if kind == "error":
            text = json.dumps(data)
            assert "queue is full" in text or "worker that drew this died" in text, f"error: {text[:300]}"
            return "queue full" if "queue is full" in text else "worker died", None
        if not data or data[0] is None:
            assert self.left, f"no picture: {json.dumps(data)[:300]}"
            return "clean cancel", None
        [file], [recipe] = data
        picture = self._get(f"/gradio_api/file={file['path']}")
        with tempfile.NamedTemporaryFile(suffix=".png") as copy:
            copy.write(picture)
            copy.flush()
            own = read(Path(copy.name))
        assert json.loads(own.model_dump_json()) == recipe, "the recipe in the picture is another one"
        asked, got = (self.prompt, self.seed, self.steps), (own.prompt, own.seed, own.steps)
        assert asked == got, f"asked for {asked}, got {got}"
        if own.stopped_after is not None:
            assert self.left, f"an unfinished picture, of {own.stopped_after} steps"
            return "partial picture", None
        return "picture", picture

    def _leave(self, action: Any) -> None:
        self.left = True
        action()

    def _stop(self) -> None:
        self._post("run/stop", {"data": [], "session_hash": self.session})

    def _cancel(self, event: str) -> None:
        self._post("cancel", {"session_hash": self.session, "fn_index": self.fn_index, "event_id": event})

    def _vanish(self) -> None:
        if self.stream is None or (sock := self.stream.sock) is None:
            return
        if self.kind == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()  # and the response's file below holds it until the read fails
        sock.shutdown(socket.SHUT_RDWR)

    def _listen(self, event: str) -> tuple[str, Any]:
        """The last event of the stream and its data; "closed" where it breaks off."""
        begin, kind = time.monotonic(), ""
        self.stream = http.client.HTTPConnection(self.host, timeout=LONGEST_S)
        try:
            self.stream.request("GET", f"/gradio_api/call/txt2img/{event}")
            answer = self.stream.getresponse()
            assert answer.status == 200, f"status {answer.status}"
            while line := answer.readline().decode():
                assert time.monotonic() - begin < LONGEST_S, "it hangs"
                name, _, rest = line.strip().partition(": ")
                kind = rest if name == "event" else kind
                if name == "data" and kind in ("complete", "error"):
                    return kind, json.loads(rest)
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            if not self.left:
                raise
        finally:
            self.stream.close()
        return "closed", None

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        return json.loads(self._get(f"/gradio_api/{route}", json.dumps(body)))

    def _get(self, path: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection(self.host, timeout=LONGEST_S)
        try:
            connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, f"{path}: status {answer.status}: {text[:200]!r}"
            return text
        finally:
            connection.close()


def client(number: int, address: str, fn_index: int, end: float, tally: Tally) -> None:
    """Visits one after another until the time is over; after a full queue it waits as a person would."""
    random_, round_ = random.Random(number), 0
    while time.monotonic() < end:
        visit = Visit(address, fn_index, number * 10_000 + round_, random_)
        begin = time.monotonic()
        try:
            how, picture = visit.run()
        except Exception as error:
            how, picture = "wrong", None
            tally.wrong.append(f"{visit.kind}, seed {visit.seed}: {type(error).__name__}: {error}")
        with tally.lock:
            tally.ends[how] += 1
            if how == "picture":
                tally.waited_s.append(time.monotonic() - begin)
            if picture is not None and len(tally.pictures) < REDRAWN and random_.random() < 0.2:
                tally.pictures.append(picture)
        time.sleep(random_.uniform(0.5, 2) if how in ("queue full", "vanished") else random_.uniform(0, 0.2))
        round_ += 1


def killer(pid: int, every: float, until: float, killed: list[int]) -> None:
    """Kill one of the server's workers at random, again and again."""
    random_ = random.Random(0)
    while time.monotonic() < until:
        time.sleep(every)
        children = Path(f"/proc/{pid}/task").glob("*/children")
        workers = [int(number) for path in children for number in path.read_text().split()]
        if workers:
            killed.append(random_.choice(workers))
            with contextlib.suppress(ProcessLookupError):
                os.kill(killed[-1], signal.SIGKILL)


def vitals(pid: int) -> dict[str, int]:
    """Resident memory in kB and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {"rss_kb": int(lines["VmRSS"].split()[0]), "threads": int(lines["Threads"])}


def measure(address: str, pid: int, home: Path, clients: int, seconds: float, kill_every: float = 0) -> dict[str, Any]:
    """Run the clients, watch the server, judge both; every `kill_every` seconds one of its workers is killed (0: none)."""
    from ui import health

    tally = Tally()
    samples: list[tuple[float, ...]] = []
    with_config = Visit(address, 0, 0, random.Random(0))
    config = json.loads(with_config._get("/config"))
    [fn_index] = [each["id"] for each in config["dependencies"] if each["api_name"] == "txt2img"]
    client(10_000, address, fn_index, time.monotonic() + 5, Tally())  # one alone, so that all is loaded
    time.sleep(11)
    health(address)
    before = vitals(pid)
    load_before = os.getloadavg()[0]
    begin = time.monotonic()
    crowd = [
        threading.Thread(target=client, args=(number, address, fn_index, begin + seconds, tally), daemon=True)
        for number in range(clients)
    ]
    killed: list[int] = []
    if kill_every:
        threading.Thread(target=killer, args=(pid, kill_every, begin + seconds, killed), daemon=True).start()
    for each in crowd:
        each.start()
    while any(each.is_alive() for each in crowd) and time.monotonic() < begin + seconds + 2 * LONGEST_S:
        samples.append((time.monotonic() - begin, *vitals(pid).values()))
        time.sleep(1)
    hung = sum(each.is_alive() for each in crowd)
    load_after = os.getloadavg()[0]
    after, jobs, settled = settle(address, pid, before["threads"])
    log = (home / "server.log").read_text()
    memory = judged_memory([row for row in samples if row[0] < seconds], seconds)
    redrawn, differ = draw_again(tally.pictures)
    wrong = tally.wrong[:20]
    wrong += [f"{hung} clients hang"] * bool(hung) + [f"{jobs} jobs stay"] * bool(jobs)
    wrong += [f"{differ} of {redrawn} pictures have other pixels than their recipe"] * bool(differ)
    wrong += [f"threads: {before['threads']} before, {after['threads']} after"] * (after["threads"] > before["threads"])
    wrong += [f"memory grows by {memory['growth']:.1%}"] * (memory["growth"] > GROWTH)
    wrong += [f"{log.count('Traceback')} tracebacks on the server"] * ("Traceback" in log)
    if wrong:
        print(log[-3000:], file=sys.stderr)
    return {
        "clients": clients, "seconds": seconds, "requests": sum(tally.ends.values()), "ends": dict(tally.ends.most_common()),
        "picture_wait_s": statistics.median(tally.waited_s) if tally.waited_s else None, "redrawn": redrawn,
        "wrong": wrong, "killed": len(killed),
        "threads": {"before": before["threads"], "most": max(row[2] for row in samples), "after": after["threads"]},
        "settled_s": settled, "jobs_after": jobs, "memory": memory, "rss_mb_before": before["rss_kb"] / 1024,
        "rss_mb_after": after["rss_kb"] / 1024, "load_average": [load_before, load_after],
    }  # fmt: skip


def settle(address: str, pid: int, threads: int) -> tuple[dict[str, int], int, float]:
    """Wait until jobs and threads are back; what is left after a minute, and the seconds it took."""
    from ui import health

    begin = time.monotonic()
    while True:
        now, jobs, passed = vitals(pid), health(address)["jobs"], time.monotonic() - begin
        if (now["threads"] <= threads and jobs == 0) or passed > SETTLE_S:
            return now, jobs, passed
        time.sleep(1)


def judged_memory(samples: Sequence[tuple[float, ...]], seconds: float) -> dict[str, Any]:
    """Mean resident memory (MB) of the first and last third after the warm-up, and of every tenth of the time."""
    first = seconds * WARM_UP
    third = (seconds - first) / 3

    def mean(low: float, high: float) -> float:
        return statistics.fmean(rss / 1024 for at, rss, _ in samples if low <= at < high)

    early, late = mean(first, first + third), mean(seconds - third, seconds)
    tenths = [round(mean(part * seconds / 10, (part + 1) * seconds / 10), 1) for part in range(10)]
    return {"first_third_mb": early, "last_third_mb": late, "growth": late / early - 1, "tenths_mb": tenths}


def draw_again(pictures: list[bytes]) -> tuple[int, int]:
    """How many pictures were drawn again from their recipes, and how many of them differ."""
    import torch

    from latentpipe import LatentPipeline

    pipe, differ = LatentPipeline.from_pretrained(), 0
    for content in pictures:
        with tempfile.NamedTemporaryFile(suffix=".png") as copy:
            copy.write(content)
            copy.flush()
            recipe = read(Path(copy.name))
        if recipe.machine is not None:
            torch.set_num_threads(recipe.machine.threads)  # another number changes last bits
        again = pipe(recipe.prompt, seed=recipe.seed, num_inference_steps=recipe.steps)[0].image
        with Image.open(io.BytesIO(content)) as stored:
            differ += not np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(again))
    return len(pictures), differ
