"""A checkpoint's files become a model: its very weights, every mistake named."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.checkpoint.layouts import (
    ADAPTER_CONFIG,
    SAFE_FILES,
    listing,
    refuse_sharded_weights,
    weight_file,
)
from entropy_ddp.checkpoint.stored import load_plain, read_tensors
from entropy_ddp.errors import InputError
from entropy_ddp.inputs import fault_of_file, require_regular_file
from entropy_ddp.model.implementations import supported_attention

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter.

    Raises:
        InputError: it cannot be read, or is of another kind of adapter.
    """
    path = adapter / ADAPTER_CONFIG
    require_regular_file(path)

    def describe(reason: str) -> str:
        return f"{path}: not a readable adapter configuration: {reason}; copy it again"

    with fault_of_file(str(path), describe):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        found = type(config).__name__
        raise InputError(f"{path}: expected a mapping, found {found}; copy it again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: expected peft_type LORA, found {kind}")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise InputError(
            f"{path}: expected a name as base_model_name_or_path, found {base!r}; "
            "correct it, or set checkpoint.base"
        )
    return config


def load_base(
    base: str, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder or hub id with its weights.

    Args:
        base: folder or hub id.
        dtype: of weights and activations.
        attention: Hugging Face attention implementation asked for.
        trust_remote_code: whether code that comes with the model may be run.

    Raises:
        InputError: it cannot be loaded, needs code that may not be run, or weights are
            missing, surplus or of another shape.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(base)
    pickled = folder.is_dir() and weight_file(folder) not in (None, *SAFE_FILES)

    def describe(reason: str) -> str:
        if needs_own_code(reason):
            return own_code_refused(f"base model {base}")
        hint = _base_hint(folder, base, pickled)
        return f"base model {base}: cannot be loaded ({reason}); {hint}"

    with fault_of_file(f"base model {base}", describe), quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=supported_attention(base, attention, trust_remote_code),
            use_safetensors=not pickled,
            weights_only=True,
            trust_remote_code=trust_remote_code,
            # Reported below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(_describe(entry) for entry in report[kind])
            raise InputError(
                f"base model {base}: {len(names)} {kind.replace('_', ' ')}, the first "
                f"is {names[0]}; the weights do not belong to its config.json"
            )
    return model


def needs_own_code(reason: str) -> bool:
    """Whether transformers refused files because they need code of their own."""
    return "custom code" in reason or "trust_remote_code" in reason


def own_code_refused(source: str) -> str:
    """The message about files that need code of their own."""
    return (
        f"{source}: needs the Python code that comes with it, which is not run unasked; "
        "read that code, and give --trust-remote-code if you trust it"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the context, the libraries print no reports of their own: errors only."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before = logging.get_verbosity(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        hub.set_verbosity(before[1])


def _base_hint(folder: Path, base: str, pickled: bool) -> str:
    """What to do about a base model that cannot be loaded."""
    if pickled:
        return (
            "pickled weights are read as tensors only, no code is run from them; save "
            "them as safetensors with save_pretrained"
        )
    if folder.is_dir():
        refuse_sharded_weights(folder)
        if (folder / "config.json").is_file() and weight_file(folder) is not None:
            return "copy its files again, or set checkpoint.base to another folder"
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

    settings = read_adapter_config(adapter)
    stored = read_adapter(adapter)
    _require_base_of(model, adapter, settings.get("base_model_name_or_path"))
    with _misfit(adapter), warnings.catch_warnings():
        # They are told below, as an error.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        wrapped = PeftModel.from_pretrained(
            model, str(adapter), adapter_name=name, is_trainable=True
        )
    require_same_adapter_names(wrapped, adapter, name, stored)
    return wrapped


def _require_base_of(model: nn.Module, adapter: Path, named: Any) -> None:
    """Check a base model against the one that an adapter names, where that is a folder.

    Adapters of two kinds of models can have the same names and shapes.

    Raises:
        InputError: it is of another kind.
    """
    file = Path(str(named)) / "config.json"
    if not isinstance(named, str) or not file.is_file():
        return
    if getattr(model.config, "auto_map", None):
        # Code of its own gives a model a name of its own.
        return

    def describe(reason: str) -> str:
        return f"base model {file}: cannot be read ({reason}); copy it again"

    with fault_of_file(str(file), describe):
        expected = json.loads(file.read_text(encoding="utf-8"))
        kind = expected["model_type"]
    found = model.config.model_type
    if kind != found:
        raise InputError(
            f"adapter {adapter}: expected the base model {named}, a {kind}, found a "
            f"{found}; is checkpoint.base the model it was trained on?"
        )


def read_adapter(adapter: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU, by their names in the file.

    Raises:
        InputError: there is no file of weights, or it cannot be read.
    """
    from peft.utils import load_peft_weights

    files = [adapter / file for file in ADAPTER_WEIGHTS if (adapter / file).is_file()]
    if not files:
        # PEFT would ask the hub for them.
        raise InputError(
            f"adapter {adapter}: expected {ADAPTER_WEIGHTS[0]}, found "
            f"{listing(adapter)}; copy it there"
        )
    if files[0].name.endswith(".bin"):
        return load_plain(files[0], "file of adapter weights")

    def describe(reason: str) -> str:
        return (
            f"adapter {files[0]}: its weights cannot be read ({reason}); copy it again"
        )

    with fault_of_file(str(files[0]), describe):
        return load_peft_weights(str(adapter), device="cpu")


def require_same_adapter_names(
    model: nn.Module, adapter: Path, name: str, stored: Mapping[str, Tensor]
) -> None:
    """Check that a file of adapter weights has the tensors of the model's adapter.

    Raises:
        InputError: one is missing on either side, or of another shape.
    """
    from peft import get_peft_model_state_dict

    # Left to itself, PEFT compares the vocabulary with the base model's, and asks the hub
    # for it where its folder is not to be found.
    expected, with_embeddings = (
        get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=embeddings
        )
        for embeddings in (False, True)
    )
    if with_embeddings.keys() == stored.keys():
        expected = with_embeddings
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
    with _misfit(adapter):
        config = LoraConfig.from_pretrained(str(adapter))
        config.inference_mode = False
        return get_peft_model(model, config, adapter_name=name)


def _misfit(adapter: Path) -> AbstractContextManager[None]:
    return fault_of_file(
        f"adapter {adapter}",
        lambda reason: (
            f"adapter {adapter}: does not fit the base model ({reason}); is "
            "checkpoint.base the model it was trained on?"
        ),
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
