"""Attribution: every token's exact share in the first-order change, and what if it were out.

Beside the passes of a probe it costs one backward pass over E (which the audit of forward
against reverse mode is part of) and one forward-mode pass over U, however large U is.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_ddp import audit
from entropy_ddp.config import Config
from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.shares import (
    TokenTable,
    concentration,
    judge_proxy,
    proxies,
    rules,
)
from entropy_ddp.estimators.standard_errors import relative_difference
from entropy_ddp.model.parameters import global_norm, inner_product
from entropy_ddp.model.response_tokens import (
    DirectionalScores,
    TokenScores,
    TokenWeights,
)
from entropy_ddp.probe.audits import Extras, audit_rows, tolerance_of
from entropy_ddp.probe.estimation import changes_at
from entropy_ddp.probe.measure import Measured, measure
from entropy_ddp.probe.outcome import make_results
from entropy_ddp.probe.phases import snapshot_device
from entropy_ddp.probe.session import Progress, Session, open_session
from entropy_ddp.probe.token_tables import summaries, token_rows, top_tokens
from entropy_ddp.probe.unfinished import Record
from entropy_ddp.results import AttributionResult, AuditRow, Probed, Rows
from entropy_ddp.update.decomposition import step_parts
from entropy_ddp.update.loss import loss_weights
from entropy_ddp.update.step import Step, one_step

# Of the largest term of the slope; the rounding of the stored weights is added.
GAP_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}


def run_attribution(
    config: Config, world: World, out: Path | None, progress: Progress
) -> Probed:
    """A probe without curvature, and the share of every token and sequence of U.

    Args:
        config: the run's configuration.
        world: the ranks.
        out: run directory, where sampled rollouts are kept; None keeps none.
        progress: told how far the current phase is.

    Raises:
        InputError: the configuration, the checkpoint or a batch is wrong.
        RunError: a number is not finite.
    """
    require_attributable(config)
    return attribute_session(open_session(config, world, out, progress, "attribute"))


def attribute_session(session: Session) -> Probed:
    """The attribution of what is open already; errors as of `run_attribution`."""
    require_attributable(session.config)
    measured = measure(session, "gradient", with_curvature=False)
    return attributed(
        session, measured, audit_rows(session, measured, Extras()), "attribute"
    )


def require_attributable(config: Config) -> None:
    """Check that the change can be attributed to U.

    Raises:
        InputError: it is not an optimizer's step, or control variates are to be removed.
    """
    require_plain_slope(config)
    if config.update.delta is not None:
        raise InputError(
            "update.delta: attribution is of the optimizer's step on U; a change that is "
            "given does not say what it was made of; leave update.delta out"
        )


def require_plain_slope(config: Config) -> None:
    """Check that the configured slope is a derivative along the update.

    Raises:
        InputError: control variates are to be removed from it.
    """
    if config.linear.control_variates:
        raise InputError(
            "linear.control_variates: attribution is of a slope without them (they are "
            "no derivative of the update); set it to false"
        )


def attributed(
    session: Session,
    measured: Measured,
    rows: list[AuditRow],
    command: str,
    **parts: Any,
) -> Probed:
    """The results of what was measured on all of E, with the attribution to U.

    Args:
        session: the run.
        measured: with the gradient of the entropy on all of E.
        rows: the audits.
        command: the job.
        parts: other parts of the results.
    """
    assert measured.gradient is not None
    size = measured.estimates.original.denominator
    slope = measured.duality.gradient / size
    split = split_step(session, measured.gradient, measured.step, slope)
    shard = session.shard(session.batches["U"])
    weights = loss_weights(shard, session.config.update, session.reference_logp)
    table = score_shares(session, weights, split.direction)
    # Used up: not to be held while the what-if steps are taken.
    split.direction.clear()
    shares = table.share.new_zeros(len(session.batches["U"]))
    shares.index_add_(0, table.sequence, table.share)
    result = _attribution_result(session, measured, split, table)
    rows = [*rows, _gap_row(session, measured, slope, result)]
    probed = make_results(
        session, measured, rows, command, shares=shares, attribution=result, **parts
    )
    tokens = Rows(lambda: token_rows(session, table))
    return replace(probed, tokens=tokens)


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
        session: the run.
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
        momentum += _dot(slopes[name], parts.momentum)
        decay += _dot(slopes[name], parts.decay)
        direction[name] = parts.gain.to(slopes[name]) * slopes[name]
    return SplitStep(momentum=momentum, decay=decay, direction=direction)


def _dot(slope: Tensor, part: Tensor) -> float:
    return inner_product(slope.reshape(-1), part.cpu().reshape(-1))


def score_shares(
    session: Session, weights: TokenWeights, direction: dict[str, Tensor]
) -> TokenTable:
    """Share, log p and entropy of every token of U, all ranks' in file order.

    Args:
        session: the run.
        weights: dL / d log p and dL / dH of every token of this rank's shard of U.
        direction: z, as `split_step` gives it.
    """
    batch = session.batches["U"]
    shard = session.shard(batch)

    def score() -> Record:
        with session.phase("shares: U along the gradient", shard.ragged.num_tokens):
            scores = session.passes.score(shard, direction, as_trained=True)
            return Record(tokens=scores.arrays())

    scores = DirectionalScores(**session.kept("shares", shard, score).tokens)
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


def _attribution_result(
    session: Session, measured: Measured, parts: SplitStep, table: TokenTable
) -> AttributionResult:
    gradient = float(table.share.sum())
    total = parts.momentum + parts.decay + gradient
    step, slope = measured.step, measured.slope
    scores = proxies(table)
    judged = {name: judge_proxy(score, table.share) for name, score in scores.items()}
    return AttributionResult(
        momentum=parts.momentum,
        weight_decay=parts.decay,
        gradient=gradient,
        total=total,
        attribution_gap=relative_difference(
            total, step.learning_rate * slope.value, _term_scale(measured)
        ),
        covariance=judged.pop("covariance"),
        proxies=judged,
        concentration=concentration(table.share),
        summaries=summaries(session, table),
        what_if=_what_if(session, measured, table, total),
        top_tokens=top_tokens(session, table),
    )


def _term_scale(measured: Measured) -> float:
    """The largest term of delta_h1, in nats."""
    terms = measured.slope.terms.values()
    return measured.step.learning_rate * max(map(abs, terms))


def _gap_row(
    session: Session, measured: Measured, gradient: Tensor, result: AttributionResult
) -> AuditRow:
    """Whether the parts add up, to rounding.

    delta_h1 is along the change of the weights as they are stored, every element of it
    off by up to half an ulp of its weight; the parts are not. That makes at most
    |grad H| |theta| eps / 2 nats.
    """
    weights = session.policy.parameters.values()
    size = math.hypot(*(global_norm(weight.detach()) for weight in weights))
    half_an_ulp = torch.finfo(session.policy.dtype).eps / 2
    scale = _term_scale(measured)
    rounding = global_norm(gradient) * size * half_an_ulp / scale if scale else 0.0
    return audit.close(
        "attribution gap",
        result.attribution_gap,
        tolerance_of(session, GAP_TOLERANCE) + rounding,
        "the parts of the step do not add up to it: the optimizer's update rule is not "
        "the one that is decomposed",
    )


def _what_if(
    session: Session, measured: Measured, table: TokenTable, total: float
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
            row |= _masked_truth(session, measured, ~mask, f"what-if-{number}")
        rows.append(row)
    return rows


def _masked_truth(
    session: Session, measured: Measured, keep: Tensor, name: str
) -> dict[str, float]:
    """Take the step on the kept tokens only, score E, undo; keep [T] of all of U."""
    evaluation = session.shard(session.batches["E"])
    record = session.kept(
        name,
        evaluation,
        lambda: Record(tokens=_score_after_masked_step(session, keep).arrays()),
    )
    scores = TokenScores(**record.tokens)
    truth = session.config.truth
    change = changes_at(session, measured.base, scores)[truth.is_mode]
    return {"delta_h_true": change.value, "se": change.se}


def _score_after_masked_step(session: Session, keep: Tensor) -> TokenScores:
    world, passes, config = session.world, session.passes, session.config
    assert session.optimizer is not None
    batch = session.batches["U"]
    shard = session.shard(batch)
    weights = _masked(
        loss_weights(shard, config.update, session.reference_logp),
        keep[token_places(batch, shard)],
    )
    evaluation = session.shard(session.batches["E"])
    num_tokens = shard.ragged.num_tokens + evaluation.ragged.num_tokens
    with session.phase("what if: masked step", num_tokens):
        gradient, _ = passes.gradient(
            shard, weights, session.buffer_dtype, as_trained=True
        )
        world.sum(gradient, "parameter buffers")
        with one_step(
            session.optimizer,
            session.policy.parameters,
            gradient,
            config.update,
            snapshot_device(config.compute),
        ):
            return passes.score(evaluation)


def _masked(weights: TokenWeights, keep: Tensor) -> TokenWeights:
    def masked(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        on_logp, on_entropy = weights(token, logp, entropy)
        return on_logp * keep[token.cpu()].to(on_logp), on_entropy

    return masked
