"""How JSON lines are read strictly: one object a line, UTF-8, plain or gzip.

Every problem is an `InputError` that begins with `path:line: ` (lines count from 1) and
says what was expected, what was found and what to do. Blank lines, keys that stand
twice and numbers that are not finite are problems: each would otherwise be read in a
way that the file's author need not have meant.
"""

import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from entropy_ddp.errors import InputError, RunError
from entropy_ddp.files import require_regular_file, written_whole

# Lists and objects in one another. JSON's own readers and writers fail at some hundreds.
MAX_DEPTH = 100
# Of one row; a few kilobytes of gzip data can hold a row that no memory can.
MAX_LINE_BYTES = 1 << 28
# As fast and as short for any list of lists as for a small one.
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 30
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def make_problem(where: str, expected: str, found: str, advice: str) -> InputError:
    """The error for one place, `path:line`, of a file, to be raised by the caller."""
    return InputError(f"{where}: expected {expected}, found {found}; {advice}")


def show(value: object) -> str:
    """The value as Python prints it, cut to 60 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file of JSON objects, one a line; row i stands on line i + 1.

    Yields:
        The rows in file order, at least one; all their numbers are finite. Each is
        read when it is asked for: a file's rows are never in memory together.

    Raises:
        InputError: if the file cannot be read, is empty, or a line is not one JSON
            object with unique keys and finite numbers.
    """
    count = 0
    require_regular_file(path)
    try:
        with _open(path) as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES:
                    raise make_problem(
                        f"{path}:{count + 1}",
                        f"a row of less than {MAX_LINE_BYTES} bytes",
                        "more",
                        "is it a file of JSON lines?",
                    )
                yield _parse_line(line, f"{path}:{count + 1}")
                count += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise make_problem(
            f"{path}:{count + 1}",
            "gzip data",
            f"a damaged or cut file ({error})",
            "write or copy the file again",
        ) from error
    except OSError as error:
        raise make_problem(
            str(path),
            "a file that can be read",
            error.strerror or str(error),
            "check the path and its permissions",
        ) from error
    if not count:
        raise make_problem(
            f"{path}:1", "at least one row", "an empty file", "write the rows to it"
        )


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.name.endswith(".jsonl.gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".jsonl"):
        return path.open("rb")
    raise make_problem(
        str(path),
        "a file name ending in .jsonl or .jsonl.gz",
        repr(path.name),
        "rename the file",
    )


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        packed = line.startswith(b"\x1f\x8b")
        raise make_problem(
            where,
            "UTF-8 text",
            f"byte 0x{line[error.start]:02x} at byte {error.start + 1}",
            "the file is gzip data: name it .jsonl.gz"
            if packed
            else "save it as UTF-8",
        ) from error
    if not text.strip():
        raise make_problem(where, "a JSON object", "a blank line", "delete the line")
    try:
        row = json.loads(text, object_pairs_hook=_make_object)
    except json.JSONDecodeError as error:
        cause = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if text.startswith("\ufeff"):
            cause = "a byte-order mark before it; save the file as plain UTF-8"
        raise _make_json_problem(where, cause) from error
    except (ValueError, RecursionError) as error:
        raise _make_json_problem(where, str(error)) from error
    if not isinstance(row, dict):
        raise make_problem(
            where, "a JSON object", show(row), 'write one {"key": value, ...} a line'
        )
    _check_values(row, where)
    return row


def _make_json_problem(where: str, cause: str) -> InputError:
    return make_problem(
        where,
        "one JSON object on one line",
        f"invalid JSON ({cause})",
        "correct the line",
    )


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"the key {key!r} stands twice in one object")
        row[key] = value
    return row


def _check_values(row: dict[str, Any], where: str) -> None:
    """Refuse numbers that are not finite, and values nested without end."""
    for key, top in row.items():
        level = [top]
        for _ in range(MAX_DEPTH):
            if any(isinstance(v, float) and not math.isfinite(v) for v in level):
                raise make_problem(
                    where,
                    f"finite numbers in `{key}`",
                    show(top),
                    "leave the key or the row out",
                )
            level = [inner for value in level for inner in _inner_values(value)]
            if not level:
                break
        else:
            raise make_problem(
                where,
                f"at most {MAX_DEPTH} lists and objects in one another in `{key}`",
                "more",
                "leave the key out",
            )


def _inner_values(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines under a temporary name, then rename: never half a file.

    The bytes depend on the rows alone: gzip data (a name ending in `.gz`) carries
    neither a time nor a name.

    Args:
        path: the file; its folder exists, an old file is replaced.

    Raises:
        RunError: if a number is not finite or the file cannot be written.
    """
    with written_whole(path) as stream:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
                _write_rows(packed, rows, path)
        else:
            _write_rows(stream, rows, path)


def _write_rows(
    stream: IO[bytes] | gzip.GzipFile, rows: Iterable[dict[str, Any]], path: Path
) -> None:
    for number, row in enumerate(rows, start=1):
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError as error:
            raise RunError(
                f"{path}:{number}: expected a row of finite numbers, found {show(row)} "
                f"({error}); find out which quantity overflowed"
            ) from error
        stream.write(line.encode() + b"\n")
