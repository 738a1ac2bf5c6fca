"""The audits of a probe: facts from every rank, turned into rows with a verdict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp import audit
from entropy_ddp.data.microbatch import plan_microbatches
from entropy_ddp.model.parameters import (
    ParameterLayout,
    global_norm,
    inner_product,
)
from entropy_ddp.probe.batch_audits import (
    batch_rows,
    on_policy_row,
    own_rollouts_rows,
    sampler_rows,
    text_rows,
    update_batch_rows,
)
from entropy_ddp.probe.gradient_dot import obstacle
from entropy_ddp.probe.measure import Measured
from entropy_ddp.probe.model_audits import (
    moment_rows,
    state_rows,
    stored_rows,
    training_rows,
)
from entropy_ddp.probe.session import Session
from entropy_ddp.probe.trainer_audits import trainer_rows
from entropy_ddp.results import AuditRow, GradientDotResult
from entropy_ddp.update.step import Step, learning_rate_of

# Of the term scale: the largest of the sums whose difference is the slope.
GAP_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What only some jobs find out; None where it was not asked for.

    Attributes:
        ratios: change and prediction at lr over those at lr / 10.
        signal: norm of the gradient of mean log p.
        dot: the gradient-dot form.
    """

    ratios: tuple[float, float] | None = None
    signal: float | None = None
    dot: GradientDotResult | None = None


def audit_rows(session: Session, measured: Measured, extras: Extras) -> list[AuditRow]:
    """All audits of a probe."""
    rows = [
        *stored_rows(session),
        *_vector_rows(session, measured),
        *_step_rows(session, measured),
        *update_batch_rows(session),
        *training_rows(session),
        *trainer_rows(session, measured.step),
        *own_rollouts_rows(session),
        *batch_rows(session),
        *moment_rows(session),
        *_scale_rows(session, measured),
        *text_rows(session, measured),
        *sampler_rows(session, measured),
        on_policy_row(session, measured),
        audit.close(
            "duality gap",
            measured.duality.gap,
            tolerance_of(session, GAP_TOLERANCE),
            "forward and reverse mode disagree: an operation of this model loses or "
            "detaches a derivative; try compute.attention: eager",
        ),
        *_routing_rows(session, measured),
        *_truth_rows(session, measured),
        *state_rows(session, measured.stepped),
        *_communication_rows(session),
    ]
    if session.config.gradient_dot.enabled == "auto":
        rows += _gradient_dot_row(session)
    if extras.dot is not None:
        rows += [
            audit.fact("U_cross, ten decimals", f"{extras.dot.u_cross:.10f}"),
            audit.fact("U_cross, ten digits", f"{extras.dot.u_cross:.10e}"),
            audit.fact("deltaH1 of the gradient-dot form", extras.dot.deltaH1),
        ]
    if extras.ratios is not None:
        rows += audit.proportionality_checks(extras.ratios)
    if extras.signal is not None:
        rows.append(audit.signal_check(extras.signal))
    return rows


def tolerance_of(session: Session, tolerances: Mapping[torch.dtype, float]) -> float:
    """The tolerance of the narrower of the dtypes of model and parameter buffers."""
    return max(tolerances[d] for d in (session.policy.dtype, session.buffer_dtype))


def _gradient_dot_row(session: Session) -> list[AuditRow]:
    """Why the gradient-dot form was not computed, where it was not."""
    reason = obstacle(session.batches, session.planned)
    return [] if reason is None else [audit.fact("gradient-dot form", "no", reason)]


def _vector_rows(session: Session, measured: Measured) -> list[AuditRow]:
    gradient, duality, step = measured.gradient, measured.duality, measured.step
    layout = session.passes.layout
    total = len(layout.shapes)
    norm, norm_of_v = global_norm(duality.gradient), step.direction_norm
    dot = inner_product(duality.gradient, step.delta) / step.learning_rate
    cosine = dot / (norm * norm_of_v) if norm * norm_of_v else 0.0
    products = {
        name: inner_product(x.reshape(-1), delta.reshape(-1))
        / (step.learning_rate * duality.denominator)
        for (name, x), delta in zip(
            layout.views(duality.gradient).items(), layout.views(step.delta).values()
        )
    }
    largest = sorted(products, key=lambda name: -abs(products[name]))[:10]
    return [
        audit.check(
            "trainable tensors",
            total,
            "> 0",
            total > 0,
            "nothing is trainable: is the adapter loaded?",
        ),
        audit.fact("trainable elements", layout.numel),
        audit.coverage_check(
            "gradient coverage: entropy (X)",
            _num_nonzero(layout, duality.gradient),
            total,
        ),
        *_loss_gradient_rows(session, gradient),
        audit.fact("sequences in audits with a pass", duality.num_sequences),
        audit.fact("norm of the entropy gradient", norm / duality.denominator),
        audit.fact("norm of v", norm_of_v),
        audit.fact("cosine of entropy gradient and v", cosine),
        audit.fact(
            "entropy gradient . v, first three parameters",
            {name: products[name] for name in list(products)[:3]},
        ),
        audit.fact(
            "entropy gradient . v, ten largest",
            {name: products[name] for name in largest},
        ),
    ]


def _loss_gradient_rows(session: Session, gradient: Tensor | None) -> list[AuditRow]:
    """Coverage and norm of the loss's gradient; none where a change was given."""
    if gradient is None:
        return []
    layout = session.passes.layout
    return [
        audit.coverage_check(
            "gradient coverage: loss (Y)",
            _num_nonzero(layout, gradient),
            len(layout.shapes),
            has_signal=_has_signal(session),
        ),
        audit.fact("norm of the loss gradient", global_norm(gradient)),
    ]


def _num_nonzero(layout: ParameterLayout, flat: Tensor) -> int:
    """Number of parameters with an element that is not zero."""
    return sum(bool(view.any()) for view in layout.views(flat).values())


def _has_signal(session: Session) -> bool:
    """Whether any advantage of U is not zero."""
    no_advantages = session.config.update.loss == "nll"
    return no_advantages or bool(session.batches["U"].advantages.any())


def _rms_without_decay(session: Session, step: Step) -> float:
    """Root mean square of the parameter change, its weight-decay part left out."""
    assert session.optimizer is not None
    update, layout = session.config.update, session.passes.layout
    # Adam's coupled decay goes through the moments: it has no part of its own.
    decay = {
        id(parameter): learning_rate_of(group, update)
        * (group["weight_decay"] if group["decoupled_weight_decay"] else 0.0)
        for group in session.optimizer.param_groups
        for parameter in group["params"]
    }
    total = 0.0
    for name, view in layout.views(step.delta).items():
        parameter = session.policy.parameters[name]
        rest = view + decay[id(parameter)] * parameter.detach().to(view)
        total += inner_product(rest.reshape(-1), rest.reshape(-1))
    return math.sqrt(total / layout.numel)


def _step_rows(session: Session, measured: Measured) -> list[AuditRow]:
    step = measured.step
    change = step.learning_rate * measured.slope.value
    if session.change is not None:
        return [
            audit.fact("optimizer steps", 0, "0: update.delta gives the change"),
            *_size_rows(step),
        ]
    return [
        audit.fact("learning rate", step.learning_rate),
        audit.fact("delta_h1, ten decimals", f"{change:.10f}"),
        audit.fact("delta_h1, ten digits", f"{change:.10e}"),
        audit.check(
            "optimizer steps",
            step.num_optimizer_steps,
            "1",
            step.num_optimizer_steps == 1,
            "the optimizer stepped more than once",
        ),
        *_size_rows(step),
        audit.step_size_check(_rms_without_decay(session, step) / step.learning_rate),
    ]


def _size_rows(step: Step) -> list[AuditRow]:
    """Whether the change is one, and survives rounding."""
    return [
        audit.check(
            "norm of the parameter change",
            global_norm(step.delta),
            "> 0",
            bool(step.delta.any()),
            "the step changed nothing: gradient, momentum and weight decay are all "
            "zero, or the learning rate is below the rounding of the weights (then use "
            "precision.model: float64); a given change may be of the same weights",
        ),
        audit.unchanged_check(1 - int(step.delta.count_nonzero()) / len(step.delta)),
    ]


def _scale_rows(session: Session, measured: Measured) -> list[AuditRow]:
    world, batch, base = session.world, session.batches["E"], measured.base
    size = measured.estimates.original.denominator
    counts = (base.num_microbatches, base.num_extra_microbatches)
    ranks, budget, fill = measured.cut
    sharing = session.passes.sharing
    # Those of a pass that other ranks may have run, each planned by one of these.
    planned = sum(
        len(plan_microbatches(block.shard, budget, sharing, fill=fill))
        for rank in range(world.rank, ranks, world.world_size)
        for block in batch.shard(rank, ranks).blocks()
    )
    numbers = [*counts, planned, int(base.logp.isfinite().sum())]
    local = torch.tensor(numbers, dtype=torch.float64)
    run, extra, expected, used = world.sum(local, "scalars").tolist()
    tokens = int(used), batch.num_tokens
    return audit.scale_checks(run / size, (expected + extra) / size, tokens)


def _routing_rows(session: Session, measured: Measured) -> list[AuditRow]:
    """Tokens of E that the step sends to other experts, of mixtures."""
    if not session.passes.tokens.routes:
        return []
    before, after = measured.base.routing, measured.stepped.scores.routing
    flips = torch.zeros(1, dtype=torch.float64)
    # A rank without tokens has neither.
    if before is not None and after is not None:
        flips += (before != after).sum()
    flipped = float(session.world.sum(flips, "scalars"))
    return [
        audit.check(
            "tokens of E that the step routes to other experts",
            flipped / session.batches["E"].num_tokens,
            "0",
            flipped == 0,
            "the truth contains the jumps of their routing, which no derivative sees; "
            "the prediction holds between jumps",
            fatal=False,
        )
    ]


def _truth_rows(session: Session, measured: Measured) -> list[AuditRow]:
    truth, change = session.config.truth, measured.change
    eta = measured.step.learning_rate
    return [
        *audit.ess_checks(change.ess_fraction, truth.ess_warn, truth.ess_abort),
        audit.noise_check(
            measured.noise_floor,
            (change.value, change.se),
            session.config.precision.model,
        ),
        *audit.linearity_checks(
            (eta, measured.eta_star),
            change.value - eta * measured.slope.value,
            change.se,
            measured.noise_floor,
        ),
    ]


def _communication_rows(session: Session) -> list[AuditRow]:
    return [
        audit.fact(f"collectives: {purpose}", f"{number}, {size} bytes")
        for purpose, (number, size) in session.world.collectives.items()
    ]
