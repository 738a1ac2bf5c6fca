"""What a Trainer leaves beside the weights: its settings, and a log of its steps.

The settings stand in training_args.bin, which is a pickle, and a pickle may name any
function and have it called. Here every name that it holds resolves to an inert stub that
only records what it was given: nothing is imported, nothing runs. What is read is what
the stub of the outermost object recorded, as plain values.

The log stands in trainer_state.json: checkpoint-N holds it up to step N. What was logged
of step N + 1, which is taken from it, stands in the next checkpoint of the same training,
beside it.
"""

import json
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from entropy_ddp.checkpoint.inert import Inert, InertUnpickler, require_small_memo
from entropy_ddp.config import Checkpoint
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file

ARGUMENTS_FILE = "training_args.bin"
STATE_FILE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# A pickle of settings has some kilobytes; a larger one is something else.
MAX_BYTES = 2**20
SHOWN = {
    "sampling": (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_completion_length",
        "num_generations",
    ),
    "loss": (
        "loss_type",
        "beta",
        "use_bias_correction_kl",
        "epsilon",
        "epsilon_high",
        "scale_rewards",
        "importance_sampling_level",
        "mask_truncated_completions",
    ),
    "batches": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
    ),
    "step": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "optim",
        "bf16",
        "fp16",
    ),
}
# What reading a damaged archive raises.
_UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """What a training_args.bin says.

    Attributes:
        path: the file.
        kind: full name of the class of the pickled object.
        values: its settings as plain Python values; what is not plain is left out.
    """

    path: Path
    kind: str
    values: dict[str, Any]

    @property
    def shown(self) -> dict[str, dict[str, Any]]:
        """The settings that matter to a step, by subject, where present."""
        return {
            subject: {name: self.values[name] for name in names if name in self.values}
            for subject, names in SHOWN.items()
        }


def find_training_arguments(checkpoint: Checkpoint) -> Path | None:
    """The training_args.bin of a checkpoint's folder or its adapter's, if there is one."""
    folders = [f for f in (checkpoint.path, checkpoint.adapter) if f is not None]
    files = [Path(folder) / ARGUMENTS_FILE for folder in folders]
    return next((path for path in files if path.is_file()), None)


def training_arguments(checkpoint: Checkpoint) -> TrainingArguments | None:
    """What a checkpoint was trained with, if it says; errors as of reading it."""
    path = find_training_arguments(checkpoint)
    return None if path is None else read_training_arguments(path)


def read_training_arguments(path: Path) -> TrainingArguments:
    """Read a training_args.bin without running anything of it.

    Raises:
        InputError: the file cannot be read, is no torch archive, or its pickle is
            damaged or does not hold one object with settings.
    """
    data = _read_pickle_bytes(path)

    def describe(reason: str) -> str:
        return (
            f"{path}: expected the pickled settings of a trainer, found a damaged "
            f"pickle ({reason}); copy the file again"
        )

    # Whatever damaged or hostile bytes make the unpickler raise, the file is at fault.
    with fault_of_file(str(path), describe):
        require_small_memo(data)
        stub = InertUnpickler(BytesIO(data)).load()
        values = _plain_state(stub)
    if values is None:
        raise InputError(
            f"{path}: expected the pickled settings of a trainer, found "
            f"{type(stub).__name__}; is it another program's file?"
        )
    return TrainingArguments(path=path, kind=type(stub).name, values=values)


def _read_pickle_bytes(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if _is_pickle(e.filename)]
            if len(entries) == 1 and entries[0].file_size <= MAX_BYTES:
                return archive.read(entries[0])
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: expected a file of torch.save, found one that cannot be read as "
            f"such ({error}); copy it again, or save it with torch 1.6 or newer"
        ) from error
    raise InputError(
        f"{path}: expected an archive with one data.pkl of at most {MAX_BYTES} bytes, "
        f"found {len(entries)} of that name; is it another program's file?"
    )


def _is_pickle(name: str) -> bool:
    return re.fullmatch(r"[^/]+/data\.pkl", name) is not None


_NOT_PLAIN = object()


def _plain_state(stub: Any) -> dict[str, Any] | None:
    """The plain settings of the outermost object; None if it is no such object."""
    if not isinstance(stub, Inert) or not isinstance(stub.state, dict):
        return None
    known: dict[int, Any] = {}
    plain = {str(key): _plain(value, known) for key, value in stub.state.items()}
    return {key: value for key, value in plain.items() if value is not _NOT_PLAIN}


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """The value of a setting; an enumeration's member is what it was made of.

    Args:
        known: results by identity, as a list can hold another a million times.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) not in known:
        known[id(value)] = _plain_container(value, known)
    return known[id(value)]


def _plain_container(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_plain(item, known) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, dict):
        if not all(isinstance(key, (bool, int, float, str)) for key in value):
            return _NOT_PLAIN
        pairs = {str(key): _plain(item, known) for key, item in value.items()}
        return _NOT_PLAIN if any(v is _NOT_PLAIN for v in pairs.values()) else pairs
    if isinstance(value, Inert) and not value.state and value.arguments:
        last = value.arguments[-1]
        return last if isinstance(last, str) else _NOT_PLAIN
    return _NOT_PLAIN


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
        text = (folder / STATE_FILE).read_text(encoding="utf-8")
        state = json.loads(text, parse_constant=lambda name: None)
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
