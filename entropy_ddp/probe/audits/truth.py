"""The audits of the change: is it trusted, resolved, and in the linear regime?"""

import math
from collections.abc import Mapping

import torch

from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.estimators.standard_errors import Estimate
from entropy_ddp.model.parameters import inner_product
from entropy_ddp.probe.attribution import largest_term
from entropy_ddp.probe.audits.primitives import compare, fact, threshold
from entropy_ddp.probe.gradient_dot import obstacle
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow
from entropy_ddp.results.schema import FEW_DEGREES, LARGE_SHARE

# Of the term scale: the largest of the sums whose difference is the slope.
DUALITY_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}
# Of the largest term of the slope; the rounding of the stored weights is added.
ATTRIBUTION_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}
# Before this step of the optimizer, second moments are made of few gradients.
EARLY_STEPS = 20
# Of a standard error: what is smaller is lost in it.
LOST = 0.1


def _tolerance(session: Session, tolerances: Mapping[torch.dtype, float]) -> float:
    """The tolerance of the narrower of the dtypes of model and parameter buffers."""
    return max(tolerances[d] for d in (session.policy.dtype, session.buffer_dtype))


def duality_row(session: Session, measured: Measurements) -> AuditRow:
    """Forward against reverse mode."""
    return threshold(
        "duality gap",
        measured.duality.gap,
        _tolerance(session, DUALITY_TOLERANCE),
        "forward and reverse mode disagree: an operation of this model loses or "
        "detaches a derivative; try compute.attention: eager",
    )


def routing_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """Tokens of E that the step sends to other experts, of mixtures."""
    if not session.passes.tokens.routes:
        return []
    before, after = measured.base.routing, measured.stepped.routing
    flips = torch.zeros(1, dtype=torch.float64)
    # A rank without tokens has neither.
    if before is not None and after is not None:
        flips += (before != after).sum()
    flipped = float(session.world.sum(flips, "scalars"))
    return [
        compare(
            "tokens of E that the step routes to other experts",
            flipped / session.batches["E"].num_tokens,
            "0",
            flipped == 0,
            "the truth contains the jumps of their routing, which no derivative sees; "
            "the prediction holds between jumps",
            fatal=False,
        )
    ]


def truth_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    truth, change = session.config.truth, measured.change
    eta = measured.step.learning_rate
    sampler, count = measured.estimates.sampler_ess, len(session.batches["E"])
    of_sampler = []
    if sampler is not None:
        of_sampler = ess_rows(
            sampler / count,
            truth.ess_warn,
            truth.ess_abort,
            "ESS / N of the sampler's E",
        )
    return [
        *of_sampler,
        *ess_rows(change.ess_fraction, truth.ess_warn, truth.ess_abort),
        compare(
            "ESS, responses",
            change.ess,
            f">= {truth.ess_least:g}",
            change.ess >= truth.ess_least,
            "as if E had so few responses: their spread is hardly known, and what is "
            "rare among responses is not in E at all; sample more of E",
            fatal=False,
        ),
        *error_rows(change.change, _line_of_largest(session, change.change)),
        noise_row(
            measured.noise_floor,
            change.value,
            change.change.se_jackknife,
            session.config.precision.model,
        ),
        *linearity_rows(
            eta,
            _resolved_eta_star(measured),
            change.value - eta * measured.slope.value,
            change.change.se_jackknife,
            measured.noise_floor,
            two_sided(session.draws.num_units - 1),
        ),
    ]


def error_rows(change: Estimate, place: str) -> list[AuditRow]:
    """Whether enough of E makes the error of the change that its size is known.

    Args:
        place: file and line of the response with the largest part of it.
    """
    degrees, (share, _) = change.effective_degrees_of_freedom, change.largest_share
    few = (
        "few groups make the error, which is known as if from so many: the interval may "
        "be too narrow, that of H more so; sample more of E"
    )
    one = (
        f"{place}: this response alone makes so much of the squared error. Look at it; "
        "if it is no mistake, responses like it are rare and weigh much: sample more of E"
    )
    return [
        compare(
            "effective degrees of freedom of the error",
            degrees,
            f">= {FEW_DEGREES}",
            degrees >= FEW_DEGREES,
            few,
            fatal=False,
        ),
        compare(
            "largest share of one response in the squared error",
            share,
            f"<= {LARGE_SHARE:g}",
            share <= LARGE_SHARE,
            one,
            fatal=False,
        ),
    ]


def _line_of_largest(session: Session, change: Estimate) -> str:
    """File and line of the response with the largest part of the squared error."""
    _, place = change.largest_share
    line = session.batches["E"].sequences[place].index + 1
    source = session.config.batches.E.file or "rollouts/E.jsonl"
    return f"{source}, line {line}"


def ess_rows(
    ess_fraction: float, warn: float, abort: float, name: str = "ESS / N"
) -> list[AuditRow]:
    """The two thresholds of the effective sample size over N."""
    hint = (
        "few sequences carry the weight: the step is too large for importance sampling "
        "from this batch; probe a smaller update.lr_override or sample more of E"
    )
    if name != "ESS / N":
        hint = (
            "few sequences carry the weight: the policy that wrote E is too far from "
            "this one; sample E from a nearer one"
        )
    if ess_fraction < abort:
        return [compare(name, ess_fraction, f">= {abort:g} to be trusted", False, hint)]
    return [
        compare(
            name,
            ess_fraction,
            f">= {warn:g}",
            ess_fraction >= warn,
            hint,
            fatal=False,
        )
    ]


def linearity_rows(
    eta: float,
    eta_star: float | None,
    difference: float,
    error: float,
    noise: float,
    quantile: float,
) -> list[AuditRow]:
    """Whether the step is small enough for a first-order prediction.

    Args:
        eta: the step's learning rate.
        eta_star: the one where the quadratic term equals the linear one; None where the
            curvature is unknown or not resolved.
        difference: delta_h_true - delta_h1.
        error: standard error of delta_h_true.
        noise: noise floor of delta_h_true; above the error it is what is seen.
        quantile: errors that make half of the truth's 95 % interval.
    """
    hint = (
        "the step leaves the linear regime: read delta_h2 or the truth, or probe a "
        "smaller update.lr_override"
    )
    if is_rounding(error, noise):
        # The check of the noise floor fails: no step size mends the rounding.
        ratio = abs(difference) / error if error else 0.0
        name = "|true - first order| / SE of the truth"
        return [fact(name, ratio, "nothing: rounding is above the SE")]
    rows = [
        compare(
            "|true - first order| / SE of the truth",
            abs(difference) / error if error else 0.0,
            f"<= {quantile:.3g}",
            abs(difference) <= quantile * math.hypot(error, noise),
            hint,
            fatal=False,
        )
    ]
    if eta_star:
        rows.append(
            compare(
                "eta / eta*",
                eta / eta_star,
                "<= 0.5",
                eta <= eta_star / 2,
                hint,
                fatal=False,
            )
        )
    return rows


def _resolved_eta_star(measured: Measurements) -> float | None:
    """eta*; None where the curvature is unknown, or its 95 % interval holds zero."""
    curvature = measured.curvature
    if curvature is None:
        return None
    _, largest = curvature.eta_star_interval(measured.slope.estimate)
    return measured.eta_star if largest is not None else None


def is_rounding(error: float, noise_floor: float) -> bool:
    """Whether a standard error is of rounding rather than of sampling.

    The error has the spread of the rounding in it: se^2 = sampling^2 + noise^2, and
    noise > sampling where 2 noise^2 > se^2.
    """
    return 2 * noise_floor**2 > error**2


def noise_row(noise_floor: float, value: float, error: float, dtype: str) -> AuditRow:
    """Whether the change is visible above the rounding of the scoring pass.

    It fails where the rounding is above the sampling error, as the standard error is not
    that of another batch then, or above the change itself, unless both are lost in it.

    Args:
        noise_floor: what rounding makes of the change of a sample.
        value, error: delta_h_true and its standard error.
    """
    drowned = is_rounding(error, noise_floor) or (
        noise_floor > abs(value) and noise_floor > LOST * error
    )
    remedy = "precision.model: float64, or a larger update.lr_override"
    if dtype == "bfloat16":
        remedy = "precision.model: float32"
    return compare(
        "noise floor of delta_h_true",
        noise_floor,
        "<= |delta_h_true| / 10",
        noise_floor <= abs(value) / 10 and not drowned,
        "the change or its standard error is as small as the rounding of the scoring "
        f"pass; use {remedy}",
        fatal=drowned,
    )


def gradient_dot_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """The gradient-dot form in full, or why it was not computed, where it was not."""
    rows, dot = [], measured.gradient_dot
    if session.config.gradient_dot.enabled == "auto":
        reason = obstacle(session.batches, session.planned)
        if reason is not None:
            rows.append(fact("gradient-dot form", "no", reason))
    if dot is not None:
        rows += [
            fact("U_cross, ten decimals", f"{dot.u_cross:.10f}"),
            fact("U_cross, ten digits", f"{dot.u_cross:.10e}"),
            fact("deltaH1 of the gradient-dot form", dot.deltaH1),
        ]
        if dot.direction == "step":
            rows.append(gain_row(saved_steps(session.optimizer)))
    return rows


def saved_steps(optimizer: torch.optim.Optimizer | None) -> int:
    """Steps that the saved state remembers, of the parameter with the fewest."""
    assert optimizer is not None
    return min((int(s["step"]) for s in optimizer.state.values()), default=0)


def gain_row(saved: int) -> AuditRow:
    """Whether V_Y may hold the gain of the step fixed: does U hardly move it?

    Args:
        saved: steps that the optimizer has taken before the probed one.
    """
    t = saved + 1
    return compare(
        "step t of the optimizer, for V_Y",
        t,
        f">= {EARLY_STEPS}",
        t >= EARLY_STEPS,
        f"this is the optimizer's step t = {t}: its denominator is made of U as much as "
        "its gradient is. V_Y holds it (the gain) fixed and overstates how another U "
        "would change the answer; V_X stands",
        fatal=False,
    )


def attribution_gap(session: Session, measured: Measurements) -> AuditRow:
    """Whether the parts of an attribution add up, to rounding.

    delta_h1 is along the change of the weights as they are stored, every element of it
    off by up to half an ulp of its weight; the parts are not. That makes at most
    |grad H| |theta| eps / 2 nats.
    """
    assert measured.attribution is not None
    weights, layers = session.policy.parameters.values(), session.passes.layers
    squares = layers.totals(inner_product(w.detach(), w.detach()) for w in weights)
    size = math.hypot(*map(math.sqrt, squares))
    slope_norm = (
        session.passes.norm(measured.duality.gradient) / measured.duality.denominator
    )
    half_an_ulp = torch.finfo(session.policy.dtype).eps / 2
    scale = largest_term(measured)
    rounding = slope_norm * size * half_an_ulp / scale if scale else 0.0
    return threshold(
        "attribution gap",
        measured.attribution.attribution_gap,
        _tolerance(session, ATTRIBUTION_TOLERANCE) + rounding,
        "the parts of the step do not add up to it: the optimizer's update rule is not "
        "the one that is decomposed",
    )
