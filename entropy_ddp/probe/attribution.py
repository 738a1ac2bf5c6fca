"""Attribution: every token's exact share in the first-order change, and what if it were out.

E is divided into blocks of whole groups. Beside the passes of a probe it costs one backward
pass over E (which the audit of forward against reverse mode is part of), block by block,
and for every block one forward-mode pass over U, however large U is. The blocks' shares
sum to those of all of E, and their spread says how much of a share is E's luck.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.answers.shares import BY_KIND, IMPROBABLE, KINDS
from entropy_ddp.data.batch import Batch, Block, Shard
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.entropy import EntropyChange, Ratio
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.estimators.share_blocks import (
    BlockShares,
    block_of_group,
    block_sizes,
    correlation_of_halves,
    left_out,
    reliability,
    share_by,
    standard_error,
)
from entropy_ddp.estimators.shares import (
    TokenTable,
    concentration,
    covariance_score,
    judge_proxy,
    probability_deciles,
    proxies,
    rules,
    rules_by_share,
)
from entropy_ddp.estimators.standard_errors import Estimate, relative_difference
from entropy_ddp.model.parameters import inner_product
from entropy_ddp.model.response_tokens import (
    DirectionalScores,
    TokenScores,
    TokenWeights,
)
from entropy_ddp.probe.estimates import Predictions, changes_at
from entropy_ddp.probe.measurements import HoldSums, Measurements
from entropy_ddp.probe.passes import (
    policy_weights,
    score_along,
    step_taken,
    summed_gradient,
    update_weights,
)
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.reverse_mode import slope_along
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AttributionResult
from entropy_ddp.update.decomposition import step_parts
from entropy_ddp.update.step import Step

# Tokens shown on either side of a token in its context.
CONTEXT_TOKENS = 16


class BlockPasses:
    """The passes that give the gradient of the entropy and the shares, block by block.

    Args:
        session: the run, its parameters and optimizer at theta (the step undone).
        gradient: gradient of the loss, summed over ranks, flat, [P].
        step: the step that was taken with it.
        original: the entropy estimator at theta.
    """

    def __init__(
        self, session: Session, gradient: Tensor, step: Step, original: Ratio
    ) -> None:
        self._session, self._gradient, self._step = session, gradient, step
        self._original = original
        batch = session.batches["E"]
        self._block_of_group = _block_of_group(session)
        self._size = block_sizes(original.size, batch.groups, self._block_of_group)
        self._parts: list[tuple[float, float, float]] = []
        self._shares: list[Tensor] = []
        self._bonus: list[Tensor] = []
        self._even: Tensor | None = None
        self._first: TokenShares | None = None

    def gradient_of(self, shard: Shard, weights: TokenWeights) -> Tensor:
        """Gradient of sum(a log p + b H) over all of E, flat, [P]; keeps the shares.

        Beside it there is one more buffer at any time: that of the block at work. With
        `verify` there is that of the even blocks too.
        """
        session = self._session
        total = torch.zeros(session.passes.layout.numel, dtype=session.buffer_dtype)
        if session.config.attribution.verify:
            self._even = torch.zeros_like(total)
        blocks = shard.divided(self._block_of_group, len(self._size))
        for number, block in enumerate(blocks, start=1):
            sums = (
                [total]
                if number % 2 == 0 or self._even is None
                else [total, self._even]
            )
            self._add_block(sums, block, weights, f"block {number}")
        return total

    def _add_block(
        self, sums: list[Tensor], block: Block, weights: TokenWeights, name: str
    ) -> None:
        """Add a block's gradient to the sums, and score U along it."""
        session = self._session
        of_block = self._pull_back(block, weights, name)
        for total in sums:
            total += of_block
        # The block's part of grad H: it is divided by the denominator of all of E.
        of_block /= self._original.denominator
        split = split_step(session, self._gradient, self._step, of_block, with_own=True)
        self._parts.append((split.momentum, split.decay, split.own))
        found = token_shares(
            session,
            update_weights(session),
            split.direction,
            kept_as=f"shares: U along the gradient, {name}",
        )
        self._shares.append(found.share)
        self._bonus.append(session.shard("U").ragged.sum(found.dentropy))
        # Log p and H are the same of every pass.
        self._first = self._first or found

    def _pull_back(self, block: Block, weights: TokenWeights, name: str) -> Tensor:
        session = self._session

        def weights_of_block(token: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            return weights(block.tokens[token.cpu()], *values)

        def pull_back() -> PassResult:
            flat, _ = summed_gradient(
                session, session.passes, block.shard, weights_of_block
            )
            return PassResult(vectors={"gradient": flat})

        phase = "audit: reverse mode"
        found = session.pass_over(
            block.shard, phase, pull_back, kept_as=f"{phase}, {name}"
        )
        return found.vectors["gradient"]

    def table(self) -> tuple[TokenTable, BlockShares]:
        """Every token of U with its share, and what each block adds to it."""
        assert self._first is not None
        shares = torch.stack(self._shares, dim=1)
        found = replace(self._first, share=shares)
        table, by_block = gather_tokens(self._session, found)
        momentum, decay, _ = torch.tensor(self._parts, dtype=torch.float64).unbind(1)
        blocks = BlockShares(
            share=by_block, momentum=momentum, decay=decay, size=self._size
        )
        return table, blocks

    def hold_sums(self) -> HoldSums:
        """What else is needed to say what would have held the entropy; collective."""
        assert self._first is not None
        session = self._session
        batch, shard = session.batches["U"], session.shard("U")
        # Of every sequence, so that any number of ranks adds up the same.
        by_sequence = session.world.gather_rows(
            torch.stack(self._bonus, dim=1), shard.positions, len(batch)
        )
        *_, own = torch.tensor(self._parts, dtype=torch.float64).unbind(1)
        return HoldSums(
            bonus=by_sequence.sum(0) / max(batch.num_tokens, 1),
            own=own,
            policy_part=_policy_part(session, self._first),
            even=self._even,
        )


def part_estimates(
    session: Session,
    gradient: Tensor,
    step: Step,
    slope: Slope,
    original: Ratio,
    predictions: Predictions | None,
) -> dict[str, Estimate]:
    """Momentum, weight decay and gradient as parts of delta_h1, with their errors.

    One forward-mode pass over E along the momentum, and one along the decay if there is
    any; the gradient's is what they leave. All are of the same sequences, so that the
    errors pair.

    Args:
        gradient: gradient of the loss, summed over ranks, flat, [P].
        step: the step that was taken with it.
        slope: the configured slope along it.
        original: the entropy estimator at theta.
        predictions: the configured baseline's predictions of all tokens of E.
    """
    whole = slope.estimate.scaled(step.learning_rate)
    found, rest, layers = {}, whole, session.passes.layers
    for key, part in (("momentum", "momentum"), ("weight_decay", "decay")):
        direction = _part_of_step(session, gradient, step, part)
        moves = any(bool(piece.any()) for piece in direction.values())
        if not layers.total(float(moves)):
            found[key] = whole.scaled(0.0)
            continue
        name = f"errors of parts: E along the {part}"
        along = slope_along(session, direction, name, original, predictions)
        found[key] = along.estimate.scaled(step.learning_rate)
        rest = rest.minus(found[key])
    # Without a gradient rounding is left, which is no estimate of anything.
    found["gradient"] = (
        rest if not session.passes.is_zero(gradient) else whole.scaled(0.0)
    )
    return found


def _part_of_step(
    session: Session, gradient: Tensor, step: Step, part: str
) -> dict[str, Tensor]:
    """The momentum or the decay part of the step over its learning rate, by name."""
    passes = session.passes
    flat = torch.zeros(passes.layout.numel, dtype=session.buffer_dtype)
    direction = passes.layout.views(flat)
    for name, parts in step_parts(
        session.optimizer, passes.parameters, gradient, step, session.config.update
    ):
        direction[name].copy_(getattr(parts, part) / step.learning_rate)
    return direction


def attribute(session: Session, measured: Measurements) -> None:
    """Add to what was measured the share of every token of U in delta_h1.

    Args:
        measured: with the shares of U's tokens.
    """
    assert measured.token_table is not None and measured.block_shares is not None
    assert measured.parts is not None
    step, slope = measured.step, measured.slope
    errors: dict[str, Any] = {}
    for name, estimate in measured.parts.items():
        errors[f"{name}_se"] = estimate.se
        errors[f"{name}_se_jackknife"] = estimate.se_jackknife
        errors[f"{name}_interval"] = estimate.interval()
    table, blocks = measured.token_table, measured.block_shares
    momentum, decay = float(blocks.momentum.sum()), float(blocks.decay.sum())
    gradient = float(table.share.sum())
    total = momentum + decay + gradient
    correlation = correlation_of_halves(blocks)
    scores = proxies(table)
    judged = {name: judge_proxy(score, table.share) for name, score in scores.items()}
    measured.attribution = AttributionResult(
        momentum=momentum,
        weight_decay=decay,
        gradient=gradient,
        total=total,
        **errors,
        attribution_gap=relative_difference(
            total, step.learning_rate * slope.value, largest_term(measured)
        ),
        num_blocks=blocks.count,
        covariance=judged.pop("covariance"),
        proxies=judged,
        concentration=concentration(table.share),
        summaries=summaries(session, table, blocks),
        what_if=_what_if(session, measured, total),
        top_tokens=top_tokens(session, table),
        half_correlation=correlation,
        reliability=None if correlation is None else reliability(correlation),
    )


def largest_term(measured: Measurements) -> float:
    """The largest term of delta_h1 by absolute value, in nats."""
    terms = measured.slope.terms.values()
    return measured.step.learning_rate * max(map(abs, terms))


def sequence_shares(session: Session, table: TokenTable) -> Tensor:
    """Share of each sequence of U, [N]: the sum of its tokens'."""
    shares = table.share.new_zeros(len(session.batches["U"]))
    return shares.index_add_(0, table.sequence, table.share)


@dataclass(frozen=True, kw_only=True)
class SplitStep:
    """The first-order change by part of the step.

    Attributes:
        momentum: <grad H, momentum part>, nats.
        decay: <grad H, weight-decay part>, nats.
        direction: z = gain * grad H by parameter name: the share of a gradient g_i in
            the change is -<z, g_i>.
        own: <grad H, z>, if it was asked for.
    """

    momentum: float
    decay: float
    direction: dict[str, Tensor]
    own: float = 0.0


def split_step(
    session: Session,
    gradient: Tensor,
    step: Step,
    slope: Tensor,
    *,
    with_own: bool = False,
) -> SplitStep:
    """Momentum and decay parts of delta_h1, and the direction z of the gradient part.

    Args:
        gradient: gradient of the loss, summed over ranks, flat, [P].
        step: the step that was taken with it.
        slope: grad H, gradient of the entropy estimator, flat, [P]; z takes its place.
        with_own: give <grad H, z> too.
    """
    assert session.optimizer is not None
    passes = session.passes
    direction = passes.layout.views(slope)
    momentum = decay = own = 0.0
    for name, parts in step_parts(
        session.optimizer, passes.parameters, gradient, step, session.config.update
    ):
        view = direction[name]
        momentum += inner_product(view, parts.momentum.cpu())
        decay += inner_product(view, parts.decay.cpu())
        if with_own:
            own += inner_product(view, view * parts.gain.to(view))
        view *= parts.gain.to(view)
    momentum, decay, own = passes.layers.totals([momentum, decay, own])
    return SplitStep(momentum=momentum, decay=decay, direction=direction, own=own)


@dataclass(frozen=True, kw_only=True)
class TokenShares:
    """What one forward-mode pass gives of this rank's tokens of U, float64, [t] each.

    Attributes:
        share: share of each token, nats; of several passes, [t, K].
        logp: log-probability.
        entropy: entropy of the distribution it was drawn from.
        dentropy: D_z H, nats.
    """

    share: Tensor
    logp: Tensor
    entropy: Tensor
    dentropy: Tensor


def token_shares(
    session: Session,
    weights: TokenWeights,
    direction: dict[str, Tensor],
    *,
    kept_as: str | None = None,
) -> TokenShares:
    """Share, log p and entropy of this rank's tokens of U.

    Args:
        weights: dL / d log p and dL / dH of every token of this rank's shard of U.
        direction: z, as `split_step` gives it.
        kept_as: see `Session.pass_over`.
    """
    shard = session.shard("U")
    name = "shares: U along the gradient"
    scores = score_along(session, shard, name, direction, kept_as=kept_as)
    tokens = torch.arange(shard.ragged.num_tokens)
    on_logp, on_entropy = weights(tokens, scores.logp, scores.entropy)
    return TokenShares(
        share=-(on_logp * scores.dlogp + on_entropy * scores.dentropy),
        logp=scores.logp,
        entropy=scores.entropy,
        dentropy=scores.dentropy,
    )


def gather_tokens(session: Session, found: TokenShares) -> tuple[TokenTable, Tensor]:
    """Every token of U, all ranks' in file order; one collective.

    Args:
        found: this rank's tokens, with shares of several passes that sum to the share.

    Returns:
        The tokens, and their shares by pass, [T, K].
    """
    batch, shard = session.batches["U"], session.shard("U")
    columns = torch.stack([found.logp, found.entropy], dim=1)
    rows = session.world.gather_rows(
        torch.cat([columns, found.share], dim=1),
        token_places(batch, shard),
        batch.num_tokens,
    )
    by_pass, ragged = rows[:, 2:], batch.ragged
    table = TokenTable(
        share=by_pass.sum(1),
        logp=rows[:, 0],
        entropy=rows[:, 1],
        advantage=ragged.spread(_advantages(session)),
        sequence=ragged.sequence_of_token,
        position=ragged.position,
    )
    return table, by_pass


def score_shares(
    session: Session, weights: TokenWeights, direction: dict[str, Tensor]
) -> TokenTable:
    """Share, log p and entropy of every token of U, of one forward-mode pass.

    Args:
        weights: dL / d log p and dL / dH of every token of this rank's shard of U.
        direction: z, as `split_step` gives it.
    """
    found = token_shares(session, weights, direction)
    table, _ = gather_tokens(session, replace(found, share=found.share[:, None]))
    return table


def token_places(batch: Batch, shard: Shard) -> Tensor:
    """Places of this rank's tokens in the flat token arrays of the whole batch, [t]."""
    starts = batch.ragged.starts[shard.positions]
    return shard.ragged.spread(starts) + shard.ragged.position


def _policy_part(session: Session, found: TokenShares) -> Tensor:
    """Which part of every token's weight in the loss its advantage makes, [T].

    The rest is the KL term's: what weighs advantages leaves it as it is. Collective.
    """
    batch, shard = session.batches["U"], session.shard("U")
    if not session.config.update.kl_coefficient:
        return torch.ones(batch.num_tokens, dtype=torch.float64)
    tokens = torch.arange(shard.ragged.num_tokens)
    whole, own = (
        weights(tokens, found.logp, found.entropy)[0]
        for weights in (update_weights(session), policy_weights(session))
    )
    part = torch.where(whole == 0, 0.0, own / whole)
    return session.world.gather_rows(
        part[:, None], token_places(batch, shard), batch.num_tokens
    )[:, 0]


def _advantages(session: Session) -> Tensor:
    """A_i of U, [N]; 1 for the loss that has none."""
    batch = session.batches["U"]
    if session.config.update.loss == "nll":
        return torch.ones(len(batch), dtype=torch.float64)
    return batch.advantages


def _what_if(
    session: Session, measured: Measurements, total: float
) -> list[dict[str, Any]]:
    """delta_h1 without the tokens that each rule chooses; with `verify`, the truth too."""
    table, blocks = measured.token_table, measured.block_shares
    assert table is not None and blocks is not None
    settings = session.config.attribution
    # A rule that looks at shares chooses with one half, and is judged by the other.
    by_half = [rules_by_share(blocks.half(n), settings.fraction) for n in (0, 1)]
    whole = Evaluation(session=session, base=measured.base)
    halves = halves_of_E(session, measured.base) if settings.verify else []
    rows = []
    chosen = rules(table, settings.fraction)
    for number, (rule, mask) in enumerate(chosen.items(), start=1):
        masks = (mask, mask)
        if rule in by_half[0]:
            masks = (by_half[0][rule], by_half[1][rule])
        left = blocks.total - left_out(blocks, masks)
        row: dict[str, Any] = {
            "rule": rule,
            "num_tokens": int(mask.sum()),
            "delta_h1": total - float(table.share[mask].sum()),
            "delta_h1_cross_fitted": float(left.sum()),
        }
        error = standard_error(left, blocks.size)
        if error is not None:
            row["se"] = error
        if settings.verify:
            name = f"what if {number}"
            if rule in by_half[0]:
                value, error = _cross_fitted_truth(halves, masks, blocks.size, name)
            else:
                change = _masked_truth(whole, ~mask, name)
                value, error = change.value, change.se
            row |= {"delta_h_true": value, "delta_h_true_se": error}
        rows.append(row)
    return rows


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """E, or a half of it, at theta.

    Attributes:
        session: the run, with E for its batch E.
        base: this rank's tokens of it.
    """

    session: Session
    base: TokenScores


def halves_of_E(session: Session, base: DirectionalScores) -> list[Evaluation]:
    """The even and the odd blocks of E; every sequence stays on its rank."""
    batch = session.batches["E"]
    half_of_group = _block_of_group(session) % 2
    halves = session.shard("E").divided(half_of_group, 2)
    return [
        Evaluation(
            session=replace(
                session,
                batches=session.batches
                | {"E": batch.part(half_of_group == number, session.world.world_size)},
            ),
            base=base.at(half.tokens),
        )
        for number, half in enumerate(halves)
    ]


def _block_of_group(session: Session) -> Tensor:
    """Block of each group of E, [num_groups]."""
    batch = session.batches["E"]
    unit = batch.groups.new_zeros(batch.num_groups)
    unit[batch.groups] = session.draws.groups
    return block_of_group(batch.group_order, unit, session.config.attribution.blocks)


def require_halves(session: Session) -> None:
    """Check that a masked step can be measured on either half of E.

    Raises:
        InputError: `verify` is asked for, and a half has fewer than two groups.
    """
    if not session.config.attribution.verify:
        return
    if "E" in session.batches:
        batch, units = session.batches["E"], session.draws.groups
        half = (_block_of_group(session) % 2)[batch.groups]
        spoken = batch.lengths > 0
        sizes = [len(units[spoken & (half == n)].unique()) for n in (0, 1)]
    else:
        count = session.planned["E"].num_prompts
        sizes = [(count + 1) // 2, count // 2]
    if min(sizes) < 2:
        raise InputError(
            "attribution.verify: expected at least 2 groups with response tokens in "
            "either half of E (tokens are chosen with one half, and the step without "
            f"them is measured on the other), found {sizes[0]} and {sizes[1]}; give E "
            "more prompts, or leave attribution.verify out"
        )


def _cross_fitted_truth(
    halves: list[Evaluation],
    chosen: tuple[Tensor, Tensor],
    size: Tensor,
    name: str,
) -> tuple[float, float]:
    """The truth without what a half chose, measured on the other, and its error.

    Of both halves, each counted by its part of the denominator.

    Args:
        chosen: the tokens that the even and the odd blocks chose, as masks, [T] each.
        size: d_b, [K].
    """
    value = error = 0.0
    for number, half in enumerate(halves):
        weight = float(size[number::2].sum())
        keep = ~chosen[1 - number]
        change = _masked_truth(half, keep, f"{name}, half {number + 1}")
        value += weight * change.value
        error = math.hypot(error, weight * change.se)
    return value, error


def _masked_truth(evaluation: Evaluation, keep: Tensor, name: str) -> EntropyChange:
    """Take the step on the kept tokens only, score E, undo; keep [T] of all of U."""
    session = evaluation.session
    update = session.shard("U")
    places = token_places(session.batches["U"], update)
    weights = _masked(update_weights(session), keep[places])

    def masked_step() -> AbstractContextManager[Step]:
        gradient, _ = summed_gradient(
            session, session.passes, update, weights, as_trained=True
        )
        return step_taken(session, gradient)

    return truth_after(
        evaluation,
        masked_step,
        "what if: masked step",
        kept_as=name,
        beside=update.ragged.num_tokens,
    )


def truth_after(
    evaluation: Evaluation,
    take: Callable[[], AbstractContextManager[Step]],
    phase: str,
    *,
    kept_as: str,
    beside: int = 0,
) -> EntropyChange:
    """The change of the entropy by another step: taken, E scored, undone.

    Args:
        take: within what it gives the parameters are those after the step.
        phase: name of the pass, as it is shown.
        kept_as: name of its result.
        beside: tokens that `take` passes over on this rank.
    """
    session = evaluation.session
    shard = session.shard("E")

    def score_after_step() -> PassResult:
        with take():
            return PassResult(tokens=session.passes.score(shard).arrays())

    found = session.pass_over(
        shard,
        phase,
        score_after_step,
        tokens=beside + shard.ragged.num_tokens,
        kept_as=kept_as,
    )
    changes = changes_at(session, evaluation.base, TokenScores(**found.tokens))
    mode, _ = session.config.truth_estimator
    return changes[mode]


def _masked(weights: TokenWeights, keep: Tensor) -> TokenWeights:
    def masked(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        on_logp, on_entropy = weights(token, logp, entropy)
        return on_logp * keep[token.cpu()].to(on_logp), on_entropy

    return masked


def summaries(
    session: Session, table: TokenTable, blocks: BlockShares
) -> dict[str, list[Any]]:
    """Shares by sign of advantage, probability, position, reward and pass rate."""
    batch = session.batches["U"]
    sign = (table.advantage.sign() + 1).long()
    decile = probability_deciles(table.logp)
    edges = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    place = torch.bucketize(table.position + 1, edges, right=True) - 1
    positions = [
        f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        for low, high in pairwise(edges.tolist())
    ]
    found = {
        "advantage": share_by(["A < 0", "A = 0", "A > 0"], sign, blocks),
        "probability decile": share_by(
            [f"{10 * d}-{10 * d + 10} %" for d in range(10)], decile, blocks
        ),
        "position": share_by([*positions, f"{edges[-1]} on"], place, blocks),
    }
    improbable = (table.logp < IMPROBABLE).long()
    # By the sign of A, then by p; those of A = 0 last.
    kind = torch.where(sign == 1, 4, sign + 1 - improbable)
    found[BY_KIND] = share_by(list(KINDS), kind, blocks)
    rewards = [s.reward for s in batch.sequences]
    if all(reward is not None for reward in rewards):
        best = torch.tensor(rewards, dtype=torch.float64)
        passed = (best >= best.max()).double()
        rate = torch.zeros(batch.num_groups, dtype=torch.float64)
        rate.index_add_(0, batch.groups, passed)
        rate /= batch.group_sizes
        quarter = (rate * 4).long().clamp(max=3)[batch.groups]
        ragged = batch.ragged
        found["largest reward"] = share_by(
            ["not reached", "reached"], ragged.spread(passed.long()), blocks
        )
        found["pass rate of the group"] = share_by(
            ["0-25 %", "25-50 %", "50-75 %", "75-100 %"], ragged.spread(quarter), blocks
        )
    return found


def token_rows(session: Session, table: TokenTable) -> Iterator[dict[str, Any]]:
    """The rows of tokens.jsonl.gz, one by one: every token of U, k counted from 1."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    covariance = covariance_score(table.logp, table.advantage)
    columns = {
        "logp": table.logp,
        "entropy": table.entropy,
        "advantage": table.advantage,
        "covariance": covariance,
        "share": table.share,
    }
    for sequence, start in zip(batch.sequences, batch.ragged.starts.tolist()):
        here = slice(start, start + sequence.num_tokens)
        values = zip(*(column[here].tolist() for column in columns.values()))
        ids = sequence.response_ids.tolist()
        for k, (token_id, numbers) in enumerate(zip(ids, values), start=1):
            row = {"index": sequence.index, "k": k, "token_id": token_id}
            if tokenizer is not None:
                row["text"] = tokenizer.decode([token_id])
            yield row | dict(zip(columns, numbers))


def top_tokens(session: Session, table: TokenTable) -> list[dict[str, Any]]:
    """The tokens with the largest shares by absolute value, in their context."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    count = min(session.config.attribution.top, len(table.share))
    rows = []
    for place in table.share.abs().topk(count).indices.tolist():
        sequence = batch.sequences[int(table.sequence[place])]
        position = int(table.position[place])
        row: dict[str, Any] = {
            "index": sequence.index,
            "k": position + 1,
            "share": float(table.share[place]),
            "logp": float(table.logp[place]),
            "entropy": float(table.entropy[place]),
            "advantage": float(table.advantage[place]),
        }
        if tokenizer is not None:
            ids = sequence.response_ids.tolist()
            before = [*sequence.prompt_ids.tolist(), *ids[:position]][-CONTEXT_TOKENS:]
            after = ids[position + 1 : position + 1 + CONTEXT_TOKENS]
            pieces = (before, [ids[position]], after)
            row["context"] = [tokenizer.decode(piece) for piece in pieces]
        rows.append(row)
    return rows
