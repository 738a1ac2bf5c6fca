"""`ledger.jsonl`: appended to line by line while a run trains."""

import json
from pathlib import Path
from typing import Any

from entropy_ddp.errors import InputError, RunError
from entropy_ddp.ledger.reading import LEDGER_FILE


def require_new(folder: Path) -> None:
    """Check that a training from its first step has a ledger to itself.

    Raises:
        InputError: there is one already.
    """
    file = folder / LEDGER_FILE
    if file.exists():
        raise InputError(
            f"{file}: expected no ledger for a training that begins, found one; give "
            "the callback another `out`, or remove it"
        )


def append_line(folder: Path, entry: dict[str, Any]) -> None:
    """Append one whole line: a reader never sees half of one for long.

    Raises:
        RunError: a number is not finite, or the file cannot be written.
    """
    file = folder / LEDGER_FILE
    try:
        line = json.dumps(entry, allow_nan=False)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except ValueError as error:
        raise RunError(f"{file}: step {entry.get('step')}: {error}") from error
    except OSError as error:
        raise RunError(
            f"{file}: cannot be written ({error.strerror or error}); check that the "
            "folder has room and may be written to"
        ) from error
