"""The batch of an optimizer step, and what its loss weighs every token by.

A forward hook sees the token ids that the loss is computed from. Hooks on the gradient
see the exact weights of every token,

    a_t = dL / d log p_t        b_t = dL / dH_t

of the loss L whose gradient the optimizer steps on, whatever it is: clipping, KL term,
normalisation and accumulation are in them, and nothing is implemented again.

Where the model returns log-probabilities (TRL), the hooks are on them. Where it returns
logits z (cross-entropy), the gradient of a loss of log p_y alone is a_t (1_y - p), and
a_t is read off by projection; a gradient that has another part is refused.

`listen` tells of every call of a trainer's method, with its arguments and what it returned.
The method is replaced on the instance, once for all its listeners, and comes back with the
last of them; so two callbacks may listen to one method and end in any order.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.data.batch import Batch, Sequence, Shard
from entropy_ddp.errors import InputError

IGNORED_LABEL = -100
# Place of each response in the order of sampling, in the batches of a trainer that samples.
ORDER = "entropy_ddp_order"
# What a trainer of TRL that samples calls for each batch.
SAMPLING = "_generate_and_score_completions"
# Part of the gradient by the logits that may be rounding, relative to its norm.
LOGITS_RESIDUAL = 1e-2
# What a row has of each of its response tokens.
COLUMNS = ("on_logp", "on_entropy", "logp", "entropy")
NO_ENTROPY = (
    "entropy floor: expected the entropy of every token from the trainer's forward pass, "
    "found none; train with a release of TRL that computes it, or without the callback"
)
# Positions whose softmax is computed at a time.
CHUNK_POSITIONS = 256


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """One sequence of the batch that is stepped on.

    Attributes:
        prompt_ids: token ids up to the first token of the loss.
        response_ids: those from there to the last token of the loss.
        on_logp, on_entropy: a_t and b_t of each response token; 0 where the loss does
            not depend on it.
        logp, entropy: log p and H of each response token as the trainer computed them;
            NaN where it did not.
        advantage: its advantage; 1 where there are none.
        draw: number of the draw of its prompt; None where the trainer does not sample.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    on_logp: list[float]
    on_entropy: list[float]
    logp: list[float]
    entropy: list[float]
    advantage: float
    draw: int | None


@dataclass(kw_only=True)
class _ForwardPass:
    """One forward pass of the trainer, shifted: column j is about token j + 1.

    Attributes:
        input_ids, attended: [B, L].
        counted: whether the loss may depend on the token, [B, L - 1].
        advantages, draws: [B]; None if there are none.
        logp, entropy, on_logp, on_entropy: [B, L - 1]; None until known.
        residual: share of the logits' gradient that is not of log p.
    """

    input_ids: Tensor
    attended: Tensor
    counted: Tensor
    advantages: Tensor | None
    draws: Tensor | None
    logp: Tensor | None = None
    entropy: Tensor | None = None
    on_logp: Tensor | None = None
    on_entropy: Tensor | None = None
    residual: float = 0.0


def sampling_order(trainer: Any) -> Callable[[dict[str, Any]], None]:
    """What numbers the responses of a trainer, before it mixes and splits them.

    A run of `num_generations` of them, over all ranks, is one draw of a prompt: rows of
    equal prompts may be of two.

    Args:
        trainer: TRL's GRPOTrainer, or one that samples as it does.

    Returns:
        Called with every batch that was just sampled, it gives each row its place.
    """
    num_sampled = 0

    def number(batch: dict[str, Any]) -> None:
        nonlocal num_sampled
        if not trainer.model.training:
            return
        size = len(batch["completion_ids"])
        first = num_sampled + trainer.accelerator.process_index * size
        batch[ORDER] = torch.arange(first, first + size)
        num_sampled += trainer.accelerator.num_processes * size

    return number


class BatchCapture:
    """Watches the forward passes between the begin of a step and its optimizer step.

    Args:
        model: the trained model, not wrapped.
        num_ranks: number of ranks, over which gradients are averaged.
        draw_size: how many responses in the order of sampling are of one draw.
        reweigh: gives a weight for each token from log p [B, L - 1] and advantage [B, 1],
            by which the gradient of the loss through its log p is multiplied; None
            leaves it as it is.

    Attributes:
        inputs: what the loss was last called with.
    """

    def __init__(
        self,
        model: nn.Module,
        num_ranks: int,
        draw_size: int = 1,
        reweigh: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.inputs: dict[str, Any] = {}
        self._model = model
        self._num_ranks = num_ranks
        self._draw_size = draw_size
        self._reweigh = reweigh
        self._microbatches: list[_ForwardPass] = []
        self._handles: list[Any] = []
        self._is_seen = False

    def arm(self) -> None:
        """Watch from now on, from an empty batch."""
        self.disarm()
        self._microbatches = []
        self._handles = [self._model.register_forward_pre_hook(self._begun)]
        for module in _layers_of(self._model):
            hook = module.register_forward_hook(self._returned, with_kwargs=True)
            self._handles.append(hook)

    def disarm(self) -> None:
        """Watch no longer; what was seen is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rows(self) -> list[TrainedRow]:
        """This rank's sequences of the batch, in the order they were passed in.

        Raises:
            InputError: the loss does not go through log-probabilities or logits that
                the model returns.
        """
        if all(batch.on_logp is None for batch in self._microbatches):
            raise InputError(
                "training batch: expected a loss of the log-probabilities or logits that "
                "the model returns, found none with a gradient (a fused loss, logits "
                "converted by mixed precision, or no forward pass at all); train "
                "without the callback"
            )
        return [row for batch in self._microbatches for row in self._rows_of(batch)]

    def _begun(self, module: nn.Module, args: Any) -> None:
        self._is_seen = False

    def _returned(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The first to return is the innermost that was called as a module."""
        if self._is_seen or not (module.training and torch.is_grad_enabled()):
            return
        self._is_seen = True
        batch = self._microbatch(args, kwargs)
        logp = getattr(output, "log_probs", None)
        if logp is not None and logp.requires_grad:
            batch.logp = logp.detach()
            if self._reweigh is not None:
                # Before the keeper: what it keeps is what the optimizer steps on.
                logp.register_hook(_multiplier(self._weights_of(batch)))
            logp.register_hook(_keeper(batch, "on_logp"))
            entropy = getattr(output, "entropy", None)
            if entropy is not None:
                batch.entropy = entropy.detach()
                if entropy.requires_grad:
                    entropy.register_hook(_keeper(batch, "on_entropy"))
        elif getattr(output, "logits", None) is not None:
            logits = output.logits
            # Not the graph: it may be freed when the hook runs.
            values = logits.detach()
            logits.register_hook(lambda slope: _read_off(batch, values, slope))
        self._microbatches.append(batch)

    def entropy_sums(self) -> Tensor:
        """Sum of H over this rank's tokens of the batch, and their number; float64, [2]."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._microbatches:
            if batch.entropy is None:
                raise InputError(NO_ENTROPY)
            values = batch.entropy.double().cpu()[batch.counted.cpu()]
            sums += torch.stack([values.sum(), torch.tensor(float(len(values)))])
        return sums

    def _weights_of(self, batch: _ForwardPass) -> Tensor:
        assert self._reweigh is not None and batch.logp is not None
        if batch.advantages is None:
            raise InputError(
                "entropy floor: expected an advantage for each sequence of the loss, "
                "found none; train without the callback"
            )
        return self._reweigh(batch.logp, batch.advantages[:, None])

    def _microbatch(self, args: Any, kwargs: dict[str, Any]) -> _ForwardPass:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or kwargs.get("position_ids") is not None:
            raise InputError(
                "training batch: expected batches of input_ids, one sequence a row, found "
                f"{'packed rows' if ids is not None else 'embeddings'}; turn packing and "
                "padding_free off, or train without the callback"
            )
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        labels = self.inputs.get("labels") if labels is None else labels
        attended = torch.ones_like(ids) if mask is None else mask
        counted = attended[:, 1:] != 0
        if labels is not None:
            counted = counted & (labels[:, 1:] != IGNORED_LABEL)
        advantages = self.inputs.get("advantages")
        if advantages is not None and advantages.shape != ids.shape[:1]:
            raise InputError(
                "training batch: expected one advantage for each sequence, found "
                f"advantages of shape {list(advantages.shape)} for {len(ids)} sequences; "
                "advantages by token are not supported"
            )
        order = self.inputs.get(ORDER)
        return _ForwardPass(
            input_ids=ids.detach(),
            attended=attended.detach() != 0,
            counted=counted,
            advantages=advantages,
            draws=None if order is None else order // self._draw_size,
        )

    def _rows_of(self, batch: _ForwardPass) -> list[TrainedRow]:
        if batch.residual > LOGITS_RESIDUAL:
            raise InputError(
                "training batch: expected a loss of the labels' log-probabilities, found "
                f"one with another part ({100 * batch.residual:.0f} % of its gradient: "
                "label smoothing?); this loss cannot be attributed to tokens"
            )
        # DistributedDataParallel divides the sum of the ranks' gradients by their number.
        columns = torch.stack(
            [
                _or_constant(batch.on_logp, batch.counted, 0.0) / self._num_ranks,
                _or_constant(batch.on_entropy, batch.counted, 0.0) / self._num_ranks,
                _or_constant(batch.logp, batch.counted, torch.nan),
                _or_constant(batch.entropy, batch.counted, torch.nan),
            ]
        ).cpu()
        # Column j of what is counted is about token j + 1.
        counted, length = batch.counted.cpu(), batch.input_ids.shape[1]
        if not bool(counted.any()):
            return []
        column, place = torch.arange(length), torch.arange(1, length)
        first = torch.where(counted, place, length).amin(1, keepdim=True)  # [B, 1]
        last = torch.where(counted, place, 0).amax(1, keepdim=True)
        # Of a row without such a token there is no prompt and no response.
        attended = batch.attended.cpu() & counted.any(1, keepdim=True)
        is_prompt = attended & (column < first)
        is_response = attended & (column >= first) & (column <= last)
        ids, sizes = batch.input_ids.cpu(), is_response.sum(1).tolist()
        prompts = ids[is_prompt].split(is_prompt.sum(1).tolist())
        responses = ids[is_response].split(sizes)
        values = columns[:, is_response[:, 1:]].split(sizes, dim=1)
        advantages, draws = batch.advantages, batch.draws
        return [
            TrainedRow(
                prompt_ids=prompts[number].tolist(),
                response_ids=responses[number].tolist(),
                **dict(zip(COLUMNS, values[number].tolist(), strict=True)),
                advantage=1.0 if advantages is None else float(advantages[number]),
                draw=None if draws is None else int(draws[number]),
            )
            for number in counted.any(1).nonzero()[:, 0].tolist()
        ]


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The model and what PEFT has wrapped, each once.

    Of these PEFT calls some past their hooks, by `forward`: with a task type the
    innermost, without one the tuner in between.
    """
    if not hasattr(model, "get_base_model"):
        return [model]
    tuner, base = model.base_model, model.get_base_model()
    layers = {id(layer): layer for layer in (model, tuner, base)}
    return list(layers.values())


def _keeper(batch: _ForwardPass, name: str) -> Callable[[Tensor | None], None]:
    # An output that the loss does not use has no gradient under DistributedDataParallel.
    def keep(slope: Tensor | None) -> None:
        if slope is not None:
            setattr(batch, name, slope.detach().double())

    return keep


def _multiplier(weights: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda slope: slope * weights.to(slope)


def _read_off(batch: _ForwardPass, logits: Tensor, slope: Tensor | None) -> None:
    """a_t from the gradient by the logits, [B, L, V]."""
    if slope is None:
        return
    weights = torch.zeros(batch.counted.shape, dtype=torch.float64)
    values = torch.full(batch.counted.shape, torch.nan, dtype=torch.float64)
    rest = whole = 0.0
    row, column = batch.counted.nonzero(as_tuple=True)
    for part in range(0, len(row), CHUNK_POSITIONS):
        here = (
            row[part : part + CHUNK_POSITIONS],
            column[part : part + CHUNK_POSITIONS],
        )
        logp = logits[here].double().log_softmax(-1)  # [c, V]
        target = batch.input_ids[here[0], here[1] + 1][:, None]
        # 1_y - p, the gradient of log p_y by the logits.
        basis = (-logp.exp()).scatter_add_(
            1, target, torch.ones_like(target, dtype=logp.dtype)
        )
        # a_t by least squares; what it leaves is of no log p_y.
        given = slope[here].double()
        size = basis.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        factor = (given * basis).sum(1) / size
        rest += float((given - factor[:, None] * basis).square().sum())
        whole += float(given.square().sum())
        places = (here[0].cpu(), here[1].cpu())
        weights[places] = factor.cpu()
        values[places] = logp.gather(1, target)[:, 0].cpu()
    # What the positions that are not counted add to the loss is not of log p either.
    whole_slope = float(slope.double().square().sum())
    rest += max(0.0, whole_slope - whole)
    batch.on_logp, batch.logp = weights, values
    batch.residual = (rest / whole_slope) ** 0.5 if whole_slope else 0.0


def _or_constant(values: Tensor | None, counted: Tensor, constant: float) -> Tensor:
    if values is None:
        return torch.full(counted.shape, constant, dtype=torch.float64)
    return values.double().cpu().masked_fill(~counted.cpu(), constant)


@dataclass(frozen=True, kw_only=True)
class TrainedBatch:
    """The rows of all ranks as a batch U.

    Attributes:
        batch: the batch; a draw of a prompt is one group, and where the trainer does
            not sample, responses to one prompt are.
        rows: the rows in its order.
    """

    batch: Batch
    rows: list[TrainedRow]

    @classmethod
    def of(cls, rows: list[TrainedRow]) -> "TrainedBatch":
        """The batch of these rows.

        Raises:
            InputError: a sequence has no token before its first token of the loss.
        """
        groups: dict[Any, int] = {}
        sequences = []
        for index, row in enumerate(rows):
            if not row.prompt_ids:
                raise InputError(
                    "training batch: expected a token before the first token of the loss, "
                    f"found none in sequence {index + 1} of the batch"
                )
            draw = tuple(row.prompt_ids) if row.draw is None else row.draw
            group = groups.setdefault(draw, len(groups))
            sequence = Sequence(
                index=index,
                group=group,
                group_key=group,
                prompt_ids=torch.tensor(row.prompt_ids),
                response_ids=torch.tensor(row.response_ids),
                advantage=row.advantage,
            )
            sequences.append(sequence)
        first = {s.group: s.prompt_ids for s in reversed(sequences)}
        # The responses of a group share one copy of its prompt.
        shared = tuple(replace(s, prompt_ids=first[s.group]) for s in sequences)
        return cls(batch=Batch(split="U", sequences=shared), rows=rows)

    def token_values(self, shard: Shard, name: str) -> Tensor:
        """One of the rows' lists as a flat token array of a shard, float64, [t]."""
        mine = [getattr(self.rows[i], name) for i in shard.positions.tolist()]
        flat = [value for values in mine for value in values]
        return torch.tensor(flat, dtype=torch.float64)


class _Announced:
    """A method that tells its listeners of every call."""

    def __init__(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)
        functools.update_wrapper(self, method)
        self._method = method
        self._replaced = vars(owner).get(name)
        # What is called before and after each call, by listener.
        self.listeners: dict[
            object, tuple[Callable[..., None] | None, Callable[[Any], None] | None]
        ] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        present = list(self.listeners.values())
        for before, _ in present:
            if before is not None:
                before(*args, **kwargs)
        result = self._method(*args, **kwargs)
        for _, after in present:
            if after is not None:
                after(result)
        return result

    def withdraw(self, owner: Any, name: str) -> None:
        """Bring back what the instance had under this name, or its class's method."""
        if self._replaced is None:
            delattr(owner, name)
        else:
            setattr(owner, name, self._replaced)


def listen(
    owner: Any,
    name: str,
    *,
    before: Callable[..., None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> Callable[[], None]:
    """Be told of every call of a method from now on.

    Args:
        owner, name: the object and its method.
        before: called with the arguments, before the method is.
        after: called with what the method returned, if it did.

    Returns:
        What ends it; a second call does nothing.
    """
    found = vars(owner).get(name)
    announced = found if isinstance(found, _Announced) else _Announced(owner, name)
    if announced is not found:
        setattr(owner, name, announced)
    listener = object()
    announced.listeners[listener] = (before, after)

    def end() -> None:
        if announced.listeners.pop(listener, None) is None:
            return
        # Not where somebody else has replaced it meanwhile: theirs calls this one.
        if not announced.listeners and vars(owner).get(name) is announced:
            announced.withdraw(owner, name)

    return end


def follow(
    trainer: Any, capture: BatchCapture, on_norm: Callable[[float], None]
) -> ExitStack:
    """Tell a capture what the loss is called with, until the stack is closed.

    Then it is disarmed too.

    Args:
        on_norm: told the norm of every gradient before it is clipped.
    """

    def before_loss(model: Any, inputs: Any, *_: Any, **__: Any) -> None:
        capture.inputs = dict(inputs)

    def after_loss(_: Any) -> None:
        capture.inputs = {}

    listening = ExitStack()
    hear = listening.callback
    # A training that failed within a step has left its hooks on the model.
    hear(capture.disarm)
    hear(listen(trainer, "compute_loss", before=before_loss, after=after_loss))
    hear(
        listen(
            trainer.accelerator,
            "clip_grad_norm_",
            after=lambda norm: on_norm(float(norm)),
        )
    )
    if hasattr(trainer, SAMPLING):
        hear(listen(trainer, SAMPLING, after=sampling_order(trainer)))
    return listening
