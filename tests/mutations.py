"""What a file may have become on its way: JSON with other values in it, and bytes cut, changed and moved."""

from __future__ import annotations

import copy
import json
import random
from typing import Any


#: Values that no entry of a config is meant to hold, or only few are.
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "*",
    "[",
    "int8",
    "AM68A",
    "minmax",
    "a\nb",
    "\x00\ud800",
    "../../etc/passwd",
    "x" * 10_000,
    [],
    [[]],
    [None],
    ["", 1],
    {},
    {"": None},
    {"bits": 4},
    {"weights": {"bits": 4}},
    {"tensor": [2, 10**12], "dtype": "float32"},
    {"tensor": [-1], "dtype": "float32"},
    {"tensor": [2], "dtype": "load"},
    {"tensor": "x", "dtype": []},
    {"dict": {"pixel_values": 1}},
    {"dict": []},
)


def mutated_json(data: Any, draw: random.Random, changes: int = 3) -> Any:
    """A copy of plain data with a few values replaced, entries added, removed or exchanged."""
    data = copy.deepcopy(data)
    for _ in range(draw.randint(1, changes)):
        holders = list(_holders(data))
        holder = draw.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        kind = draw.choice(["replace", "replace", "replace", "remove", "add", "exchange"])
        if kind == "add" or not keys:
            _add(holder, draw)
        elif kind == "remove":
            del holder[draw.choice(keys)]
        elif kind == "exchange":
            one, other = draw.choice(keys), draw.choice(keys)
            holder[one], holder[other] = holder[other], holder[one]
        else:
            holder[draw.choice(keys)] = copy.deepcopy(draw.choice(ODD))
    return data


def _holders(data: Any) -> Any:
    """All dicts and lists in plain data."""
    if isinstance(data, dict | list):
        yield data
        for value in data.values() if isinstance(data, dict) else data:
            yield from _holders(value)


def _add(holder: Any, draw: random.Random) -> None:
    value = copy.deepcopy(draw.choice(ODD))
    if isinstance(holder, list):
        holder.insert(draw.randint(0, len(holder)), value)
    else:
        holder[draw.choice(["", "bits", "dict", "tensor", "weights", "pixel_values", "checkpoint", "é"])] = value


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """A copy with some bytes flipped, cut off, removed, doubled, moved, or filled with one value."""
    kind = draw.choice(["flip", "flip", "cut", "remove", "double", "fill", "move", "number"])
    start = draw.randrange(max(1, len(content)))
    end = min(len(content), start + draw.choice([1, 2, 4, 8, 64, 1024]))
    if kind == "flip":
        flipped = bytearray(content)
        for _ in range(draw.choice([1, 1, 1, 4, 32])):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == "cut":
        return content[:start]
    if kind == "remove":
        return content[:start] + content[end:]
    if kind == "double":
        return content[:end] + content[start:]
    if kind == "fill":
        return content[:start] + bytes([draw.choice([0, 0x7F, 0x80, 0xFF])]) * (end - start) + content[end:]
    if kind == "number":
        value = draw.choice([0, 1, 2**31 - 1, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
        return content[:start] + value + content[start + 8 :]
    return content[end:] + content[start:end] + content[:start]


def mutated_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header: its length, its JSON, or both; by the specification of the format."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    encoded = json.dumps(mutated_json(header, draw)).encode(errors="surrogatepass")
    claimed = draw.choice([len(encoded)] * 8 + [0, 1, 2**40, 2**64 - 1])
    return claimed.to_bytes(8, "little") + encoded + content[8 + length :]
