"""Files that are whole or absent: a reader never sees half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from entropy_ddp.errors import RunError


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only when complete.

    It is written beside its place under a temporary name, flushed to disk, and renamed;
    an earlier file of that name stays until then.

    Raises:
        RunError: the file cannot be written.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); check that the "
            "folder exists, has room and may be written to"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def no_empty_folder(out: Path) -> Iterator[None]:
    """Leave no new, empty folder behind if the context fails.

    Args:
        out: a folder that is made within the context, or before.
    """
    above = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in above:
                path.rmdir()
        raise
