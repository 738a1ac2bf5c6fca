"""What a Trainer's checkpoints say of its steps, from their trainer_state.json.

checkpoint-N holds the log up to step N. What was logged of step N + 1, which is taken
from it, stands in the next checkpoint of the same training, beside it.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

FILE_NAME = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_step(folder: Path) -> int | None:
    """How many steps a checkpoint has behind it; None where its folder does not say."""
    step = _state(folder).get("global_step")
    return step if type(step) is int else None


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a Trainer's output folder, in the order of their steps."""
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := CHECKPOINT.fullmatch(path.name)) is not None
    }
    return {step: found[step] for step in sorted(found)}


def next_grad_norm(folder: Path) -> float | None:
    """Norm of the gradient, before clipping, of the step that was taken from it.

    None where no later checkpoint of the training is beside it, or it was not logged.

    Args:
        folder: a Trainer's checkpoint folder.
    """
    step, history = last_step(folder), _history(folder)
    if step is None:
        return None
    for number, later in numbered_checkpoints(folder.resolve().parent).items():
        entries = _history(later) if number > step else []
        # A training that was resumed goes on with the log; another has its own.
        if entries[: len(history)] != history:
            continue
        for entry in entries[len(history) :]:
            norm = entry.get("grad_norm")
            if entry.get("step") == step + 1 and isinstance(norm, float):
                return norm if math.isfinite(norm) else None
    return None


def _history(folder: Path) -> list[dict[str, Any]]:
    """The log's entries; what is not a number in them is none, which equals itself."""
    history = _state(folder).get("log_history")
    entries = history if isinstance(history, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def _state(folder: Path) -> dict[str, Any]:
    """The file's content; nothing where it is not one: no result depends on it."""
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
        state = json.loads(text, parse_constant=lambda name: None)
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
