"""The audits of the step: its gradients, its size, what ran, and the trainer's own."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.checkpoint.trainer_files import (
    find_training_arguments,
    last_step,
    next_grad_norm,
    read_training_arguments,
)
from entropy_ddp.data.microbatch import plan_microbatches
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import (
    has_dropout,
    inner_product,
)
from entropy_ddp.probe.audits.primitives import compare, fact
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow, RunFacts
from entropy_ddp.update.step import Step, learning_rate_of

# Relative difference of the gradient norm from the trainer's own of the same step:
# measured up to 7e-7 in float32, 4e-3 against bfloat16 autocast. A lost or added token
# makes percents of it.
NORM_TOLERANCE = 1e-4
NARROW_NORM_TOLERANCE = 3e-2
# Settings with which a trainer computes in less than float32.
NARROW = ("bf16", "fp16", "tf32")


def gradient_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """Coverage of both gradients, and how that of the entropy lies to the step."""
    gradient, duality, step = measured.gradient, measured.duality, measured.step
    passes, layout = session.passes, session.passes.layout
    total = len(layout.shapes)
    norm, norm_of_v = passes.norm(duality.gradient), step.direction_norm
    dot = passes.inner_product(duality.gradient, step.delta) / step.learning_rate
    cosine = dot / (norm * norm_of_v) if norm * norm_of_v else 0.0
    views = [layout.views(vector).values() for vector in (duality.gradient, step.delta)]
    of_parts = (inner_product(x, delta) for x, delta in zip(*views))
    scale = step.learning_rate * duality.denominator
    products = {
        name: product / scale
        for name, product in zip(layout.shapes, passes.layers.totals(of_parts))
    }
    largest = sorted(products, key=lambda name: -abs(products[name]))[:10]
    of_loss = []
    if gradient is not None:
        of_loss = [
            _coverage_row(session, "loss (Y)", gradient),
            fact("norm of the loss gradient", passes.norm(gradient)),
        ]
    return [
        compare(
            "trainable tensors",
            total,
            "> 0",
            total > 0,
            "nothing is trainable: is the adapter loaded?",
        ),
        fact("trainable elements", passes.num_parameters),
        _coverage_row(session, "entropy (X)", duality.gradient),
        *of_loss,
        fact("sequences in audits with a pass", duality.num_sequences),
        fact("norm of the entropy gradient", norm / duality.denominator),
        fact("norm of v", norm_of_v),
        fact("cosine of entropy gradient and v", cosine),
        fact(
            "entropy gradient . v, first three parameters",
            {name: products[name] for name in list(products)[:3]},
        ),
        fact(
            "entropy gradient . v, ten largest",
            {name: products[name] for name in largest},
        ),
    ]


def _coverage_row(session: Session, name: str, gradient: Tensor) -> AuditRow:
    """Tensors with a gradient that is not all zero."""
    views = session.passes.layout.views(gradient).values()
    found = session.passes.layers.totals(float(view.any()) for view in views)
    nonzero = sum(bool(some) for some in found)
    value = f"{nonzero} of {len(views)} tensors"
    is_loss = name.startswith("loss") and session.config.update.loss != "nll"
    if is_loss and not session.batches["U"].advantages.any():
        # That no group carries a signal is a check of its own.
        return fact(f"gradient coverage: {name}", value, "none: all A are 0")
    return compare(
        f"gradient coverage: {name}",
        value,
        "all non-zero",
        nonzero == len(views),
        "some trainable tensors get no gradient: an adapter that is not in use, B "
        "matrices still zero, or a batch that does not reach them",
        fatal=nonzero == 0,
    )


def step_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """The step, its size, and whether it was one."""
    step = measured.step
    change = step.learning_rate * measured.slope.value
    if session.change is not None:
        return [
            fact("optimizer steps", 0, "0: update.delta gives the change"),
            *_size_rows(step),
        ]
    # About 0.1 to 1 for AdamW.
    relative_size = _rms_without_decay(session, step) / step.learning_rate
    return [
        fact("learning rate", step.learning_rate),
        fact("delta_h1, ten decimals", f"{change:.10f}"),
        fact("delta_h1, ten digits", f"{change:.10e}"),
        compare(
            "optimizer steps",
            step.num_optimizer_steps,
            "1",
            step.num_optimizer_steps == 1,
            "the optimizer stepped more than once",
        ),
        *_size_rows(step),
        compare(
            "rms of the step / learning rate",
            relative_size,
            "1e-3 to 10",
            1e-3 <= relative_size <= 10,
            "below: second moments crush the step (a huge gradient is still "
            "remembered); above: second moments are nearly zero; compare optimizer.pt "
            "with an earlier checkpoint's",
            fatal=False,
        ),
    ]


def _size_rows(step: Step) -> list[AuditRow]:
    """Whether the change is one, and survives rounding."""
    counts = (float(step.delta.count_nonzero()), float(len(step.delta)))
    changed, total = step.totals(counts)
    unchanged = 1 - changed / total
    return [
        compare(
            "norm of the parameter change",
            step.norm,
            "> 0",
            not step.is_zero,
            "the step changed nothing: gradient, momentum and weight decay are all "
            "zero, or the learning rate is below the rounding of the weights (then use "
            "precision.model: float64); a given change may be of the same weights",
        ),
        compare(
            "share of elements that did not change",
            unchanged,
            "< 0.1",
            unchanged < 0.1,
            "the learning rate is tiny against the rounding of the weights, and the step "
            "is lost (use precision.model: float64 or a larger update.lr_override), or "
            "these elements have no gradient and no momentum",
            fatal=False,
        ),
    ]


def _rms_without_decay(session: Session, step: Step) -> float:
    """Root mean square of the parameter change, its weight-decay part left out."""
    assert session.optimizer is not None
    update, layout = session.config.update, session.passes.layout
    # Adam's coupled decay goes through the moments: it has no part of its own.
    decay = {
        id(parameter): learning_rate_of(group, update)
        * (group["weight_decay"] if group["decoupled_weight_decay"] else 0.0)
        for group in session.optimizer.param_groups
        for parameter in group["params"]
    }
    total = 0.0
    for name, view in layout.views(step.delta).items():
        parameter = session.policy.parameters[name]
        rest = view + decay[id(parameter)] * parameter.detach().to(view)
        total += inner_product(rest, rest)
    passes = session.passes
    return math.sqrt(passes.layers.total(total) / passes.num_parameters)


def scale_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """What the slope's pass ran against what the batch file alone says that it should.

    The sum over microbatches of the constant 1/D, D the global denominator, with those
    into which others were split for want of memory; and the response tokens.
    """
    world, batch, base = session.world, session.batches["E"], measured.base
    size = measured.estimates.original.denominator
    counts = (base.num_microbatches, base.num_extra_microbatches)
    ranks, budget, fill = measured.cut
    sharing = session.passes.sharing
    # Those of a pass that other ranks may have run, each planned by one of these.
    planned = sum(
        len(plan_microbatches(block.shard, budget, sharing, fill=fill))
        for rank in range(world.rank, ranks, world.world_size)
        for block in batch.shard(rank, ranks).blocks()
    )
    numbers = [*counts, planned, int(base.logp.isfinite().sum())]
    local = torch.tensor(numbers, dtype=torch.float64)
    run, extra, expected, used = world.sum(local, "scalars").tolist()
    return scale_checks(
        run / size, (expected + extra) / size, int(used), batch.num_tokens
    )


def scale_checks(
    scale_sum: float, expected: float, used: int, planned: int
) -> list[AuditRow]:
    """Scales and tokens that were used against those that were planned."""
    return [
        compare(
            "sum_deriv_scales",
            scale_sum,
            f"{expected:.10g}",
            math.isclose(scale_sum, expected, rel_tol=1e-12),
            "a microbatch was skipped, run twice or scaled by a local count",
        ),
        compare(
            "total_tokens_used",
            used,
            f"{planned}",
            used == planned,
            "tokens were lost or counted twice between the file and the passes",
        ),
    ]


def thorough_rows(measured: Measurements) -> list[AuditRow]:
    """What only the job `audit` asks for."""
    if measured.rate_ratios is None or measured.signal is None:
        return []
    names = ("norm of the parameter change", "delta_h1")
    rows = [
        compare(
            f"{name} at lr / at lr/10",
            ratio,
            "10 within 1 %",
            abs(ratio / 10 - 1) <= 0.01,
            "the step is not proportional to the learning rate: rounding of the weights "
            "swallows the smaller one; use precision.model: float64",
            fatal=False,
        )
        for name, ratio in zip(names, measured.rate_ratios, strict=True)
    ]
    signal = compare(
        "norm of the gradient of mean log p",
        measured.signal,
        "> 0",
        measured.signal > 0,
        "no gradient flows through the responses: the adapter is frozen, disabled or "
        "merged, its matrices are zero, or the responses are empty",
    )
    return [*rows, signal]


def communication_rows(session: Session) -> list[AuditRow]:
    """Number and bytes of collectives, by purpose."""
    return [
        fact(f"collectives: {purpose}", f"{number}, {size} bytes")
        for purpose, (number, size) in session.world.collectives.items()
    ]


def memory_rows(run: RunFacts, configured: int) -> list[AuditRow]:
    """Whether memory ran out on the way; no row if it did not.

    Args:
        run: how often, and the budget that was left.
        configured: the budget of tokens at the start.
    """
    if not run.out_of_memory_retries:
        return []
    return [
        compare(
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


def trainer_rows(session: Session, step: Step) -> list[AuditRow]:
    """The step that U is the batch of, and the norm of its gradient."""
    folder = session.config.checkpoint.path
    if folder is None or "U" not in session.batches:
        return []
    saved = last_step(Path(folder))
    if saved is None:
        return []
    return [*_trainer_step_rows(session, saved), *_norm_rows(session, saved, step)]


def _steps_of_update(session: Session) -> list[int]:
    """The steps that rows of U are of, where the file says it."""
    found = (s.extra.get("step") for s in session.batches["U"].sequences)
    return [step for step in found if type(step) is int]


def _trainer_step_rows(session: Session, saved: int) -> list[AuditRow]:
    steps, size = _steps_of_update(session), len(session.batches["U"])
    if not steps:
        return []
    right = sum(step == saved + 1 for step in steps)
    distinct = sorted(set(steps))
    return [
        compare(
            "U step of the trainer",
            distinct[0] if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}",
            f"{saved + 1}, as the checkpoint has {saved} steps behind it",
            right == size,
            f"{size - right} of U's {size} rows are of other steps by their key `step`: "
            f"the step probed is not the one that was taken from this checkpoint; name "
            f"the file of step {saved + 1} (U-{saved + 1:06d}.jsonl.gz of a "
            "RolloutRecorder), or the checkpoint before the step, or rename a key "
            "`step` that means another thing",
            fatal=right == 0,
        )
    ]


def _norm_rows(session: Session, saved: int, step: Step) -> list[AuditRow]:
    """The norm before clipping; a fact where U is not said to be that batch."""
    assert step.grad_norm is not None and session.config.checkpoint.path is not None
    logged = next_grad_norm(Path(session.config.checkpoint.path))
    if logged is None:
        return []
    name = f"gradient norm, the trainer's of step {saved + 1}"
    if set(_steps_of_update(session)) != {saved + 1}:
        expected = f"{logged:.10g} if U is its batch"
        return [fact(name, step.grad_norm, expected)]
    narrow = _computed_narrowly(session)
    tolerance = NARROW_NORM_TOLERANCE if narrow else NORM_TOLERANCE
    return [
        compare(
            name,
            step.grad_norm,
            f"{logged:.10g} within {tolerance:.0e} of it",
            abs(step.grad_norm - logged) <= tolerance * logged,
            f"the trainer logged {logged:.6g}: ids that are not what was sampled "
            "(record them with RolloutRecorder; texts lose some), another loss, KL "
            "term or temperature than the trainer's (set update.from_checkpoint: true), "
            "dropout, or padding tokens inside responses",
            fatal=_is_replay(session) and not narrow,
        )
    ]


def _computed_narrowly(session: Session) -> bool:
    """Whether trainer or probe compute in less than float32, as far as is known."""
    settings, policy = _settings(session), session.policy
    dtypes = {str(policy.dtype).removeprefix("torch."), *policy.stored.values()}
    if not settings or not dtypes <= {"float32", "float64"}:
        return True
    return any(settings.get(name) for name in NARROW)


def _is_replay(session: Session) -> bool:
    """Whether nothing but U can tell the step from the trainer's."""
    if not session.config.update.from_checkpoint:
        return False
    # An engine's log-probabilities weigh the tokens of the loss.
    sampled_elsewhere = bool(_settings(session).get("use_vllm"))
    return not sampled_elsewhere and not has_dropout(session.policy.model)


def _settings(session: Session) -> dict[str, Any]:
    """The trainer's settings; nothing where they are not known."""
    path = find_training_arguments(session.config.checkpoint)
    try:
        return {} if path is None else read_training_arguments(path).values
    except InputError:
        # Said by another audit; the run takes nothing from it.
        return {}
