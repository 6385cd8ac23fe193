"""Damage to files: bits, JSON, YAML, safetensors headers and tensors, PNG texts, checksums; each is decided by a `Random`."""

from __future__ import annotations

import copy
import json
import os
import re
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.5, 4.0, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30, -(2**40), 1_000_000,
    1e308, 1e-320, "", "0", "nan", "4", "../../etc/passwd", "AutoencoderKL", "DiffusionPipeline", "\0", "\ud800", "x" * 70_000,
    [], {}, [[]], [None], {"": None}, [0], [1, 2, 3], [10**30], [2**31], [1.5], ["a"], {"a": {"b": [1]}}, [[1, 2], [3]],
    list(range(3000)),
]  # fmt: skip
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "0x10", "'a'", "{", "[" * 100_000, '{"a":' * 50_000]
DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "I64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64", "C64", "F4", "X"]
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4}


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    found = [here]
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*here, key))
    return found


def json_text(text: str, random: Random) -> str:
    """A JSON text with one to three values, keys or signs changed."""
    try:
        value = json.loads(text)
    except ValueError:
        return text[: random.randrange(len(text) + 1)]
    for _ in range(random.choice((1, 1, 2, 3))):
        path = random.choice(places(value)[1:] or [()])
        if not path:
            value = copy.deepcopy(random.choice(NASTY))
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        action = random.randrange(10)
        if action == 0:
            del owner[path[-1]]
        elif action == 1 and isinstance(owner, dict):
            owner[random.choice(["", "x", "_class_name", "\0", str(path[-1]) + "_"])] = owner.pop(path[-1])
        elif action == 2:
            owner[path[-1]] = f"@{random.choice(RAW)}@"
        elif action == 3 and isinstance(owner[path[-1]], int | float):
            owner[path[-1]] = owner[path[-1]] * random.choice([-1, 0, 0.5, 2, 3, 1000, 10**9])
        else:
            owner[path[-1]] = copy.deepcopy(random.choice(NASTY))
    out = json.dumps(value)
    out = re.sub(r'"@(.*?)@"', lambda found: found[1].replace('\\"', '"'), out)
    if random.random() < 0.05 and out.startswith("{"):
        key = next(iter(value), "a") if isinstance(value, dict) else "a"
        out = '{"' + str(key) + '": 1, ' + out[1:]
    return out


def yaml_text(text: str, random: Random) -> str:
    """A YAML text with values, keys, tags, aliases or indentation changed."""
    lines = text.splitlines()
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(lines))
        key, sign, _ = lines[at].partition(":")
        plain = [json.dumps(value) for value in NASTY] + [
            ".nan",
            ".inf",
            "-.inf",
            "1e999",
            "!!python/name:os.system ''",
            "!!int ''",
        ]
        plain += [
            "!!binary 1",
            "!!timestamp x",
            "*x",
            "&x [*x]",
            "[" * 3000,
            "2024-13-45",
            "1:2:3",
            "? a",
            "!!set {a, b}",
            "0o17",
        ]
        plain += [
            "9" * 5000,
            "~",
            "on",
            "{a: 1, a: 2}",
            "<<: 1",
            "|",
            "'",
            "\t",
            "%YAML 9.9",
            "---",
            "...",
            "!!omap [a]",
            "!!bool x",
        ]
        lines[at] = random.choice(
            [f"{key}{sign} {random.choice(plain)}", lines[at] + lines[at], " " + lines[at], random.choice(plain)]
        )
    if random.random() < 0.05:
        names = "abcdefghi"
        lines += ["a0: &a [x, x, x, x, x, x, x, x, x]"]
        lines += [f"{b}0: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(names)]
    if random.random() < 0.05:
        lines += ["m0: &m0 {a: 1}"] + [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 9)]
    return "\n".join(lines) + "\n"


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: str, data: bytes) -> bytes:
    """A safetensors file of a header's text and data, with the header's true length."""
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def safetensors(data: bytes, random: Random) -> bytes:
    """A safetensors file whose header, metadata, shapes, dtypes or values are changed; lengths stay true as a rule."""
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    name = random.choice(names)
    entry = header[name]
    action = random.randrange(10)
    if action == 0:
        return joined(json_text(json.dumps(header), random), body)
    if action in (1, 2) and header.get("__metadata__"):
        stored = header["__metadata__"]
        key = random.choice(list(stored))
        stored[key] = json_text(stored[key], random) if stored[key][:1] in ("{", "[") else str(random.choice(NASTY))
    elif action == 3:
        entry["dtype"] = random.choice(DTYPES)
    elif action == 4:
        entry["shape"] = random.choice(
            [entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], [2**62, 4], [0], [-1], [1.5]]
        )
    elif action == 5:  # another dtype of the same bytes: a true header
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["dtype"] = random.choice(list(WIDTHS))
        entry["shape"] = [size // WIDTHS[entry["dtype"]]] if random.random() < 0.5 else [size // WIDTHS[entry["dtype"]], 1]
    elif action == 6:
        begin, end = entry["data_offsets"]
        width = WIDTHS.get(entry["dtype"], 1)
        at = begin + random.randrange(max(1, (end - begin) // width)) * width
        value = random.choice([b"\xff" * width, b"\x7f\xf0"[::-1].rjust(width, b"\0"), b"\x7f\x80"[::-1].rjust(width, b"\0")])
        body = body[:at] + value[-width:] + body[at + width :]
    elif action == 7:
        other = random.choice(names)
        header[name], header[other] = header[other], header[name]
    elif action == 8:
        header[random.choice(["x", name + "x", name.replace("weight", "bias"), "unet.x.lora_A.weight"])] = header.pop(name)
    else:
        length = random.choice([0, 1, 7, 2**20, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8])
        return length.to_bytes(8, "little") + data[8:]
    return joined(json.dumps(header), body)


def plain(data: bytes, random: Random) -> bytes:
    """Bytes with bits turned, cut, doubled, zeroed or inserted."""
    found = bytearray(data)
    action = random.randrange(6)
    if action == 0 or not found:
        for _ in range(random.choice((1, 1, 4, 32))):
            found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    elif action == 1:
        return bytes(found[: random.randrange(len(found))])
    elif action == 2:
        at = random.randrange(len(found))
        found[at : at + random.randrange(64)] = bytes(random.randrange(64))
    elif action == 3:
        at = random.randrange(len(found))
        found[at:at] = random.randbytes(random.randrange(1, 64))
    elif action == 4:
        at = random.randrange(len(found))
        found[at : at + 4] = random.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1", b"\1\0\0\0"])
    else:
        return random.choice([b"", b"\xef\xbb\xbf" + data, b"\xff\xfe" + data, data + data, b"\0" * len(data), data[::-1]])
    return bytes(found)


def png(data: bytes, random: Random) -> bytes:
    """A PNG with bytes or a text chunk changed and checksums that are true again."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    texts = [chunk for chunk in chunks if chunk[0] in (b"iTXt", b"tEXt")]
    if texts and random.random() < 0.7:
        chunk = random.choice(texts)
        head, sign, body = chunk[1].partition(b"{")
        text = json_text((sign + body).decode("utf-8", "replace"), random) if sign else plain(head, random).decode("latin-1")
        chunk[1] = (head if sign else b"") + text.encode("utf-8", "surrogatepass")
    else:
        chunk = random.choice(chunks)
        chunk[1] = plain(chunk[1] or b"\0", random)
    out = data[:8]
    for kind, body in chunks:
        out += len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)
    return out


def lpz(data: bytes, random: Random) -> bytes:
    """An .lpz file with bytes changed and a checksum that is true again."""
    body = bytearray(plain(data[:-4], random))
    if random.random() < 0.5:
        body[:9] = data[:9]  # the picture and its sizes, not the identity
    return bytes(body) + zlib.crc32(body).to_bytes(4)


def special(path: Path, random: Random) -> None:
    """Something in a file's place that is no file, or too large a one."""
    path.unlink()
    action = random.randrange(6)
    if action == 0:
        os.mkfifo(path)
    elif action == 1:
        path.mkdir()
    elif action == 2:
        path.symlink_to("/dev/zero")
    elif action == 3:
        path.symlink_to(path.name)
    elif action == 4:
        with open(path, "wb") as file:
            file.truncate(2**40)  # a hole
    else:
        path.write_bytes(b"\xef\xbb\xbf" + b"[" * 200_000)


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": lambda data, random: json_text(data.decode(), random).encode("utf-8", "surrogatepass"),
    ".jsonl": lambda data, random: json_text(data.decode(), random).encode("utf-8", "surrogatepass"),
    ".yaml": lambda data, random: yaml_text(data.decode(), random).encode("utf-8", "surrogatepass"),
    ".safetensors": safetensors,
    ".png": png,
    ".lpz": lpz,
}


def mutate(path: Path, random: Random) -> None:
    """Damage one file in place: mostly in the way of its kind, else its bytes, seldom what it is."""
    chance = random.random()
    if chance < 0.03:
        special(path, random)
        return
    data = path.read_bytes()
    change = KINDS.get(path.suffix, plain) if chance < 0.8 else plain
    path.write_bytes(change(data, random))
