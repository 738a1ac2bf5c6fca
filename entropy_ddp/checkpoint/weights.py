"""Weights as a folder holds them: tensors by name, and the dtypes they are stored in."""

import json
import re
import warnings
import zipfile
from collections import Counter
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file, require_regular_file

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_ddp.checkpoint.stored import StoredTensor

SAFE_FILES = ("model.safetensors", "model.safetensors.index.json")
# Read with torch.load(weights_only=True), where there is no safetensors file.
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What safetensors calls a dtype.
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# What wrappers add to parameter names, anywhere in them.
_WRAPPERS = re.compile(
    r"^module\.|(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)


def unwrapped_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return _WRAPPERS.sub("", name)


def weight_file(folder: Path) -> str | None:
    """The file (or index of files) of a folder's whole weights; safetensors first."""
    names = (*SAFE_FILES, *PICKLED_FILES)
    return next((name for name in names if (folder / name).exists()), None)


def listing(folder: Path) -> str:
    """The first names of a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "nothing"


def stored_tensors(folder: Path) -> "dict[str, StoredTensor]":
    """The whole weights of a folder, by their names in its file; none is read yet.

    Raises:
        InputError: the file cannot be read, or not as tensors only.
    """
    path = _one_file(folder)
    if path.name in SAFE_FILES:
        return safe_tensors(path)
    return tensors_by_name(path, load_plain(path, "file of weights"))


def tensors_by_name(path: Path, stored: Any) -> "dict[str, StoredTensor]":
    """What a file of torch.save held, as stored tensors.

    Raises:
        InputError: it is something else.
    """
    from torch import Tensor

    from entropy_ddp.checkpoint.stored import in_memory

    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor)
        for name, tensor in stored.items()
    ):
        raise InputError(
            f"{path}: expected tensors by name, found {type(stored).__name__}; save the "
            "weights as safetensors"
        )
    return {name: in_memory(tensor) for name, tensor in stored.items()}


def safe_tensors(path: Path) -> "dict[str, StoredTensor]":
    """The tensors of a safetensors file; each is read from it when asked for."""
    import torch
    from safetensors import safe_open

    from entropy_ddp.checkpoint.stored import Region, StoredTensor

    def stored(name: str) -> StoredTensor:
        view = file.get_slice(name)
        shape = torch.Size(view.get_shape())

        def fetch(region: Region) -> "Tensor":
            with _unreadable(path):
                # A view of no dimension cannot be sliced.
                found = view[region] if region else file.get_tensor(name)
                return found.clone()

        dtype = getattr(torch, _NAMES.get(view.get_dtype(), ""), None)
        if dtype is None:
            # Not a dtype of weights: read to learn it.
            dtype = file.get_tensor(name).dtype
        return StoredTensor(shape, dtype, fetch)

    with _unreadable(path):
        file = safe_open(path, framework="pt")
        return {name: stored(name) for name in file.offset_keys()}


def _one_file(folder: Path) -> Path:
    name = weight_file(folder)
    assert name is not None
    if name.endswith(".json"):
        raise InputError(
            f"{folder / name}: expected one file of weights, as accelerate's save_state "
            "leaves it, found an index of many; is config.json missing from the folder?"
        )
    return folder / name


def _unreadable(path: Path) -> AbstractContextManager[None]:
    require_regular_file(path)
    return fault_of_file(
        str(path),
        lambda reason: (
            f"{path}: not a readable file of weights: {reason}; copy it again"
        ),
    )


def load_plain(path: Path, what: str) -> Any:
    """What a file of torch.save holds, if it is tensors and plain values only.

    Args:
        path: the file; nothing that its pickle names is imported or run. Its tensors
            are mapped into memory: their bytes are read when they are used.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    import torch

    require_regular_file(path)

    def describe(reason: str) -> str:
        return (
            f"{path}: not a readable {what} (tensors and plain values only; no code is "
            f"run from it): {_pickle_reason(reason)}"
        )

    with fault_of_file(str(path), describe), warnings.catch_warnings():
        # About pickles of another make, which are refused or read like any.
        warnings.simplefilter("ignore")
        # Files of the time before archives cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _pickle_reason(reason: str) -> str:
    """A reason without torch's advice to load the file in a way that runs its code."""
    if "Weights only load failed" not in reason and "weights_only" not in reason:
        return f"{reason}; copy the file again"
    return (
        "it is no file of torch.save, or its pickle names functions or classes to be "
        "called; copy it again, or save it as tensors"
    )


def stored_dtypes(*, base: str, adapter: Path | None) -> dict[str, str]:
    """Dtypes of the weights in the files, by part of the checkpoint.

    A part whose files do not tell (pickles, the base model of a hub) is absent.
    """
    files = {"base": _weight_files(_local_folder(base))}
    if adapter is not None:
        files["adapter"] = [adapter / ADAPTER_WEIGHTS[0]]
    found = {}
    for part, paths in files.items():
        dtypes = [_dtypes_in(path) for path in paths if path.is_file()]
        counts = Counter(chain.from_iterable(dtypes))
        if counts:
            found[part] = ", ".join(name for name, _ in counts.most_common())
    return found


def mapped_tensors(base: str) -> "dict[str, Tensor] | None":
    """The weights of a folder or hub id by name, as pages of their files.

    They are not read until they are used.

    Returns:
        None where they are not safetensors files on this machine.

    Raises:
        InputError: a file cannot be read.
    """
    from safetensors import safe_open

    found = {}
    for path in _weight_files(_local_folder(base)):
        with _unreadable(path), safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                found[name] = file.get_tensor(name)
    return found or None


def _local_folder(base: str) -> Path | None:
    """Where the files of a folder or hub id are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if Path(base).is_dir():
        return Path(base)
    path = try_to_load_from_cache(base, "config.json")
    return Path(path).parent if isinstance(path, str) else None


def _weight_files(folder: Path | None) -> list[Path]:
    """The safetensors files of a folder's whole weights; none for pickles."""
    name = None if folder is None else weight_file(folder)
    if folder is None or name not in SAFE_FILES:
        return []
    if name == SAFE_FILES[0]:
        return [folder / name]
    with _unreadable(folder / name):
        index = json.loads((folder / name).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        return [folder / shard for shard in shards]


def _dtypes_in(path: Path) -> list[str]:
    """The dtype of every tensor of a safetensors file."""
    from safetensors import safe_open

    with _unreadable(path), safe_open(path, framework="pt") as file:
        stored = [file.get_slice(name).get_dtype() for name in file.offset_keys()]
        return [_NAMES.get(dtype, dtype) for dtype in stored]


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


def read_adapter(adapter: Path) -> "dict[str, Tensor]":
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
