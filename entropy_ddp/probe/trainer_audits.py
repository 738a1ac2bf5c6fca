"""The audits against the trainer's log: is U the batch of the step taken from here?"""

from pathlib import Path
from typing import Any

from entropy_ddp import audit
from entropy_ddp.checkpoint.trainer_files import (
    find_training_arguments,
    last_step,
    next_grad_norm,
    read_training_arguments,
)
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import has_dropout
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow
from entropy_ddp.update.step import Step

# Relative difference of the gradient norm from the trainer's own of the same step:
# measured up to 7e-7 in float32, 4e-3 against bfloat16 autocast. A lost or added token
# makes percents of it.
NORM_TOLERANCE = 1e-4
NARROW_NORM_TOLERANCE = 3e-2
# Settings with which a trainer computes in less than float32.
NARROW = ("bf16", "fp16", "tf32")


def trainer_rows(session: Session, step: Step) -> list[AuditRow]:
    """The step that U is the batch of, and the norm of its gradient."""
    folder = session.config.checkpoint.path
    if folder is None or "U" not in session.batches:
        return []
    saved = last_step(Path(folder))
    if saved is None:
        return []
    return [*_step_rows(session, saved), *_norm_rows(session, saved, step)]


def _steps_of_update(session: Session) -> list[int]:
    """The steps that rows of U are of, where the file says it."""
    found = (s.extra.get("step") for s in session.batches["U"].sequences)
    return [step for step in found if type(step) is int]


def _step_rows(session: Session, saved: int) -> list[AuditRow]:
    steps, size = _steps_of_update(session), len(session.batches["U"])
    if not steps:
        return []
    right = sum(step == saved + 1 for step in steps)
    distinct = sorted(set(steps))
    return [
        audit.check(
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
        return [audit.fact(name, step.grad_norm, expected)]
    narrow = _computed_narrowly(session)
    tolerance = NARROW_NORM_TOLERANCE if narrow else NORM_TOLERANCE
    return [
        audit.check(
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
