"""The schema of a run's results; it needs no torch.

`Results.to_dict()` is results.json. A part that was not asked for is absent. Entropies
are in nats, per token or per sequence as `truth.normalize` says; slopes are per unit of
learning rate.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from entropy_ddp.errors import RunError
from entropy_ddp.estimators.sweep_points import SweepPoint, SweepSummary

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
# Fewer effective degrees of freedom of the truth's error, or more of its square in one
# response: the size of the error is hardly known.
FEW_DEGREES, LARGE_SHARE = 10, 0.2

Status = Literal["ok", "untrusted", "failed"]
Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How the run was made.

    Attributes:
        command: the job: probe, audit, attribute or sweep; absent in the results of
            versions that did not write it.
        versions: versions of this package and of the libraries under it.
        device, dtype: of the model.
        started: start time, ISO 8601, UTC.
        seconds: wall-clock seconds of each phase on rank 0.
        passes: what each kind of pass over E and over U cost, all ranks together:
            {pass, batch, sequences, tokens, positions, microbatches} and, if counted,
            {operations}.
        tokens_per_microbatch: the budget at the end of the run, the smallest over ranks.
        out_of_memory_retries: calls of the model that were made again with less in them,
            all ranks together.
        memory: of the host, for the rank that needs most: estimated_bytes at the peak,
            free_bytes beside what was in use at the estimate, peak_bytes as it was.
        resumed: passes that an earlier, interrupted start of this run had finished and
            this one has read; absent if there were none. They are not in `passes`, and
            their time is not in `seconds`.
    """

    command: str
    versions: dict[str, str]
    world_size: int
    seed: int
    device: str
    dtype: str
    started: str
    seconds: dict[str, float]
    passes: list[dict[str, Any]]
    tokens_per_microbatch: int
    out_of_memory_retries: int
    memory: dict[str, int] | None = None
    resumed: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """Size of a batch, whole (all ranks), and how its prompts were drawn.

    Attributes:
        num_prompts_total: size of the set that the prompts were drawn from; absent, as
            the next, where the batch's rows do not say.
        with_replacement: whether a prompt could be drawn twice.
        responses_per_prompt: responses of each prompt draw (of each prompt, where all
            of them come in balanced passes); absent where their numbers differ.
    """

    num_groups: int
    num_sequences: int
    num_tokens: int
    num_prompts_total: int | None = None
    with_replacement: bool | None = None
    responses_per_prompt: int | None = None


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """The optimizer step that was probed, or the change in its place.

    Attributes:
        loss: the loss on U; absent, as the next two, of a given change.
        grad_norm: global norm of the gradient before clipping.
        clip_coef: factor that clipping applied.
        delta: file or checkpoint that gives the change; absent of a step.
        learning_rate_used: eta, the learning rate of the first param group; of a given
            change 1 (slopes are per unit of it), or what `update.lr_override` says.
        param_update_l2: Euclidean norm of the parameter change.
        num_optimizer_steps: optimizer steps taken; 1, or 0 of a given change.
        top_parameters: the parameters that moved most, {name, l2}.
    """

    loss: str | None
    delta: str | None = None
    learning_rate_used: float
    param_update_l2: float
    grad_norm: float | None
    clip_coef: float | None
    num_optimizer_steps: int
    top_parameters: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TruthResult:
    """The importance-sampled entropy change, measured after the step.

    What earlier versions did not write is absent in their results.

    Attributes:
        normalize: what the entropy is divided by.
        is_mode: kind of importance weights.
        control_variates: whether first-order noise was removed.
        control_weight: mean share c of it that was removed.
        H_orig: entropy before the step.
        H_upd: entropy after it.
        H_orig_se, H_upd_se: their standard errors, clustered by group: of another E. As
            one E gave both, that of their difference is `se`.
        H_orig_se_jackknife, H_upd_se_jackknife: the same by leaving one group out.
        delta_h_true: H_upd - H_orig.
        se: its standard error by the delta method, clustered by group.
        se_jackknife: the same by leaving one group out.
        interval: 95 % interval of delta_h_true, [low, high]: jackknife and rounding,
            Student's t.
        effective_degrees_of_freedom: how many groups tell the error's size, of n - 1.
        largest_share: largest share of one response in the squared error.
        largest_sequence: number of that response in the file of E, from 0.
        noise_floor: what rounding alone makes of it: the change of a sample of E that is
            only scored again, or its standard error if that is larger.
        ess: effective sample size of the weights, in sequences.
        ess_fraction: the same over N.
        sampler: {ess, ess_fraction} of the weights before the step, where E was sampled
            by another policy; absent otherwise.
        log_weight: min, median and max of log w_i.
        clip_fraction: share of sequences whose weight exceeds `truth.clip_c`.
    """

    normalize: str
    is_mode: str
    H_orig: float
    H_upd: float
    delta_h_true: float
    se: float
    ess: float
    ess_fraction: float
    log_weight: dict[str, float]
    clip_fraction: float
    H_orig_se: float | None = None
    H_upd_se: float | None = None
    noise_floor: float | None = None
    control_variates: bool = False
    control_weight: float | None = None
    H_orig_se_jackknife: float | None = None
    H_upd_se_jackknife: float | None = None
    se_jackknife: float | None = None
    interval: list[float] | None = None
    effective_degrees_of_freedom: float | None = None
    largest_share: float | None = None
    largest_sequence: int | None = None
    sampler: dict[str, float] | None = None

    @property
    def error(self) -> float:
        """What is shown behind delta_h_true: its standard error and rounding together.

        The jackknife's, or the delta method's in the results of earlier versions.
        """
        own = self.se if self.se_jackknife is None else self.se_jackknife
        return math.hypot(own, self.noise_floor or 0.0)


@dataclass(frozen=True, kw_only=True)
class PowerResult:
    """What this E can tell, and how large a better one would have to be.

    Attributes:
        resolved: whether 0 is outside the 95 % interval of the measured change.
        smallest_change: what an E of this size finds resolved with a probability of
            80 %: (t_.975 + t_.8) se_jackknife; nats.
        change: what the next three are for: the size of the measured change where it is
            resolved, else `truth.resolve` times the entropy; nats.
        groups_for_20_percent: fewest groups (prompts, where they come in passes) whose
            95 % interval of that change is no wider than 20 % of it to either side;
            absent where no number is enough.
        groups_for_20_percent_se: standard error of that number.
        responses_for_20_percent: where all prompts of a known set are not enough, the
            responses to each of them that would be.
        between_prompts: share of the variance of E's error that lies between prompts,
            and not between the responses to one; absent, as the next two, where a
            prompt has a single response.
        between_prompts_se: its standard error.
        best_responses_per_prompt: responses to each prompt whose error is least for the
            number of tokens, those of a prompt counted once; absent where no variance is
            seen between prompts.
    """

    resolved: bool
    smallest_change: float
    change: float
    groups_for_20_percent: int | None = None
    groups_for_20_percent_se: float | None = None
    responses_for_20_percent: int | None = None
    between_prompts: float | None = None
    between_prompts_se: float | None = None
    best_responses_per_prompt: int | None = None


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """The first-order prediction.

    Attributes:
        normalize, score, baseline, control_variates: which estimator.
        slope: derivative of the entropy along the step, per unit learning rate.
        delta_h1: eta times the slope.
        se: standard error of the slope (delta method), conditional on the step.
        se_jackknife: the same by leaving one group out.
        interval: 95 % interval of delta_h1, [low, high].
        terms: score, pathwise and denominator terms of the slope.
        duality_gap: relative difference of forward- and reverse-mode slope on a sample.
        difference_se: standard error of delta_h_true - delta_h1, from the paired
            influences of each group on both.
        difference_se_jackknife: the same by leaving one group out.
        difference_interval: 95 % interval of delta_h_true - delta_h1, [low, high].
        matched_difference: the same difference {value, se, se_jackknife, interval} by
            a truth and the slope that is exactly its derivative, so that all noise of
            first order cancels; where control variates leave some of it in the other.
    """

    normalize: str
    score: str
    baseline: str
    control_variates: bool
    slope: float
    delta_h1: float
    se: float
    se_jackknife: float
    terms: dict[str, float]
    duality_gap: float
    difference_se: float
    interval: list[float] | None = None
    difference_se_jackknife: float | None = None
    difference_interval: list[float] | None = None
    matched_difference: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class CurvatureResult:
    """The second order.

    Attributes:
        method: `midpoint` or `taylor`.
        second_derivative: H'' along the step, per squared unit of learning rate.
        se, se_jackknife: its jackknife standard error.
        delta_h2: eta slope + eta^2 H'' / 2.
        step: eta between the slopes whose difference H'' is: from theta to the middle of
            the step, or from theta to either side.
        eta_star: |2 slope / H''|, the edge of the linear regime; absent if H'' is 0.
        delta_h2_se, delta_h2_se_jackknife: standard errors of delta_h2.
        interval: 95 % interval of delta_h2, [low, high].
        difference_se, difference_se_jackknife: standard errors of delta_h_true -
            delta_h2, from the paired influences of each group on both.
        difference_interval: 95 % interval of that difference, [low, high].
        matched_difference: as of `LinearResult`, less the second order too.
        eta_star_se: standard error of eta_star, to first order: it means something
            where H'' is several of its own errors.
        eta_star_interval: 95 % interval of eta_star, [low, high]; high is null where H''
            is not resolved, so that there is no largest value.
    """

    second_derivative: float
    se: float
    delta_h2: float
    step: float | None
    eta_star: float | None
    method: str = "taylor"
    se_jackknife: float | None = None
    delta_h2_se: float | None = None
    delta_h2_se_jackknife: float | None = None
    interval: list[float] | None = None
    difference_se: float | None = None
    difference_se_jackknife: float | None = None
    difference_interval: list[float] | None = None
    matched_difference: dict[str, Any] | None = None
    eta_star_se: float | None = None
    eta_star_interval: list[float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class GradientDotResult:
    """The gradient-dot form of the first-order prediction.

    Attributes:
        direction, weighting: which form.
        bars_dot: <Xbar, Ybar>, without its diagonal if `u_statistic`.
        u_cross: -bars_dot.
        deltaH1: learning_rate times bars_dot, in nats per token of the weighting.
        learning_rate: eta of the first param group; 1 for direction `step`, whose Ybar
            holds every group's own already.
        V_X, V_Y: variance of bars_dot due to the groups of E and of U; V_Y with the gain
            of the step held fixed.
        se_deltaH1: learning_rate sqrt(V_X + V_Y).
        frac_var: (V_X + V_Y) / bars_dot^2; None when bars_dot is 0.
        x_norm, y_norm: Euclidean norms of Xbar and Ybar.
        u_statistic: whether E and U are the same rollouts, so that the diagonal was
            removed.
        se_paired: jackknife standard error of deltaH1 with the covariance of X and Y,
            which the same rollouts have; None when E and U are different, or have fewer
            than three groups.
    """

    direction: str
    weighting: str
    bars_dot: float
    u_cross: float
    deltaH1: float
    learning_rate: float
    V_X: float
    V_Y: float
    se_deltaH1: float
    frac_var: float | None
    x_norm: float
    y_norm: float
    u_statistic: bool
    se_paired: float | None = None


@dataclass(frozen=True, kw_only=True)
class AttributionResult:
    """Which part of the step, and which tokens of U, make delta_h1; nats.

    Attributes:
        momentum: part of the saved first moment.
        weight_decay: part of the weight decay.
        gradient: part of U's gradient; the sum of its tokens' shares.
        total: the sum of the three; delta_h1 up to rounding.
        momentum_se, weight_decay_se, gradient_se: delta-method standard errors of the
            parts, over the prompts of E; 0 of a part that the step does not have.
        momentum_se_jackknife, ...: by the jackknife.
        momentum_interval, ...: 95 % intervals [low, high].
        attribution_gap: |total - delta_h1| over the largest term of delta_h1.
        num_blocks: number of disjoint blocks of E that shares were computed from.
        half_correlation: correlation (Pearson's) of the token shares of two halves of E,
            the mean over all ways to halve its blocks; None if shares are all equal.
        reliability: what the token shares of another E as large would correlate with, by
            Spearman and Brown; 0 where the halves do not agree; None as above.
        covariance: how well (log p - mean)(A - mean) ranks tokens against their share:
            {spearman, top_overlap}; a good predictor has a Spearman correlation near -1.
        proxies: the same for other cheap scores, by name.
        concentration: smallest fraction of tokens that holds half of the sum of |share|.
        summaries: sums of shares by sign of advantage, probability, position, ...; each
            with `se` from the blocks, if there are at least three.
        what_if: the change had the chosen tokens been left out: `delta_h1` with the
            tokens chosen and evaluated on the same E; `delta_h1_cross_fitted` chosen on
            one half of E and evaluated on the other, swapped and averaged, with `se`
            from the blocks (of rules that do not look at shares it is delta_h1);
            `delta_h_true` with `delta_h_true_se` likewise, the masked steps taken.
        top_tokens: the tokens with the largest shares, in their context.
        would_hold: what would have left the change `target`: for each of the `families`
            its name, the `parameter` that the shares give with the gain held fixed,
            `parameter_se` by the blocks, `saturated` where none reaches the target (it is
            then the nearest), `token_fraction` with another weight, `delta_h1`,
            `delta_h1_cross_fitted` and `se` as of `what_if`; with `verify`, of the step
            that AdamW makes of the changed gradient: `parameter_taken`,
            `saturated_taken`, `gradient_change` as a share of its norm, `cosine` of the
            two steps, `delta_h1_taken`, `delta_h_true` with `delta_h_true_se`, either
            half of E judging what the other found. None of old runs.
    """

    momentum: float
    weight_decay: float
    gradient: float
    total: float
    momentum_se: float
    weight_decay_se: float
    gradient_se: float
    momentum_se_jackknife: float
    weight_decay_se_jackknife: float
    gradient_se_jackknife: float
    momentum_interval: list[float]
    weight_decay_interval: list[float]
    gradient_interval: list[float]
    attribution_gap: float
    num_blocks: int
    covariance: dict[str, Any]
    proxies: dict[str, dict[str, Any]]
    concentration: float
    summaries: dict[str, list[Any]]
    what_if: list[dict[str, Any]]
    top_tokens: list[dict[str, Any]]
    half_correlation: float | None = None
    reliability: float | None = None
    would_hold: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One check.

    Attributes:
        name: what was checked.
        value: what was found.
        expected: what it should be, in words.
        verdict: ok, warn or fail.
        hint: likely cause and next thing to try; empty when ok.
    """

    name: str
    value: Any
    expected: str
    verdict: Verdict
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything a probe found: the content of results.json."""

    status: Status
    run: RunFacts
    E: BatchFacts
    U: BatchFacts | None
    update: UpdateResult
    truth: TruthResult
    truth_all: list[dict[str, Any]]
    power: PowerResult | None = None
    linear: LinearResult
    linear_all: list[dict[str, Any]]
    curvature: CurvatureResult | None = None
    gradient_dot: GradientDotResult | None = None
    sweep: list[SweepPoint] | None = None
    sweep_summary: SweepSummary | None = None
    attribution: AttributionResult | None = None
    audit: list[AuditRow]
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json; absent parts are left out.

        Raises:
            RunError: a number is NaN or infinite.
        """
        document = _plain(self)
        document = {"schema_version": document.pop("schema_version"), **document}
        _require_finite(document, "results")
        return document


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _require_finite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{place} is {value}: the run's numbers cannot be trusted")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, item in items:
        _require_finite(item, f"{place}.{name}")


@dataclass(frozen=True)
class Rows:
    """Rows of a file that are made when they are read, and never in memory together.

    They can be read any number of times. A rank that does not read them makes none.

    Attributes:
        make: begins the rows anew.
    """

    make: Callable[[], Iterator[dict[str, Any]]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.make()


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A finished probe.

    Attributes:
        results: what goes into results.json.
        sequences: the rows of per_sequence.jsonl, E then U, in file order.
        delta: change of every parameter by name, if the run was asked to save it.
        tokens: the rows of tokens.jsonl.gz, for a run that attributes.
        sampled: the batches that the run sampled itself into rollouts/.
    """

    results: Results
    sequences: Iterable[dict[str, Any]]
    delta: "dict[str, Tensor] | None"
    tokens: Iterable[dict[str, Any]] | None = None
    sampled: frozenset[str] = frozenset()
