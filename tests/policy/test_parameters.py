"""Are parameter vectors laid out, hashed and put back to the last bit?"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from entropy_ddp.policy.parameters import (
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
    product = inner_product(flat, flat, block=1000)
    assert math.isclose(product, exact**2, rel_tol=NORM_RTOL)
    half = torch.full((4,), 3e4, dtype=torch.float16)
    assert global_norm(half) == 2 * float(half[0])
    assert inner_product(half, half) == 4 * float(half[0]) ** 2


def test_product_does_not_depend_on_the_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 1001, generator=generator, dtype=torch.float64)
    expected = float(left @ right)
    for block in (1, 7, 1000, 1001, 5000):
        assert math.isclose(inner_product(left, right, block), expected, rel_tol=1e-12)
    assert inner_product(left[:0], right[:0]) == 0.0
    with pytest.raises(ValueError, match="zip"):
        inner_product(left, right[:500], 100)


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
