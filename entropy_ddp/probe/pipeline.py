"""What a run does, pass by pass: read this first.

`probe`, `sweep`, `attribute` and `audit` are one pipeline; a plan says which parts a job
has. In forwards over the batch, one pass costs

    gradient of U               3           forward and backward
    truth: E after the step     1
    slope: E along the step     2.2         forward mode
    second order                2.2         forward mode in the middle of the step; by
                                            second derivatives 4.4
    reverse mode                3           on a sample of E, or on all of it
    noise floor                 1           on a sample of E
    sweep                       1           for each step size
    shares of U's tokens        2.2         forward mode over U, for each of the 8 blocks of E;
                                            a what-if costs 3 of U, 1 of E, and what
                                            would hold the entropy 6 to 54 of U, 6 of E
    errors of parts             2.2         forward mode over E along the momentum; along the
                                            weight decay, if there is any
    gradient-dot form           up to 10    see `gradient_dot`

Between passes ranks exchange parameter buffers (one all-reduce for each gradient) and
tables of per-sequence sums; every rank computes the same numbers from them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from entropy_ddp.config import Config, require_job
from entropy_ddp.distributed import World
from entropy_ddp.estimators.curvature import CurvatureEstimate, midpoint_curvature
from entropy_ddp.model.response_tokens import DirectionalScores
from entropy_ddp.probe.attribution import (
    BlockPasses,
    attribute,
    part_estimates,
    require_halves,
)
from entropy_ddp.probe.audits import audit_rows
from entropy_ddp.probe.audits.truth import attribution_gap
from entropy_ddp.probe.estimates import (
    EntropyEstimates,
    SequenceSums,
    estimate,
    estimate_curvature,
    slope_elsewhere,
)
from entropy_ddp.probe.gradient_dot import (
    gradient_dot,
    is_wanted,
    proxy_gradient_norm,
    require_passes,
)
from entropy_ddp.probe.holding import would_hold
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.memory import announce_memory
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.passes import (
    gather_sums,
    loss_gradient,
    score_after_step,
    score_along_step,
    score_in_the_middle,
    score_twice_along_step,
)
from entropy_ddp.probe.results import make_results
from entropy_ddp.probe.reverse_mode import (
    Audited,
    audit_sample,
    check_duality,
    learning_rate_ratios,
    measure_noise_floor,
)
from entropy_ddp.probe.session import Progress, Session
from entropy_ddp.probe.sweep import sweep_step_sizes
from entropy_ddp.results import Probed
from entropy_ddp.update.step import Step

Command = Literal["probe", "sweep", "attribute", "audit"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parts of the pipeline a job has.

    Attributes:
        audited: over what of E there is a backward pass.
        curvature: the second derivative, if the configuration enables it.
        sweep: the truth at other step sizes.
        attribution: the shares of U's tokens.
        gradient_dot: the gradient-dot form, if the configuration enables it.
        thorough: the audits that cost a step or a pass of their own.
    """

    audited: Audited = "sample"
    curvature: bool = True
    sweep: bool = False
    attribution: bool = False
    gradient_dot: bool = False
    thorough: bool = False


def plan_of(command: Command, config: Config) -> Plan:
    """The parts of a job.

    Raises:
        InputError: the configuration asks for what the job cannot give.
    """
    require_job(config, command)
    if command == "sweep":
        return Plan(sweep=True)
    if command == "audit":
        return Plan(audited="everything", gradient_dot=True, thorough=True)
    if command == "attribute":
        return Plan(audited="gradient", curvature=False, attribution=True)
    if not config.attribution.enabled:
        return Plan(gradient_dot=True)
    return Plan(audited="gradient", gradient_dot=True, attribution=True)


def run(
    command: Command,
    config: Config,
    world: World,
    out: Path | None,
    progress: Progress,
) -> Probed:
    """Open everything, measure, audit; every rank returns the same results.

    Args:
        out: run directory, where finished passes and sampled batches are kept until the
            run is done; None keeps none.

    Raises:
        InputError: the configuration, the checkpoint or a batch is wrong, or the
            unfinished run in `out` is another one.
        RunError: a number is not finite.
    """
    plan = plan_of(command, config)
    session = open_session(
        config, world, out, progress, command, lambda s: _require_batches(plan, s)
    )
    return _run(command, plan, session)


def run_opened(command: Command, session: Session) -> Probed:
    """The same of what is open already."""
    plan = plan_of(command, session.config)
    _require_batches(plan, session)
    return _run(command, plan, session)


def _run(command: Command, plan: Plan, session: Session) -> Probed:
    measured = measure(session, plan)
    rows = audit_rows(session, measured)
    if plan.attribution:
        # What the shares of U's tokens say; with `verify`, also the masked steps.
        attribute(session, measured)
        would_hold(session, measured)
        rows.append(attribution_gap(session, measured))
    return make_results(session, measured, rows, command)


def measure(session: Session, plan: Plan) -> Measurements:
    """Every pass of a plan, and the estimates made of them.

    Raises:
        InputError: the learning rate is 0, or something the loss needs is missing.
        RunError: a number is not finite.
    """
    announce_memory(session, plan.audited)
    config = session.config

    # The gradient of the loss on U: one forward and backward.
    gradient = update_scores = update_sums = None
    if session.change is None:
        gradient, update_scores = loss_gradient(session)
        logp, entropy = gather_sums(
            session.world, session.shard("U"), update_scores.logp, update_scores.entropy
        )
        update_sums = SequenceSums(logp=logp, entropy=entropy)

    # The truth: take the step, score E, undo the step bit for bit.
    step, stepped, hashes = score_after_step(session, gradient)

    # The prediction: E at theta with derivatives along the step. It gives E at theta too.
    evaluation, sampled = session.batches["E"], plan.audited == "sample"
    num_reversed = audit_sample(evaluation) if sampled else len(evaluation)
    along = score_along_step(session, step, num_reversed)
    base, cut, surprise = along.scores, along.cut, along.features.surprise
    estimates, predicted = estimate(
        session, step.learning_rate, along, stepped, num_reversed
    )
    sample_features = along.features.sample
    # What else was kept of the tokens is used up.
    del along
    slope = estimates.slopes[*config.slope_estimator, config.linear.control_variates]

    # The second order. A step that changed nothing has no direction to be curved along.
    curvature = curvature_step = None
    if plan.curvature and config.curvature.enabled and not step.is_zero:
        curvature, curvature_step = second_order(session, step, base, estimates)

    # The slope again by reverse mode, and what rounding makes of the truth.
    # For an attribution block by block, with a pass over U for the shares of each.
    by_block = None
    if plan.attribution:
        assert gradient is not None
        by_block = BlockPasses(session, gradient, step, estimates.original)
    duality = check_duality(
        session,
        base,
        estimates.original.value,
        step,
        predicted,
        sample_features,
        num_reversed,
        cut_otherwise=plan.audited != "gradient",
        gradient_of=None if by_block is None else by_block.gradient_of,
    )
    del sample_features
    parts = None
    if plan.attribution:
        assert gradient is not None
        parts = part_estimates(
            session, gradient, step, slope, estimates.original, predicted
        )
    del predicted
    noise_floor = duality.noise_floor
    if noise_floor is None:
        noise_floor = measure_noise_floor(session, base)

    measured = Measurements(
        gradient=gradient,
        update_scores=update_scores,
        update_sums=update_sums,
        step=step,
        stepped=stepped,
        hashes=hashes,
        base=base,
        cut=cut,
        surprise=surprise,
        estimates=estimates,
        change=estimates.change(config.truth_estimator),
        slope=slope,
        duality=duality,
        noise_floor=noise_floor,
        curvature=curvature,
        curvature_step=curvature_step,
    )
    if by_block is not None:
        measured.token_table, measured.block_shares = by_block.table()
        measured.hold_sums = by_block.hold_sums()
        measured.parts = parts
    if plan.sweep:
        measured.points, measured.sweep_summary = sweep_step_sizes(session, measured)
    if plan.gradient_dot:
        measured.gradient_dot = gradient_dot(
            session, step, gradient, base, config.gradient_dot
        )
    if plan.thorough and gradient is not None:
        measured.rate_ratios = learning_rate_ratios(
            session, gradient, step, duality.gradient
        )
        measured.signal = proxy_gradient_norm(session, limit=len(session.batches["U"]))
    return measured


def second_order(
    session: Session, step: Step, base: DirectionalScores, estimates: EntropyEstimates
) -> tuple[CurvatureEstimate, float]:
    """H'' along the step, and eta between the slopes whose difference it is."""
    if session.config.curvature.method == "taylor":
        *second, distance = score_twice_along_step(session, step, base)
        return estimate_curvature(session, estimates, base, *second), distance
    middle = slope_elsewhere(
        session,
        base,
        score_in_the_middle(session, step),
        estimates.original.value,
    )
    start = estimates.slopes[middle.score, middle.baseline, False]
    found = midpoint_curvature(middle, start, step.learning_rate)
    return found, step.learning_rate / 2


def _require_batches(plan: Plan, session: Session) -> None:
    """Asked for but impossible is said before the first token and the first pass."""
    if plan.gradient_dot:
        is_wanted(session.config.gradient_dot, session.batches, session.planned)
        require_passes(session)
    if plan.attribution:
        require_halves(session)
