"""What TRL logged about a step's completions, held against what was imported.

TRL's completions file has text only. Special tokens that the policy sampled inside of a
response are missing from it, and a truncated response that lost some of its tokens looks
finished. TRL's log, which checkpoints keep in trainer_state.json, has the mean length in
tokens and the share of truncated responses of the step: both are reproduced exactly when
every response was restored.
"""

import json
import math
from pathlib import Path
from typing import Any

from entropy_ddp.errors import InputError

# The log's numbers are float32.
TOLERANCE = 1e-5


def log_notes(
    files: tuple[Path, ...], rows: list[dict[str, Any]], steps: list[int | None]
) -> dict[int, str]:
    """By step, a sentence where the log says another thing than its rows.

    Steps that no log beside the files mentions are left out.

    Args:
        files: the completions files; their trainer's output folder is two levels up.
        rows: the imported rows.
        steps: the step of each row.

    Raises:
        InputError: a trainer_state.json cannot be read.
    """
    logged: dict[int, dict[str, Any]] = {}
    for folder in {path.resolve().parent.parent for path in files}:
        logged |= _read_log(folder)
    notes = {}
    for step in sorted({step for step in steps if step is not None and step in logged}):
        own = [row for row, its in zip(rows, steps) if its == step]
        length = sum(len(row["response_ids"]) for row in own) / len(own)
        truncated = sum(not row["finished"] for row in own) / len(own)
        entry = logged[step]
        expected = entry["completions/mean_length"], entry["completions/clipped_ratio"]
        if not all(map(_agree, expected, (length, truncated))):
            notes[step] = (
                f"TRL logged a mean length of {expected[0]:.6g} tokens and a truncated "
                f"share of {expected[1]:.6g} for step {step}, the rows have "
                f"{length:.6g} and {truncated:.6g}: some responses are not what was "
                "sampled (special tokens inside of them are not in the file, or the "
                "maximum completion length is another)"
            )
    return notes


def _agree(expected: float, found: float) -> bool:
    return math.isclose(expected, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _read_log(folder: Path) -> dict[int, dict[str, Any]]:
    """Log entries about completions by step, from all checkpoints of a run."""
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            for entry in history:
                if {"completions/mean_length", "completions/clipped_ratio"} <= set(
                    entry
                ):
                    entries[int(entry["step"])] = entry
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: expected the Trainer's log, found a file that cannot be read "
                f"as such ({type(error).__name__}: {error}); copy it again"
            ) from error
    return entries
