"""Are parameter vectors laid out, hashed and put back to the last bit?"""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from entropy_ddp.model.parameters import (
    ParameterLayout,
    differentiate_padding_tokens,
    fingerprint,
    frozen_fingerprint,
    global_norm,
    inner_product,
    preserved,
    trainable_parameters,
)

NORM_RTOL = 1e-10  # a million float64 additions one after the other; float32: 2e-7


def make_parameters() -> dict[str, nn.Parameter]:
    """A matrix, a scalar, nothing, and a transposed (not contiguous) matrix."""
    matrix = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    return {
        "matrix": nn.Parameter(matrix.clone()),
        "scalar": nn.Parameter(torch.tensor(7.0, dtype=torch.float64)),
        "empty": nn.Parameter(torch.zeros(0, 4, dtype=torch.float64)),
        "transposed": nn.Parameter((10 + matrix).T),
    }


def test_flat_buffers_hold_the_parameters_in_order() -> None:
    parameters = make_parameters()
    layout = ParameterLayout.of(parameters)
    assert layout.numel == 13
    flat = layout.flatten(parameters, torch.float32)
    assert flat.dtype == torch.float32
    expected = [0, 1, 2, 3, 4, 5, 7, 10, 13, 11, 14, 12, 15]
    assert flat.tolist() == expected
    assert not flat.requires_grad


def test_views_are_the_buffer_itself() -> None:
    parameters = make_parameters()
    layout = ParameterLayout.of(parameters)
    flat = layout.flatten(parameters, torch.float64)
    views = layout.views(flat)
    assert list(views) == list(parameters)
    for name, view in views.items():
        assert torch.equal(view, parameters[name])
    views["transposed"].zero_()
    assert flat[7:].tolist() == [0] * 6
    flat[0] = 99
    assert views["matrix"][0, 0] == 99


def test_trainable_parameters_are_those_that_need_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    found = trainable_parameters(model)
    assert list(found) == ["0.bias", "1.weight", "1.bias"]
    assert found["1.weight"] is model[1].weight


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "one bit": lambda t: t | {"a": torch.nextafter(t["a"], t["a"] + 1)},
    "sign of zero": lambda t: t | {"b": -t["b"]},
    "name": lambda t: {"A": t["a"], "b": t["b"]},
    "shape": lambda t: t | {"a": t["a"].reshape(3, 2)},
    "dtype": lambda t: t | {"b": t["b"].view(torch.int32)},
    "one more": lambda t: t | {"c": torch.zeros(0)},
    "order": lambda t: {"b": t["b"], "a": t["a"]},
    "bits on the other side": lambda t: t | {"a": t["a"].roll(1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_sees_every_change(change: str) -> None:
    tensors = {
        "a": torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
        "b": torch.zeros(2),
    }
    before = fingerprint(tensors.items())
    assert before == fingerprint({n: t.clone() for n, t in tensors.items()}.items())
    assert fingerprint(CHANGES[change](tensors).items()) != before


def test_a_fingerprint_reads_every_layout_and_dtype() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    strided = matrix.T.contiguous().T
    assert fingerprint([("m", matrix)]) == fingerprint([("m", strided)])
    hashes = {
        fingerprint([("x", torch.ones((), dtype=dtype))])
        for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool)
    }
    assert len(hashes) == 4


def test_the_frozen_fingerprint_is_of_frozen_parameters_only() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    before = frozen_fingerprint(model)
    with torch.no_grad():
        model[1].weight += 1
    assert frozen_fingerprint(model) == before
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    assert frozen_fingerprint(model) != before


def frozen(tensor: Tensor) -> nn.Module:
    """A module that holds one frozen parameter."""
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


@pytest.mark.bits
def test_the_frozen_fingerprint_does_not_depend_on_threads_or_places() -> None:
    """As one process has two threads where the ranks of a launcher have one each."""
    numbers = torch.Generator().manual_seed(0)
    matrices = torch.randn(8, 1024, 2048, generator=numbers)
    models = [frozen(matrix) for matrix in matrices]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([frozen_fingerprint(model) for model in models])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert len(set(found[0])) == len(models)
    small = matrices.flatten()[:1000].clone()
    moved = placed(small.tolist(), 1, torch.float32)
    assert frozen_fingerprint(frozen(moved)) == frozen_fingerprint(frozen(small))


def swapped(x: Tensor) -> Tensor:
    x[[3, 40_000]] = x[[40_000, 3]]
    return x


def with_two_signs(x: Tensor) -> Tensor:
    x[[3, 40_000]] *= -1
    return x


def with_last_bit(x: Tensor) -> Tensor:
    bits = x.view(torch.int64 if x.element_size() == 8 else torch.int16)
    bits[-1] ^= 1
    return x


FROZEN_CHANGES = {
    "swapped": swapped,
    "two signs": with_two_signs,
    "last bit": with_last_bit,
    "swapped halves": lambda x: torch.cat(x.chunk(2)[::-1]),
    "shape": lambda x: x.view(2, -1),
    "one more": lambda x: torch.cat([x, torch.zeros(1, dtype=x.dtype)]),
    "not a number": lambda x: x.index_fill(0, torch.tensor(7), math.nan),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FROZEN_CHANGES)
def test_the_frozen_fingerprint_sees_every_change(
    name: str, dtype: torch.dtype
) -> None:
    """Also what leaves the sum of the values as it was."""
    values = (torch.arange(65_536) - 32_000).to(dtype)
    values[40_000] = -values[3]
    before = frozen_fingerprint(frozen(values))
    changed = FROZEN_CHANGES[name](values.clone())
    assert frozen_fingerprint(frozen(changed)) != before


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_preserved_tensors_get_every_bit_back(
    fails: bool, device: torch.device | None
) -> None:
    values = torch.tensor([1.5, -0.0, math.nan, -math.inf, 1e-310], dtype=torch.float64)
    tensors = [nn.Parameter(values.clone()), torch.tensor(3), values.float().clone()]
    before = fingerprint((str(i), t) for i, t in enumerate(tensors))
    identities = [(id(t), t.data_ptr()) for t in tensors]
    try:
        with preserved(iter(tensors), device) as copies:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.fill_(5)
            assert fingerprint((str(i), t) for i, t in enumerate(copies)) == before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert fingerprint((str(i), t) for i, t in enumerate(tensors)) == before
    assert [(id(t), t.data_ptr()) for t in tensors] == identities


def test_norm_and_product_accumulate_in_float64() -> None:
    """Squares of 1e-4 beside 1e4 vanish in float32 sums, and 3e4^2 in float16."""
    flat = torch.full((1 << 20,), 1e-4)
    flat[0] = 1e2
    exact = math.sqrt(float(flat.double().square().sum()))
    assert math.isclose(global_norm(flat), exact, rel_tol=NORM_RTOL)
    product = inner_product(flat, flat, block=1024)
    assert math.isclose(product, exact**2, rel_tol=NORM_RTOL)
    half = torch.full((4,), 3e4, dtype=torch.float16)
    assert global_norm(half) == 2 * float(half[0])
    assert inner_product(half, half) == 4 * float(half[0]) ** 2


def folded_product(left: list[float], right: list[float], block: int) -> float:
    """The sum in its order, number by number: lanes of a block, folded in halves."""
    width = 1
    while width < min(block, len(left)):
        width *= 2
    sums = [0.0] * width
    for place, (a, b) in enumerate(zip(left, right, strict=True)):
        sums[place % width] += a * b
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [low + high for low, high in zip(sums[:half], sums[half:])]
    return sums[0]


def placed(values: list[float], offset: int, dtype: torch.dtype) -> Tensor:
    """The values so many elements behind the beginning of a piece of memory."""
    memory = torch.empty(len(values) + offset, dtype=dtype)
    memory[offset:] = torch.tensor(values, dtype=dtype)
    return memory[offset:]


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block", [1, 64, 1 << 14])
def test_the_bits_of_a_product_depend_on_the_values_only(
    block: int, dtype: torch.dtype
) -> None:
    """Not on where they lie in memory, on threads, or on the instruction set."""
    numbers = random.Random(0)
    threads = torch.get_num_threads()
    for size in (0, 1, 2, 3, 5, 7, 8, 31, 33, 100, 255, 257, 1001, 40_000):
        if size > 1001 * block:
            continue
        pair = [[numbers.gauss(0, 1) for _ in range(size)] for _ in range(2)]
        stored = [torch.tensor(values, dtype=dtype).tolist() for values in pair]
        expected = folded_product(*stored, block)
        for offset in range(8) if size < 1000 else (0, 3):
            buffers = [placed(values, offset, dtype) for values in pair]
            assert inner_product(*buffers, block) == expected
        try:
            torch.set_num_threads(2)
            assert inner_product(*buffers, block) == expected
        finally:
            torch.set_num_threads(threads)
        exact = math.fsum(a * b for a, b in zip(*stored))
        scale = math.fsum(abs(a * b) for a, b in zip(*stored))
        # Of as many additions as a lane has, and of the folding.
        assert abs(expected - exact) <= (size / block + 20) * 2**-53 * scale


def test_a_product_is_of_buffers_of_one_size() -> None:
    with pytest.raises(ValueError, match="buffers of 1001 and 500 elements"):
        inner_product(torch.zeros(1001), torch.zeros(500))


def test_the_padding_token_has_a_gradient_where_it_is_read() -> None:
    """As forward mode has one; with values as before."""
    embedding = nn.Embedding(3, 2, padding_idx=1)
    embedding.weight.data.fill_(2.0)
    differentiate_padding_tokens(nn.Sequential(embedding))
    output = embedding(torch.tensor([1, 1, 2]))
    assert output.tolist() == [[2.0, 2.0]] * 3
    output.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.tolist() == [[0.0, 0.0], [2.0, 2.0], [1.0, 1.0]]
