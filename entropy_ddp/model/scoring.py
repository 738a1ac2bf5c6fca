"""The two ways in which everything here needs the model: `score` and `pull_back`.

`score` is a teacher-forced forward pass that gives, for every response token, its
log-probability and the entropy of the distribution it was drawn from, and at order 1
also their derivatives along a direction in parameter space (forward mode, nothing is
stored). `pull_back` adds the gradient of sum(a log p + b H) over all response tokens
into the parameters' `.grad` (reverse mode, one backward per microbatch), and `gradient`
moves them into one flat buffer. `score_twice` gives second derivatives.

Where memory runs out, the microbatch is split and tried again. A forward pass that fails
leaves nothing; a backward pass has added to some of the gradients already, which are then
made anew: that costs time when it happens, and nothing when it does not.

Where a gradient is NaN or infinite, the token that makes it so is looked for: the pass is
repeated sequence by sequence, and of the first bad one for ever shorter beginnings.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from entropy_ddp.data.batch import Batch, Block, Sequence, Shard
from entropy_ddp.data.microbatch import (
    Microbatch,
    PromptSharing,
    Row,
    make_microbatch,
    plan_microbatches,
)
from entropy_ddp.distributed.sharding import ShardedParameters, WholeLayers
from entropy_ddp.errors import RunError
from entropy_ddp.memory import Allowance, unless_out_of_memory
from entropy_ddp.model.counting import PassCount, counted
from entropy_ddp.model.forward_mode import (
    dual_parameters,
    dual_parts,
    halves,
    undetached,
    weight_norms,
)
from entropy_ddp.model.parameters import (
    ParameterLayout,
    add_gradients,
    inner_product,
    shifted,
)
from entropy_ddp.model.precision import precision_context
from entropy_ddp.model.response_tokens import (
    DirectionalScores,
    ResponseTokens,
    TokenScores,
    TokenWeights,
)

# How far apart the two passes of a second derivative are, in nats: the typical change
# of a token's log p from the middle to either. The rounding of first derivatives, which
# the distance divides, and the fourth derivatives, which its square multiplies, are then
# both below the tolerances of the estimator.
CURVATURE_NATS = {torch.float64: 3e-5, torch.float32: 1.5e-3, torch.bfloat16: 5e-2}
# On a CPU: elements of the widest hidden state of a microbatch, which its caches hold,
# and the fewest tokens for which products with the weights run at full speed.
FILL_ELEMENTS, LEAST_FILL = 1 << 20, 512
# Least change of log p per unit of Euclidean length that is reckoned with: the parameters
# are moved at most so far even if the first derivative vanishes.
LEAST_SLOPE = 0.02
# Elements of a gradient that are looked at together.
_BLOCK = 1 << 22


@dataclass(kw_only=True)
class Passes:
    """Both passes over one rank's shards, which may be empty, and what they have cost.

    `as_trained` of a pass: see `differentiated`.

    Attributes:
        tokens: the policy as a function of response tokens.
        wrapped: the same module inside DistributedDataParallel, or itself when there
            is no process group. Its own settings are not read.
        parameters: the trainable parameters by name.
        dtype, device: the model's.
        advance: called with the number of tokens after every microbatch.
        count_operations: whether floating-point operations are counted.
        layers: whether the model's layers are on every rank whole, or in parts. In parts
            every pass is a collective: all ranks make the same passes in the same order,
            over shards of any size.
        runs_hooks: whether backward passes run hooks on the parameters: not a trainer's.
        allowance: how many tokens of a microbatch fit into memory, as far as is known.
        most_backward: tokens of a microbatch with a backward pass that there is room for,
            where one that failed cannot be made again; None: as many as configured.
        saved_per_position: bytes that a backward pass keeps of each position of a
            microbatch; 0 as long as it was not measured.
        performed: what this rank has run so far, by kind of pass and batch.
    """

    tokens: ResponseTokens
    wrapped: nn.Module
    parameters: Mapping[str, nn.Parameter]
    dtype: torch.dtype
    device: torch.device
    advance: Callable[[int], None] = lambda count: None
    count_operations: bool = False
    layers: WholeLayers = field(default_factory=WholeLayers)
    runs_hooks: bool = True
    allowance: Allowance = field(default_factory=Allowance)
    most_backward: int | None = None
    saved_per_position: float = 0.0
    performed: dict[tuple[str, str], PassCount] = field(default_factory=dict)

    @overload
    def score(self, shard: Shard) -> TokenScores: ...

    @overload
    def score(
        self,
        shard: Shard,
        direction: Mapping[str, Tensor],
        *,
        with_features: bool = False,
        as_trained: bool = False,
    ) -> DirectionalScores: ...

    def score(
        self,
        shard: Shard,
        direction: Mapping[str, Tensor] | None = None,
        *,
        with_features: bool = False,
        as_trained: bool = False,
    ) -> TokenScores:
        """Log p and H of every response token, with a direction also their derivatives.

        Args:
            direction: tangent of each trainable parameter by name (order 1), or None
                (order 0).
            with_features: at order 1, also what baselines and control variates need.

        Raises:
            RunError: a value is not finite, or the model returned no tangent.
        """
        order = 0 if direction is None else 1
        with (
            self.differentiated(as_trained),
            self._counted(f"score order {order}", shard) as count,
        ):
            return self._score(shard, direction, with_features, count)

    def score_twice(
        self,
        shard: Shard,
        direction: Mapping[str, Tensor],
        step: float,
        snapshot_device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Second derivatives of l_i and H_i of every sequence along a direction, [n] each.

        A central difference of two passes with first derivatives: nested forward mode
        costs more than twice as much, and is wrong through layer normalisation.

        Args:
            direction: tangent of each trainable parameter by name, not all zero.
            step: how far along it the two passes are from the middle
                (`difference_step`).
            snapshot_device: where copies of the parameters are kept meanwhile; None for
                each parameter's own device.

        Raises:
            RunError: a value is not finite, or the model returned no tangent.
        """
        second = torch.zeros(2, len(shard.positions), dtype=torch.float64)  # l'', H''
        with (
            self.differentiated(as_trained=False),
            self._counted("score order 2", shard) as count,
        ):
            for sign in (1, -1):
                with shifted(self.parameters, direction, sign * step, snapshot_device):
                    for block in self.blocks(shard):
                        scores = self._score(block.shard, direction, False, count)
                        assert isinstance(scores, DirectionalScores)
                        for sums, values in zip(
                            second, (scores.dlogp, scores.dentropy)
                        ):
                            sums[block.sequences] += sign * block.ragged.sum(values)
        logp, entropy = second / (2 * step)
        return logp, entropy

    def difference_step(self, direction: Mapping[str, Tensor], typical: float) -> float:
        """How far from the middle the two passes of `score_twice` should be.

        Args:
            direction: tangent of each trainable parameter by name, not all zero.
            typical: root mean square of (log p)' along it, over the tokens of all
                ranks.
        """
        squares = sum(inner_product(v, v) for v in direction.values())
        length = math.sqrt(self.layers.total(squares))
        return CURVATURE_NATS[self.dtype] / max(typical, LEAST_SLOPE * length)

    def blocks(self, shard: Shard) -> Iterator[Block]:
        """The blocks of a shard; where a pass is a collective, as many on every rank.

        A rank that has fewer than another gets empty ones.
        """
        blocks = list(shard.blocks())
        missing = self.layers.most(len(blocks)) - len(blocks)
        yield from blocks
        for _ in range(missing):
            yield shard.empty_block()

    def _score(
        self,
        shard: Shard,
        direction: Mapping[str, Tensor] | None,
        with_features: bool,
        count: PassCount,
    ) -> TokenScores:
        num_tokens = shard.ragged.num_tokens
        scores = TokenScores.empty(num_tokens)
        duals: AbstractContextManager[Any] = nullcontext(nullcontext())
        if direction is not None:
            scores = DirectionalScores.empty(num_tokens, with_features)
            if isinstance(self.layers, ShardedParameters):
                duals = dual_parts(self.tokens, self.layers, direction)
            else:
                duals = dual_parameters(self.tokens, self.parameters, direction)
        with torch.no_grad(), duals as tangent_rules:

            def attempt(microbatch: Microbatch, is_spare: bool = False) -> None:
                into = type(scores).empty(1) if is_spare else scores
                with precision_context(self.dtype), tangent_rules:
                    self.layers.within(lambda: self._score_microbatch(microbatch, into))

            for microbatch in self._microbatches(shard, scores, attempt):
                self._performed_one(microbatch, scores, count)
        _require_finite(scores, shard)
        return scores

    def pull_back(
        self,
        shard: Shard,
        weights: TokenWeights,
        collect: Callable[[], None] | None = None,
        *,
        as_trained: bool = False,
    ) -> TokenScores:
        """Put the gradient of sum(a log p + b H) into the parameters' `.grad`.

        Args:
            weights: gives a and b of each token; called for a few tokens at a time, which
                need not be whole sequences.
            collect: called after the backward pass of every microbatch, to move the
                gradients elsewhere; None: they are summed in `.grad`, which is None
                before.

        Returns:
            The log p and H that the pass computed on its way.

        Raises:
            RunError: a value is not finite.
        """
        scores = TokenScores.empty(shard.ragged.num_tokens)
        no_sync = getattr(self.wrapped, "no_sync", nullcontext)
        backward, tokens_done = False, 0

        def attempt(microbatch: Microbatch, is_spare: bool = False) -> None:
            nonlocal backward
            backward = False
            with precision_context(self.dtype):
                settings, used = self.tokens.settings, _nothing if is_spare else weights
                total, logp, entropy = self.wrapped(microbatch, used, settings)
                if not is_spare:
                    scores.fill(microbatch.token.cpu(), logp=logp, entropy=entropy)
                backward = True
                add_gradients(total, self.parameters.values(), self.runs_hooks)
                self.layers.collect_gradients()

        def undo() -> bool:
            """Drop the sum that a part of a microbatch may have been added to."""
            nonlocal tokens_done
            if not backward:
                return False
            self._drop_gradients()
            if collect is None:
                self.advance(-tokens_done)
                scores.num_microbatches = tokens_done = 0
            return collect is None

        with (
            self.differentiated(as_trained),
            self._counted("pull_back", shard) as count,
            no_sync(),
        ):
            for microbatch in self._microbatches(
                shard, scores, attempt, undo, backward=True
            ):
                if collect is not None:
                    collect()
                self._performed_one(microbatch, scores, count)
                tokens_done += len(microbatch.token)
        _require_finite(scores, shard)
        return scores

    def differentiated(self, as_trained: bool) -> AbstractContextManager[None]:
        """The context of a pass: whose derivative it takes.

        Args:
            as_trained: the one that the trainer takes for the gradient, where that is
                not the derivative of the model: DoRA holds the norms of its weights
                fixed. The derivative itself otherwise.
        """
        return undetached([] if as_trained else weight_norms(self.tokens))

    def with_settings(self, **settings: Any) -> "Passes":
        """The same passes with some of the scoring settings replaced."""
        tokens = ResponseTokens(
            self.tokens.causal_lm,
            replace(self.tokens.settings, **settings),
            self.tokens.sharing,
        )
        # Inside DistributedDataParallel or FSDP the module stays, and is told the settings.
        is_wrapped = self.wrapped is not self.tokens or self.layers.has_parts
        wrapped = self.wrapped if is_wrapped else tokens
        return replace(self, tokens=tokens, wrapped=wrapped)

    @property
    def layout(self) -> ParameterLayout:
        """Layout of flat buffers over the trainable parameters."""
        return ParameterLayout.of(self.parameters)

    @property
    def num_parameters(self) -> int:
        """Number of trainable elements, those of all parts."""
        return round(self.layers.total(self.layout.numel))

    def inner_product(self, left: Tensor, right: Tensor) -> float:
        """Inner product of two vectors over the trainable elements, or of parts of them.

        Where ranks have parts, it is of the whole vectors: one collective.
        """
        return self.layers.total(inner_product(left, right))

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm of such a vector."""
        return math.sqrt(self.inner_product(vector, vector))

    def is_zero(self, vector: Tensor) -> bool:
        """Whether every element of such a vector is zero."""
        return not self.layers.total(float(vector.any()))

    def gradient(
        self,
        shard: Shard,
        weights: TokenWeights,
        dtype: torch.dtype,
        *,
        as_trained: bool = False,
    ) -> tuple[Tensor, TokenScores]:
        """This rank's gradient of sum(a log p + b H) as a flat CPU buffer [P].

        A parameter that no token of the shard depends on has gradient zero. The
        parameters' `.grad` are None before and after.

        Raises:
            RunError: a value is not finite.
        """
        flat = torch.zeros(self.layout.numel, dtype=dtype)
        views = self.layout.views(flat)

        def collect() -> None:
            for name, view in views.items():
                gradient = self.parameters[name].grad
                if gradient is not None:
                    view += gradient.to(view)
                    self.parameters[name].grad = None

        # A sum over many microbatches in bfloat16 would depend on their number.
        narrow = any(p.dtype.itemsize < 4 for p in self.parameters.values())
        try:
            if narrow:
                scores = self.pull_back(shard, weights, collect, as_trained=as_trained)
            else:
                scores = self.pull_back(shard, weights, as_trained=as_trained)
                collect()
        finally:
            self._drop_gradients()
        self._require_finite_gradient(shard, weights, flat)
        return flat, scores

    def _require_finite_gradient(
        self, shard: Shard, weights: TokenWeights, flat: Tensor
    ) -> None:
        """Check a gradient [P]; name batch, line and response token if it is not finite."""
        # Block by block: no mask of the whole.
        if all(bool(block.isfinite().all()) for block in flat.split(_BLOCK)):
            return
        place = f"the gradient of batch {shard.batch.split}"
        if self.layers.is_sharded:
            # No pass over one sequence on one rank: each is a collective.
            raise RunError(
                f"{place} is NaN or infinite on this rank; are the advantages and the "
                "sampling log-probabilities right? compute.shard: none names the token"
            )
        spans = zip(shard.ragged.starts.tolist(), shard.ragged.ends.tolist())
        for number, (begin, end) in enumerate(spans):
            here = shard.positions[number : number + 1]
            one = Shard(batch=shard.batch, positions=here)
            bad = partial(self._bad_parameter, one, weights, begin)
            if begin == end or not bad(begin, end):
                continue
            place += f", line {shard.sequences[number].index + 1}"
            # The shortest beginning that is bad ends with the first bad token.
            good, worst = begin, end
            while worst - good > 1:
                middle = (good + worst) // 2
                good, worst = (good, middle) if bad(begin, middle) else (middle, worst)
            name = bad(worst - 1, worst)
            if name is None:
                raise RunError(f"{place} is NaN or infinite in the sum over its tokens")
            raise RunError(
                f"{place}, response token {worst - begin} is NaN or infinite in {name}; "
                "are its advantage and its sampling log-probability right?"
            )
        raise RunError(f"{place} is NaN or infinite in the sum over its sequences")

    def _bad_parameter(
        self, one: Shard, weights: TokenWeights, start: int, first: int, last: int
    ) -> str | None:
        """The first parameter whose gradient is not finite, for one sequence.

        Args:
            one: the sequence alone.
            weights: of the tokens by their places in the whole shard.
            start: place of the sequence's first token there.
            first, last: first and one past the last place of the tokens that count.
        """

        def only_those(place: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            whole = place + start
            other = (whole < first) | (whole >= last)
            found = weights(whole, *values)
            # Rows: one of the weights may be several numbers of each token.
            return tuple(w.index_fill(0, other.nonzero()[:, 0], 0.0) for w in found)

        try:
            self.pull_back(one, only_those)
            for name, parameter in self.parameters.items():
                gradient = parameter.grad
                if gradient is not None and not bool(gradient.isfinite().all()):
                    return name
            return None
        finally:
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _microbatches(
        self,
        shard: Shard,
        scores: TokenScores,
        attempt: Callable[..., None],
        undo: Callable[[], bool] = lambda: False,
        *,
        backward: bool = False,
    ) -> Iterator[Microbatch]:
        """Each microbatch of a shard once the attempt at it has succeeded.

        Where memory runs out, what is left is cut anew with a smaller budget.

        Args:
            shard: this rank's sequences.
            scores: told how many microbatches more it is than the configured budget
                would have made.
            attempt: runs the model over a microbatch; what it leaves of a failure is
                overwritten by the next attempt, or undone. Told of a spare one, it
                leaves nothing.
            undo: called after an attempt that failed; says whether it had to undo the
                earlier ones too, which are then made again.
            backward: whether an attempt passes backward too.

        Raises:
            RunError: memory runs out with a single sequence.
        """
        configured = self.tokens.settings.tokens_per_microbatch
        if backward and self.most_backward is not None:
            configured = min(configured, self.most_backward)

        def plan(budget: int, left: list[int] | None = None) -> list[list[Row]]:
            return plan_microbatches(shard, budget, self.sharing, left, self.fill)

        def attempted() -> Microbatch:
            def run() -> Microbatch:
                microbatch = make_microbatch(shard, waiting[0]).to(self.device)
                attempt(microbatch)
                return microbatch

            return self.layers.together(run, backward)

        done: list[list[Row]] = []
        waiting = deque(plan(self.allowance.of(configured)))
        planned = len(waiting)
        if self.allowance.limit is not None:
            planned = len(plan(configured))
        while self.layers.is_work_left(bool(waiting)):
            if not waiting:
                self.layers.together(lambda: attempt(self._spare(), True), backward)
                continue
            microbatch, shortage = unless_out_of_memory(attempted)
            if microbatch is not None:
                done.append(waiting.popleft())
                scores.num_extra_microbatches = len(done) + len(waiting) - planned
                yield microbatch
                continue
            self._allow_less(shard, waiting[0], shortage)
            self.layers.recover()
            if undo():
                waiting.extend(done)
                done = []
            left = [
                place for rows in waiting for row in rows for place in row.sequences
            ]
            waiting = deque(plan(self.allowance.of(configured), sorted(left)))

    def _spare(self) -> Microbatch:
        """A microbatch of one token, for a rank that has no other in a round."""
        one = torch.zeros(1, dtype=torch.int64)
        sequence = Sequence(
            index=0, group=0, group_key=0, prompt_ids=one, response_ids=one
        )
        shard = Batch(split="spare", sequences=(sequence,)).shard(0, 1)
        (rows,) = plan_microbatches(shard, 2)
        return make_microbatch(shard, rows).to(self.device)

    def _allow_less(self, shard: Shard, rows: list[Row], shortage: str | None) -> None:
        """Allow half of what did not fit, or of the budget if that is smaller."""
        configured = self.tokens.settings.tokens_per_microbatch
        size = len(rows) * max(row.length for row in rows)
        places = [place for row in rows for place in row.sequences]
        if len(places) == 1:
            sequence = shard.sequences[places[0]]
            raise RunError(
                f"out of memory with a single sequence, line {sequence.index + 1} of "
                f"batch {shard.batch.split} ({size} tokens), after "
                f"{self.allowance.num_retries} smaller microbatches (configured: "
                f"{configured} tokens): {shortage}; free memory on this device, run "
                "fewer ranks on it, leave out sequences of this length, or set "
                "precision.model: bfloat16"
            )
        self.allowance.halve(min(size, self.allowance.of(configured)))

    @property
    def fill(self) -> int:
        """Padded tokens up to which rows are put into one microbatch."""
        budget = self.tokens.settings.tokens_per_microbatch
        if self.device.type != "cpu":
            return budget
        return min(budget, max(LEAST_FILL, FILL_ELEMENTS // self.tokens.widest))

    @property
    def sharing(self) -> PromptSharing | None:
        """When responses to one prompt share a row; None for never."""
        return self.tokens.sharing if self.tokens.settings.share_prompts else None

    def _score_microbatch(self, microbatch: Microbatch, scores: TokenScores) -> None:
        hidden, routing = self.tokens.hidden_states_and_routing(microbatch)
        if routing is not None:
            scores.put_routing(microbatch.token.cpu(), routing)
        directional = isinstance(scores, DirectionalScores)
        with_features = isinstance(scores, DirectionalScores) and scores.features
        if with_features:
            projected = self.tokens.projected(halves(hidden)[0])
            scores.fill(microbatch.token.cpu(), hidden=projected)
        values = self.tokens.statistics(
            hidden, microbatch.target_ids, with_features=bool(with_features)
        )
        if directional and "dlogp" not in values:
            raise RunError(
                "the model returned no tangent: every trainable parameter is bypassed "
                "(adapter merged or disabled), or the forward pass runs under "
                "inference_mode or reentrant gradient checkpointing"
            )
        scores.fill(microbatch.token.cpu(), **values)

    @contextmanager
    def _counted(self, kind: str, shard: Shard) -> Iterator[PassCount]:
        with counted(shard, self.count_operations) as count:
            yield count
        key = (kind, shard.batch.split)
        self.performed.setdefault(key, PassCount()).add(count)

    def _performed_one(
        self, microbatch: Microbatch, scores: TokenScores, count: PassCount
    ) -> None:
        count.add_microbatch(microbatch)
        scores.num_microbatches += 1
        self.advance(len(microbatch.token))


def _nothing(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of tokens that count for nothing."""
    return torch.zeros_like(logp), torch.zeros_like(entropy)


def _require_finite(scores: TokenScores, shard: Shard) -> None:
    names = ["logp", "entropy"]
    names += ["dlogp", "dentropy"] if isinstance(scores, DirectionalScores) else []
    for name in names:
        values = scores.array(name)
        if bool(values.isfinite().all()):
            continue
        token = int((~values.isfinite()).nonzero()[0])
        sequence = shard.sequences[int(shard.ragged.sequence_of_token[token])]
        position = int(shard.ragged.position[token]) + 1
        raise RunError(
            f"{name} of batch {shard.batch.split}, line {sequence.index + 1}, response "
            f"token {position} is {float(values[token])}: the model gives this token "
            "probability 0 or its weights are not finite"
        )
