"""Facts in, verdicts out: what each number of a run should be, and why it is not.

Every check compares with something independent of the computation it checks. A verdict
is `ok`, `warn` (the result stands, with the reservation named) or `fail` (the result
cannot be trusted); whatever is not ok carries the likely cause and the next thing to try.
"""

import math
from dataclasses import dataclass
from typing import Any

from entropy_ddp.data.rows import listed_lines
from entropy_ddp.results import AuditRow, RunFacts, Verdict

# How many end tokens of a batch may be expected to be as improbable as one that is
# taken for genuine.
RARE_ENDS = 1e-3

# Standard deviations beyond which a deviation is no accident.
SURPRISING = 5.0
# Mean |d| of log p against a sampler's: more than the rounding of float32 sums makes; as
# much as that of a sampler that computes in bfloat16 may.
ROUNDING, ROUNDED_SAMPLER = 1e-3, 1e-2
# Root mean square of d over that of log p + H. A sampler that computes in bfloat16 has
# 0.025, of 0.3 nats per token and a hundred thousand parameters as of 1.8 and 135 million.
BEYOND_ROUNDING = 0.05
# Of a standard error: what is smaller is lost in it.
LOST = 0.1
# A correlation, or a share, of a pattern that leaves nothing for chance.
NEARLY_ALL = 0.9


def check(
    name: str, value: Any, expected: str, holds: bool, hint: str, *, fatal: bool = True
) -> AuditRow:
    """A check with a verdict: ok if it holds, otherwise fail (or warn) with the hint."""
    failed: Verdict = "fail" if fatal else "warn"
    return AuditRow(
        name=name,
        value=value,
        expected=expected,
        verdict="ok" if holds else failed,
        hint="" if holds else hint,
    )


def fact(name: str, value: Any, expected: str = "") -> AuditRow:
    """A number to read, without a way to fail."""
    return AuditRow(name=name, value=value, expected=expected, verdict="ok")


def close(
    name: str, error: float, tolerance: float, hint: str, *, fatal: bool = True
) -> AuditRow:
    """A relative error against its tolerance; NaN fails."""
    return check(
        name, error, f"<= {tolerance:.0e}", error <= tolerance, hint, fatal=fatal
    )


def ess_checks(ess_fraction: float, warn: float, abort: float) -> list[AuditRow]:
    """The two thresholds of the effective sample size over N."""
    hint = (
        "few sequences carry the weight: the step is too large for importance sampling "
        "from this batch; probe a smaller update.lr_override or sample more of E"
    )
    if ess_fraction < abort:
        return [
            check("ESS / N", ess_fraction, f">= {abort:g} to be trusted", False, hint)
        ]
    return [
        check(
            "ESS / N",
            ess_fraction,
            f">= {warn:g}",
            ess_fraction >= warn,
            hint,
            fatal=False,
        )
    ]


def advantage_checks(deviations: list[float]) -> list[AuditRow]:
    """Whether U's groups carry a signal: share with std(A) > 0 and their histogram.

    Args:
        deviations: population standard deviation of the advantages of each group.
    """
    share = sum(deviation > 0 for deviation in deviations) / len(deviations)
    largest = max(deviations)
    counts = [0] * 5
    for deviation in deviations:
        place = int(5 * deviation / largest) if largest else 0
        counts[min(4, place)] += 1
    edges = [f"{largest * i / 5:.3g}" for i in range(6)]
    histogram = {
        f"[{low}, {high}{']' if i == 4 else ')'}": count
        for i, (low, high, count) in enumerate(zip(edges, edges[1:], counts))
    }
    return [
        check(
            "U groups with std(A) > 0",
            share,
            "> 0",
            share > 0,
            "every group's rewards are all equal: the policy-gradient part of the step "
            "is zero, what remains is momentum and weight decay; sample harder or "
            "easier prompts",
            fatal=False,
        ),
        fact("histogram of std(A) over U groups", histogram),
    ]


def moment_checks(tiny_share: float, zero_share: float) -> list[AuditRow]:
    """Second moments that are zero or below eps^2: elements the step hardly scales."""
    hint = (
        "the optimizer has hardly seen a gradient there: its step is lr * sign-like "
        "noise or crushed by eps; was the checkpoint saved after very few steps?"
    )
    return [
        check(
            "second moments equal to 0",
            zero_share,
            "< 0.5 of all",
            zero_share < 0.5,
            hint,
            fatal=False,
        ),
        check(
            "second moments below eps^2",
            tiny_share,
            "< 0.5 of all",
            tiny_share < 0.5,
            hint,
            fatal=False,
        ),
    ]


def step_size_check(rms_over_rate: float) -> AuditRow:
    """Whether the step has the size that AdamW's steps have.

    Args:
        rms_over_rate: root mean square of the parameter change, weight decay left out,
            over the learning rate; about 0.1 to 1 for AdamW.
    """
    return check(
        "rms of the step / learning rate",
        rms_over_rate,
        "1e-3 to 10",
        1e-3 <= rms_over_rate <= 10,
        "below: second moments crush the step (a huge gradient is still "
        "remembered); above: second moments are nearly zero; compare optimizer.pt "
        "with an earlier checkpoint's",
        fatal=False,
    )


def unchanged_check(unchanged_share: float) -> AuditRow:
    """Whether the change of the parameters survives rounding.

    Args:
        unchanged_share: share of elements that did not change.
    """
    return check(
        "share of elements that did not change",
        unchanged_share,
        "< 0.1",
        unchanged_share < 0.1,
        "the learning rate is tiny against the rounding of the weights, and the step "
        "is lost (use precision.model: float64 or a larger update.lr_override), or "
        "these elements have no gradient and no momentum",
        fatal=False,
    )


def own_rollouts_check(distinct: bool) -> AuditRow:
    """Whether E and U are different rollouts.

    Args:
        distinct: whether they are.
    """
    return check(
        "E and U are different rollouts",
        distinct,
        "true",
        distinct,
        "the part of U's own gradient is biased, in the truth and in every prediction: each "
        "response has made the step that it is to measure (self-influence, of the order "
        "of one over the number of groups), and no standard error here covers it; "
        "momentum and weight decay are not. Sample another E; the gradient-dot form "
        "leaves the diagonal out",
        fatal=False,
    )


@dataclass(frozen=True, kw_only=True)
class Surprise:
    """Surprisal against entropy of a batch that should be samples of the policy.

    Attributes:
        total: sum of -log p - H over tokens; of mean 0 for samples of the policy.
        variance: sum of the variances of -log p, each given what comes before.
        line: of the response that adds most to the total, from 1.
        part: what it adds.
        later: total and variance without the first token of each response.
    """

    total: float
    variance: float
    line: int
    part: float
    later: tuple[float, float]

    @property
    def score(self) -> float:
        """The total in standard deviations: about standard normal, whatever the policy."""
        return self.total / math.sqrt(self.variance) if self.variance else 0.0

    @property
    def score_of_others(self) -> float:
        """The same without that response, whose variance is left in."""
        rest = self.total - self.part
        return rest / math.sqrt(self.variance) if self.variance else 0.0

    @property
    def is_of_first_tokens(self) -> bool:
        """Whether the first tokens of responses are all that surprises."""
        total, variance = self.later
        return self.score > 0 and abs(total) <= SURPRISING / 2 * math.sqrt(variance)


def on_policy_check(split: str, found: Surprise, temperature: float) -> AuditRow:
    """Whether responses look like samples of this policy at this temperature.

    Samples at temperature tau / beta have an expected surprisal of H - (beta - 1) V to
    first order, V the variance of -log p: so beta is about 1 - total / variance.

    Args:
        split: the batch.
        found: surprisal and entropy.
        temperature: at which the policy is scored, tau.
    """
    others = abs(found.score_of_others) > SURPRISING
    hint = (
        f"one response, line {found.line}, is most of it: is its prompt the one that it "
        "was sampled for?"
    )
    if others:
        hint = (
            "the responses are not samples of this policy at objective.temperature: "
            f"{_surprising_cause(found, temperature)}; H and its change are of another "
            "policy's responses"
        )
    return check(
        f"{split} surprisal against entropy, in SD",
        found.score,
        "-5 to 5",
        abs(found.score) <= SURPRISING,
        hint,
        fatal=others,
    )


def _surprising_cause(found: Surprise, temperature: float) -> str:
    """What makes responses too probable, or too improbable."""
    beta = 1 - found.total / found.variance
    if found.is_of_first_tokens:
        return (
            "the first tokens alone are too improbable: prompt and response are "
            "misaligned (a mask that begins a token early or late), or the prompt ends "
            "otherwise than the sampler's (chat template, generation prompt)"
        )
    if beta > 1:
        return (
            f"they are too probable, as of a lower temperature ({temperature:g} is set; "
            f"about {temperature / beta:.2g} if that is all), of top-p or top-k sampling, "
            "or of a checkpoint that was trained further"
        )
    if beta > 0.5:
        return (
            f"they are too improbable, as of a higher temperature ({temperature:g} is "
            f"set; about {temperature / beta:.2g} if that is all), of another checkpoint "
            "or of weights without this adapter; or prompt and response are misaligned"
        )
    return (
        "they are far too improbable: prompt and response are misaligned (a mask that "
        "begins a token early or late, another chat template or tokenizer), or other "
        "weights sampled them"
    )


def linearity_checks(
    etas: tuple[float, float | None], difference: float, error: float, noise: float
) -> list[AuditRow]:
    """Whether the step is small enough for a first-order prediction.

    Args:
        etas: the step's learning rate, and the one where the quadratic term equals the
            linear one; None if unknown.
        difference: delta_h_true - delta_h1.
        error: standard error of delta_h_true.
        noise: noise floor of delta_h_true; above the error it is what is seen.
    """
    eta, eta_star = etas
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
        check(
            "|true - first order| / SE of the truth",
            abs(difference) / error if error else 0.0,
            "<= 2",
            abs(difference) <= 2 * math.hypot(error, noise),
            hint,
            fatal=False,
        )
    ]
    if eta_star:
        rows.append(
            check("eta / eta*", eta / eta_star, "<= 0.5", eta <= eta_star / 2, hint,
                  fatal=False)
        )  # fmt: skip
    return rows


def proportionality_checks(ratios: tuple[float, float]) -> list[AuditRow]:
    """Norm of the change and delta_h1 at lr over those at lr / 10; both 10 for AdamW."""
    names = ("norm of the parameter change", "delta_h1")
    return [
        check(
            f"{name} at lr / at lr/10",
            ratio,
            "10 within 1 %",
            abs(ratio / 10 - 1) <= 0.01,
            "the step is not proportional to the learning rate: rounding of the weights "
            "swallows the smaller one; use precision.model: float64",
            fatal=False,
        )
        for name, ratio in zip(names, ratios, strict=True)
    ]


def signal_check(norm: float) -> AuditRow:
    """Gradient of the mean response log-probability: zero means nothing is reached."""
    return check(
        "norm of the gradient of mean log p",
        norm,
        "> 0",
        norm > 0,
        "no gradient flows through the responses: the adapter is frozen, disabled or "
        "merged, its matrices are zero, or the responses are empty",
    )


def coverage_check(
    name: str, nonzero: int, total: int, *, has_signal: bool = True
) -> AuditRow:
    """Tensors with a gradient that is not all zero.

    Args:
        name: of which gradient.
        nonzero: number of tensors with one.
        total: number of trainable tensors.
        has_signal: whether a gradient is to be expected at all.
    """
    if not has_signal:
        # That no group carries a signal is a check of its own.
        return fact(name, f"{nonzero} of {total} tensors", "none: all A are 0")
    return check(
        name,
        f"{nonzero} of {total} tensors",
        "all non-zero",
        nonzero == total,
        "some trainable tensors get no gradient: an adapter that is not in use, B "
        "matrices still zero, or a batch that does not reach them",
        fatal=nonzero == 0,
    )


def scale_checks(
    scale_sum: float, expected: float, tokens: tuple[int, int]
) -> list[AuditRow]:
    """Derivative scales and token counts over all ranks.

    Args:
        scale_sum: sum over the microbatches that ran of the constant 1/D, D the global
            denominator.
        expected: what it should be: the number planned from the batch file alone, and
            those into which others were split for want of memory, times 1/D.
        tokens: response tokens that the passes returned, and that the file holds.
    """
    used, planned = tokens
    return [
        check(
            "sum_deriv_scales",
            scale_sum,
            f"{expected:.10g}",
            math.isclose(scale_sum, expected, rel_tol=1e-12),
            "a microbatch was skipped, run twice or scaled by a local count",
        ),
        check(
            "total_tokens_used",
            used,
            f"{planned}",
            used == planned,
            "tokens were lost or counted twice between the file and the passes",
        ),
    ]


def text_checks(
    split: str, size: int, doubtful: int, named: list[int]
) -> list[AuditRow]:
    """Responses whose ids were tokenised from text, and those that may be others.

    Args:
        split: the batch.
        size: how many responses are from text.
        doubtful: of how many the file says that their ids are in doubt.
        named: lines of those that are so by themselves, and not by their step's log.
    """
    lines = f" ({listed_lines(named)})" if named else ""
    return [
        fact(f"{split} responses with ids from text", size),
        check(
            f"{split} responses with ids in doubt",
            f"{doubtful}{lines}",
            "0",
            doubtful == 0,
            "their text may not lead back to the tokens that were sampled (the row's "
            "`ids_from_text` says why), and a token that was not sampled can dominate "
            "the step: record exact ids (entropy_ddp.training.RolloutRecorder), or leave "
            "their groups out",
            fatal=False,
        ),
    ]


def restored_end_check(
    split: str, least: float, tokens: int, improbable: list[int], matters: bool
) -> AuditRow:
    """Whether end-of-sequence tokens that were put back behind text can be genuine.

    Of T sampled tokens at most T p are expected to be end tokens whose probability is p
    or less, whatever the policy.

    Args:
        split: the batch.
        least: the smallest log-probability of a restored end token, nats.
        tokens: response tokens of the batch, T.
        improbable: lines of the restored ends whose T p is below `RARE_ENDS`.
        matters: whether one of them has a part in the results.
    """
    return check(
        f"{split} restored end of sequence, least log p",
        least,
        f">= {least_end_logp(tokens):.4g}",
        not improbable,
        f"{listed_lines(improbable) if improbable else ''}: a batch in a thousand has a "
        "genuine end token so improbable: the response was cut off, and its text lacks a "
        "token of it; set `finished: false` there and leave the end token out, or record "
        "exact ids (entropy_ddp.training.RolloutRecorder)",
        fatal=matters,
    )


def least_end_logp(tokens: int) -> float:
    """The log-probability below which an end token among so many is not genuine."""
    return math.log(RARE_ENDS / tokens)


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Log-probabilities here less the sampler's, d, of the tokens that have both.

    x = log p + H is what another temperature changes first: at tau / beta the sampler's
    log p is higher by (beta - 1) x.

    Attributes:
        count: number of tokens.
        absolute, signed, squares: sums of |d|, d and d^2.
        largest: largest |d|.
        products: sum of d x.
        product_squares: sum of (d x)^2.
        spread: sum of x^2.
        recurrence: whether tokens of one id are off alike under different prompts, in
            standard deviations of rounding, whose sign is another everywhere.
    """

    count: int
    absolute: float
    signed: float
    squares: float
    largest: float
    products: float
    product_squares: float
    spread: float
    recurrence: float

    @property
    def mean(self) -> float:
        """Mean |d|."""
        return self.absolute / self.count

    @property
    def beta(self) -> float:
        """beta of the temperature tau / beta that fits best, to first order."""
        return 1 - self.products / self.spread if self.spread else 1.0

    @property
    def is_temperature(self) -> bool:
        """Whether another temperature is nearly all of it, and no accident."""
        size = math.sqrt(self.squares * self.spread)
        return abs(self.products) > NEARLY_ALL * size and (
            abs(self.products) > SURPRISING * math.sqrt(self.product_squares)
        )

    @property
    def is_one_sided(self) -> bool:
        """Whether nearly all of it has one sign, and no accident."""
        return abs(self.signed) > NEARLY_ALL * self.absolute and (
            abs(self.signed) > SURPRISING * math.sqrt(self.squares)
        )

    @property
    def is_other_weights(self) -> bool:
        """Whether it is no rounding: systematic, or larger than any."""
        beyond = self.squares > BEYOND_ROUNDING**2 * self.spread
        return self.recurrence > SURPRISING or beyond


def sampler_checks(
    split: str, found: Mismatch, temperature: float, stale: str
) -> list[AuditRow]:
    """Whether the sampler had these weights and this temperature, up to its rounding.

    Args:
        split: the batch.
        found: its log-probabilities here and there.
        temperature: at which the policy is scored.
        stale: why other weights are legal for this batch; empty if they are not.
    """
    patterned = found.is_temperature or found.is_one_sided
    others = found.is_other_weights
    small = found.mean <= (ROUNDING if patterned or others else ROUNDED_SAMPLER)
    if found.is_temperature:
        hint = (
            f"they fit a temperature of about {temperature / found.beta:.2g}, not "
            f"{temperature:g}: set objective.temperature to the sampler's; if that is "
            "what it is, the sampler recorded log-probabilities before it divided by the "
            "temperature (vLLM: logprobs_mode: processed_logprobs records them after)"
        )
    elif found.is_one_sided:
        hint = (
            "nearly all are off to one side, as of a truncated distribution (top-p, "
            "top-k, min-p) or a penalty: sample with neither"
        )
    elif others:
        hint = stale or (
            "no rounding, that of a bfloat16 sampler included, is so large or off alike "
            "where a token recurs: the rollouts come from other weights (another "
            "checkpoint, with or without an adapter, quantised), or prompt and response "
            "are misaligned; for a U of earlier steps set update.ratio: clipped"
        )
    else:
        hint = (
            "as much as rounding makes of a sampler that computes in bfloat16, and "
            "without a pattern"
        )
    return [
        check(
            f"{split} sampler mismatch, mean |Δ log p|",
            found.mean,
            f"<= {ROUNDED_SAMPLER:.0e} nats",
            small,
            hint,
            fatal=patterned or (others and not stale),
        ),
        fact(f"{split} sampler mismatch, largest", found.largest),
    ]


def is_rounding(error: float, noise_floor: float) -> bool:
    """Whether a standard error is of rounding rather than of sampling.

    The error has the spread of the rounding in it: se^2 = sampling^2 + noise^2, and
    noise > sampling where 2 noise^2 > se^2.
    """
    return 2 * noise_floor**2 > error**2


def noise_check(
    noise_floor: float, change: tuple[float, float], dtype: str
) -> AuditRow:
    """Whether the change is visible above the rounding of the scoring pass.

    It fails where the rounding is above the sampling error, as the standard error is not
    that of another batch then, or above the change itself, unless both are lost in it.

    Args:
        noise_floor: what rounding makes of the change of a sample.
        change: delta_h_true and its standard error.
        dtype: of the model.
    """
    value, error = change
    drowned = is_rounding(error, noise_floor) or (
        noise_floor > abs(value) and noise_floor > LOST * error
    )
    remedy = "precision.model: float64, or a larger update.lr_override"
    if dtype == "bfloat16":
        remedy = "precision.model: float32"
    return check(
        "noise floor of delta_h_true",
        noise_floor,
        "<= |delta_h_true| / 10",
        noise_floor <= abs(value) / 10 and not drowned,
        "the change or its standard error is as small as the rounding of the scoring "
        f"pass; use {remedy}",
        fatal=drowned,
    )


def memory_checks(run: RunFacts, configured: int) -> list[AuditRow]:
    """Whether memory ran out on the way; no row if it did not.

    Args:
        run: how often, and the budget that was left.
        configured: the budget of tokens at the start.
    """
    if not run.out_of_memory_retries:
        return []
    return [
        check(
            "calls made again for want of memory",
            run.out_of_memory_retries,
            "0",
            False,
            "smaller calls were made in their place, which changes no result but took "
            f"time: the microbatches had {run.tokens_per_microbatch} tokens at the end "
            f"instead of {configured}; set compute.tokens_per_microbatch (and "
            "sequences_per_call of sampled batches) to what fits",
            fatal=False,
        )
    ]


def worst_verdict(rows: list[AuditRow]) -> Verdict:
    """fail if any row failed, else warn if any warned, else ok."""
    verdicts = {row.verdict for row in rows}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "ok"
