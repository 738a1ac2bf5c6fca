"""Files that are whole or absent: a reader never sees half of one."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from entropy_ddp.errors import RunError

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

    It is written beside its place under a temporary name, flushed to disk, and renamed;
    an earlier file of that name stays until then.

    Args:
        path: the file.
        size: how many bytes it will have, if known, for the message of a full disk.

    Raises:
        RunError: the file cannot be written.
    """
    written = 0
    try:
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        # What was written counts as free again before the message is made.
        with temporary(Path(name)):
            with os.fdopen(descriptor, "wb") as stream:
                try:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                finally:
                    written = os.fstat(descriptor).st_size
            os.chmod(name, 0o644)
            os.replace(name, path)
    except OSError as error:
        raise RunError(_reason(path, error, (size, written))) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _reason(path: Path, error: OSError, sizes: tuple[int | None, int]) -> str:
    """Why a file could not be written, and what to do."""
    cause = error.strerror or str(error)
    if error.errno not in _FULL:
        return (
            f"{path}: cannot be written ({cause}); check that the folder exists, has "
            "room and may be written to"
        )
    size, written = sizes
    needed = f"more than {written:,}" if size is None else f"{size:,}"
    free = shutil.disk_usage(path.parent).free
    return (
        f"{path}: cannot be written ({cause}): {needed} bytes are needed, {free:,} are "
        "free there; make room, or raise the quota or the limit on file sizes"
    )
