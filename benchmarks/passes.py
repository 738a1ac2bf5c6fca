"""Rows about the passes: score, its derivatives, and pull_back."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Comparison, Setting, Timings, time_in_turns
from benchmarks.models import (
    FAMILIES,
    MIDDLE,
    QWEN_05B,
    TINY,
    Lengths,
    Shape,
    make_direction,
    make_model,
    make_passes,
    make_shard,
)
from entropy_ddp.data.batch import Shard
from entropy_ddp.data.microbatch import make_microbatches
from entropy_ddp.model.parameters import shifted
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.model.scoring import Passes

# The families whose layers have tangent rules of their own.
FAST_FAMILIES = ("qwen2", "llama")
SEQUENCES = Lengths(groups=4, prompt=96, response=48, shortest=32)


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Largest difference of two token arrays, relative to the larger of 1 and value."""
    first, second = first.detach().double().cpu(), second.detach().double().cpu()
    scale = second.abs().clamp(min=1.0)
    return float(((first - second) / scale).abs().max())


def scores_difference(pair: tuple[TokenScores, TokenScores]) -> float:
    """The same of log p and H of two scoring passes."""
    first, second = pair
    return max(
        relative_difference(first.logp, second.logp),
        relative_difference(first.entropy, second.entropy),
    )


def middle(setting: Setting) -> tuple[Shape, Lengths]:
    """A model and a batch that take about a second."""
    shape = setting.pick(TINY, MIDDLE, replace(MIDDLE, hidden=768, layers=8))
    lengths = setting.pick(
        Lengths(groups=3, prompt=5, response=6, shortest=2),
        SEQUENCES,
        SEQUENCES.with_groups(16),
    )
    return shape, lengths


def make_case(family: str, setting: Setting) -> tuple[Passes, Shard, dict[str, Any]]:
    """Passes over a middle-sized model, a batch for them, and what to write of both."""
    shape, lengths = middle(setting)
    passes = make_passes(make_model(family, shape, device=setting.device))
    details = {"family": family, "model": asdict(shape), "batch": asdict(lengths)}
    return passes, make_shard(lengths, shape.vocabulary), details


def all_ones(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of sum(log p + H)."""
    return torch.ones_like(logp), torch.ones_like(entropy)


def score_row(setting: Setting) -> Iterator[Comparison]:
    """score with a vocabulary of 32,000 / the forward pass below the output layer."""
    shape = setting.pick(TINY, *[replace(QWEN_05B, vocabulary=32_000)] * 2)
    lengths = setting.pick(
        Lengths(groups=2, prompt=5, response=4),
        Lengths(groups=2, prompt=128, response=64),
        Lengths(groups=8, prompt=128, response=64),
    )
    passes = make_passes(make_model("qwen2", shape, device=setting.device))
    shard = make_shard(lengths, shape.vocabulary)
    tokens, budget = passes.tokens, passes.tokens.settings.tokens_per_microbatch

    @torch.no_grad()
    def body() -> list[tuple[Tensor, Tensor, Tensor]]:
        microbatches = (m.to(passes.device) for m in make_microbatches(shard, budget))
        return [(m.token, m.target_ids, tokens.hidden_states(m)) for m in microbatches]

    timings = time_in_turns(lambda: passes.score(shard), body, setting)
    scores, states = timings.results
    yield timings.comparison(
        "score, vocabulary 32,000",
        "score / body forward",
        target=1.10,
        difference=max(_head_difference(tokens, scores, *state) for state in states),
        details={"model": asdict(shape), "batch": asdict(lengths)},
    )


@torch.no_grad()
def _head_difference(
    tokens: Any, scores: TokenScores, token: Tensor, targets: Tensor, hidden: Tensor
) -> float:
    """What `score` gave of tokens against log_softmax of their hidden states' logits."""
    logs = tokens.output_layer(hidden).double().log_softmax(-1)
    logp = logs.gather(-1, targets[:, None])[:, 0]
    return max(
        relative_difference(scores.logp[token], logp),
        relative_difference(scores.entropy[token], -(logs.exp() * logs).sum(-1)),
    )


def first_order_row(setting: Setting) -> Iterator[Comparison]:
    """score with first derivatives / score, for every family."""
    return (_first_order(family, setting) for family in FAMILIES)


def _first_order(family: str, setting: Setting) -> Comparison:
    passes, shard, details = make_case(family, setting)
    direction = make_direction(passes)
    timings = time_in_turns(
        lambda: passes.score(shard, direction), lambda: passes.score(shard), setting
    )
    return timings.comparison(
        f"order 1, {family}",
        "order 1 / score",
        target=2.3 if family in FAST_FAMILIES else 2.8,
        difference=scores_difference(timings.results),
        details=details,
    )


def difference_step(passes: Passes, shard: Shard) -> float:
    """How far apart the passes of a second derivative along `make_direction` are."""
    direction = make_direction(passes)
    scores = passes.score(shard, direction)
    typical = float(scores.dlogp.square().mean().sqrt())
    return passes.difference_step(direction, typical)


def second_order_row(setting: Setting) -> Iterator[Comparison]:
    """score with second derivatives / score, and their error by dtype."""
    passes, shard, details = make_case("qwen2", setting)
    direction = make_direction(passes)
    step = difference_step(passes, shard)
    timings = time_in_turns(
        lambda: torch.stack(passes.score_twice(shard, direction, step)),
        lambda: passes.score(shard),
        setting,
    )
    yield timings.comparison(
        "order 2, qwen2", "order 2 / score", target=5.0, details=details
    )
    wide, wide_direction = _widened(passes, direction)
    reference = _richardson(wide, shard, wide_direction)
    found = {
        torch.float32: timings.results[0],
        torch.float64: torch.stack(
            wide.score_twice(shard, wide_direction, difference_step(wide, shard))
        ),
    }
    for dtype, target in ((torch.float32, 2e-4), (torch.float64, 1e-7)):
        error = (found[dtype] - reference).norm() / reference.norm()
        yield Comparison(
            part=f"order 2, error, {str(dtype).removeprefix('torch.')}",
            over="error against float64 / size",
            values=[float(error)],
            target=target,
            details=details,
        )


def _widened(
    passes: Passes, direction: dict[str, Tensor]
) -> tuple[Passes, dict[str, Tensor]]:
    """The same model and direction in float64; the model's own parameters change."""
    wide = make_passes(passes.tokens.causal_lm.double())
    return wide, {name: tangent.double() for name, tangent in direction.items()}


def _richardson(passes: Passes, shard: Shard, direction: dict[str, Tensor]) -> Tensor:
    """Second derivatives to the fourth order of their step, in float64.

    The step is as long as the float64 errors of the first derivatives allow: errors
    of both kinds are then below 1e-9.
    """

    def difference(step: float) -> Tensor:
        ends = []
        for sign in (step, -step):
            with shifted(passes.parameters, direction, sign):
                scores = passes.score(shard, direction)
            first = (scores.dlogp, scores.dentropy)
            ends.append(torch.stack([shard.ragged.sum(values) for values in first]))
        return (ends[0] - ends[1]) / (2 * step)

    return (4 * difference(2e-3) - difference(4e-3)) / 3


def pull_back_row(setting: Setting) -> Iterator[Comparison]:
    """pull_back / score."""
    return (_pull_back(family, setting) for family in FAST_FAMILIES)


def _pull_back(family: str, setting: Setting) -> Comparison:
    passes, shard, details = make_case(family, setting)
    timings = time_in_turns(
        lambda: pulled_back(passes, shard), lambda: passes.score(shard), setting
    )
    return timings.comparison(
        f"pull_back, {family}",
        "pull_back / score",
        target=2.3,
        difference=scores_difference(timings.results),
        details=details,
    )


def pulled_back(passes: Passes, shard: Shard) -> TokenScores:
    """One backward pass into a flat buffer; the log p and H on its way."""
    return passes.gradient(shard, all_ones, torch.float32)[1]


def attribution_row(setting: Setting) -> Iterator[Comparison]:
    """All shares of U / one score of E and of U, for two sizes of U."""
    passes, evaluation, details = make_case("qwen2", setting)
    shape, lengths = middle(setting)
    for groups in (lengths.groups // 2, 2 * lengths.groups):
        update = make_shard(lengths.with_groups(groups), shape.vocabulary, seed=4)
        timings = _attribution(passes, evaluation, update, setting)
        pairs = zip(*timings.results, strict=True)
        yield timings.comparison(
            f"attribution, |E| = {lengths.groups}, |U| = {groups}",
            "pull_back E, order 1 U / score E, score U",
            target=2.4,
            difference=max(map(scores_difference, pairs)),
            details=details,
        )


def _attribution(
    passes: Passes, evaluation: Shard, update: Shard, setting: Setting
) -> Timings:
    def attribute() -> tuple[TokenScores, TokenScores]:
        flat, scores = passes.gradient(evaluation, all_ones, torch.float32)
        return scores, passes.score(update, passes.layout.views(flat))

    return time_in_turns(
        attribute, lambda: (passes.score(evaluation), passes.score(update)), setting
    )
