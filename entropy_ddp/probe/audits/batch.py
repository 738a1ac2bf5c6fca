"""The audits of the batches: their rows, their advantages, and who sampled them."""

import math
from collections import Counter
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from entropy_ddp.checkpoint.trainer_settings import trained_limit
from entropy_ddp.data.batch import RESPONSE, Batch, Ragged
from entropy_ddp.data.rows import DOUBTS, END_RESTORED, LOG_DIFFERS, listed_lines
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.probe.audits.primitives import compare, fact
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow

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
# A correlation, or a share, of a pattern that leaves nothing for chance.
NEARLY_ALL = 0.9
# Prompts and token ids are dealt out to so many cells each.
PROMPT_CELLS, ID_CELLS = 32, 4096


def update_batch_rows(session: Session) -> list[AuditRow]:
    """Whether the advantages of U say anything: their spread within groups."""
    if "U" not in session.batches or session.config.update.loss == "nll":
        return []
    batch = session.batches["U"]
    ragged = Ragged(batch.group_sizes)
    order = batch.groups.argsort(stable=True)
    advantages = batch.advantages[order]
    sizes = batch.group_sizes.double()
    deviations = advantages - ragged.spread(ragged.sum(advantages) / sizes)
    variances = ragged.sum(deviations.square()) / sizes
    return advantage_rows(variances.sqrt().tolist())


def advantage_rows(deviations: list[float]) -> list[AuditRow]:
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
        compare(
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


def own_rollouts_rows(session: Session) -> list[AuditRow]:
    """Whether one batch's responses are all in the other: one file, or its content."""
    if "U" not in session.batches:
        return []
    evaluation, update = (
        Counter(zip(*map(session.batches[split].column, RESPONSE))) for split in "EU"
    )
    distinct = not (update <= evaluation or evaluation <= update)
    return [
        compare(
            "E and U are different rollouts",
            distinct,
            "true",
            distinct,
            "the part of U's own gradient is biased, in the truth and in every "
            "prediction: each response has made the step that it is to measure "
            "(self-influence, of the order of one over the number of groups), and no "
            "standard error here covers it; momentum and weight decay are not. Sample "
            "another E; the gradient-dot form leaves the diagonal out",
            fatal=False,
        )
    ]


def batch_rows(session: Session) -> list[AuditRow]:
    """Lengths, truncated and empty responses, and redraws of both batches."""
    rows = []
    for split, batch in session.batches.items():
        truncated = sum(finished is False for finished in batch.column("finished"))
        empty = int((batch.lengths == 0).sum())
        rows += [
            fact(f"{split} mean response length", batch.num_tokens / len(batch)),
            fact(f"{split} prompt lengths", _prompt_lengths(batch)),
            compare(
                f"{split} responses without tokens",
                empty,
                "0",
                empty == 0,
                "they count in N with entropy 0; filter them out if they are artefacts",
                fatal=False,
            ),
            compare(
                f"{split} truncated responses",
                truncated / len(batch),
                "< 0.5 of all",
                truncated < 0.5 * len(batch),
                _truncation_hint(session, batch),
                fatal=False,
            ),
        ]
        rows += _ending_rows(session, batch)
        if split in session.num_redraws:
            rows.append(fact(f"{split} redraws", session.num_redraws[split]))
    return rows


def _truncation_hint(session: Session, batch: Batch) -> str:
    """What a limit that cuts most responses off means, and whose it is."""
    pairs = zip(batch.lengths.tolist(), batch.column("finished"))
    cut = [length for length, finished in pairs if finished is False]
    if not cut:
        return ""
    told = f"most responses were cut off, the longest after {max(cut)} tokens"
    trained = trained_limit(session.config.checkpoint)
    if trained == max(cut):
        return (
            f"{told}, which is the trainer's own limit (max_completion_length): the "
            "policy is measured as it is trained, and only a longer limit in the "
            "training would change that"
        )
    longer = "" if trained is None else f" (the trainer's is {trained})"
    if session.config.batches.sources[batch.split].sample is not None:
        return f"{told}: raise batches.{batch.split}.sample.max_new_tokens{longer}"
    return (
        f"{told}: unless that is the trainer's own limit{longer}, sample the batch with "
        "a larger one"
    )


def _prompt_lengths(batch: Batch) -> str:
    """Shortest and longest prompt: rows are prompt + response, never padded left."""
    return f"{int(batch.prompt_lengths.min())} to {int(batch.prompt_lengths.max())}"


def _ending_rows(session: Session, batch: Batch) -> list[AuditRow]:
    """Whether finished responses still have the token that ended them."""
    end_ids = session.policy.end_ids
    columns = map(batch.column, ("finished", "num_tokens", "last_id"))
    finished = [last for is_whole, length, last in zip(*columns) if is_whole and length]
    if not finished or not end_ids:
        return []
    ended = sum(last in end_ids for last in finished)
    return [
        compare(
            f"{batch.split} finished responses that end in an end token",
            ended / len(finished),
            "1",
            ended == len(finished),
            "the end-of-sequence token was stripped from the file; its log-probability "
            "and entropy belong to the response",
            fatal=False,
        )
    ]


def text_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """Responses whose ids were tokenised from text: what is doubtful, and their ends."""
    rows = []
    for split, scores in _scores_of(measured).items():
        batch = session.batches[split]
        marks_of = zip(batch.column("index"), batch.column("ids_from_text"))
        from_text = {i: marks for i, marks in marks_of if marks is not None}
        if not from_text:
            continue
        doubts = {i + 1: set(marks) & set(DOUBTS) for i, marks in from_text.items()}
        doubtful = sum(map(bool, doubts.values()))
        # Those that are in doubt by themselves, and not by their step's log.
        named = [line for line, found in doubts.items() if found - {LOG_DIFFERS}]
        lines = f" ({listed_lines(named)})" if named else ""
        rows += [
            fact(f"{split} responses with ids from text", len(from_text)),
            compare(
                f"{split} responses with ids in doubt",
                f"{doubtful}{lines}",
                "0",
                doubtful == 0,
                "their text may not lead back to the tokens that were sampled (the row's "
                "`ids_from_text` says why), and a token that was not sampled can "
                "dominate the step: record exact ids "
                "(entropy_ddp.training.RolloutRecorder), or leave their groups out",
                fatal=False,
            ),
        ]
        if any(END_RESTORED in marks for marks in from_text.values()):
            rows.append(_restored_end_row(session, batch, scores))
    return rows


def _restored_end_row(session: Session, batch: Batch, scores: TokenScores) -> AuditRow:
    """Whether the ends that were put back are as probable as genuine ones."""
    shard = session.shard(batch.split)
    lasts = (shard.ragged.starts + shard.ragged.lengths - 1).tolist()
    own = {
        sequence.index: float(scores.logp[last])
        for sequence, last in zip(shard.sequences, lasts)
        if END_RESTORED in (sequence.ids_from_text or ())
    }
    ends: dict[int, float] = {}
    for shares in session.world.gather_objects(own):
        ends |= shares
    limit = least_end_logp(batch.num_tokens)
    improbable = sorted(index for index, logp in ends.items() if logp < limit)
    advantage = dict(zip(batch.column("index"), batch.column("advantage")))
    return restored_end_check(
        batch.split,
        min(ends.values()),
        batch.num_tokens,
        [index + 1 for index in improbable],
        # Without advantage a response of U moves nothing.
        any(advantage[index] != 0 for index in improbable),
    )


def restored_end_check(
    split: str, least: float, tokens: int, improbable: list[int], matters: bool
) -> AuditRow:
    """Whether end-of-sequence tokens that were put back behind text can be genuine.

    Of T sampled tokens at most T p are expected to be end tokens whose probability is p
    or less, whatever the policy.

    Args:
        least: the smallest log-probability of a restored end token, nats.
        tokens: response tokens of the batch, T.
        improbable: lines of the restored ends whose T p is below `RARE_ENDS`.
        matters: whether one of them has a part in the results.
    """
    return compare(
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


def _scores_of(measured: Measurements) -> dict[str, TokenScores]:
    """This rank's tokens of the batches that were scored, by split."""
    found: dict[str, TokenScores] = {"E": measured.base}
    if measured.update_scores is not None:
        found["U"] = measured.update_scores
    return found


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


def sampler_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """Log-probabilities against those that the sampler recorded, where it did."""
    rows = []
    for split, scores in _scores_of(measured).items():
        found = _mismatch(session, session.batches[split], scores)
        if split == "E" and session.reweights:
            # Another policy is what these weights are for.
            name = "E sampler mismatch, mean |Δ log p|"
            rows.append(fact(name, found.mean, "any: batches.E.reweight weighs it"))
        elif found.count:
            temperature = session.config.objective.temperature
            stale = _why_stale(session) if split == "U" else ""
            rows += sampler_checks(split, found, temperature, stale)
    return rows


def sampler_checks(
    split: str, found: Mismatch, temperature: float, stale: str
) -> list[AuditRow]:
    """Whether the sampler had these weights and this temperature, up to its rounding.

    Args:
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
        compare(
            f"{split} sampler mismatch, mean |Δ log p|",
            found.mean,
            f"<= {ROUNDED_SAMPLER:.0e} nats",
            small,
            hint,
            fatal=patterned or (others and not stale),
        ),
        fact(f"{split} sampler mismatch, largest", found.largest),
    ]


def _mismatch(session: Session, batch: Batch, scores: TokenScores) -> Mismatch:
    """Sums over the tokens of all ranks that have log-probabilities of a sampler."""
    shard = session.shard(batch.split)
    sums, largest = torch.zeros(7, dtype=torch.float64), 0.0
    cells = torch.zeros(PROMPT_CELLS, ID_CELLS, dtype=torch.float64)
    places = zip(shard.ragged.starts.tolist(), shard.ragged.lengths.tolist())
    for (start, length), sequence in zip(places, shard.sequences):
        if sequence.sampling_logprobs is not None and length:
            here = slice(start, start + length)
            own = scores.logp[here]
            d, x = own - sequence.sampling_logprobs, own + scores.entropy[here]
            terms = (torch.ones_like(d), d.abs(), d, d * d, d * x, (d * x) ** 2, x * x)
            sums += torch.stack([term.sum() for term in terms])
            largest = max(largest, float(d.abs().max()))
            prompt = crc32(sequence.prompt_ids.numpy().tobytes()) % PROMPT_CELLS
            cells[prompt].index_add_(0, sequence.response_ids % ID_CELLS, d)
    count, *totals = session.world.sum(sums, "scalars").tolist()
    absolute, signed, squares, products, product_squares, spread = totals
    if count:
        cells = session.world.sum(cells, "scalars")
    return Mismatch(
        count=int(count),
        absolute=absolute,
        signed=signed,
        squares=squares,
        largest=session.world.max(largest),
        products=products,
        product_squares=product_squares,
        spread=spread,
        recurrence=recurrence(cells),
    )


def recurrence(cells: Tensor) -> float:
    """Whether what is off recurs with the token under other prompts, in SD.

    With S_qv the sum over the tokens of id v behind prompt q, the products of two
    prompts' sums of one id add up to

        sum_v [(sum_q S_qv)^2 - sum_q S_qv^2] / 2,

    which has mean 0 where signs are independent, as those of rounding are, and the
    variance sum_v [(sum_q S_qv^2)^2 - sum_q S_qv^4] / 2. Products within a prompt are
    left out: behind one prompt whole contexts recur, and the same rounding with them.

    Args:
        cells: S, [q, v]; cells of several prompts or ids make it no less right.
    """
    squares = cells.square()
    pairs = cells.sum(0).square() - squares.sum(0)
    variance = squares.sum(0).square() - squares.square().sum(0)
    total = float(variance.sum())
    return float(pairs.sum()) / math.sqrt(2 * total) if total > 0 else 0.0


def _why_stale(session: Session) -> str:
    """Why U may be of other weights than the checkpoint's; empty if it may not."""
    update = session.config.update
    if update.loss == "nll":
        return "update.loss: nll asks for no sampler, and does not use what it recorded"
    if update.ratio == "clipped":
        return (
            "update.ratio: clipped allows a batch that was sampled some steps earlier, "
            "and weighs it by the ratio; a batch of this very step has no such mismatch"
        )
    return ""


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


def on_policy_row(session: Session, measured: Measurements) -> AuditRow:
    """Sum of (-log p - H) over E in standard deviations; a martingale for samples."""
    if session.reweights:
        name = "E surprisal against entropy, in SD"
        return fact(name, "not of this policy", "any: batches.E.reweight weighs it")
    sums = session.world.sum(measured.surprise.clone(), "scalars")
    total, variance = sums.sum(0).tolist()
    before, batch = measured.estimates.before, session.batches["E"]
    parts = -(before.logp + before.entropy)
    most = int((parts * math.copysign(1.0, total)).argmax())
    found = Surprise(
        total=total,
        variance=variance,
        line=batch.sequences[most].index + 1,
        part=float(parts[most]),
        later=tuple(sums[1].tolist()),
    )
    return on_policy_check("E", found, session.config.objective.temperature)


def on_policy_check(split: str, found: Surprise, temperature: float) -> AuditRow:
    """Whether responses look like samples of this policy at this temperature.

    Samples at temperature tau / beta have an expected surprisal of H - (beta - 1) V to
    first order, V the variance of -log p: so beta is about 1 - total / variance.

    Args:
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
    return compare(
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
