"""What a saved optimizer state consists of: the types and ranges of every value in it.

A state that is of another kind, or damaged, and yet opens, must not become a step.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.data import jsonlines
from entropy_ddp.errors import InputError


def show(value: Any) -> str:
    """The value on one line, of a tensor its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return " ".join(jsonlines.show(value).split())


def _number(value: Any) -> float:
    """The number that it is, or that its only element is; NaN for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 2**1023 else math.nan


def _is_at_least_zero(value: Any) -> bool:
    return 0 <= _number(value) < math.inf


def _are_betas(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(0 <= _number(beta) < 1 for beta in value)
    )


def _are_ids(value: Any) -> bool:
    if not isinstance(value, list) or len({type(number) for number in value}) > 1:
        return False
    return all(type(number) in (int, str) for number in value)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_GROUP_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "params": (_are_ids, "a list of numbers, or of names"),
    "lr": (_is_at_least_zero, "a finite number of at least 0"),
    "betas": (_are_betas, "two numbers from 0 to less than 1"),
    "eps": (_is_at_least_zero, "a finite number of at least 0"),
    "weight_decay": (_is_at_least_zero, "a finite number of at least 0"),
    "amsgrad": (_is_flag, "true or false"),
    "maximize": (_is_flag, "true or false"),
    "decoupled_weight_decay": (_is_flag, "true or false"),
    "param_names": (_are_names, "a list of names"),
}


def require_structure(path: Path, saved: Any) -> None:
    """Check that a loaded file has the structure of a torch optimizer's state.

    Raises:
        InputError: it has another, with what was found.
    """
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        found = list(saved) if isinstance(saved, dict) else type(saved).__name__
        raise InputError(
            f"{path}: expected an optimizer state with `state` and `param_groups`, "
            f"found {show(found)}; name the trainer's optimizer.pt or optimizer.bin"
        )
    groups, state = saved["param_groups"], saved["state"]
    if not isinstance(groups, list):
        groups = [groups]
    for group in groups:
        if not isinstance(group, dict) or not all(isinstance(k, str) for k in group):
            found = type(group).__name__
            raise InputError(f"{path}: expected param groups, found a {found} in place")
    if not isinstance(saved["param_groups"], list):
        raise InputError(f"{path}: expected a list of param groups, found one alone")
    entries = state.values() if isinstance(state, dict) else [state]
    for entry in entries:
        if not isinstance(state, dict) or not isinstance(entry, dict):
            raise InputError(
                f"{path}: expected `state` with a mapping for each parameter, found "
                f"{type(entry).__name__}; is the file damaged?"
            )


def require_group_values(path: Path, groups: list[dict[str, Any]]) -> None:
    """Check the settings of every param group: types and ranges.

    Raises:
        InputError: one is not what AdamW takes.
    """
    kinds = {
        type(n) for g in groups if isinstance(g["params"], list) for n in g["params"]
    }
    if len(kinds) > 1:
        raise InputError(
            f"{path}: expected numbers or names as params of all groups, found both; is "
            "the file damaged?"
        )
    for number, group in enumerate(groups):
        for key, (is_right, expected) in _GROUP_VALUES.items():
            if key in group and not is_right(group[key]):
                raise InputError(
                    f"{path}: expected {expected} as {key} of param group {number}, "
                    f"found {show(group[key])}; is the file damaged?"
                )
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):
            raise InputError(
                f"{path}: expected {len(group['params'])} param_names in group "
                f"{number}, found {len(names)}; is the file damaged?"
            )


def require_step_count(path: Path, name: str, step: Any) -> None:
    """Check that a parameter's `step` counts steps.

    Raises:
        InputError: it is no whole number of at least 0.
    """
    count = _number(step)
    if not (count >= 0 and count == math.floor(count)):
        raise InputError(
            f"{path}: expected the number of steps taken as `step` of {name}, found "
            f"{show(step)}; is the file damaged?"
        )


def require_moment(
    path: Path, name: str, key: str, moment: Any, shape: torch.Size
) -> None:
    """Check that a moment is a finite tensor of its parameter's shape.

    Raises:
        InputError: it is not, or a second moment is negative.
    """
    found = getattr(moment, "shape", None)
    if found != shape:
        shown = type(moment).__name__ if found is None else tuple(found)
        raise InputError(
            f"{path}: {key} of {name} should be {tuple(shape)}, found {shown}; it is "
            "the state of other parameters"
        )
    if not moment.is_floating_point() or moment.layout != torch.strided:
        raise InputError(
            f"{path}: expected floating-point numbers in {key} of {name}, found "
            f"{moment.dtype}; is the file damaged?"
        )
    if not bool(moment.isfinite().all()):
        raise InputError(
            f"{path}: {key} of {name} has NaN or infinite values; take the state of an "
            "earlier checkpoint"
        )
    if key != "exp_avg" and bool((moment < 0).any()):
        raise InputError(
            f"{path}: {key} of {name} has negative values, and is a mean of squares; "
            "is the file damaged?"
        )
