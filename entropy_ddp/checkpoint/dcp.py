"""Checkpoints of torch.distributed.checkpoint (DCP): prime-rl, accelerate, transformers.

    .metadata              a pickle: every tensor's shape and blocks, and where those lie
    __RANK_N.distcp        the blocks, one archive of torch.save after another

`.metadata` is read by a list of the few classes that it has, the archives as any file of
tensors: torch's own reader would run whatever a pickle names. A rank reads the blocks
that meet its region.

The names in it are those of nested mappings: where the optimizer's `param_groups` are,
its state is beside them; the model's tensors are those below `model`, or at the top.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.checkpoint.inert import (
    FileBytes,
    Inert,
    dtypes_by_name,
    inert,
    read_archive_at,
    read_pickle,
)
from entropy_ddp.checkpoint.stored import (
    Block,
    Region,
    StoredTensor,
    joined,
    read_number,
)
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file, require_regular_file

_CLASSES = "torch.distributed.checkpoint."
_KNOWN = {
    "torch.Size": tuple,
    "builtins.set": set,
    **{
        name: inert(name)
        for name in (
            f"{_CLASSES}metadata.Metadata",
            f"{_CLASSES}metadata.TensorStorageMetadata",
            f"{_CLASSES}metadata.BytesStorageMetadata",
            f"{_CLASSES}metadata.ChunkStorageMetadata",
            f"{_CLASSES}metadata.TensorProperties",
            f"{_CLASSES}metadata.MetadataIndex",
            f"{_CLASSES}metadata.StorageMeta",
            f"{_CLASSES}metadata._MEM_FORMAT_ENCODING",
            f"{_CLASSES}filesystem._StorageInfo",
            "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
            "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
            "torch.serialization._get_layout",
            "pathlib.PosixPath",
            "pathlib.PurePosixPath",
            "pathlib._local.PosixPath",
        )
    },
}


@dataclass(frozen=True)
class _Item:
    """Where a block, or a value that is no tensor, lies."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Contents:
    """What a folder of DCP holds.

    Attributes:
        folder: the folder.
        places: the keys that lead to an entry, by the entry's name.
        tensors: the tensors, by name.
        items: where each block or value lies, by name and offsets.
    """

    folder: Path
    places: dict[str, tuple[Any, ...]]
    tensors: dict[str, StoredTensor]
    items: dict[tuple[str, tuple[int, ...] | None], _Item]

    def value(self, name: str) -> Any:
        """An entry that is no tensor, as plain values; a number that is one, read."""
        if name in self.tensors:
            return read_number(self.tensors[name])
        item = self.items.get((name, None))
        if item is None:
            raise InputError(
                f"{self.folder / '.metadata'}: says of {name} not where it lies; copy "
                "the folder again"
            )
        return read_number(_read_item(self.folder, item))


def read_contents(folder: Path) -> Contents:
    """The entries of a folder of DCP, none of which is read yet.

    Raises:
        InputError: its .metadata cannot be read, names anything that does not belong
            there, or describes tensors whose blocks do not make them up.
    """
    path = folder / ".metadata"
    require_regular_file(path)

    def describe(reason: str) -> str:
        return (
            f"{path}: not a readable description of a DCP checkpoint (no code is run "
            f"from it): {reason}; copy the folder again"
        )

    with fault_of_file(str(path), describe):
        return _contents(folder, read_pickle(path.read_bytes(), _known()))


@functools.cache
def _known() -> dict[str, Any]:
    return _KNOWN | dtypes_by_name()


def _contents(folder: Path, metadata: Any) -> Contents:
    items = {}
    for index, info in _checked(metadata.get("storage_data")).items():
        file = Path(info.get("relative_path"))
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(f"a file outside the folder: {file}")
        if info.get("transform_descriptors"):
            raise ValueError(f"blocks are packed ({info.get('transform_descriptors')})")
        offset = index.get("offset")
        key = index.get("fqn"), None if offset is None else tuple(offset)
        items[key] = _Item(str(file), int(info.get("offset")), int(info.get("length")))
    described = _checked(metadata.get("state_dict_metadata"))
    tensors = {
        name: _tensor(folder, name, entry, items)
        for name, entry in described.items()
        if entry.name.endswith(".TensorStorageMetadata")
    }
    nested = metadata.get("planner_data") or {}
    places = {name: tuple(nested.get(name, (name,))) for name in described}
    return Contents(folder, places, tensors, items)


def _checked(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping, found {type(value).__name__}")
    return value


def _tensor(
    folder: Path, name: str, entry: Inert, items: Mapping[Any, _Item]
) -> StoredTensor:
    dtype = entry.get("properties").state[0]
    blocks = []
    for chunk in entry.get("chunks"):
        offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        fetch = functools.partial(_fetch, folder, name, items[name, offsets], sizes)
        blocks.append(Block(offsets, StoredTensor(torch.Size(sizes), dtype, fetch)))
    return joined(entry.get("size"), blocks)


def _fetch(
    folder: Path, name: str, item: _Item, sizes: tuple[int, ...], region: Region
) -> Tensor:
    stored = _read_item(folder, item)
    if not isinstance(stored, StoredTensor) or stored.shape != sizes:
        found = getattr(stored, "shape", type(stored).__name__)
        raise InputError(
            f"{folder / item.file}: expected {sizes} as a block of {name}, found "
            f"{found}; copy the folder again"
        )
    return stored.read(region)


def _read_item(folder: Path, item: _Item) -> Any:
    path = folder / item.file
    require_regular_file(path)

    def describe(reason: str) -> str:
        return (
            f"{path}: not readable as tensors and plain values at byte {item.start} (no "
            f"code is run from it): {reason}; copy the folder again"
        )

    with fault_of_file(str(path), describe):
        return read_archive_at(FileBytes.of(path).part(item.start, item.length))


# The model and the optimizer among the entries


def weights_in(folder: Path) -> dict[str, StoredTensor]:
    """The model's tensors by their names in the model.

    Raises:
        InputError: the folder cannot be read, or holds no model.
    """
    contents = read_contents(folder)
    of_optimizer = {prefix for prefix, _ in _optimizers(contents)}
    found: dict[tuple[Any, ...], dict[str, StoredTensor]] = {}
    for name, tensor in contents.tensors.items():
        place = contents.places[name]
        if not any(place[: len(p)] == p and _is_state(place, p) for p in of_optimizer):
            found.setdefault(place[:-1], {})[str(place[-1])] = tensor
    below = {prefix: t for prefix, t in found.items() if prefix[-1:] == ("model",)}
    below = below or {prefix: t for prefix, t in found.items() if prefix == ()}
    if len(below) != 1:
        places = sorted({".".join(map(str, prefix)) or "." for prefix in found})
        raise InputError(
            f"{folder}: expected the tensors of one model, below `model` or at the top, "
            f"found {len(below)} such places, and tensors below "
            f"{', '.join(places[:6]) or 'none'}; name the folder of the weights in "
            "checkpoint.weights"
        )
    (tensors,) = below.values()
    return tensors


def optimizer_in(folder: Path) -> dict[str, Any]:
    """The optimizer's state by parameter names, as torch's state_dict has it.

    Raises:
        InputError: the folder cannot be read, or does not hold one optimizer.
    """
    contents = read_contents(folder)
    optimizers = _optimizers(contents)
    if len(optimizers) != 1:
        raise InputError(
            f"{folder}: expected the state of one optimizer, found {len(optimizers)} "
            f"among {len(contents.places)} entries; name the folder of the optimizer "
            "state in checkpoint.optimizer"
        )
    ((prefix, is_flat),) = optimizers
    return (_flat_state if is_flat else _nested_state)(contents, prefix)


def _optimizers(contents: Contents) -> set[tuple[tuple[Any, ...], bool]]:
    """Where optimizers are, and whether their keys are flattened into names."""
    found = set()
    for place in contents.places.values():
        if "param_groups" in place[:-1]:
            found.add((place[: place.index("param_groups")], False))
        elif isinstance(place[-1], str) and place[-1].startswith("param_groups."):
            found.add((place[:-1], True))
    return found


def _is_state(place: tuple[Any, ...], prefix: tuple[Any, ...]) -> bool:
    """Whether an entry below an optimizer's prefix is the optimizer's."""
    key = str(place[len(prefix)])
    return key in ("state", "param_groups") or key.startswith(
        ("state.", "param_groups.")
    )


def _nested_state(contents: Contents, prefix: tuple[Any, ...]) -> dict[str, Any]:
    """As `get_optimizer_state_dict` gives it: state.NAME.KEY, param_groups.I.KEY."""
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[Any, dict[str, Any]] = {}
    for name, place in contents.places.items():
        rest = place[len(prefix) :] if place[: len(prefix)] == prefix else ()
        if len(rest) == 3 and rest[0] == "state":
            state.setdefault(rest[1], {})[rest[2]] = contents.value(name)
        elif len(rest) == 3 and rest[0] == "param_groups":
            groups.setdefault(rest[1], {})[rest[2]] = contents.value(name)
        elif len(rest) == 4 and rest[0] == "param_groups":
            # A list of names, entry by entry.
            listed = groups.setdefault(rest[1], {}).setdefault(rest[2], [])
            listed.append(contents.value(name))
    return {"state": state, "param_groups": [groups[i] for i in sorted(groups)]}


def _flat_state(contents: Contents, prefix: tuple[Any, ...]) -> dict[str, Any]:
    """As flattened: the keys state.NAME.KEY and param_groups.NAME.KEY.

    Parameters of equal settings are one group.
    """
    state: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, place in contents.places.items():
        if place[:-1] != prefix or not isinstance(place[-1], str):
            continue
        kind, _, rest = place[-1].partition(".")
        parameter, _, key = rest.rpartition(".")
        if kind == "state":
            state.setdefault(parameter, {})[key] = contents.value(name)
        elif kind == "param_groups":
            settings.setdefault(parameter, {})[key] = contents.value(name)
    groups: list[dict[str, Any]] = []
    for parameter, chosen in settings.items():
        same = [
            g for g in groups if {k: v for k, v in g.items() if k != "params"} == chosen
        ]
        if not same:
            same = [chosen | {"params": []}]
            groups += same
        same[0]["params"].append(parameter)
    return {"state": state, "param_groups": groups}
