"""The main job's passes in order, and everything they gave."""

from dataclasses import dataclass

from torch import Tensor

from entropy_ddp.estimators.curvature import Curvature
from entropy_ddp.estimators.entropy import EntropyChange
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.model.response_tokens import DirectionalScores, TokenScores
from entropy_ddp.probe.diagnosis import (
    Audited,
    Duality,
    audit_sample,
    check_duality,
    measure_noise_floor,
)
from entropy_ddp.probe.estimation import (
    EntropyEstimates,
    estimate,
    estimate_curvature,
    predict,
)
from entropy_ddp.probe.memory import announce_memory
from entropy_ddp.probe.phases import (
    SequenceSums,
    SteppedScores,
    loss_gradient,
    score_after_step,
    score_along_step,
    score_twice_along_step,
)
from entropy_ddp.probe.session import Session
from entropy_ddp.update.step import Step


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe's passes gave.

    Attributes:
        gradient: gradient of the loss, summed over ranks, flat, [P]; None, as the next
            two, for a given change.
        update_sums: sums of U's sequences at theta.
        update_scores: this rank's tokens of U.
        stepped: the step, this rank's tokens of E after it, hashes.
        base: this rank's tokens of E at theta, with derivatives.
        estimates: every estimator of truth and prediction.
        change: the configured truth.
        slope: the configured prediction.
        curvature: the second derivative; None if not asked for.
        curvature_step: eta between theta and the slopes whose difference it is.
        duality: forward against reverse mode.
        noise_floor: what rounding makes of Delta H of a sample: it is only scored again.
        cut: number of ranks, and budget and filling of a microbatch, of the slope's pass.
        surprise: sums over this rank's tokens of E of -log p - H, and of its variance
            given what comes before; of the first tokens of responses, of others, [2, 2].
    """

    gradient: Tensor | None
    update_sums: SequenceSums | None
    update_scores: TokenScores | None
    stepped: SteppedScores
    base: DirectionalScores
    estimates: EntropyEstimates
    change: EntropyChange
    slope: Slope
    curvature: Curvature | None
    curvature_step: float | None
    duality: Duality
    noise_floor: float
    cut: tuple[int, int, int]
    surprise: Tensor

    @property
    def step(self) -> Step:
        """The step that was taken."""
        return self.stepped.step

    @property
    def eta_star(self) -> float | None:
        """Edge of the linear regime, if known."""
        curvature = self.curvature
        return None if curvature is None else curvature.eta_star(self.slope.value)


def measure(
    session: Session, audited: Audited = "sample", *, with_curvature: bool = True
) -> Measured:
    """One forward and backward over U, E after the step, E along the step, audits.

    Args:
        session: an opened run.
        audited: what of E the audits with a pass of their own are on.
        with_curvature: whether the curvature is measured if the configuration enables
            it.

    Raises:
        InputError: the learning rate is 0, or something the loss needs is missing.
        RunError: a number is not finite.
    """
    announce_memory(session, audited)
    config = session.config
    gradient = update_sums = update_scores = None
    if session.change is None:
        gradient, update_sums, update_scores = loss_gradient(session)
    stepped = score_after_step(session, gradient)
    size = _num_reversed(session, audited)
    along = score_along_step(session, stepped.step, size)
    base, surprise, cut = along.scores, along.features.surprise, along.cut
    predictions = predict(session, along, size)
    estimates = estimate(session, along, stepped.scores, predictions)
    # The features kept for the sample are used up.
    del along
    curvature = curvature_step = None
    # A step that changed nothing has no direction to be curved along.
    if with_curvature and config.curvature.enabled and bool(stepped.step.delta.any()):
        second = score_twice_along_step(session, stepped.step, base)
        curvature = estimate_curvature(session, estimates, base, second)
        curvature_step = second.step
    duality = check_duality(
        session,
        base,
        estimates.original.value,
        stepped.step,
        predictions.sample,
        size,
        cut_otherwise=audited != "gradient",
    )
    noise_floor = duality.noise_floor
    if noise_floor is None:
        noise_floor = measure_noise_floor(session, base)
    linear = config.linear
    return Measured(
        gradient=gradient,
        update_sums=update_sums,
        update_scores=update_scores,
        stepped=stepped,
        base=base,
        estimates=estimates,
        change=estimates.changes[config.truth.is_mode],
        slope=estimates.slopes[linear.score, linear.baseline, linear.control_variates],
        curvature=curvature,
        curvature_step=curvature_step,
        duality=duality,
        noise_floor=noise_floor,
        cut=cut,
        surprise=surprise,
    )


def _num_reversed(session: Session, audited: Audited) -> int:
    """Over how many of the first sequences of E there is a backward pass."""
    evaluation = session.batches["E"]
    return audit_sample(evaluation) if audited == "sample" else len(evaluation)
