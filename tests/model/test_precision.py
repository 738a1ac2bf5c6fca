"""Does a float64 model compute in float64, and every other model as it would anyway?"""

from collections.abc import Callable
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from tiny_runs import as_batch, make_passes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_ddp.model.precision import precision_context, true_float64

X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3)
NARROW = (torch.float32, torch.float16, torch.bfloat16)

NARROWING: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "to": lambda x, dtype: x.to(dtype),
    "to, keyword": lambda x, dtype: x.to(dtype=dtype),
    "to, with device": lambda x, dtype: x.to("cpu", dtype),
    "type": lambda x, dtype: x.type(dtype),
    "softmax": lambda x, dtype: F.softmax(x, dim=-1, dtype=dtype),
    "softmax, method": lambda x, dtype: x.softmax(-1, dtype=dtype),
    "log_softmax": lambda x, dtype: F.log_softmax(x, dim=-1, dtype=dtype),
    "torch.softmax": lambda x, dtype: torch.softmax(x, -1, dtype=dtype),
    "torch.log_softmax": lambda x, dtype: torch.log_softmax(x, -1, dtype=dtype),
    "sum": lambda x, dtype: x.sum(-1, dtype=dtype),
    "mean": lambda x, dtype: torch.mean(x, -1, dtype=dtype),
    "cumsum": lambda x, dtype: x.cumsum(-1, dtype=dtype),
    "prod": lambda x, dtype: torch.prod(x, -1, dtype=dtype),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", NARROWING)
def test_float64_stays_float64(name: str, dtype: torch.dtype) -> None:
    cast = NARROWING[name]
    with true_float64():
        result = cast(X, dtype)
    assert result.dtype == torch.float64
    assert torch.equal(result, cast(X, torch.float64))
    assert cast(X, dtype).dtype == dtype  # outside, torch is as ever


@pytest.mark.parametrize("method", [Tensor.float, Tensor.half, Tensor.bfloat16])
def test_shorthand_casts_do_nothing(method: Callable[[Tensor], Tensor]) -> None:
    with true_float64():
        assert method(X) is X
    assert method(X).dtype in NARROW


def test_everything_else_is_cast_as_asked() -> None:
    integers = torch.tensor([1, 2])
    with true_float64():
        assert integers.float().dtype == torch.float32
        assert integers.to(torch.bfloat16).dtype == torch.bfloat16
        assert X.to(torch.int64).dtype == torch.int64
        assert X.to(torch.bool).dtype == torch.bool
        assert X.float().double().dtype == torch.float64
        assert X.float() is X
        single = torch.ones(2, dtype=torch.float32)
        assert single.half().dtype == torch.float16
        assert single.to(torch.float64).dtype == torch.float64
        assert torch.ones(2, dtype=torch.float32).sum().dtype == torch.float32


def test_the_cast_is_back_after_an_exception() -> None:
    with pytest.raises(KeyboardInterrupt), true_float64():
        raise KeyboardInterrupt
    assert X.float().dtype == torch.float32


def test_only_float64_models_get_the_context() -> None:
    with precision_context(torch.float64):
        assert X.float().dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        with precision_context(dtype):
            assert X.float().dtype == torch.float32


class Float32Spy(TorchDispatchMode):
    """Counts results in less than float64 that are not whole numbers (positions)."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor) and item.dtype in NARROW:
                self.count += not torch.equal(item, item.round())
        return result


MODELS = {
    "gpt2": (ref.tiny_gpt2, 13),
    "qwen2": (ref.tiny_qwen2, 17),
    "llama": (ref.tiny_llama, 15),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    make, _ = MODELS[request.param]
    return make(0)


def test_the_gradient_of_a_float64_model_is_float64_throughout(
    model: nn.Module,
) -> None:
    vocabulary = model.config.vocab_size
    shard = as_batch(ref.random_rows(3, vocabulary=vocabulary), vocabulary).shard(0, 1)
    passes = make_passes(model)
    ones = torch.ones(shard.ragged.num_tokens, dtype=torch.float64)
    with Float32Spy() as spy:
        passes.gradient(shard, lambda at, *_: (ones[at], ones[at]), torch.float64)
        passes.score(shard)
    assert spy.count == 0


def test_the_spy_sees_the_casts_of_a_float32_model() -> None:
    model = ref.tiny_llama(0).float()
    shard = as_batch(ref.random_rows(3), 15).shard(0, 1)
    with Float32Spy() as spy:
        make_passes(model).score(shard)
    assert spy.count > 0
