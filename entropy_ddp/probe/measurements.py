"""Everything that the passes of a run gave, and what was estimated from it."""

from dataclasses import dataclass

from torch import Tensor

from entropy_ddp.estimators.curvature import CurvatureEstimate
from entropy_ddp.estimators.entropy import EntropyChange
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.estimators.share_blocks import BlockShares
from entropy_ddp.estimators.shares import TokenTable
from entropy_ddp.estimators.standard_errors import Estimate
from entropy_ddp.estimators.sweep_points import SweepPoint, SweepSummary
from entropy_ddp.model.response_tokens import DirectionalScores, TokenScores
from entropy_ddp.probe.estimates import EntropyEstimates, SequenceSums
from entropy_ddp.probe.reverse_mode import Duality
from entropy_ddp.results import AttributionResult, GradientDotResult
from entropy_ddp.update.step import Step


@dataclass(frozen=True, kw_only=True)
class HoldSums:
    """What beside the shares tells what would have held the entropy.

    Attributes:
        bonus: what each block of E adds to the first-order change by a unit of the
            gradient of U's mean entropy of a token, [K].
        own: <grad H, gain * grad H> of each block, [K].
        policy_part: the part of each token's weight in the loss that its advantage
            makes, [T]: 1 but for a KL term.
        even: gradient of the entropy of the even blocks, times the denominator of all of
            E, flat, [P]; with `verify` only.
    """

    bonus: Tensor
    own: Tensor
    policy_part: Tensor
    even: Tensor | None


@dataclass(kw_only=True)
class Measurements:
    """What a run measured; None where its plan has no such part.

    Attributes:
        gradient: gradient of the loss, summed over ranks, flat, [P]; None, as the next
            two, for a given change.
        update_scores: this rank's tokens of U at theta.
        update_sums: sums of U's sequences at theta.
        step: the step that was taken.
        stepped: this rank's tokens of E at theta_after.
        hashes: fingerprints of parameters and optimizer state: before, after the step
            (parameters only), and after the restore.
        base: this rank's tokens of E at theta, with derivatives along the step.
        cut: number of ranks, and budget and filling of a microbatch, of that pass.
        surprise: sums over this rank's tokens of E of -log p - H, and of its variance
            given what comes before; of the first tokens of responses, of others, [2, 2].
        estimates: every estimator of truth and prediction.
        change: the configured truth.
        slope: the configured prediction.
        duality: forward against reverse mode.
        noise_floor: what rounding makes of Delta H of a sample: it is only scored again.
        curvature: the second derivative.
        curvature_step: eta between theta and the slopes whose difference it is.
        points: the truth and both predictions at every step size of a sweep.
        sweep_summary: what they say together.
        gradient_dot: the gradient-dot form of the prediction.
        token_table: every token of U with its share.
        parts: momentum, weight decay and gradient as parts of the prediction.
        block_shares: what each block of E adds to the parts and shares.
        hold_sums: what else tells what would have held the entropy.
        attribution: what the shares say.
        rate_ratios: norm of the change, and the prediction, at lr over those at lr / 10.
        signal: norm of the gradient of mean log p of U.
    """

    gradient: Tensor | None
    update_scores: TokenScores | None
    update_sums: SequenceSums | None
    step: Step
    stepped: TokenScores
    hashes: tuple[str, str, str]
    base: DirectionalScores
    cut: tuple[int, int, int]
    surprise: Tensor
    estimates: EntropyEstimates
    change: EntropyChange
    slope: Slope
    duality: Duality
    noise_floor: float
    curvature: CurvatureEstimate | None = None
    curvature_step: float | None = None
    points: list[SweepPoint] | None = None
    sweep_summary: SweepSummary | None = None
    gradient_dot: GradientDotResult | None = None
    token_table: TokenTable | None = None
    parts: dict[str, Estimate] | None = None
    block_shares: BlockShares | None = None
    hold_sums: HoldSums | None = None
    attribution: AttributionResult | None = None
    rate_ratios: tuple[float, float] | None = None
    signal: float | None = None

    @property
    def eta_star(self) -> float | None:
        """Edge of the linear regime, if known."""
        curvature = self.curvature
        return None if curvature is None else curvature.eta_star(self.slope.estimate)
