"""Pickles read as data: nothing that they name is imported, called or made.

A pickle may name any function and have it called. Here a name is looked up in a short
list of what a format is known to hold, whose values are our own: a class of torch or
DeepSpeed becomes an `Inert`, which only records what it was given. Any other name is
refused (`read_pickle`), or an `Inert` too where nothing is read but plain values.

Files of torch.save are archives: a pickle with the structure, and one record for each
storage, uncompressed. `read_archive` gives their tensors as `StoredTensor`s, so that of a
rank's file only those bytes are read that a region lies in. DTensors become
`ShardOfTensor`.
"""

import functools
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file, require_regular_file

if TYPE_CHECKING:
    from entropy_ddp.checkpoint.stored import Region, StoredTensor

# A pickle of tensors by name has some kilobytes for each; a larger one is something else.
MAX_PICKLE_BYTES = 2**30


class Inert:
    """Stands for whatever a pickle names: calling and filling it only records."""

    name = ""
    # Pickles may make an object without calling __init__.
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """What `__new__` was given."""

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

    def get(self, name: str) -> Any:
        """An attribute that the pickle gave it; None if it gave none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Known:
    """A function of ours that stands for a name.

    A pickle may set attributes of whatever it can name; of this, none.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of a function")


class Refusal(str):
    """Stands for a name that tells a format which is not read: the message."""


def inert(name: str) -> type[Inert]:
    """What stands for a name of a pickle."""
    return type("Inert", (Inert,), {"name": name})


class InertUnpickler(pickle.Unpickler):
    """Builds the pickled object out of stubs and known values.

    Args:
        stream: the pickle.
        known: what names stand for; None: every name is an `Inert`.
        load: what becomes of a persistent identifier.
    """

    def __init__(
        self,
        stream: IO[bytes],
        known: Mapping[str, Any] | None = None,
        load: Callable[[Any], Any] = Inert,
    ) -> None:
        super().__init__(stream)
        self._known = known
        self._load = load

    def find_class(self, module: str, name: str) -> Any:
        """Our own value for a name."""
        full = f"{module}.{name}"
        if self._known is None:
            return inert(full)
        if full not in self._known:
            raise pickle.UnpicklingError(
                f"it names {full}, which does not belong there"
            )
        found = self._known[full]
        if isinstance(found, Refusal):
            raise InputError(found)
        return found

    def persistent_load(self, identifier: Any) -> Any:
        """A storage, in files of torch.save."""
        return self._load(identifier)


def require_small_memo(data: bytes) -> None:
    """Refuse places in the memo beyond the file's length: all before are allocated.

    Raises:
        ValueError: there is one.
    """
    for opcode, argument, position in pickletools.genops(data):
        is_place = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if is_place and (argument or 0) > len(data):
            raise ValueError(f"place {argument} in its memo at byte {position}")


def read_pickle(
    data: bytes, known: Mapping[str, Any], load: Callable[[Any], Any] = Inert
) -> Any:
    """The content of a pickle that names nothing but what is known.

    Raises:
        Exception: whatever damaged or hostile bytes make of it.
    """
    require_small_memo(data)
    return InertUnpickler(BytesIO(data), known, load).load()


# Files of torch.save


@dataclass(frozen=True)
class ShardOfTensor:
    """What one rank holds of a tensor: a DTensor in its file.

    Attributes:
        shape: of the whole tensor.
        local: what this rank holds.
        placements: how it is split, by dimension of the mesh: the tensor's dimension, or
            None where every rank has all; a name for anything else.
    """

    shape: tuple[int, ...]
    local: "StoredTensor"
    placements: tuple[int | str | None, ...]


def read_archive(path: Path, known: Mapping[str, Any] | None = None) -> Any:
    """What a file of torch.save holds: plain values, and tensors that are not read yet.

    Args:
        known: names of classes that the format's pickles have beside tensors.

    Raises:
        InputError: it cannot be read, or its pickle names anything else.
    """
    require_regular_file(path)

    def describe(reason: str) -> str:
        return (
            f"{path}: not a readable file of tensors and plain values (no code is run "
            f"from it): {reason}; copy it again, or save it as tensors"
        )

    with fault_of_file(str(path), describe):
        return read_archive_at(FileBytes.of(path), known)


@dataclass(frozen=True)
class FileBytes:
    """A part of a file, mapped into memory.

    Attributes:
        path: the file, for messages.
        start, length: the part, in bytes.
    """

    path: Path
    map: mmap.mmap
    start: int
    length: int

    @classmethod
    def of(cls, path: Path) -> "FileBytes":
        """The whole file.

        Raises:
            OSError, ValueError: it cannot be opened, or is empty.
        """
        with path.open("rb") as stream:
            # Private: what is read is the file's, and nothing is written to it.
            found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return cls(path, found, 0, len(found))

    def part(self, start: int, length: int) -> "FileBytes":
        """A part of it.

        Raises:
            ValueError: it ends beyond the end.
        """
        if not 0 <= start <= start + length <= self.length:
            raise ValueError(
                f"{length} bytes from byte {start} on, in {self.length} of them; is the "
                "file cut off?"
            )
        return FileBytes(self.path, self.map, self.start + start, length)

    def read(self) -> bytes:
        """Its bytes."""
        return self.map[self.start : self.start + self.length]


def read_archive_at(data: FileBytes, known: Mapping[str, Any] | None = None) -> Any:
    """As `read_archive`, of a part of a file.

    Raises:
        Exception: whatever damaged or hostile bytes make of it.
    """
    records = _records(data)
    (structure,) = (r for name, r in records.items() if name.endswith("/data.pkl"))
    (prefix,) = (n.rpartition("/")[0] for n in records if n.endswith("/data.pkl"))
    order = records.get(f"{prefix}/byteorder")
    if order is not None and order.read() != b"little":
        raise ValueError("it was written on a machine of another byte order")
    if structure.length > MAX_PICKLE_BYTES:
        raise ValueError(f"its structure has {structure.length} bytes")

    def load(identifier: Any) -> _Storage:
        kind, dtype, key, _, _ = identifier
        if kind != "storage" or not isinstance(dtype, _StorageType):
            raise ValueError(f"a persistent object of kind {kind!r}")
        return _Storage(records[f"{prefix}/data/{key}"], dtype.dtype)

    return read_pickle(structure.read(), _tensor_names() | dict(known or {}), load)


def _records(data: FileBytes) -> dict[str, FileBytes]:
    """The records of an archive by name; they must be stored uncompressed."""
    found = {}
    with zipfile.ZipFile(_Slice(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {entry.filename} is compressed")
            # The name and an extra field, which pads the record, are of any length.
            header = data.part(entry.header_offset, 30).read()
            sizes = struct.unpack("<HH", header[26:30])
            start = entry.header_offset + 30 + sum(sizes)
            found[entry.filename] = data.part(start, entry.file_size)
    return found


class _Slice:
    """A part of a file as `zipfile` reads one: bytes are copied when they are asked for."""

    def __init__(self, data: FileBytes) -> None:
        self._data = data
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        origin = (0, self._position, self._data.length)[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._data.length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        found = self._data.part(self._position, size).read() if size else b""
        self._position += size
        return found


@dataclass(frozen=True)
class _StorageType:
    """Stands for torch's class of storages of a dtype."""

    dtype: Any

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of a class")


@dataclass(frozen=True)
class _Storage:
    """A storage in an archive, of a dtype."""

    data: FileBytes
    dtype: Any


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> "StoredTensor":
    """A tensor on a storage: `torch._utils._rebuild_tensor_v2`."""
    import torch

    from entropy_ddp.checkpoint.stored import StoredTensor

    if not isinstance(storage, _Storage):
        raise TypeError(f"expected a storage, found {type(storage).__name__}")
    dtype, shape, strides = storage.dtype, torch.Size(size), tuple(stride)
    if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
        raise ValueError(f"a tensor of shape {tuple(shape)} and strides {strides}")

    def last(lengths: "tuple[int, ...]") -> int:
        """Number of elements from the first to the last of a region."""
        if 0 in lengths:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(lengths, strides, strict=True))

    width = dtype.itemsize
    # Read beyond the end of the record, it would be another's bytes.
    storage.data.part(offset * width, last(tuple(shape)) * width)

    def fetch(region: "Region") -> torch.Tensor:
        lengths = tuple(part.stop - part.start for part in region)
        count = last(lengths)
        first = offset + sum(
            part.start * step for part, step in zip(region, strides, strict=True)
        )
        if not count:
            return torch.empty(lengths, dtype=dtype)
        place = storage.data.part(first * width, count * width)
        # Records of a rank's file need not be aligned: bytes first.
        raw = torch.frombuffer(
            place.map, dtype=torch.uint8, count=place.length, offset=place.start
        )
        flat = raw.clone().view(dtype)
        return flat.as_strided(lengths, strides).contiguous()

    return StoredTensor(shape, dtype, fetch)


def _rebuild_from_type(make: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a subclass: `torch._tensor._rebuild_from_type_v2`."""
    made = make(*arguments)
    if not isinstance(made, _Wrapper):
        return made
    attributes = state[1] if isinstance(state, tuple) else state
    local, spec = attributes["_local_tensor"], attributes["_spec"]
    placements = tuple(_placement(p) for p in spec.get("placements"))
    return ShardOfTensor(made.shape, local, placements)


@dataclass(frozen=True)
class _Wrapper:
    shape: tuple[int, ...]


def _rebuild_wrapper(kind: Any, dtype: Any, size: Any, *_: Any) -> _Wrapper:
    """`torch._utils._rebuild_wrapper_subclass`: a tensor without elements."""
    return _Wrapper(tuple(size))


def _placement(placement: Any) -> int | str | None:
    name = placement.name.rpartition(".")[2]
    if name == "Replicate":
        return None
    if name == "Shard":
        return int(placement.get("dim"))
    return name


class _Mapping(OrderedDict[Any, Any]):
    """An ordered mapping, which may have attributes (`_metadata` of a state dict)."""


# What torch calls a storage of a dtype.
_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool",
}  # fmt: skip


def dtypes_by_name() -> dict[str, Any]:
    """torch's dtypes, as pickles name them."""
    import torch

    return {
        f"torch.{name}": value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    }


_MESH = "torch.distributed.tensor."


@functools.cache
def _tensor_names() -> dict[str, Any]:
    """What pickles of tensors name, and what stands for it here."""
    import torch

    return {
        "collections.OrderedDict": Known(_Mapping),
        "builtins.set": set,
        "torch.Size": tuple,
        "torch.device": inert("torch.device"),
        "torch.Tensor": inert("torch.Tensor"),
        "torch.nn.parameter.Parameter": inert("torch.nn.parameter.Parameter"),
        "torch.serialization._get_layout": inert("torch.layout"),
        "torch._utils._rebuild_tensor_v2": Known(_rebuild_tensor),
        "torch._utils._rebuild_parameter": Known(lambda tensor, *_: tensor),
        "torch._tensor._rebuild_from_type_v2": Known(_rebuild_from_type),
        "torch._utils._rebuild_wrapper_subclass": Known(_rebuild_wrapper),
        **{
            f"torch.{kind}Storage": _StorageType(getattr(torch, name))
            for kind, name in _STORAGES.items()
        },
        **dtypes_by_name(),
        **{
            name: inert(name)
            for name in (
                f"{_MESH}DTensor",
                f"{_MESH}_api.DTensor",
                f"{_MESH}_dtensor_spec.DTensorSpec",
                f"{_MESH}_dtensor_spec.TensorMeta",
                f"{_MESH}_dtensor_spec.ShardOrderEntry",
                f"{_MESH}placement_types.Shard",
                f"{_MESH}placement_types._StridedShard",
                f"{_MESH}placement_types.Replicate",
                f"{_MESH}placement_types.Partial",
                "torch.distributed.device_mesh.DeviceMesh",
                "torch.distributed.device_mesh._MeshLayout",
                "torch.distributed._mesh_layout._MeshLayout",
                "torch.distributed._mesh_layout._FlatLayout",
            )
        },
    }
