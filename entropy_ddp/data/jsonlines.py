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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from entropy_ddp.errors import InputError, RunError
from entropy_ddp.files import require_regular_file, written_whole

# Lists and objects in one another. JSON's own readers and writers fail at some hundreds.
MAX_DEPTH = 100
# Of one row; a few kilobytes of gzip data can hold a row that no memory can.
MAX_LINE_BYTES = 1 << 28
# Of a file whose lines are counted, at once.
_BLOCK_BYTES = 1 << 24
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
    lines = Lines(path)
    for index, line in lines:
        yield parse_line(line, f"{path}:{index + 1}")
    if not lines.index:
        raise no_rows(path)


def no_rows(path: Path) -> InputError:
    """The error for a file without a line, to be raised by the caller."""
    return make_problem(
        f"{path}:1", "at least one row", "an empty file", "write the rows to it"
    )


@dataclass(frozen=True, kw_only=True)
class FileShare:
    """The lines of a file that one of several readers parses.

    Of a plain file those that begin in a run of bytes. No place of gzip data can be
    found without what is before it: of these every `count`-th line.

    Attributes:
        number, count: which reader it is, from 0, of how many.
        size: of the file, in bytes.
        begin, end: the run of bytes, of a plain file.
        num_lines: number of lines that begin in it; 0 of gzip data.
        first: number of the file's lines that begin before it, once that is known.
    """

    number: int = 0
    count: int = 1
    size: int
    begin: int
    end: int
    num_lines: int = 0
    first: int = 0

    @classmethod
    def of(cls, path: Path, number: int, count: int) -> "FileShare":
        """The share of one reader of so many, with its lines counted but not parsed.

        Raises:
            InputError: the file cannot be read, or is not one of JSON lines by its name.
        """
        require_regular_file(path)
        with _told(path, lambda: 0), _open(path) as stream:
            size = path.stat().st_size
            share = cls(
                number=number,
                count=count,
                size=size,
                begin=size * number // count,
                end=size * (number + 1) // count,
            )
            if isinstance(stream, gzip.GzipFile) or count == 1:
                return share
            return replace(share, num_lines=_lines_begun(stream, share))


def _lines_begun(stream: IO[bytes], share: FileShare) -> int:
    """Number of lines that begin in a run of bytes: at its places behind a newline."""
    place = max(share.begin - 1, 0)
    begun = int(share.begin == 0 < share.end)
    stream.seek(place)
    # A newline at the run's last byte begins a line beyond it.
    last = share.end - 1
    while place < last and (block := stream.read(min(_BLOCK_BYTES, last - place))):
        begun += block.count(b"\n")
        place += len(block)
    return begun


class Lines:
    """The lines of a share of a file (the whole, if none is given), with their numbers.

    Attributes:
        index: 0-based number in the file of the line that is being read, or was last
            asked for: the place of what is wrong.
    """

    def __init__(self, path: Path, share: FileShare | None = None) -> None:
        self.path = path
        self.share = share
        self.index = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Each line when it is asked for.

        Raises:
            InputError: the file cannot be read.
        """
        share = self.share or FileShare.of(self.path, 0, 1)
        require_regular_file(self.path)
        with _told(self.path, lambda: self.index), _open(self.path) as stream:
            if isinstance(stream, gzip.GzipFile):
                yield from self._every(stream, share.number, share.count)
            else:
                yield from self._run(stream, share)

    def _every(
        self, stream: gzip.GzipFile, number: int, count: int
    ) -> Iterator[tuple[int, bytes]]:
        while line := stream.readline(MAX_LINE_BYTES):
            self._require_end(line)
            if self.index % count == number:
                yield self.index, line
            self.index += 1

    def _run(self, stream: IO[bytes], share: FileShare) -> Iterator[tuple[int, bytes]]:
        place, self.index = share.begin, share.first
        if share.begin:
            # The rest of a line that began before; empty but for its newline if none did.
            stream.seek(share.begin - 1)
            place -= 1
            while line := stream.readline(MAX_LINE_BYTES):
                place += len(line)
                if line.endswith(b"\n"):
                    break
        while place < share.end and (line := stream.readline(MAX_LINE_BYTES)):
            self._require_end(line)
            yield self.index, line
            place += len(line)
            self.index += 1
        found = self.index - share.first
        if share.count > 1 and found != share.num_lines:
            raise make_problem(
                str(self.path),
                f"{share.num_lines} lines that begin between its bytes {share.begin} and "
                f"{share.end}, as a moment ago",
                str(found),
                "read it once it is written",
            )

    def _require_end(self, line: bytes) -> None:
        if len(line) == MAX_LINE_BYTES:
            raise make_problem(
                f"{self.path}:{self.index + 1}",
                f"a row of less than {MAX_LINE_BYTES} bytes",
                "more",
                "is it a file of JSON lines?",
            )


@contextmanager
def _told(path: Path, index: Callable[[], int]) -> Iterator[None]:
    """What the system cannot read, as an error of the file.

    Args:
        index: gives the 0-based number of the line at which it was.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise make_problem(
            f"{path}:{index() + 1}",
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


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        InputError: it is none, has a key twice, or a number that is not finite.
    """
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
        if isinstance(top, list) and _is_flat_and_finite(top):
            continue
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


def _is_flat_and_finite(values: list[Any]) -> bool:
    """Whether a list is of integers, or of finite floats, only: what most tokens are in."""
    kinds = set(map(type, values))
    return kinds <= {int} or (kinds == {float} and all(map(math.isfinite, values)))


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
