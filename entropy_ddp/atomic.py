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
    temporary = None
    written = 0
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        with os.fdopen(descriptor, "wb") as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            finally:
                written = os.fstat(descriptor).st_size
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        # Before the message: what was written counts as free again.
        _remove(temporary)
        temporary = None
        raise RunError(_reason(path, error, (size, written))) from error
    finally:
        _remove(temporary)


def _remove(temporary: str | None) -> None:
    if temporary is not None:
        Path(temporary).unlink(missing_ok=True)


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
