"""The saved AdamW state: every value in it checked, and matched to parameters by name.

A state that is of another kind, or damaged, and yet opens, must not become a step.

A saved optimizer numbers its parameters in the order of its param groups and stores no
names (unless it was built from named parameters). The order is reconstructed from how
such optimizers are built, and then verified by the size of every group and the shape of
every moment:

- names in place of numbers (gathered from FSDP), or stored in the groups: used as they
  are;
- one group: the model's `named_parameters()` order (a plain training loop);
- two groups: parameters with weight decay, then those without, each in
  `named_parameters()` order (the Hugging Face Trainer).

Hyper-parameters come from the saved groups; the stored learning rate is the one of the
next step.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.checkpoint.formats import stored_optimizer
from entropy_ddp.checkpoint.stored import (
    Part,
    StoredTensor,
    in_memory,
    read_number,
)
from entropy_ddp.checkpoint.weights import unwrapped_name
from entropy_ddp.data import jsonlines
from entropy_ddp.errors import InputError

# The Trainer's own patterns for parameters without weight decay.
NO_DECAY_PATTERNS = [
    r"bias",
    r"layernorm",
    r"rmsnorm",
    r"(?:^|\.)norm(?:$|\.)",
    r"_norm(?:$|\.)",
]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
GROUP_KEYS = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")
# What Adam and AdamW groups may hold beside these; NAdam, say, has a `momentum_decay`.
OTHER_GROUP_KEYS = {
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
    "initial_lr",
    "maximize",
    "param_names",
}
# What tells other optimizers: any of these keys of a param group or of a state.
OTHER_OPTIMIZERS: tuple[tuple[str, set[str]], ...] = (
    ("an 8-bit optimizer of bitsandbytes", {"absmax1", "qmap1"}),
    ("an optimizer of bitsandbytes", {"state1"}),
    ("Muon", {"ns_steps", "ns_coefficients"}),
    ("Adafactor", {"scale_parameter", "exp_avg_sq_row", "row_var", "beta2_decay"}),
    ("NAdam", {"momentum_decay"}),
    ("Prodigy", {"d_coef"}),
    ("a schedule-free optimizer", {"weight_lr_power"}),
    ("Adagrad", {"lr_decay"}),
    ("RMSprop", {"square_avg"}),
    ("Adamax", {"exp_inf"}),
    ("SGD", {"dampening", "nesterov"}),
)


def load_optimizer(
    path: Path,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Part] | None = None,
) -> torch.optim.Adam:
    """AdamW over these parameters, in the saved state.

    Args:
        path: optimizer.pt (Trainer), optimizer.bin (accelerate), or a folder that holds
            the state in the shares of ranks.
        model: the model, for the Trainer's rule of which parameters decay.
        parts: what of each parameter of the checkpoint `parameters` has, where a rank
            holds a part only; of the moments, that part is read. None: all is held.

    Raises:
        InputError: the file is not an AdamW state of exactly these parameters.
    """
    parts = Part.all_of(parameters) if parts is None else parts
    saved = _read_state(path)
    groups = _without_frozen(saved, model)
    names = _names_by_group(path, groups, model, parameters)
    _verify_state(path, saved["state"], groups, names, parts)
    decoupled = {group.get("decoupled_weight_decay", True) for group in groups}
    kind = torch.optim.AdamW if decoupled == {True} else torch.optim.Adam
    optimizer = kind(
        [{"params": [parameters[n] for n in group]} for group in names], lr=1.0
    )
    numbers = [number for group in groups for number in group["params"]]
    flat_names = [name for group in names for name in group]
    entries = {
        number: _read_entry(path, name, saved["state"][number], parts[name])
        for number, name in zip(numbers, flat_names, strict=True)
    }
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    for group in optimizer.param_groups:
        # One kernel on every device and dtype: the step must not depend on them.
        group.update(fused=None, foreach=False, capturable=False, differentiable=False)
        # Capturable optimizers may keep it in a tensor.
        group["lr"] = float(group["lr"])
        group["decoupled_weight_decay"] = kind is torch.optim.AdamW
    return optimizer


def _read_entry(
    path: Path, name: str, entry: Mapping[str, Any], part: Part
) -> dict[str, Any]:
    """The state of one parameter, or of a part of it, in memory of its own."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, StoredTensor):
            if key not in MOMENTS:
                # No step of Adam has a use for it.
                continue
            value = value.read(part.region)
            _require_moment_values(path, name, key, value)
        found[key] = value.clone() if isinstance(value, Tensor) else value
    return found


def _read_state(path: Path) -> dict[str, Any]:
    saved = stored_optimizer(path)
    _require_structure(path, saved)
    saved = {
        "state": {
            number: {key: _stored(key, value) for key, value in entry.items()}
            for number, entry in saved["state"].items()
        },
        "param_groups": [
            {key: _stored(key, value) for key, value in group.items()}
            for group in saved["param_groups"]
        ],
    }
    _refuse_other_optimizers(path, saved)
    for group in saved["param_groups"]:
        missing = [key for key in GROUP_KEYS if key not in group]
        if missing:
            raise InputError(
                f"{path}: expected an AdamW state; its param groups have no "
                f"{', '.join(missing)}, only {', '.join(sorted(group))}"
            )
        foreign = sorted(group.keys() - set(GROUP_KEYS) - OTHER_GROUP_KEYS)
        if foreign:
            raise InputError(
                f"{path}: expected an AdamW state, found one with {foreign[0]} in its "
                "param groups; other optimizers are not supported"
            )
    _require_group_values(path, saved["param_groups"])
    decoupled = {g.get("decoupled_weight_decay", True) for g in saved["param_groups"]}
    if len(decoupled) > 1:
        raise InputError(f"{path}: its param groups mix Adam and AdamW")
    return _numbered(path, saved)


def _stored(key: str, value: Any) -> Any:
    """A moment as a tensor that is read when asked for; anything else in memory."""
    if isinstance(value, StoredTensor):
        return value if key in MOMENTS else read_number(value)
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return in_memory(value) if is_dense and key in MOMENTS else value


def _refuse_other_optimizers(path: Path, saved: dict[str, Any]) -> None:
    groups = [set(group) for group in saved["param_groups"]]
    entries = [e for e in _values(saved["state"]) if isinstance(e, dict)]
    keys = set().union(*groups, *entries)
    found = [
        (name, min(keys & marks)) for name, marks in OTHER_OPTIMIZERS if keys & marks
    ]
    if "exp_avg" in keys and not keys & {"exp_avg_sq", "eps"}:
        found.append(("Lion", "exp_avg without a second moment"))
    if "decoupled_weight_decay" in keys and "amsgrad" not in keys:
        found.append(("RAdam", "decoupled_weight_decay without amsgrad"))
    for name, mark in found:
        raise InputError(
            f"{path}: expected the state of torch's AdamW or Adam, found that of {name} "
            f"(it has {mark}); other optimizers are not supported, as their step is "
            "another one; update.delta: the next checkpoint measures it without them"
        )


def _values(state: Any) -> list[Any]:
    return list(state.values()) if isinstance(state, dict) else []


def _numbered(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """A state with names in place of numbers, numbered; others as they are."""
    groups, state = saved["param_groups"], saved["state"]
    names = [name for group in groups for name in group["params"]]
    if not names or not all(isinstance(name, str) for name in names):
        return saved
    number_of = {name: number for number, name in enumerate(names)}
    foreign = sorted(set(state) - set(names), key=str)
    if foreign:
        raise InputError(f"{path}: state for {foreign[0]}, which is in no group")
    numbered = [
        group
        | {
            "params": [number_of[name] for name in group["params"]],
            "param_names": group["params"],
        }
        for group in groups
    ]
    entries = {number_of[name]: entry for name, entry in state.items()}
    return {"state": entries, "param_groups": numbered}


def _without_frozen(saved: dict[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """The groups without parameters that are not trained and have no state.

    Some trainers (verl) give all of a model's parameters to the optimizer.
    """
    groups, names = saved["param_groups"], dict(model.named_parameters())
    frozen = {name for name, p in names.items() if not p.requires_grad}

    def restricted(group: dict[str, Any], of_group: list[str]) -> dict[str, Any]:
        kept = [
            place
            for place, (name, number) in enumerate(zip(of_group, group["params"]))
            if name not in frozen or number in saved["state"]
        ]
        lists = {k: group[k] for k in ("params", "param_names") if k in group}
        return group | {k: [v[i] for i in kept] for k, v in lists.items()}

    if all("param_names" in group for group in groups):
        stored = [[unwrapped_name(n) for n in group["param_names"]] for group in groups]
        return [restricted(g, of_group) for g, of_group in zip(groups, stored)]
    if len(groups) == 1 and len(groups[0]["params"]) == len(names):
        return [restricted(groups[0], list(names))]
    return groups


def _names_by_group(
    path: Path,
    groups: list[dict[str, Any]],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
) -> list[list[str]]:
    """The parameter names of each group, in the order of the saved ids."""
    sizes = [len(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        stored = [[unwrapped_name(n) for n in group["param_names"]] for group in groups]
        _require_same_names(path, [n for group in stored for n in group], parameters)
        return stored
    candidate = [list(parameters)]
    if len(groups) == 2:
        decay = _decaying(model)
        candidate = [
            [name for name in parameters if name in decay],
            [name for name in parameters if name not in decay],
        ]
    if [len(group) for group in candidate] != sizes:
        raise InputError(
            f"{path}: expected param groups of {[len(g) for g in candidate]} "
            f"parameters (the checkpoint has {len(parameters)} trainable ones), found "
            f"{sizes}; it is the state of other parameters, or of an optimizer built "
            "in another way than by the Trainer or over named_parameters()"
        )
    return candidate


def _decaying(model: nn.Module) -> set[str]:
    from transformers.trainer_pt_utils import get_parameter_names

    return set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY_PATTERNS))


def _require_same_names(
    path: Path, stored: list[str], parameters: Mapping[str, nn.Parameter]
) -> None:
    twice = sorted(name for name, count in Counter(stored).items() if count > 1)
    if twice:
        raise InputError(f"{path}: parameter {twice[0]} stands in its groups twice")
    for name in sorted(set(stored) ^ parameters.keys()):
        where = "optimizer state" if name in parameters else "model's trainable ones"
        raise InputError(f"{path}: parameter {name} is missing from the {where}")


def _verify_state(
    path: Path,
    state: dict[int, dict[str, Any]],
    groups: list[dict[str, Any]],
    names: list[list[str]],
    parts: Mapping[str, Part],
) -> None:
    """Every parameter has both moments, of its shape, and a step count; no others."""
    ids = [(number, group) for group in groups for number in group["params"]]
    surplus = sorted(set(state) - {number for number, _ in ids}, key=str)
    if surplus:
        raise InputError(f"{path}: state for id {surplus[0]}, which is in no group")
    flat_names = [name for group in names for name in group]
    for (number, group), name in zip(ids, flat_names, strict=True):
        entry = state.get(number)
        if not entry:
            raise InputError(
                f"{path}: no state for {name}; was the checkpoint saved before the "
                "first step?"
            )
        moments = MOMENTS if group["amsgrad"] else MOMENTS[:2]
        for key in ("step", *moments):
            if key not in entry:
                raise InputError(
                    f"{path}: expected AdamW's {key} for {name}, found "
                    f"{', '.join(sorted(map(str, entry)))}; other optimizers are not supported"
                )
        _require_step_count(path, name, entry["step"])
        for key in moments:
            _require_moment(path, name, key, entry[key], parts[name].shape)


# The values of a state: types and ranges


def _show(value: Any) -> str:
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


def _require_structure(path: Path, saved: Any) -> None:
    """A loaded file has the structure of a torch optimizer's state."""
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        found = list(saved) if isinstance(saved, dict) else type(saved).__name__
        raise InputError(
            f"{path}: expected an optimizer state with `state` and `param_groups`, "
            f"found {_show(found)}; name the trainer's optimizer.pt or optimizer.bin"
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


def _require_group_values(path: Path, groups: list[dict[str, Any]]) -> None:
    """The settings of every param group are what AdamW takes: types and ranges."""
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
                    f"found {_show(group[key])}; is the file damaged?"
                )
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):
            raise InputError(
                f"{path}: expected {len(group['params'])} param_names in group "
                f"{number}, found {len(names)}; is the file damaged?"
            )


def _require_step_count(path: Path, name: str, step: Any) -> None:
    """A parameter's `step` counts steps: a whole number of at least 0."""
    count = _number(step)
    if not (count >= 0 and count == math.floor(count)):
        raise InputError(
            f"{path}: expected the number of steps taken as `step` of {name}, found "
            f"{_show(step)}; is the file damaged?"
        )


def _require_moment(
    path: Path, name: str, key: str, moment: Any, shape: torch.Size
) -> None:
    """A moment has its parameter's shape, and floating-point numbers."""
    found = getattr(moment, "shape", None)
    if found != shape:
        shown = type(moment).__name__ if found is None else tuple(found)
        raise InputError(
            f"{path}: {key} of {name} should be {tuple(shape)}, found {shown}; it is "
            "the state of other parameters"
        )
    if not (isinstance(moment, StoredTensor) and moment.dtype.is_floating_point):
        raise InputError(
            f"{path}: expected floating-point numbers in {key} of {name}, found "
            f"{moment.dtype}; is the file damaged?"
        )


def _require_moment_values(path: Path, name: str, key: str, moment: Tensor) -> None:
    """What is read of a moment is finite; of a second one, not negative."""
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
