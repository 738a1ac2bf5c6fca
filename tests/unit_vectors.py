"""Every unit's gradient by plain autograd, on the full logits, one sequence at a time.

What probes of a tiny run are compared with: X_u of E's groups, and of U's groups the
gradient of the reward, of the share of the loss, and what AdamW makes of either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import reference as ref
import torch
from reference import LossSettings, Row
from tiny_runs import TinyRun
from torch import Tensor

DOUBLE = torch.float64


@dataclass(frozen=True, kw_only=True, eq=False)
class Vectors:
    """All gradients of a run by plain autograd, in the model's order of parameters."""

    run: TinyRun
    update: dict[str, Any]

    @property
    def loss(self) -> LossSettings:
        names = ("loss", "length_norm", "ratio")
        return LossSettings(**{n: self.update[n] for n in names if n in self.update})

    def flat(self, value: Tensor) -> Tensor:
        """Gradient of a scalar, [P]."""
        parameters = ref.trainable(self.run.saved.model).values()
        if not value.requires_grad:
            return torch.zeros(sum(p.numel() for p in parameters), dtype=DOUBLE)
        with ref.true_float64():
            gradients = torch.autograd.grad(
                value, list(parameters), materialize_grads=True
            )
        return torch.cat([gradient.flatten() for gradient in gradients])

    def of_sequences(self, rows: Sequence[Row]) -> tuple[list[float], list[Tensor]]:
        """S and grad S of every row."""
        values, gradients = [], []
        for row in rows:
            logp, _ = ref.token_scores(self.run.saved.model, row, 1.0)
            values.append(math.fsum(logp.tolist()))
            gradients.append(self.flat(logp.sum()))
        return values, gradients

    def x(self, weighting: str) -> Tensor:
        """X_u of E's groups, [B_E, P]."""
        values, gradients = self.of_sequences(self.run.E)
        units = []
        for places in members(self.run.E):
            lengths = [len(self.run.E[i].response_ids) for i in places]
            divisors = [max(*lengths, 1)] * len(places)
            if weighting == "per_token_avg":
                divisors = [max(length, 1) for length in lengths]
            weighted = [values[i] / d for i, d in zip(places, divisors, strict=True)]
            unit = torch.zeros_like(gradients[0])
            for i, own in zip(places, weighted, strict=True):
                others = (math.fsum(weighted) - own) / (len(places) - 1)
                unit -= (own - others) * gradients[i] / len(places)
            units.append(unit)
        return torch.stack(units)

    def reward(self) -> Tensor:
        """grad J_u of U's groups, [B_U, P]."""
        rows = self.run.U
        _, gradients = self.of_sequences(rows)
        advantages = [1.0] * len(rows)
        if self.loss.loss != "nll":
            advantages = ref.advantages(rows, "centered")
        units = []
        for places in members(rows):
            longest = max(len(rows[i].response_ids) for i in places)
            terms = [advantages[i] / longest * gradients[i] for i in places]
            units.append(sum(terms) / len(places))
        return torch.stack(units)

    def loss_shares(self) -> Tensor:
        """B_U times the gradient of each group's share of the loss, [B_U, P]."""
        rows, settings = self.run.U, self.loss
        advantages = [1.0] * len(rows)
        if settings.loss == "nll":
            settings = replace(settings, loss="dapo")  # which it is, for A = 1
        else:
            advantages = ref.advantages(rows, "centered")
        units = []
        for places in members(rows):
            alone = [a if i in places else 0.0 for i, a in enumerate(advantages)]
            value = ref.rl_loss(self.run.saved.model, rows, alone, settings)
            units.append(len(members(rows)) * self.flat(value))
        return torch.stack(units)

    def adam(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """eta, first and second moment, and parameters of every element, [P] each."""
        pieces: dict[str, tuple[Tensor, ...]] = {}
        parameters = ref.trainable(self.run.saved.model)
        names = {id(p): name for name, p in parameters.items()}
        for group in self.run.saved.optimizer.param_groups:
            assert group["betas"] == (0.9, 0.99) and group["eps"] == 1e-8
            rate = self.update.get("lr_override", group["lr"])
            for p in group["params"]:
                state = self.run.saved.optimizer.state[p]
                assert float(state["step"]) == 3
                moments = (state["exp_avg"], state["exp_avg_sq"])
                pieces[names[id(p)]] = (torch.full_like(p, rate), *moments, p)
        columns = zip(*(pieces[name] for name in parameters), strict=True)
        rate, first, second, theta = (
            torch.cat([piece.detach().flatten() for piece in column])
            for column in columns
        )
        return rate, first, second, theta

    def y(self, direction: str, clip_coef: float) -> Tensor:
        """Y_u of U's groups, [B_U, P]."""
        rate, _, second, _ = self.adam()
        if direction == "preconditioned":
            return self.reward() / ((second / (1 - 0.99**3)).sqrt() + 1e-8)
        shares = self.loss_shares()
        clipped = clip_coef * shares.mean(0)
        moment = 0.99 * second + 0.01 * clipped.square()
        denominator = (moment / (1 - 0.99**4)).sqrt() + 1e-8
        return -rate * clip_coef * 0.1 * shares / ((1 - 0.9**4) * denominator)


def members(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows of each group, groups in order of appearance."""
    groups = dict.fromkeys(row.group for row in rows)
    return [[i for i, row in enumerate(rows) if row.group == g] for g in groups]
