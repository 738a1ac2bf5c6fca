"""The settings a checkpoint was trained with, read from its training_args.bin.

The file is a pickle, and a pickle may name any function and have it called. Here every
name that it holds resolves to an inert stub that only records what it was given:
nothing is imported, nothing runs. What is read is what the stub of the outermost object
recorded, as plain values.

    training_args.bin                            configuration
    loss_type                                    update.loss
    max_completion_length                        update.length_norm (of dr_grpo)
    epsilon; epsilon_high, or else epsilon       update.epsilon_low; .epsilon_high
    max_grad_norm                                update.max_grad_norm
    scale_rewards none, group                    batches.advantage centered, standardized
    temperature                                  objective.temperature
"""

import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from entropy_ddp.config import Checkpoint, Config
from entropy_ddp.errors import InputError

FILE_NAME = "training_args.bin"
# A pickle of settings has some kilobytes; a larger one is something else.
MAX_BYTES = 16 * 2**20
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
LOSSES = ("dr_grpo", "grpo", "dapo")
ADVANTAGES = {
    "none": "centered",
    "False": "centered",
    "group": "standardized",
    "True": "standardized",
}
# Settings that change the step's loss in a way that no configuration key can say, and
# the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": ("token",),
    "mask_truncated_completions": (False,),
    "top_entropy_quantile": (1, 1.0),
    "entropy_coef": (0, 0.0),
    "use_adaptive_entropy": (False,),
    "delta": (None,),
    "off_policy_mask_threshold": (None,),
    "router_aux_loss_coef": (None, 0, 0.0),
}


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


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A setting that the configuration and the trainer disagree on.

    Attributes:
        key: the configuration's key, as in `update.loss`.
        configured: the configuration's value.
        trained: what the trainer used, in the configuration's terms.
    """

    key: str
    configured: Any
    trained: Any


class _Inert:
    """Stands for whatever a pickle names: calling and filling it only records."""

    name = ""
    # Pickles may make an object without calling __init__.
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """A list's, as pickles call it."""

    def extend(self, values: Any) -> None:
        """A list's, as pickles call it."""

    def add(self, value: Any) -> None:
        """A set's, as pickles call it."""


class _InertUnpickler(pickle.Unpickler):
    """Builds the pickled object out of stubs."""

    def find_class(self, module: str, name: str) -> Any:
        return type("Inert", (_Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, identifier: Any) -> Any:
        return _Inert(identifier)


def find_training_arguments(checkpoint: Checkpoint) -> Path | None:
    """The training_args.bin of a checkpoint's folder or its adapter's, if there is one."""
    folders = [f for f in (checkpoint.path, checkpoint.adapter) if f is not None]
    files = [Path(folder) / FILE_NAME for folder in folders]
    return next((path for path in files if path.is_file()), None)


def read_training_arguments(path: Path) -> TrainingArguments:
    """Read a training_args.bin without running anything of it.

    Raises:
        InputError: the file cannot be read, is no torch archive, or its pickle is
            damaged or does not hold one object with settings.
    """
    data = _read_pickle_bytes(path)
    try:
        stub = _InertUnpickler(BytesIO(data)).load()
        values = _plain_state(stub)
    # Whatever damaged or hostile bytes make the unpickler raise, the file is at fault.
    except Exception as error:
        raise InputError(
            f"{path}: expected the pickled settings of a trainer, found a damaged "
            f"pickle ({type(error).__name__}: {error}); copy the file again"
        ) from error
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
    if not isinstance(stub, _Inert) or not isinstance(stub.state, dict):
        return None
    plain = {str(key): _plain(value) for key, value in stub.state.items()}
    return {key: value for key, value in plain.items() if value is not _NOT_PLAIN}


def _plain(value: Any) -> Any:
    """The value of a setting; an enumeration's member is what it was made of."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if _NOT_PLAIN in items else items
    if isinstance(value, dict):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return _NOT_PLAIN if _NOT_PLAIN in pairs.values() else pairs
    if isinstance(value, _Inert) and not value.state and value.arguments:
        last = value.arguments[-1]
        return last if isinstance(last, str) else _NOT_PLAIN
    return _NOT_PLAIN


# What the configuration says about the same


def trained_settings(arguments: TrainingArguments) -> dict[str, Any]:
    """The trainer's settings by configuration key, where the key can say them.

    A setting that is absent from the file, or has no form here (a loss that this
    package does not have), is absent.
    """
    values = arguments.values
    settings: dict[str, Any] = {}
    loss = values.get("loss_type")
    if loss in LOSSES:
        settings["update.loss"] = loss
    if values.get("max_completion_length") is not None:
        settings["update.length_norm"] = values["max_completion_length"]
    if values.get("epsilon") is not None:
        low, high = values["epsilon"], values.get("epsilon_high")
        settings["update.epsilon_low"] = float(low)
        settings["update.epsilon_high"] = float(low if high is None else high)
    if values.get("max_grad_norm") is not None:
        settings["update.max_grad_norm"] = float(values["max_grad_norm"])
    advantage = ADVANTAGES.get(str(values.get("scale_rewards")))
    if advantage is not None:
        settings["batches.advantage"] = advantage
    if values.get("temperature") is not None:
        settings["objective.temperature"] = float(values["temperature"])
    return settings


def contradictions(config: Config, arguments: TrainingArguments) -> list[Contradiction]:
    """Keys whose value in the configuration is not what the trainer used.

    Keys that the configured loss does not read are not compared: the clipping range
    without `ratio: clipped`, the length norm of other losses than `dr_grpo`.
    """
    found = []
    for key, trained in trained_settings(arguments).items():
        configured = _value_at(config, key)
        if configured != trained and _is_read(config, key):
            found.append(Contradiction(key=key, configured=configured, trained=trained))
    loss = arguments.values.get("loss_type")
    if loss is not None and loss not in LOSSES:
        found.append(
            Contradiction(
                key="update.loss", configured=config.update.loss, trained=loss
            )
        )
    beta = arguments.values.get("beta")
    if beta:
        found.append(
            Contradiction(key="the loss's KL term", configured=0.0, trained=beta)
        )
    return found


def _is_read(config: Config, key: str) -> bool:
    if key in ("update.epsilon_low", "update.epsilon_high"):
        return config.update.ratio == "clipped"
    if key == "update.length_norm":
        return config.update.loss == "dr_grpo"
    if key == "batches.advantage":
        return config.update.loss != "nll"
    return True


def _value_at(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_training_arguments(config: Config) -> Config:
    """The configuration with what `update.from_checkpoint` takes from the checkpoint.

    Keys that the configuration gives keep their value. Without `from_checkpoint` it is
    returned as it is.

    Raises:
        InputError: the checkpoint has no training_args.bin, it lacks a setting that the
            configuration does not give, or the trainer's loss is not one of this
            package's.
    """
    if not config.update.from_checkpoint:
        return config
    path = find_training_arguments(config.checkpoint)
    if path is None:
        raise InputError(
            f"update.from_checkpoint: expected {FILE_NAME} in the checkpoint's folder, "
            "found none; set update.from_checkpoint: false and give the trainer's "
            "settings in the configuration"
        )
    arguments = read_training_arguments(path)
    _require_same_loss(arguments)
    settings = trained_settings(arguments)
    document = config.model_dump(exclude_unset=True)
    for key in _SOURCES:
        section, name = key.split(".")
        given = document.setdefault(section, {})
        if name not in given and key in settings:
            given[name] = settings[key]
    resolved = Config.model_validate(document)
    for key in _SOURCES:
        is_given = key.split(".")[1] in document[key.split(".")[0]]
        if not is_given and _is_read(resolved, key):
            raise _make_missing(key, arguments)
    return resolved


_SOURCES = {
    "update.loss": "loss_type",
    "update.length_norm": "max_completion_length",
    "update.epsilon_low": "epsilon",
    "update.epsilon_high": "epsilon",
    "update.max_grad_norm": "max_grad_norm",
    "batches.advantage": "scale_rewards",
    "objective.temperature": "temperature",
}


def _make_missing(key: str, arguments: TrainingArguments) -> InputError:
    source = _SOURCES[key]
    found = arguments.values.get(source)
    return InputError(
        f"{arguments.path}: update.from_checkpoint expected a `{source}` that {key} can "
        f"take, found {found!r} in a {arguments.kind}; set {key} in the configuration"
    )


def _require_same_loss(arguments: TrainingArguments) -> None:
    """Refuse what would make the trainer's step another one than the loss here gives."""
    beta = arguments.values.get("beta")
    if beta:
        raise InputError(
            f"{arguments.path}: update.from_checkpoint expected beta 0, found {beta!r}; "
            "the KL term is not part of the loss here: set update.from_checkpoint: "
            "false to probe the step without it"
        )
    for name, neutral in NEUTRAL.items():
        value = arguments.values.get(name, neutral[0])
        if value not in neutral:
            raise InputError(
                f"{arguments.path}: update.from_checkpoint expected {name} "
                f"{neutral[0]!r}, found {value!r}, which the loss here does not have; "
                "set update.from_checkpoint: false to probe the step without it"
            )
