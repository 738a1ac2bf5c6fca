"""A checkpoint's files become a model: its very weights, every mistake named."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.errors import InputError, raise_if_out_of_memory
from entropy_ddp.policy.implementations import supported_attention
from entropy_ddp.policy.layouts import (
    ADAPTER_CONFIG,
    SAFE_FILES,
    listing,
    refuse_sharded_weights,
    weight_file,
)
from entropy_ddp.policy.stored import read_tensors


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter.

    Raises:
        InputError: it cannot be read, or is of another kind of adapter.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable adapter configuration") from error
    if not isinstance(config, dict):
        found = type(config).__name__
        raise InputError(f"{path}: expected a mapping, found {found}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: expected peft_type LORA, found {kind}")
    return config


def load_base(base: str, dtype: torch.dtype, attention: str) -> nn.Module:
    """The model of a folder or hub id with its weights.

    Raises:
        InputError: it cannot be loaded, or weights are missing, surplus or of another
            shape.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(base)
    pickled = folder.is_dir() and weight_file(folder) not in (None, *SAFE_FILES)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=supported_attention(base, attention),
            use_safetensors=not pickled,
            weights_only=True,
            trust_remote_code=False,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise_if_out_of_memory(error)
        # Whatever the libraries raise, it is these files that they cannot read.
        raise InputError(
            f"base model {base}: cannot be loaded ({first_line(error)}); "
            f"{_base_hint(folder, base, pickled)}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(_describe(entry) for entry in report[kind])
            raise InputError(
                f"base model {base}: {len(names)} {kind.replace('_', ' ')}, the first "
                f"is {names[0]}; the weights do not belong to its config.json"
            )
    return model


def _base_hint(folder: Path, base: str, pickled: bool) -> str:
    """What to do about a base model that cannot be loaded."""
    if pickled:
        return (
            "pickled weights are read as tensors only, no code is run from them; save "
            "them as safetensors with save_pretrained"
        )
    if folder.is_dir():
        refuse_sharded_weights(folder)
        return "set checkpoint.base to its folder or hub id"
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        return (
            "it is no folder here, and as a hub id it is neither in the cache nor can "
            f"it be downloaded: run `hf download {base}` where there is a network, or "
            "set checkpoint.base to its folder"
        )
    return "there is no such folder; set checkpoint.base to where it is now"


def _describe(entry: Any) -> str:
    """A key of a loading report, with its shapes if they are what is wrong."""
    if isinstance(entry, str):
        return entry
    name, found, expected = entry
    return f"{name} (found {tuple(found)}, expected {tuple(expected)})"


def load_adapter(model: nn.Module, adapter: Path, name: str) -> nn.Module:
    """The model with an adapter of this name around it, trainable.

    Raises:
        InputError: the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftModel

    read_adapter_config(adapter)
    stored = read_adapter(adapter)
    try:
        wrapped = PeftModel.from_pretrained(
            model, str(adapter), adapter_name=name, is_trainable=True
        )
    except Exception as error:
        raise_if_out_of_memory(error)
        # Whatever the libraries raise, it is these files that they cannot read.
        raise _make_misfit(adapter, error) from error
    require_same_adapter_names(wrapped, adapter, name, stored)
    return wrapped


def read_adapter(adapter: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU, by their names in the file.

    Raises:
        InputError: there is no file of weights, or it cannot be read.
    """
    from peft.utils import load_peft_weights

    try:
        return load_peft_weights(str(adapter), device="cpu")
    except Exception as error:
        raise_if_out_of_memory(error)
        # Whatever the libraries raise, it is these files that they cannot read.
        raise InputError(
            f"adapter {adapter}: its weights cannot be read ({first_line(error)}); "
            f"found {listing(adapter)}"
        ) from error


def require_same_adapter_names(
    model: nn.Module, adapter: Path, name: str, stored: Mapping[str, Tensor]
) -> None:
    """Check that a file of adapter weights has the tensors of the model's adapter.

    Raises:
        InputError: one is missing on either side, or of another shape.
    """
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(model, adapter_name=name)
    require_same_tensors(f"adapter {adapter}", "the adapter file", stored, expected)


def require_same_tensors(
    source: str,
    place: str,
    stored: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> None:
    """Check names and shapes of stored tensors.

    Args:
        source: what is opened, for the message.
        place: where the tensors are from, for the message.
        stored: the tensors by name.
        expected: tensors of the names and shapes that they should have.

    Raises:
        InputError: names are missing or surplus, or a shape is another; with the first
            and their number.
    """
    differing = sorted(expected.keys() ^ stored.keys())
    for name in differing:
        where = place if name in expected else "the model"
        raise InputError(
            f"{source}: {name} is missing from {where} ({len(differing)} of "
            f"{len(expected.keys() | stored.keys())} names differ); is checkpoint.base "
            "the model it was trained on?"
        )
    wrong = sorted(n for n in expected if stored[n].shape != expected[n].shape)
    for name in wrong:
        raise InputError(
            f"{source}: {name} should be {tuple(expected[name].shape)}, found "
            f"{tuple(stored[name].shape)} ({len(wrong)} of {len(expected)} tensors have "
            "another shape); is checkpoint.base the model it was trained on?"
        )


def make_adapter(model: nn.Module, adapter: Path, name: str) -> nn.Module:
    """The model with an adapter as configured around it, its weights still to be set.

    Raises:
        InputError: the configuration does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    read_adapter_config(adapter)
    try:
        config = LoraConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        return get_peft_model(model, config, adapter_name=name)
    except Exception as error:
        raise_if_out_of_memory(error)
        # Whatever the libraries raise, it is this configuration that does not fit.
        raise _make_misfit(adapter, error) from error


def _make_misfit(adapter: Path, error: Exception) -> InputError:
    return InputError(
        f"adapter {adapter}: does not fit the base model ({first_line(error)}); is "
        "checkpoint.base the model it was trained on?"
    )


def load_state(model: nn.Module, folder: Path) -> None:
    """Fill a model with the weights that accelerate's `save_state` left.

    Raises:
        InputError: names or shapes are not the model's.
    """
    stored = {n.removeprefix("module."): t for n, t in read_tensors(folder).items()}
    expected = model.state_dict()
    # Of tensors that share their memory, a safetensors file has one name only.
    present = {t.data_ptr() for n, t in expected.items() if n in stored}
    tied = {
        n for n, t in expected.items() if n not in stored and t.data_ptr() in present
    }
    required = {n: t for n, t in expected.items() if n not in tied}
    place = str(weight_file(folder))
    require_same_tensors(str(folder), place, stored, required)
    model.load_state_dict(stored, strict=False)


def first_line(error: BaseException) -> str:
    """The line of a message that says most: the one that names a tensor, or the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line.strip() for line in lines if "size mismatch for" in line]
    return (named or lines)[0]
