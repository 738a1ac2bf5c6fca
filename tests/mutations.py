"""Damage to valid files, as a disk, an editor or a wrong program does it.

Everything follows from the random generator that is passed in.
"""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

# What stands where another type was expected.
ODD_VALUES: tuple[Callable[[Random], Any], ...] = (
    lambda random: None,
    lambda random: random.choice([True, False]),
    lambda random: random.choice([-1, 0, 1, 7, 17, 99, 2**31, 2**63, -(2**63)]),
    lambda random: 10 ** random.choice([20, 400]),
    lambda random: random.choice([0.5, -0.0, 1e308, -1e308, 5e-324]),
    lambda random: random.choice([float("nan"), float("inf"), -float("inf")]),
    lambda random: random.choice(
        ["", "x", "1", "ü", "\0", "a\nb", "\ud800", "y" * 999]
    ),
    lambda random: [],
    lambda random: {},
    lambda random: [None],
    lambda random: [[1, 2], {"a": 1}],
    lambda random: {"file": 5},
    lambda random: nested(random.choice([5, 90, 150])),
    lambda random: [1, 2.5, "x", None, True],
)


def nested(depth: int) -> list[Any]:
    """Lists in one another."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def damaged_bytes(random: Random, content: bytes) -> bytes:
    """Bits flipped, pieces cut, repeated, inserted or exchanged; or other bytes."""
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        content = random.choice(_BYTE_CHANGES)(random, content)
    return content


def _flipped(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 3, 10]) if content else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _piece(random: Random, content: bytes) -> tuple[int, int]:
    begin = random.randrange(len(content) + 1)
    return begin, min(len(content), begin + random.choice([1, 4, 30, 400]))


def _cut(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _without_piece(random: Random, content: bytes) -> bytes:
    begin, end = _piece(random, content)
    return content[:begin] + content[end:]


def _repeated(random: Random, content: bytes) -> bytes:
    begin, end = _piece(random, content)
    return content[:end] + content[begin:end] * random.choice([1, 3]) + content[end:]


def _inserted(random: Random, content: bytes) -> bytes:
    begin, _ = _piece(random, content)
    odd = [
        b"\0",
        b"\n",
        b"\xff\xfe",
        b'"',
        b"{",
        b"]",
        b"NaN",
        b"\t",
        random.randbytes(9),
    ]
    return content[:begin] + random.choice(odd) + content[begin:]


def _lines_exchanged(random: Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    random.shuffle(lines)
    return b"".join(lines[: random.randint(0, len(lines))])


def _other(random: Random, content: bytes) -> bytes:
    return random.randbytes(random.choice([0, 1, 8, 100, 3000]))


_BYTE_CHANGES = (
    *(_flipped, _flipped, _cut, _without_piece, _repeated, _inserted, _inserted),
    *(_lines_exchanged, _other),
)


def damaged_value(random: Random, document: Any) -> Any:
    """A copy of a document in which some values or keys are others."""
    document = copy.deepcopy(document)
    for _ in range(random.choice([1, 1, 2, 4])):
        places = [place for place in _places(document) if place is not None]
        if not places:
            return random.choice(ODD_VALUES)(random)
        _change(random, *random.choice(places))
    return document


def _places(value: Any) -> list[Any]:
    """Every (container, key) of a document."""
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value)
    elif isinstance(value, list):
        items = list(range(len(value)))
    found = [(value, key) for key in items]
    for key in items:
        found += _places(value[key])
    return found


def _change(random: Random, container: Any, key: Any) -> None:
    kind = random.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        name = random.choice([str(key)[:-1], f"{key}s", "", "x-y", "\ud800", 5])
        container[name] = container.pop(key)
    elif kind == 2 and len(container) > 1:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        other = random.choice(list(keys))
        container[key], container[other] = container[other], container[key]
    else:
        container[key] = random.choice(ODD_VALUES)(random)


def damaged_lines(random: Random, content: bytes) -> bytes:
    """JSON lines: some values of some rows are others, or the bytes are damaged."""
    if random.random() < 0.5:
        return damaged_bytes(random, content)
    rows = [json.loads(line) for line in content.splitlines()]
    number = random.randrange(len(rows))
    rows[number] = damaged_value(random, rows[number])
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def damaged_json(random: Random, content: bytes) -> bytes:
    """A JSON document: some values are others, or the bytes are damaged."""
    if random.random() < 0.4:
        return damaged_bytes(random, content)
    return json.dumps(damaged_value(random, json.loads(content))).encode()


def damaged_safetensors(random: Random, content: bytes) -> bytes:
    """A header that says another thing, or damaged bytes."""
    if random.random() < 0.4:
        return damaged_bytes(random, content)
    size = int.from_bytes(content[:8], "little")
    header = damaged_json(random, content[8 : 8 + size])
    size = (
        len(header)
        if random.random() < 0.9
        else random.choice([0, 7, 1 << 26, 1 << 62])
    )
    return size.to_bytes(8, "little") + header + content[8 + len(header) :]
