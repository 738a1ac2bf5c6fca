"""Forward-mode differentiation of any Hugging Face model along one direction.

Parameters are swapped for dual tensors by identity, over every module slot, so that
tied weights (an embedding used again as the output layer) carry their tangent wherever
they are used. A `TorchFunctionMode` supplies the product rules that stock forward mode
lacks or wastes work on:

- `linear`, `addmm`, `matmul`: one product per operand that has a tangent. The stock
  rule multiplies by a zero tangent for every frozen weight, a third of the cost.
- `mul`, `add`: the stock rules add tensors of zeros for operands without a tangent.
- `scaled_dot_product_attention`: no stock rule exists for the fused kernels.
- `grouped_mm`, the product of a mixture's experts: no stock rule exists.

Nothing is stored for a backward pass. While a pass lasts, the slots of these parameters
and the `forward` of root-mean-square normalisations (`normalisation`) are replaced in the
model's own modules; after it, also after one that fails, they are as before. No class is
changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from entropy_ddp.distributed.sharding import ShardedParameters
from entropy_ddp.model.normalisation import closed_form_normalisation

# Attention scores of one block of queries: a [batch, heads, length, length] tensor of a
# long context would otherwise dominate the memory of the pass.
ATTENTION_BLOCK_ELEMENTS = 1 << 25
# Queries of one block of causal attention, whose keys end where the block does: half of
# the square is never computed.
CAUSAL_BLOCK_ROWS = 64


@contextmanager
def dual_parameters(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    direction: Mapping[str, Tensor],
) -> Iterator["TangentRules"]:
    """Within the context, the model's forward pass carries tangents along a direction.

    Yields:
        The rules under which the model is to be called: a mode of its own, as every
        other operation within it would pay for being looked at.

    Args:
        parameters: the parameters that have a tangent, by name.
        direction: their tangents, by the same names; moved to each parameter's dtype
            and device.
    """
    with forward_ad.dual_level(), torch.no_grad():
        duals = {
            id(parameter): forward_ad.make_dual(
                parameter.detach(), direction[name].to(parameter)
            )
            for name, parameter in parameters.items()
        }
        slots = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in duals
        ]
        try:
            for module, name, parameter in slots:
                # Into the slot itself: nn.Module refuses a tensor that is no Parameter.
                module._parameters[name] = duals[id(parameter)]  # type: ignore[assignment]
            with closed_form_normalisation(model):
                yield TangentRules()
        finally:
            for module, name, parameter in slots:
                module._parameters[name] = parameter


@contextmanager
def dual_parts(
    model: nn.Module, layers: ShardedParameters, direction: Mapping[str, Tensor]
) -> Iterator["TangentRules"]:
    """The same for a model of which this rank has a part of every parameter.

    Args:
        layers: gather each layer's tangents beside its parameters.
        direction: this rank's parts of the tangents, by the parameters' names.
    """
    with (
        forward_ad.dual_level(),
        torch.no_grad(),
        layers.with_tangents(direction),
        # Recognised while their weights were whole.
        closed_form_normalisation(model, layers.normalisations),
    ):
        yield TangentRules()


def weight_norms(model: nn.Module) -> list[nn.Module]:
    """The layers of DoRA adapters, which treat the norm of a weight as a constant."""
    holders = (getattr(m, "lora_magnitude_vector", None) for m in model.modules())
    return [
        layer
        for holder in holders
        if isinstance(holder, nn.ModuleDict)
        for layer in holder.values()
    ]


@contextmanager
def undetached(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, forward passes of these layers detach nothing.

    What is detached is lost to both modes of differentiation alike, so that they agree
    with each other and not with the change of the layer's values.
    """
    with ExitStack() as hooks:
        for layer in layers:
            mode = _Undetached()

            def enter(*_: Any, mode: TorchFunctionMode = mode) -> None:
                mode.__enter__()

            def leave(*_: Any, mode: TorchFunctionMode = mode) -> None:
                mode.__exit__(None, None, None)

            hooks.enter_context(layer.register_forward_pre_hook(enter))
            hooks.enter_context(layer.register_forward_hook(leave, always_call=True))
        yield


class _Undetached(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def halves(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The two halves of a dual tensor; the tangent is None for a plain one."""
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, tangent


def _primal(tensor: Tensor) -> Tensor:
    return halves(tensor)[0]


class TangentRules(TorchFunctionMode):
    """Product rules for the functions that stock forward mode lacks or wastes work on."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func, func)
        return rule(*args, **(kwargs or {}))


def _sum_present(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


def _own(tangent: Tensor, primal: Tensor) -> Tensor:
    """A copy in the primal's shape: an operation in place would change both of two.

    And in its dtype: of a bfloat16 and a float32 operand the sum is float32, and so is
    the tangent of a sum.
    """
    wide = tangent.expand_as(primal)
    return wide.to(primal.dtype, copy=True, memory_format=torch.contiguous_format)


def _product_tangent(
    multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor
) -> Tensor | None:
    """a'b + ab', with a product only for the tangents that exist."""
    (a, a_tangent), (b, b_tangent) = halves(left), halves(right)
    return _sum_present(
        None if a_tangent is None else multiply(a_tangent, b),
        None if b_tangent is None else multiply(a, b_tangent),
    )


def _matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return torch.matmul(input, other, out=out)
    primal = torch.matmul(_primal(input), _primal(other))
    return _dual(primal, _product_tangent(torch.matmul, input, other))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias_primal, bias_tangent = (None, None) if bias is None else halves(bias)
    primal = F.linear(_primal(input), _primal(weight), bias_primal)
    tangent = _product_tangent(F.linear, input, weight)
    if tangent is None and bias_tangent is not None:
        return _dual(primal, _own(bias_tangent, primal))
    return _dual(primal, _sum_present(tangent, bias_tangent))


def _addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    if beta != 1 or alpha != 1 or out is not None:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha, out=out)
    return _linear(mat1, _transposed(mat2), input)


def _mul(stock: Callable[..., Tensor], input: Any, other: Any, **options: Any) -> Any:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or options:
        return stock(input, other, **options)
    (a, a_tangent), (b, b_tangent) = halves(input), halves(other)
    if a_tangent is None and b_tangent is None:
        return stock(input, other)
    if a_tangent is None or b_tangent is None:
        tangent = a * b_tangent if a_tangent is None else a_tangent * b
    else:
        # (a b)' = a' b + a b', the second product added without a temporary.
        tangent = (a_tangent * b).addcmul_(a, b_tangent)
    return forward_ad.make_dual(a * b, tangent)


def _add(stock: Callable[..., Tensor], input: Any, other: Any, **options: Any) -> Any:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)) or options:
        return stock(input, other, **options)
    (a, a_tangent), (b, b_tangent) = halves(input), halves(other)
    if a_tangent is None and b_tangent is None:
        return stock(input, other)
    primal = a + b
    if a_tangent is None or b_tangent is None:
        tangent = b_tangent if a_tangent is None else a_tangent
        return forward_ad.make_dual(primal, _own(tangent, primal))
    return forward_ad.make_dual(primal, a_tangent + b_tangent)


def _grouped_mm(
    multiply: Callable[..., Tensor],
    input: Tensor,
    mat2: Tensor,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Each expert's rows times its own matrix; bilinear like any product."""
    if bias is not None:
        raise RuntimeError("a grouped product with a bias has no tangent rule")
    multiply = partial(multiply, **options)
    primal = multiply(_primal(input), _primal(mat2))
    return _dual(primal, _product_tangent(multiply, input, mat2))


def _transposed(tensor: Tensor) -> Tensor:
    primal, tangent = halves(tensor)
    return _dual(primal.t(), None if tangent is None else tangent.t())


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention O = softmax(s Q K^T + M) V and its tangent.

    With S the scores, P = softmax(S): O' = P' V + P V', P' = P * (S' - sum(P * S')).
    """
    operands = [halves(x) for x in (query, key, value)]
    if all(tangent is None for _, tangent in operands):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    if dropout_p:
        raise RuntimeError(
            "attention dropout is active in a derivative pass: the model must be in "
            "evaluation mode"
        )
    # Grouped queries: several heads of queries share one of keys and values.
    repeats = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    q, k, v = (
        [half if half is None else _repeat_heads(half, n) for half in pair]
        for pair, n in zip(operands, (1, repeats, repeats))
    )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    primals, tangents = [], []
    for rows, keys in _attention_blocks(query, key.shape[-2], is_causal):
        mask = _attention_mask(attn_mask, is_causal, rows, keys, query)
        primal, tangent = _attention_block(
            _rows(q, rows), _rows(k, slice(keys)), _rows(v, slice(keys)), mask, scale
        )
        # A causal row sees itself.
        if not is_causal and mask is not None:
            _clear_unseeing_rows(mask, primal, tangent)
        primals.append(primal)
        tangents.append(tangent)
    return forward_ad.make_dual(torch.cat(primals, -2), torch.cat(tangents, -2))


def _attention_blocks(
    query: Tensor, num_keys: int, is_causal: bool
) -> Iterator[tuple[slice, int]]:
    """Blocks of query rows, and how many of the keys each of them can see."""
    rows, width = query.shape[-2:]
    per_row = query.numel() // (rows * width) * num_keys
    block = max(1, ATTENTION_BLOCK_ELEMENTS // per_row)
    # Causal from the start of the keys; a cache in front of them would not be.
    causal = is_causal and rows == num_keys
    if causal:
        block = min(block, CAUSAL_BLOCK_ROWS)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        yield slice(start, stop), stop if causal else num_keys


def _repeat_heads(tensor: Tensor, repeats: int) -> Tensor:
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=-3)


def _rows(pair: list[Tensor | None], rows: slice) -> list[Tensor | None]:
    return [half if half is None else half[..., rows, :] for half in pair]


def _attention_mask(
    mask: Tensor | None, is_causal: bool, rows: slice, keys: int, query: Tensor
) -> Tensor | None:
    """The additive or boolean mask of a block of queries and its keys."""
    if is_causal:
        row = torch.arange(rows.start, rows.stop, device=query.device)
        # [rows, keys]; absolute positions, as blocks begin later.
        return row[:, None] >= torch.arange(keys, device=query.device)
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask


def _clear_unseeing_rows(mask: Tensor, primal: Tensor, tangent: Tensor) -> None:
    """A query without any allowed key is all NaN after softmax; its output is zero."""
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    unseeing = ~allowed.any(-1, keepdim=True)
    if unseeing.any():
        for output in (primal, tangent):
            output.masked_fill_(unseeing.expand_as(output[..., :1]), 0.0)


def _attention_block(
    query: list[Tensor | None],
    key: list[Tensor | None],
    value: list[Tensor | None],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (q, dq), (k, dk), (v, dv) = query, key, value
    assert q is not None and k is not None and v is not None
    # [..., rows, keys]
    scores = (q * scale) @ k.mT
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    weights = scores.softmax(-1)
    dscores = _sum_present(
        None if dq is None else (dq * scale) @ k.mT,
        None if dk is None else (q * scale) @ dk.mT,
    )
    dweights = None
    if dscores is not None:
        dweights = weights * dscores
        # P' = P (S' - sum P S'): the derivative of softmax along S'.
        dweights -= weights * dweights.sum(-1, keepdim=True)
    tangent = _sum_present(
        None if dweights is None else dweights @ v,
        None if dv is None else weights @ dv,
    )
    return weights @ v, tangent


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.scaled_dot_product_attention: _attention,
}
for _rule, _names in ((_mul, ("mul", "__mul__")), (_add, ("add", "__add__"))):
    for _name in _names:
        for _home in (torch, Tensor):
            if _stock := getattr(_home, _name, None):
                _RULES[_stock] = partial(_rule, _stock)
# Under both of its names; not every version of torch has either.
for _module, _name in ((torch, "_grouped_mm"), (F, "grouped_mm")):
    if _function := getattr(_module, _name, None):
        _RULES[_function] = partial(_grouped_mm, _function)
