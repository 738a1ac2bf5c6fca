"""The trainer's settings in the configuration's terms: taken over, or held against it.

training_args.bin                            configuration
loss_type                                    update.loss
max_completion_length                        update.length_norm (of dr_grpo)
(TRL's dr_grpo)                              update.average_over responses
epsilon; epsilon_high, or else epsilon       update.epsilon_low; .epsilon_high
beta                                         update.kl_coefficient
use_bias_correction_kl                       update.kl_estimator k3_weighted, or else k3
max_grad_norm                                update.max_grad_norm
scale_rewards none, group                    batches.advantage centered, standardized
temperature                                  objective.temperature
"""

import math
from typing import TYPE_CHECKING, Any

from entropy_ddp.checkpoint.find import existing_folder
from entropy_ddp.checkpoint.trainer_files import (
    ARGUMENTS_FILE,
    TrainingArguments,
    training_arguments,
)
from entropy_ddp.config import Checkpoint, Config, validated
from entropy_ddp.errors import InputError

if TYPE_CHECKING:
    from entropy_ddp.data.batch import Batch

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
    "top_entropy_quantile": (1, 1.0),
    "entropy_coef": (0, 0.0),
    "use_adaptive_entropy": (False,),
    "delta": (None,),
    "off_policy_mask_threshold": (None,),
    "router_aux_loss_coef": (None, 0, 0.0),
    # The reference policy would be one of the run's earlier policies.
    "sync_ref_model": (False,),
}


def trained_settings(arguments: TrainingArguments) -> dict[str, Any]:
    """The trainer's settings by configuration key, where the key can say them.

    A setting that is absent from the file, or has no form here (a loss that this
    package does not have), is absent.
    """
    values = arguments.values
    settings: dict[str, Any] = {}
    loss = values.get("loss_type")
    if isinstance(loss, str) and loss in LOSSES:
        settings["update.loss"] = loss
        settings["update.average_over"] = "responses"
    if type(values.get("max_completion_length")) is int:
        settings["update.length_norm"] = values["max_completion_length"]
    low, high = _number(values.get("epsilon")), values.get("epsilon_high")
    if low is not None:
        settings["update.epsilon_low"] = low
        settings["update.epsilon_high"] = low if high is None else _number(high)
    if _number(values.get("beta")) is not None:
        settings["update.kl_coefficient"] = _number(values["beta"])
        # Trainers from before the option take the plain estimate.
        is_weighted = bool(values.get("use_bias_correction_kl"))
        settings["update.kl_estimator"] = "k3_weighted" if is_weighted else "k3"
    if "max_grad_norm" in values:
        # To the trainer, none and 0 are no clipping.
        settings["update.max_grad_norm"] = _number(values["max_grad_norm"] or 0)
    advantage = ADVANTAGES.get(str(values.get("scale_rewards")))
    if advantage is not None:
        settings["batches.advantage"] = advantage
    settings["objective.temperature"] = _number(values.get("temperature"))
    return {key: value for key, value in settings.items() if value is not None}


def trained_limit(checkpoint: Checkpoint) -> int | None:
    """Tokens after which the trainer cut responses off; None where that is not told."""
    try:
        arguments = training_arguments(checkpoint)
    except InputError:
        # That the file cannot be read is told by an audit of its own.
        return None
    limit = arguments and arguments.values.get("max_completion_length")
    return limit if type(limit) is int else None


def _number(value: Any) -> float | None:
    """A finite number; None for whatever else stands in a damaged or foreign file."""
    is_number = isinstance(value, int | float) and abs(value) < 2**1023
    return float(value) if is_number and math.isfinite(value) else None


def contradictions(
    config: Config, arguments: TrainingArguments, update: "Batch | None" = None
) -> dict[str, tuple[Any, Any]]:
    """Keys whose value is not what the trainer used: the value, and what it used.

    Keys that change nothing are not compared: the clipping range without `ratio:
    clipped`, the length norm of other losses than `dr_grpo`, what it averages over where
    all groups of U are of one size; of a given change (`update.delta`) all but the
    temperature.

    Args:
        update: U, if it is known.
    """
    trained = trained_settings(arguments)
    loss = arguments.values.get("loss_type")
    if loss is not None and loss not in LOSSES:
        trained["update.loss"] = loss
    if update is None or len(update.group_sizes.unique()) == 1:
        trained.pop("update.average_over", None)
    return {
        key: (_value_at(config, key), value)
        for key, value in trained.items()
        if _value_at(config, key) != value and _is_read(config, key)
    }


def _is_read(config: Config, key: str) -> bool:
    """Whether the configured loss has a use for a key; `nll` has no trainer's KL term."""
    if config.update.delta is not None:
        return key == "objective.temperature"
    if key in ("update.epsilon_low", "update.epsilon_high"):
        return config.update.ratio == "clipped"
    if key in ("update.length_norm", "update.average_over"):
        return config.update.loss == "dr_grpo"
    if key == "update.kl_coefficient":
        return config.update.loss != "nll"
    if key == "update.kl_estimator":
        return bool(config.update.kl_coefficient)
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
        InputError: the checkpoint or its training_args.bin is not there, it lacks a
            setting that the configuration does not give, or the trainer's loss is not
            one of this package's.
    """
    if not config.update.from_checkpoint:
        return config
    if config.checkpoint.path is not None:
        existing_folder(config.checkpoint.path)
    arguments = training_arguments(config.checkpoint)
    if arguments is None:
        raise InputError(
            f"update.from_checkpoint: expected {ARGUMENTS_FILE} in the checkpoint's folder, "
            "found none; set update.from_checkpoint: false and give the trainer's "
            "settings in the configuration"
        )
    _require_same_loss(arguments)
    settings = trained_settings(arguments)
    document = config.model_dump(exclude_unset=True)
    for key in _SOURCES:
        section, name = key.split(".")
        given = document.setdefault(section, {})
        if name not in given and key in settings:
            given[name] = settings[key]
    resolved = validated(document, str(arguments.path))
    for key in _SOURCES:
        is_given = key.split(".")[1] in document[key.split(".")[0]]
        if not is_given and _is_read(resolved, key):
            raise _make_missing(key, arguments)
    return resolved


_SOURCES = {
    "update.loss": "loss_type",
    "update.length_norm": "max_completion_length",
    "update.average_over": "loss_type",
    "update.epsilon_low": "epsilon",
    "update.epsilon_high": "epsilon",
    "update.kl_coefficient": "beta",
    "update.kl_estimator": "beta",
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


def require_masked(
    config: Config, update: "Batch | None", end_ids: set[int], padding_id: int | None
) -> None:
    """Check that U is without the truncated responses that the trainer's loss leaves out.

    They count in the loss's mean over responses and in nothing else: as responses
    without a token. To the trainer a response is truncated that ends in neither an end
    token nor a padding token.

    Args:
        config: the resolved configuration; only `update.from_checkpoint` is held to it.
        update: U; None if it is to be sampled.

    Raises:
        InputError: a truncated response has tokens, or U is to be sampled.
    """
    if not config.update.from_checkpoint or config.batches.U is None:
        return
    arguments = training_arguments(config.checkpoint)
    masking = "mask_truncated_completions"
    if arguments is None or not arguments.values.get(masking):
        return
    advice = (
        f"{arguments.path}: {masking} leaves truncated responses out of the loss; write them "
        "without response_ids, as RolloutRecorder does, or set update.from_checkpoint: "
        "false to probe a step with them"
    )
    if update is None:
        raise InputError(f"batches.U: expected a file, found `sample`; {advice}")
    ending = end_ids | {padding_id}
    for sequence in update.sequences:
        if sequence.num_tokens and int(sequence.response_ids[-1]) not in ending:
            raise InputError(
                f"batch U, line {sequence.index + 1}: expected a response that ends or "
                f"has no tokens, found {sequence.num_tokens} tokens without an end; "
                f"{advice}"
            )


def _require_same_loss(arguments: TrainingArguments) -> None:
    """Refuse what would make the trainer's step another one than the loss here gives."""
    values = arguments.values
    per_step, sampled = (
        values.get(name)
        for name in ("gradient_accumulation_steps", "steps_per_generation")
    )
    if values.get("loss_type") == "dapo" and sampled not in (None, per_step):
        raise InputError(
            f"{arguments.path}: update.from_checkpoint expected steps_per_generation "
            f"{per_step}, the gradient_accumulation_steps, found {sampled}: the "
            "trainer's dapo is divided by the tokens of all that was sampled at once, "
            "and not by those of the step; set update.from_checkpoint: false to probe "
            "the step with the latter"
        )
    for name, neutral in NEUTRAL.items():
        value = values.get(name, neutral[0])
        if value not in neutral:
            raise InputError(
                f"{arguments.path}: update.from_checkpoint expected {name} "
                f"{neutral[0]!r}, found {value!r}, which the loss here does not have; "
                "set update.from_checkpoint: false to probe the step without it"
            )
