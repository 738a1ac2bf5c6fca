"""The parts of a step and of the gradient of E's entropy, by their written formulas."""

import hashlib
from dataclasses import dataclass

import reference as ref
import torch
from tiny_runs import TinyRun
from torch import Tensor

LEARNING_RATE = 0.02
Direction = dict[str, Tensor]


@dataclass(frozen=True)
class NaiveParts:
    """The change of the parameters as the written formula splits it, by name."""

    momentum: Direction
    decay: Direction
    gain: Direction
    """What multiplies a share of the gradient, with a minus sign."""

    def of_gradient(self, gradient: Direction) -> Direction:
        return {name: -gain * gradient[name] for name, gain in self.gain.items()}


def naive_parts(run: TinyRun, gradient: Direction, max_grad_norm: float) -> NaiveParts:
    """Momentum, decay, and eta kappa (1 - beta1) / (bc1 denom), by the formula."""
    clipped, _, kappa = ref.clip_gradients(gradient, max_grad_norm)
    parameters = ref.trainable(run.saved.model)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    momentum, decay, gain = {}, {}, {}
    for group in run.saved.optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            state = run.saved.optimizer.state[parameter]
            t = int(state["step"]) + 1
            second = beta2 * state["exp_avg_sq"] + (1 - beta2) * clipped[name] ** 2
            denominator = (second / (1 - beta2**t)).sqrt() + group["eps"]
            scale = LEARNING_RATE / ((1 - beta1**t) * denominator)
            momentum[name] = -scale * beta1 * state["exp_avg"]
            decay[name] = -LEARNING_RATE * group["weight_decay"] * parameter.detach()
            gain[name] = scale * kappa * (1 - beta1)
    return NaiveParts(momentum, decay, gain)


def effect_along(gradient: Direction, direction: Direction) -> float:
    return sum(float((gradient[n] * part).sum()) for n, part in direction.items())


def naive_blocks(rows: list[ref.Row], count: int) -> list[int]:
    """Block of each row: its group's place by the hash of its key, modulo the count."""
    keys = list(dict.fromkeys(row.group for row in rows))
    digest = {key: hashlib.sha256(repr(key).encode()).hexdigest() for key in keys}
    place = {key: i for i, key in enumerate(sorted(keys, key=digest.__getitem__))}
    return [place[row.group] % min(count, len(keys)) for row in rows]


def naive_block_gradients(run: TinyRun, count: int) -> list[Direction]:
    """What the rows of each block add to the gradient of the entropy per token.

    The mean entropy and the number of tokens are those of all rows.
    """
    parameters = ref.trainable(run.saved.model)
    scored = [ref.token_scores(run.saved.model, row, 1.0) for row in run.E]
    tokens = sum(len(row.response_ids) for row in run.E)
    mean = sum(float(entropy.detach().sum()) for _, entropy in scored) / tokens
    blocks = naive_blocks(run.E, count)
    totals = [torch.zeros((), dtype=torch.float64)] * (max(blocks) + 1)
    for block, (logp, entropy) in zip(blocks, scored, strict=True):
        weight = float(entropy.detach().sum()) - mean * len(entropy)
        totals[block] = totals[block] + weight * logp.sum() + entropy.sum()
    return [
        dict(
            zip(
                parameters,
                torch.autograd.grad(
                    total / tokens, list(parameters.values()), retain_graph=True
                ),
                strict=True,
            )
        )
        for total in totals
    ]
