"""Attribution: every token's exact share in the first-order change, and what if it were out.

Beside the passes of a probe it costs one backward pass over E (which the audit of forward
against reverse mode is part of) and one forward-mode pass over U, however large U is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.estimators.entropy import EntropyChange
from entropy_ddp.estimators.shares import (
    TokenTable,
    concentration,
    covariance_score,
    judge_proxy,
    probability_deciles,
    proxies,
    rules,
    share_by,
)
from entropy_ddp.estimators.standard_errors import relative_difference
from entropy_ddp.model.parameters import inner_product
from entropy_ddp.model.response_tokens import TokenScores, TokenWeights
from entropy_ddp.probe.estimates import changes_at
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.passes import (
    score_along,
    step_taken,
    summed_gradient,
    update_weights,
)
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AttributionResult
from entropy_ddp.update.decomposition import step_parts
from entropy_ddp.update.step import Step

# Tokens shown on either side of a token in its context.
CONTEXT_TOKENS = 16


def attribute(session: Session, measured: Measurements) -> None:
    """Add to what was measured the share of every token of U in delta_h1.

    Args:
        measured: with the gradient of the entropy on all of E.
    """
    assert measured.gradient is not None
    step, slope = measured.step, measured.slope
    size = measured.estimates.original.denominator
    slope_gradient = measured.duality.gradient / size
    split = split_step(session, measured.gradient, step, slope_gradient)
    del slope_gradient
    table = score_shares(session, update_weights(session), split.direction)
    # Used up: not to be held while the what-if steps are taken.
    split.direction.clear()
    gradient = float(table.share.sum())
    total = split.momentum + split.decay + gradient
    scores = proxies(table)
    judged = {name: judge_proxy(score, table.share) for name, score in scores.items()}
    measured.token_table = table
    measured.attribution = AttributionResult(
        momentum=split.momentum,
        weight_decay=split.decay,
        gradient=gradient,
        total=total,
        attribution_gap=relative_difference(
            total, step.learning_rate * slope.value, largest_term(measured)
        ),
        covariance=judged.pop("covariance"),
        proxies=judged,
        concentration=concentration(table.share),
        summaries=summaries(session, table),
        what_if=_what_if(session, measured.base, table, total),
        top_tokens=top_tokens(session, table),
    )


def largest_term(measured: Measurements) -> float:
    """The largest term of delta_h1 by absolute value, in nats."""
    terms = measured.slope.terms.values()
    return measured.step.learning_rate * max(map(abs, terms))


def sequence_shares(session: Session, table: TokenTable) -> Tensor:
    """Share of each sequence of U, [N]: the sum of its tokens'."""
    shares = table.share.new_zeros(len(session.batches["U"]))
    return shares.index_add_(0, table.sequence, table.share)


@dataclass(frozen=True, kw_only=True)
class SplitStep:
    """The first-order change by part of the step.

    Attributes:
        momentum: <grad H, momentum part>, nats.
        decay: <grad H, weight-decay part>, nats.
        direction: z = gain * grad H by parameter name: the share of a gradient g_i in
            the change is -<z, g_i>.
    """

    momentum: float
    decay: float
    direction: dict[str, Tensor]


def split_step(
    session: Session, gradient: Tensor, step: Step, slope: Tensor
) -> SplitStep:
    """Momentum and decay parts of delta_h1, and the direction z of the gradient part.

    Args:
        gradient: gradient of the loss, summed over ranks, flat, [P].
        step: the step that was taken with it.
        slope: grad H, gradient of the entropy estimator on all of E, flat, [P].
    """
    assert session.optimizer is not None
    passes = session.passes
    slopes, direction = passes.layout.views(slope), {}
    momentum = decay = 0.0
    for name, parts in step_parts(
        session.optimizer, passes.parameters, gradient, step, session.config.update
    ):
        momentum += inner_product(slopes[name], parts.momentum.cpu())
        decay += inner_product(slopes[name], parts.decay.cpu())
        direction[name] = parts.gain.to(slopes[name]) * slopes[name]
    return SplitStep(momentum=momentum, decay=decay, direction=direction)


def score_shares(
    session: Session, weights: TokenWeights, direction: dict[str, Tensor]
) -> TokenTable:
    """Share, log p and entropy of every token of U, all ranks' in file order.

    Args:
        weights: dL / d log p and dL / dH of every token of this rank's shard of U.
        direction: z, as `split_step` gives it.
    """
    batch, shard = session.batches["U"], session.shard("U")
    name = "shares: U along the gradient"
    scores = score_along(session, shard, name, direction)
    tokens = torch.arange(shard.ragged.num_tokens)
    on_logp, on_entropy = weights(tokens, scores.logp, scores.entropy)
    share = -(on_logp * scores.dlogp + on_entropy * scores.dentropy)
    columns = [share, scores.logp, scores.entropy]
    rows = session.world.gather_rows(
        torch.stack(columns, dim=1), token_places(batch, shard), batch.num_tokens
    )
    share, logp, entropy = rows.unbind(1)
    ragged = batch.ragged
    return TokenTable(
        share=share,
        logp=logp,
        entropy=entropy,
        advantage=ragged.spread(_advantages(session)),
        sequence=ragged.sequence_of_token,
        position=ragged.position,
    )


def token_places(batch: Batch, shard: Shard) -> Tensor:
    """Places of this rank's tokens in the flat token arrays of the whole batch, [t]."""
    starts = batch.ragged.starts[shard.positions]
    return shard.ragged.spread(starts) + shard.ragged.position


def _advantages(session: Session) -> Tensor:
    """A_i of U, [N]; 1 for the loss that has none."""
    batch = session.batches["U"]
    if session.config.update.loss == "nll":
        return torch.ones(len(batch), dtype=torch.float64)
    return batch.advantages


def _what_if(
    session: Session, base: TokenScores, table: TokenTable, total: float
) -> list[dict[str, Any]]:
    """delta_h1 without the tokens that each rule chooses; with `verify`, the truth too."""
    settings = session.config.attribution
    rows = []
    chosen = rules(table, settings.fraction)
    for number, (rule, mask) in enumerate(chosen.items(), start=1):
        row: dict[str, Any] = {
            "rule": rule,
            "num_tokens": int(mask.sum()),
            "delta_h1": total - float(table.share[mask].sum()),
        }
        if settings.verify:
            change = _masked_truth(session, base, ~mask, f"what if {number}")
            row |= {"delta_h_true": change.value, "se": change.se}
        rows.append(row)
    return rows


def _masked_truth(
    session: Session, base: TokenScores, keep: Tensor, name: str
) -> EntropyChange:
    """Take the step on the kept tokens only, score E, undo; keep [T] of all of U."""
    passes, shard, evaluation = session.passes, session.shard("U"), session.shard("E")
    places = token_places(session.batches["U"], shard)
    weights = _masked(update_weights(session), keep[places])

    def score_after_masked_step() -> PassResult:
        gradient, _ = summed_gradient(session, passes, shard, weights, as_trained=True)
        with step_taken(session, gradient):
            return PassResult(tokens=passes.score(evaluation).arrays())

    found = session.pass_over(
        evaluation,
        "what if: masked step",
        score_after_masked_step,
        tokens=shard.ragged.num_tokens + evaluation.ragged.num_tokens,
        kept_as=name,
    )
    changes = changes_at(session, base, TokenScores(**found.tokens))
    return changes[session.config.truth.is_mode]


def _masked(weights: TokenWeights, keep: Tensor) -> TokenWeights:
    def masked(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        on_logp, on_entropy = weights(token, logp, entropy)
        return on_logp * keep[token.cpu()].to(on_logp), on_entropy

    return masked


def summaries(session: Session, table: TokenTable) -> dict[str, list[Any]]:
    """Shares by sign of advantage, probability, position, reward and pass rate."""
    batch, share = session.batches["U"], table.share
    sign = (table.advantage.sign() + 1).long()
    decile = probability_deciles(table.logp)
    edges = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    place = torch.bucketize(table.position + 1, edges, right=True) - 1
    positions = [
        f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        for low, high in pairwise(edges.tolist())
    ]
    found = {
        "advantage": share_by(["A < 0", "A = 0", "A > 0"], sign, share),
        "probability decile": share_by(
            [f"{10 * d}-{10 * d + 10} %" for d in range(10)], decile, share
        ),
        "position": share_by([*positions, f"{edges[-1]} on"], place, share),
    }
    rewards = [s.reward for s in batch.sequences]
    if all(reward is not None for reward in rewards):
        best = torch.tensor(rewards, dtype=torch.float64)
        passed = (best >= best.max()).double()
        rate = torch.zeros(batch.num_groups, dtype=torch.float64)
        rate.index_add_(0, batch.groups, passed)
        rate /= batch.group_sizes
        quarter = (rate * 4).long().clamp(max=3)[batch.groups]
        ragged = batch.ragged
        found["largest reward"] = share_by(
            ["not reached", "reached"], ragged.spread(passed.long()), share
        )
        found["pass rate of the group"] = share_by(
            ["0-25 %", "25-50 %", "50-75 %", "75-100 %"], ragged.spread(quarter), share
        )
    return found


def token_rows(session: Session, table: TokenTable) -> Iterator[dict[str, Any]]:
    """The rows of tokens.jsonl.gz, one by one: every token of U, k counted from 1."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    covariance = covariance_score(table.logp, table.advantage)
    columns = {
        "logp": table.logp,
        "entropy": table.entropy,
        "advantage": table.advantage,
        "covariance": covariance,
        "share": table.share,
    }
    for sequence, start in zip(batch.sequences, batch.ragged.starts.tolist()):
        here = slice(start, start + sequence.num_tokens)
        values = zip(*(column[here].tolist() for column in columns.values()))
        ids = sequence.response_ids.tolist()
        for k, (token_id, numbers) in enumerate(zip(ids, values), start=1):
            row = {"index": sequence.index, "k": k, "token_id": token_id}
            if tokenizer is not None:
                row["text"] = tokenizer.decode([token_id])
            yield row | dict(zip(columns, numbers))


def top_tokens(session: Session, table: TokenTable) -> list[dict[str, Any]]:
    """The tokens with the largest shares by absolute value, in their context."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    count = min(session.config.attribution.top, len(table.share))
    rows = []
    for place in table.share.abs().topk(count).indices.tolist():
        sequence = batch.sequences[int(table.sequence[place])]
        position = int(table.position[place])
        row: dict[str, Any] = {
            "index": sequence.index,
            "k": position + 1,
            "share": float(table.share[place]),
            "logp": float(table.logp[place]),
            "entropy": float(table.entropy[place]),
            "advantage": float(table.advantage[place]),
        }
        if tokenizer is not None:
            ids = sequence.response_ids.tolist()
            before = [*sequence.prompt_ids.tolist(), *ids[:position]][-CONTEXT_TOKENS:]
            after = ids[position + 1 : position + 1 + CONTEXT_TOKENS]
            pieces = (before, [ids[position]], after)
            row["context"] = [tokenizer.decode(piece) for piece in pieces]
        rows.append(row)
    return rows
