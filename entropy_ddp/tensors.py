"""Files of named tensors, in the safetensors format, written without a copy of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from entropy_ddp.atomic import written_whole

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, whole or not at all.

    safetensors' own writer makes all bytes first, a second copy of a buffer that is as
    large as the model.

    Args:
        path: the file; its folder exists, an old file is replaced.
        tensors: what to write, by name.
        metadata: texts by name.

    Raises:
        RunError: the file cannot be written.
    """
    # Wider elements first, so that all are aligned.
    items = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, tensor in items:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path, size=8 + len(text) + end) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in items:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if len(flat):
                stream.write(flat.view(torch.uint8).numpy().data)
