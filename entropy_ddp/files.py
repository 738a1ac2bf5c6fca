"""Files: written whole or not at all, and read with a reason when they are wrong."""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from entropy_ddp.errors import InputError, RunError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is there for as long as this process works on it.
_TEMPORARY: set[Path] = set()


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A file or folder that is gone afterwards.

    Also if the process is ended within, without unwinding, by whoever calls
    `remove_temporary` before.
    """
    _TEMPORARY.add(path)
    try:
        yield path
    finally:
        _remove(path)
        _TEMPORARY.discard(path)


def remove_temporary() -> None:
    """Remove what is temporary, before the process is ended without unwinding."""
    for path in list(_TEMPORARY):
        _remove(path)


@contextmanager
def written_whole(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only when complete.

    It is written beside its place, flushed to disk, and renamed; an earlier file of
    that name stays until then.

    Args:
        size: how many bytes it will have, if known, for the message of a full disk.

    Raises:
        RunError: the file cannot be written.
    """
    with _put_in_place(path, size) as new, new.open("wb") as stream:
        yield stream


@contextmanager
def _put_in_place(path: Path, size: int | None) -> Iterator[Path]:
    """Where to write a file that is then flushed and put in its place."""
    written = 0
    try:
        folder = Path(
            tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        )
        new = folder / path.name
        # What was written counts as free again before the message is made.
        with temporary(folder):
            try:
                yield new
                with new.open("rb") as stream:
                    os.fsync(stream.fileno())
            finally:
                written = new.stat().st_size if new.exists() else 0
            os.chmod(new, 0o644)
            os.replace(new, path)
    except OSError as error:
        raise RunError(_reason(path, error, size, written)) from error


def write_tensors(
    path: Path,
    tensors: "Mapping[str, Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, whole or not at all, without a copy of them.

    Raises:
        RunError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dense = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with _put_in_place(path, sum(t.nbytes for t in dense.values())) as new:
        try:
            save_file(dense, new, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:
            # What the system said stands in its text, by number.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code)) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _reason(path: Path, error: OSError, size: int | None, written: int) -> str:
    """Why a file could not be written, and what to do."""
    cause = error.strerror or str(error)
    if error.errno not in _FULL:
        return (
            f"{path}: cannot be written ({cause}); check that the folder exists, has "
            "room and may be written to"
        )
    needed = f"more than {written:,}" if size is None else f"{size:,}"
    free = shutil.disk_usage(path.parent).free
    return (
        f"{path}: cannot be written ({cause}): {needed} bytes are needed, {free:,} are "
        "free there; make room, or raise the quota or the limit on file sizes"
    )


# Of these the message alone says nothing: KeyError('zzz') reads 'zzz'.
_TERSE = (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)


def require_regular_file(path: Path) -> None:
    """Refuse what is there under a file's name and is none.

    A pipe is read once, and every rank reads; opening one that nothing writes to never
    ends.

    Raises:
        InputError: it is a pipe, a socket or a device. A file that is missing or may
            not be read is found out by opening it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise InputError(f"{path}: expected a file, found {kind}; write it to a file first")


@contextmanager
def fault_of_file(place: str, describe: Callable[[str], str]) -> Iterator[None]:
    """Whatever a library raises within is the fault of the file that it reads.

    Args:
        place: the file, for the message when memory runs out.
        describe: the message for a reason.

    Raises:
        InputError: the file cannot be read.
        RunError: memory ran out, which need not be the file's fault.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(
                f"{place}: no memory to read it ({reason_of(error)}); is it damaged? "
                "if not, start fewer processes or use a machine with more memory"
            ) from error
        raise InputError(describe(reason_of(error))) from error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line.

    Of several lines the one that names a tensor, or else the first, with the second
    where the first only announces it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    named = [line for line in lines if "size mismatch for" in line]
    found = (named or lines)[0]
    if found.endswith(":") and len(lines) > 1 and not named:
        found = f"{found} {lines[1]}"
    found = found if len(found) <= 400 else found[:397] + "..."
    return f"{type(error).__name__}: {found}" if isinstance(error, _TERSE) else found
