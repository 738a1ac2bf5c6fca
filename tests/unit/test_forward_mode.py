"""Are the tangent rules those of calculus, and is the model whole again afterwards?

Rules are compared with `torch.func.jvp` of the plain functions, for every subset of
operands that can carry a tangent. Attention has no stock rule: it is compared with a
written-out softmax, and its values with the fused function.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from entropy_ddp.model import forward_mode
from entropy_ddp.model.forward_mode import TangentRules, dual_parameters, halves

TOLERANCES = {"rtol": 1e-12, "atol": 1e-13}  # the same sums in another order

Operands = list[Tensor]
Tangents = list[Tensor | None]


def random(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Which operands carry a tangent; not none of them."""
    return (
        chosen
        for chosen in itertools.product((True, False), repeat=count)
        if any(chosen)
    )


def by_rules(
    function: Callable[..., Tensor], operands: Operands, tangents: Tangents
) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a function under the package's rules."""
    with forward_ad.dual_level():
        duals = [
            x if t is None else forward_ad.make_dual(x, t)
            for x, t in zip(operands, tangents, strict=True)
        ]
        with TangentRules():
            return halves(function(*duals))


def by_stock(
    function: Callable[..., Tensor], operands: Operands, tangents: Tangents
) -> tuple[Tensor, Tensor]:
    """Value and tangent by torch, with a zero tangent where there is none."""
    filled = [
        torch.zeros_like(x) if t is None else t
        for x, t in zip(operands, tangents, strict=True)
    ]
    return torch.func.jvp(function, tuple(operands), tuple(filled))


def assert_rule_is_right(
    function: Callable[..., Tensor],
    written_out: Callable[..., Tensor],
    operands: Operands,
) -> None:
    """For every subset of operands with a tangent."""
    for chosen in subsets(len(operands)):
        tangents = [
            random(x.shape, seed=50 + i) if has else None
            for i, (x, has) in enumerate(zip(operands, chosen, strict=True))
        ]
        actual = by_rules(function, operands, tangents)
        for found, expected in zip(
            actual, by_stock(written_out, operands, tangents), strict=True
        ):
            torch.testing.assert_close(found, expected, **TOLERANCES, msg=str(chosen))


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(3, 4), (5, 4), (5,)]),
    "linear, batched": (F.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear, one vector": (F.linear, [(4,), (5, 4), (5,)]),
    "linear, no bias": (F.linear, [(2, 3, 4), (5, 4)]),
    "addmm": (torch.addmm, [(5,), (3, 4), (4, 5)]),
    "addmm, full matrix": (torch.addmm, [(3, 5), (3, 4), (4, 5)]),
    "addmm, row": (torch.addmm, [(1, 5), (3, 4), (4, 5)]),
    "addmm, scaled": (
        lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=-2.0),
        [(5,), (3, 4), (4, 5)],
    ),
    "matmul": (torch.matmul, [(3, 4), (4, 5)]),
    "matmul, broadcast": (torch.matmul, [(2, 1, 3, 4), (3, 4, 5)]),
    "matmul, vectors": (torch.matmul, [(4,), (4,)]),
    "matmul, method": (lambda a, b: a.matmul(b), [(2, 3, 4), (4, 5)]),
    "matmul, operator": (lambda a, b: a @ b, [(2, 3, 4), (2, 4, 5)]),
}


SUMS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "mul": (torch.mul, [(3, 4), (3, 4)]),
    "mul, operator, broadcast": (lambda a, b: a * b, [(2, 3, 4), (3, 1)]),
    "mul, method, broadcast left": (lambda a, b: a.mul(b), [(4,), (2, 3, 4)]),
    "mul, number": (lambda a: 2.5 * a * 3, [(3, 4)]),
    "add": (torch.add, [(3, 4), (3, 4)]),
    "add, operator, broadcast": (lambda a, b: a + b, [(3, 4), (2, 1, 4)]),
    "add, scaled": (lambda a, b: torch.add(a, b, alpha=-2), [(3, 4), (4,)]),
    "add, number": (lambda a: 1.5 + a, [(3, 4)]),
    "in place after a sum": (lambda a, b: (a + b).mul_(2.0) * a, [(3, 4), (4,)]),
}
PRODUCTS |= SUMS


def test_a_sum_in_place_leaves_its_operands_tangent_alone() -> None:
    """Model code writes `hidden += residual`; hidden is another sum's result."""
    a, da, b = random((3, 4), 0), random((3, 4), 1), random((4,), 2)
    with forward_ad.dual_level(), TangentRules():
        left = forward_ad.make_dual(a, da.clone())
        total = left + b
        total += left
        total *= 3.0
        assert torch.equal(halves(left)[1], da)
        torch.testing.assert_close(halves(total)[1], 6 * da, **TOLERANCES)


@pytest.mark.parametrize("narrow_first", [True, False])
@pytest.mark.parametrize("operation", [torch.add, torch.mul])
def test_operands_of_two_dtypes(
    operation: Callable[..., Tensor], narrow_first: bool
) -> None:
    """The tangent of a float32 result is float32, whichever operand has one."""
    narrow, wide = random((4,), 0).bfloat16(), random((3, 4), 1).float()
    operands = [narrow, wide] if narrow_first else [wide, narrow]
    for chosen in subsets(2):
        tangents = [
            random(x.shape, 5).to(x) if has else None
            for x, has in zip(operands, chosen, strict=True)
        ]
        value, tangent = by_rules(operation, operands, tangents)
        assert tangent is not None
        assert value.dtype == tangent.dtype == torch.float32
        # A product with the narrow operand's tangent is of float32 numbers too.
        _, expected = by_stock(
            operation,
            [x.double() for x in operands],
            [t if t is None else t.double() for t in tangents],
        )
        torch.testing.assert_close(tangent, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    function, shapes = PRODUCTS[name]
    operands = [random(shape, seed) for seed, shape in enumerate(shapes)]
    assert_rule_is_right(function, function, operands)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_without_tangents_stay_plain(name: str) -> None:
    function, shapes = PRODUCTS[name]
    operands = [random(shape, seed) for seed, shape in enumerate(shapes)]
    value, tangent = by_rules(function, operands, [None] * len(operands))
    assert tangent is None
    torch.testing.assert_close(value, function(*operands), **TOLERANCES)


def test_the_same_operand_twice_counts_twice() -> None:
    x, dx = random((3, 3), 0), random((3, 3), 1)
    with forward_ad.dual_level(), TangentRules():
        dual = forward_ad.make_dual(x, dx)
        tangent = halves(dual @ dual)[1]
    torch.testing.assert_close(tangent, dx @ x + x @ dx, **TOLERANCES)


# Attention: query [2, 4, 5, 3], key [2, H, 6, 3] and value [2, H, 6, 7]

QUERIES, KEYS = 5, 6
BOOLEAN = random((QUERIES, KEYS), 20) > -0.5
BOOLEAN[0, 0] = True
WITH_EMPTY_ROW = BOOLEAN.clone()
WITH_EMPTY_ROW[2] = False
ADDED = random((QUERIES, KEYS), 21)

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": BOOLEAN},
    "boolean mask of keys": {"attn_mask": BOOLEAN[:1]},
    "boolean mask by row and head": {
        "attn_mask": torch.stack([BOOLEAN, ~BOOLEAN | WITH_EMPTY_ROW])[:, None]
    },
    "boolean mask with an empty row": {"attn_mask": WITH_EMPTY_ROW},
    "added mask": {"attn_mask": ADDED},
    "added mask of keys": {"attn_mask": ADDED[:1]},
    "added mask with infinities": {
        "attn_mask": ADDED.masked_fill(~BOOLEAN, -torch.inf)
    },
    "added mask with an empty row": {
        "attn_mask": ADDED.masked_fill(~WITH_EMPTY_ROW, -torch.inf)
    },
}


def written_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax over the allowed keys; zero where none is allowed."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        allowed = attn_mask > -torch.inf
        scores = scores + attn_mask.masked_fill(~allowed, 0.0)
    weights = scores.exp() * allowed
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total) @ value


def attention_operands(key_heads: int) -> Operands:
    shapes = ((2, 4, QUERIES, 3), (2, key_heads, KEYS, 3), (2, key_heads, KEYS, 7))
    return [random(shape, 30 + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("block", [1, 100, 1 << 25], ids=["rows", "blocks", "whole"])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, key_heads: int, block: int
) -> None:
    """Every subset of tangents, with blocks of one query row, two rows, all rows."""
    monkeypatch.setattr(forward_mode, "ATTENTION_BLOCK_ELEMENTS", block)
    options = ATTENTION[name] | {"enable_gqa": key_heads == 2}
    operands = attention_operands(key_heads)

    def fused(*operands: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*operands, **options)

    def written_out(*operands: Tensor) -> Tensor:
        return written_out_attention(*operands, **options)

    torch.testing.assert_close(fused(*operands), written_out(*operands), **TOLERANCES)
    assert_rule_is_right(fused, written_out, operands)


def test_attention_without_heads() -> None:
    operands = [random((QUERIES, 3), 0), random((KEYS, 3), 1), random((KEYS, 7), 2)]
    assert_rule_is_right(
        F.scaled_dot_product_attention, written_out_attention, operands
    )


def test_attention_without_tangents_is_the_fused_one() -> None:
    operands = attention_operands(4)

    def dropped(*operands: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*operands, dropout_p=1.0)

    value, tangent = by_rules(dropped, operands, [None] * 3)
    assert tangent is None
    assert (value == 0).all()


def test_attention_dropout_is_refused() -> None:
    operands = attention_operands(4)

    def dropped(*operands: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*operands, dropout_p=0.1)

    with pytest.raises(RuntimeError, match="evaluation mode"):
        by_rules(dropped, operands, [operands[0], None, None])


# Parameters


class Tied(nn.Module):
    """logits = W[x] W^T through a frozen layer: one weight in two slots."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, dtype=torch.float64)
        self.middle = nn.Linear(4, 4, dtype=torch.float64)
        self.output = nn.Linear(4, 7, bias=False, dtype=torch.float64)
        self.output.weight = self.embedding.weight
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random(parameter.shape, seed))

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.middle(self.embedding(ids)))


IDS = torch.tensor([3, 0, 6, 3])


def slots(model: nn.Module) -> list[tuple[int, str, int]]:
    """Identity of the tensor in every parameter slot."""
    return [
        (id(module), name, id(parameter))
        for module in model.modules()
        for name, parameter in module._parameters.items()
    ]


def test_a_tied_weight_has_its_tangent_in_both_places() -> None:
    model = Tied()
    W, dW = model.embedding.weight, random((7, 4), 9)
    A, b = model.middle.weight, model.middle.bias
    with dual_parameters(model, {"W": W}, {"W": dW}):
        value, tangent = halves(model(IDS))
    with torch.no_grad():
        expected = dW[IDS] @ A.T @ W.T + (W[IDS] @ A.T + b) @ dW.T
        torch.testing.assert_close(value, (W[IDS] @ A.T + b) @ W.T, **TOLERANCES)
        torch.testing.assert_close(tangent, expected, **TOLERANCES)
    assert not value.requires_grad


def test_only_the_given_parameters_have_a_tangent() -> None:
    model = Tied()
    b, db = model.middle.bias, random((4,), 9)
    with dual_parameters(model, {"b": b}, {"b": db}):
        assert halves(model.embedding(IDS))[1] is None
        tangent = halves(model(IDS))[1]
    expected = (db @ model.output.weight.T).expand(4, 7)
    torch.testing.assert_close(tangent, expected.detach(), **TOLERANCES)


def test_without_a_direction_there_is_no_tangent() -> None:
    model = Tied()
    with dual_parameters(model, {}, {}):
        value, tangent = halves(model(IDS))
    assert tangent is None
    torch.testing.assert_close(value, model(IDS).detach(), **TOLERANCES)


def test_a_direction_takes_the_parameters_dtype() -> None:
    model = Tied().float()
    W = model.output.weight
    with dual_parameters(model, {"W": W}, {"W": random((7, 4), 9)}):
        tangent = halves(model(IDS))[1]
    assert tangent is not None
    assert tangent.dtype == torch.float32


def test_slots_are_restored_after_success() -> None:
    model = Tied()
    before = slots(model)
    weight = model.output.weight
    with dual_parameters(model, {"W": weight}, {"W": random((7, 4), 9)}):
        assert slots(model) != before
        assert model.output.weight is model.embedding.weight
        assert model.output.weight is not weight
    assert slots(model) == before
    assert model.output.weight is weight
    assert halves(model(IDS).detach())[1] is None


def test_slots_are_restored_after_an_exception() -> None:
    model = Tied()
    before = slots(model)
    parameters = dict(model.named_parameters())
    direction = {name: torch.ones_like(p) for name, p in parameters.items()}
    with (
        pytest.raises(KeyboardInterrupt),
        dual_parameters(model, parameters, direction),
    ):
        model(IDS)
        raise KeyboardInterrupt
    assert slots(model) == before
    # The dual level is closed and the rules are off: another pass works as the first.
    with dual_parameters(model, parameters, direction):
        assert halves(model(IDS))[1] is not None
    assert slots(model) == before


def test_slots_are_untouched_when_a_direction_is_missing() -> None:
    model = Tied()
    before = slots(model)
    parameters = dict(model.named_parameters())
    with pytest.raises(KeyError), dual_parameters(model, parameters, {}):
        pass
    assert slots(model) == before
