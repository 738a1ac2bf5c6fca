"""The audits of the batches: their rows, their advantages, and who sampled them."""

import math
from collections import Counter
from hashlib import blake2b
from zlib import crc32

import torch
from torch import Tensor

from entropy_ddp import audit
from entropy_ddp.checkpoint.trainer_settings import trained_limit
from entropy_ddp.data.batch import Batch, Ragged, Sequence
from entropy_ddp.data.rows import DOUBTS, END_RESTORED, LOG_DIFFERS
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.probe.measure import Measured
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow

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
    return audit.advantage_checks(variances.sqrt().tolist())


def own_rollouts_rows(session: Session) -> list[AuditRow]:
    """Whether one batch's responses are all in the other: one file, or its content."""
    if "U" not in session.batches:
        return []
    evaluation, update = (
        Counter(map(_fingerprint, session.batches[split].sequences)) for split in "EU"
    )
    return [
        audit.own_rollouts_check(not (update <= evaluation or evaluation <= update))
    ]


def _fingerprint(sequence: Sequence) -> bytes:
    """Of prompt and response, whatever the row says beside them."""
    ids = (sequence.prompt_ids.tolist(), sequence.response_ids.tolist())
    return blake2b(repr(ids).encode(), digest_size=16).digest()


def batch_rows(session: Session) -> list[AuditRow]:
    """Lengths, truncated and empty responses, and redraws of both batches."""
    rows = []
    for split, batch in session.batches.items():
        truncated = sum(sequence.finished is False for sequence in batch.sequences)
        empty = int((batch.lengths == 0).sum())
        rows += [
            audit.fact(f"{split} mean response length", batch.num_tokens / len(batch)),
            audit.fact(f"{split} prompt lengths", _prompt_lengths(batch)),
            audit.check(
                f"{split} responses without tokens",
                empty,
                "0",
                empty == 0,
                "they count in N with entropy 0; filter them out if they are artefacts",
                fatal=False,
            ),
            audit.check(
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
            rows.append(audit.fact(f"{split} redraws", session.num_redraws[split]))
    return rows


def _truncation_hint(session: Session, batch: Batch) -> str:
    """What a limit that cuts most responses off means, and whose it is."""
    cut = [s.num_tokens for s in batch.sequences if s.finished is False]
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
    lengths = [len(sequence.prompt_ids) for sequence in batch.sequences]
    return f"{min(lengths)} to {max(lengths)}"


def _ending_rows(session: Session, batch: Batch) -> list[AuditRow]:
    """Whether finished responses still have the token that ended them."""
    end_ids = session.policy.end_ids
    finished = [s for s in batch.sequences if s.finished and s.num_tokens]
    if not finished or not end_ids:
        return []
    ended = sum(int(s.response_ids[-1]) in end_ids for s in finished)
    return [
        audit.check(
            f"{batch.split} finished responses that end in an end token",
            ended / len(finished),
            "1",
            ended == len(finished),
            "the end-of-sequence token was stripped from the file; its log-probability "
            "and entropy belong to the response",
            fatal=False,
        )
    ]


def text_rows(session: Session, measured: Measured) -> list[AuditRow]:
    """Responses whose ids were tokenised from text: what is doubtful, and their ends."""
    rows = []
    for split, scores in _scores_of(measured).items():
        batch = session.batches[split]
        marks_of = {s.index: s.ids_from_text for s in batch.sequences}
        from_text = {i: marks for i, marks in marks_of.items() if marks is not None}
        if not from_text:
            continue
        doubts = {i + 1: set(marks) & set(DOUBTS) for i, marks in from_text.items()}
        doubtful = sum(map(bool, doubts.values()))
        named = [line for line, found in doubts.items() if found - {LOG_DIFFERS}]
        rows += audit.text_checks(split, len(from_text), doubtful, named)
        if any(END_RESTORED in marks for marks in from_text.values()):
            rows.append(_restored_end_row(session, batch, scores))
    return rows


def _restored_end_row(session: Session, batch: Batch, scores: TokenScores) -> AuditRow:
    """Whether the ends that were put back are as probable as genuine ones."""
    shard = session.shard(batch)
    lasts = (shard.ragged.starts + shard.ragged.lengths - 1).tolist()
    own = {
        sequence.index: float(scores.logp[last])
        for sequence, last in zip(shard.sequences, lasts)
        if END_RESTORED in (sequence.ids_from_text or ())
    }
    ends: dict[int, float] = {}
    for shares in session.world.gather_objects(own):
        ends |= shares
    limit = audit.least_end_logp(batch.num_tokens)
    improbable = sorted(index for index, logp in ends.items() if logp < limit)
    by_index = {sequence.index: sequence for sequence in batch.sequences}
    return audit.restored_end_check(
        batch.split,
        min(ends.values()),
        batch.num_tokens,
        [index + 1 for index in improbable],
        # Without advantage a response of U moves nothing.
        any(by_index[index].advantage != 0 for index in improbable),
    )


def _scores_of(measured: Measured) -> dict[str, TokenScores]:
    """This rank's tokens of the batches that were scored, by split."""
    found: dict[str, TokenScores] = {"E": measured.base}
    if measured.update_scores is not None:
        found["U"] = measured.update_scores
    return found


def sampler_rows(session: Session, measured: Measured) -> list[AuditRow]:
    """Log-probabilities against those that the sampler recorded, where it did."""
    rows = []
    for split, scores in _scores_of(measured).items():
        found = _mismatch(session, session.batches[split], scores)
        if found.count:
            temperature = session.config.objective.temperature
            stale = _why_stale(session) if split == "U" else ""
            rows += audit.sampler_checks(split, found, temperature, stale)
    return rows


def _mismatch(session: Session, batch: Batch, scores: TokenScores) -> audit.Mismatch:
    """Sums over the tokens of all ranks that have log-probabilities of a sampler."""
    shard = session.shard(batch)
    sums, largest = torch.zeros(7, dtype=torch.float64), 0.0
    cells = torch.zeros(PROMPT_CELLS, ID_CELLS, dtype=torch.float64)
    starts = shard.ragged.starts.tolist()
    for start, sequence in zip(starts, shard.sequences):
        if sequence.sampling_logprobs is not None and sequence.num_tokens:
            here = slice(start, start + sequence.num_tokens)
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
    return audit.Mismatch(
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


def on_policy_row(session: Session, measured: Measured) -> AuditRow:
    """Sum of (-log p - H) over E in standard deviations; a martingale for samples."""
    sums = session.world.sum(measured.surprise.clone(), "scalars")
    total, variance = sums.sum(0).tolist()
    before, batch = measured.estimates.before, session.batches["E"]
    parts = -(before.logp + before.entropy)
    most = int((parts * math.copysign(1.0, total)).argmax())
    found = audit.Surprise(
        total=total,
        variance=variance,
        line=batch.sequences[most].index + 1,
        part=float(parts[most]),
        later=tuple(sums[1].tolist()),
    )
    return audit.on_policy_check("E", found, session.config.objective.temperature)
