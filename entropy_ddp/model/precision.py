"""Float64 that is float64 throughout.

Model code narrows to float32 inside normalisation layers, softmax and rotary
embeddings, whatever the dtype of the model. Central differences of such a model stop at
1e-5 relative. Within `true_float64()` those casts leave float64 tensors alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROW_NAMES = ("torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor")
_CASTS = {Tensor.to, Tensor.type}
_REDUCTIONS = {
    F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax,
    Tensor.log_softmax, torch.sum, Tensor.sum, torch.mean, Tensor.mean, torch.cumsum,
    Tensor.cumsum, torch.prod, Tensor.prod,
}  # fmt: skip


def precision_context(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The context in which a model of this dtype computes in this dtype."""
    return true_float64() if dtype == torch.float64 else nullcontext()


def true_float64() -> TorchFunctionMode:
    """A context in which casts of float64 tensors to narrower floats do nothing."""
    return _KeepFloat64()


class _KeepFloat64(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
                return args[0]
            if func is Tensor.type_as and args[1].is_floating_point():
                return args[0].to(args[1].device)
            if func in _CASTS or func in _REDUCTIONS:
                args = (args[0], *(_widened(argument) for argument in args[1:]))
                kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    """What a cast or reduction is asked for, with narrow floats read as float64."""
    if isinstance(value, str) and value in _NARROW_NAMES:
        return torch.float64
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.new_empty(0, dtype=torch.float64)
    narrow = isinstance(value, torch.dtype) and value in _NARROW
    return torch.float64 if narrow else value
