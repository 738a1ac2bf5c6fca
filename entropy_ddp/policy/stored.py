"""Weights as a folder holds them: tensors by name, and the dtypes they are stored in."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from entropy_ddp.errors import InputError, raise_if_out_of_memory
from entropy_ddp.policy.layouts import SAFE_FILES, weight_file

ADAPTER_FILES = ("adapter_model.safetensors",)
# A header that is longer is not one of weights.
MAX_HEADER_BYTES = 1 << 27


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a folder, on the CPU, by their names in the file.

    Raises:
        InputError: the file cannot be read, or not as tensors only.
    """
    from safetensors.torch import load_file

    path = _one_file(folder)
    with _named_as_unreadable(path):
        if path.name in SAFE_FILES:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def tensor_names(folder: Path) -> list[str]:
    """The names of the whole weights of a folder.

    Raises:
        InputError: the file cannot be read, or not as tensors only.
    """
    from safetensors import safe_open

    path = _one_file(folder)
    if path.name not in SAFE_FILES:
        return list(read_tensors(folder))
    with _named_as_unreadable(path), safe_open(path, framework="pt") as file:
        return list(file.keys())


def _one_file(folder: Path) -> Path:
    name = weight_file(folder)
    assert name is not None
    if name.endswith(".json"):
        raise InputError(
            f"{folder / name}: expected one file of weights, as accelerate's save_state "
            "leaves it, found an index of many; is config.json missing from the folder?"
        )
    return folder / name


@contextmanager
def _named_as_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise_if_out_of_memory(error)
        # Whatever the libraries raise, it is this file that they cannot read.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: not a readable file of weights (tensors only; no code is run from "
            f"it): {reason}"
        ) from error


def stored_dtypes(
    *, state: Path | None, base: str, adapter: Path | None
) -> dict[str, str]:
    """Dtypes of the weights in the files, by part of the checkpoint.

    A part whose files do not tell (pickles, the base model of a hub) is absent.

    Args:
        state: folder of accelerate's `save_state`, which takes the others' place.
        base: the base model.
        adapter: folder of the adapter.
    """
    files: dict[str, list[Path]] = {"state": [], "base": [], "adapter": []}
    if state is not None:
        files["state"] = _weight_files(state)
    else:
        files["base"] = _weight_files(_local_folder(base))
        if adapter is not None:
            files["adapter"] = [adapter / name for name in ADAPTER_FILES]
    found = {}
    for part, paths in files.items():
        counts: Counter[str] = Counter()
        for path in paths:
            if path.is_file():
                counts.update(_header_dtypes(path))
        if counts:
            found[part] = ", ".join(name for name, _ in counts.most_common())
    return found


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
    shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
    return [folder / shard for shard in sorted(set(shards.values()))]


def _header_dtypes(path: Path) -> Counter[str]:
    """Number of tensors of each dtype, from the file's header alone."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(size, MAX_HEADER_BYTES)))
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    return Counter(_NAMES.get(entry["dtype"], entry["dtype"]) for entry in tensors)


_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
