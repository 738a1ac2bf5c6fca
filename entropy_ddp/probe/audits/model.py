"""The audits of the opened model: files, settings, moments, restored bits, its passes."""

from pathlib import Path

from entropy_ddp.checkpoint.trainer_files import (
    TrainingArguments,
    find_training_arguments,
    read_training_arguments,
)
from entropy_ddp.checkpoint.trainer_settings import contradictions
from entropy_ddp.errors import InputError
from entropy_ddp.model.forward_mode import weight_norms
from entropy_ddp.model.implementations import slower_routes
from entropy_ddp.model.parameters import frozen_fingerprint
from entropy_ddp.probe.audits.primitives import compare, fact, threshold
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow

CPU_FACTS = Path("/proc/cpuinfo")
# Of x86 and of ARM.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def stored_rows(session: Session) -> list[AuditRow]:
    """Which weights are used in another dtype than they are stored in."""
    policy = session.policy
    used = str(policy.dtype).removeprefix("torch.")
    return [
        fact(f"weights of the {part} are stored as", stored, f"used as {used}")
        for part, stored in policy.stored.items()
        if stored != used
    ]


def training_rows(session: Session) -> list[AuditRow]:
    """Where the configuration says another thing than the trainer did."""
    path = find_training_arguments(session.config.checkpoint)
    if path is None:
        return []
    try:
        arguments = read_training_arguments(path)
    except InputError as error:
        # Nothing is taken from it: the probe does not depend on it.
        return [fact("training arguments", "not readable", str(error))]
    update = session.batches.get("U")
    given = update is None or all(s.advantage is not None for s in update.sequences)
    return _engine_rows(session, arguments) + [
        compare(
            f"trainer's setting: {key}",
            configured,
            str(trained),
            False,
            f"the step probed is not the one that {path} describes; set "
            f"{key} to what the trainer used if it is to be that one",
            fatal=False,
        )
        for key, (configured, trained) in contradictions(
            session.config, arguments, update
        ).items()
        if not (given and key == "batches.advantage")
    ]


def _engine_rows(session: Session, arguments: TrainingArguments) -> list[AuditRow]:
    """Whether the trainer's loss weighs tokens by the ratio to an inference engine."""
    values, correction = arguments.values, "vllm_importance_sampling_correction"
    is_trainers = "U" in session.batches and session.config.update.loss != "nll"
    if not (is_trainers and values.get("use_vllm") and values.get(correction)):
        return []
    return [
        compare(
            f"trainer's setting: {correction}",
            "no weights",
            "true, as the trainer had it",
            False,
            "the trainer's loss also weighs responses by the ratio of the policy to the "
            "engine that sampled them, which the loss here does not have: the step probed "
            "is the one with all these weights 1",
            fatal=False,
        )
    ]


def moment_rows(session: Session) -> list[AuditRow]:
    """Parameters without optimizer state, and second moments that are tiny or zero."""
    if session.optimizer is None:
        return []
    zero = tiny = total = 0.0
    with_state = {id(p) for p, state in session.optimizer.state.items() if state}
    parameters = session.policy.parameters.values()
    stateless = sum(id(p) not in with_state for p in parameters)
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            moment = session.optimizer.state[parameter]["exp_avg_sq"]
            zero += float((moment == 0).sum())
            tiny += float((moment < group["eps"] ** 2).sum())
            total += moment.numel()
    zero, tiny, total = session.passes.layers.totals([zero, tiny, total])
    return [
        compare(
            "parameters without optimizer state",
            stateless,
            "0",
            stateless == 0,
            "their step is not the trainer's",
        ),
        *_moment_rows(tiny / total, zero / total),
    ]


def _moment_rows(tiny_share: float, zero_share: float) -> list[AuditRow]:
    """Second moments that are zero or below eps^2: elements the step hardly scales."""
    hint = (
        "the optimizer has hardly seen a gradient there: its step is lr * sign-like "
        "noise or crushed by eps; was the checkpoint saved after very few steps?"
    )
    return [
        compare(
            "second moments equal to 0",
            zero_share,
            "< 0.5 of all",
            zero_share < 0.5,
            hint,
            fatal=False,
        ),
        compare(
            "second moments below eps^2",
            tiny_share,
            "< 0.5 of all",
            tiny_share < 0.5,
            hint,
            fatal=False,
        ),
    ]


def state_rows(session: Session, measured: Measurements) -> list[AuditRow]:
    """Restored bits, equality of ranks, and what was verified of the model."""
    before, after_step, restored = measured.hashes
    model = session.policy.model
    frozen = frozen_fingerprint(model, session.passes.layers.gathered)
    all_hashes = session.world.gather_objects((before, after_step, restored, frozen))
    equal = [len(set(hashes)) == 1 for hashes in zip(*all_hashes)]
    rows = [
        compare(
            "restored bits: parameters and optimizer state",
            restored[:16],
            before[:16],
            before == restored,
            "the probe changed the model in memory; the files are untouched",
        )
    ]
    names = (
        "parameters before the step",
        "parameters after the step",
        "parameters after the restore",
        "frozen parameters",
    )
    for name, same in zip(names, equal):
        rows.append(
            compare(
                f"equal on all ranks: {name}",
                same,
                "true",
                same,
                "ranks hold different weights: do all machines read the same files?",
            )
        )
    for item in session.self_checks:
        rows.append(
            threshold(
                f"self-check: {item.name}",
                item.error,
                item.tolerance,
                "such a model is refused when it is opened",
            )
        )
    return [*rows, *_route_rows(session), *_sharing_rows(session)]


def multiplies_bfloat16(cpuinfo: Path = CPU_FACTS) -> bool | None:
    """Whether this CPU has instructions for products in bfloat16; None if unknown."""
    if not cpuinfo.is_file():
        return None
    return not BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text().split())


def precision_rows(device: str, dtype: str, native: bool | None) -> list[AuditRow]:
    """What bfloat16 costs on a CPU that has no instructions for it.

    Args:
        native: whether there are such instructions; None if unknown.
    """
    if device != "cpu" or dtype != "bfloat16" or native is None:
        return []
    return [
        compare(
            "bfloat16 instructions of the CPU",
            native,
            "true",
            native,
            "products are emulated, at about four times the cost of float32, and rounding "
            "is in every number; set precision.model: float32",
            fatal=False,
        )
    ]


def _route_rows(session: Session) -> list[AuditRow]:
    """Parts of the model that take the plain, slower code path."""
    policy, asked = session.policy, session.config.compute.attention
    dtype = session.config.precision.model
    rows = precision_rows(policy.device.type, dtype, multiplies_bfloat16())
    if weight_norms(policy.model):
        text = "not the derivative: DoRA holds weight norms fixed"
        rows.append(fact("the trainer's gradient", text))
    return rows + [
        fact(f"{part} implementation", f"eager: {reason}")
        for part, reason in slower_routes(policy.model, asked, policy.dtype).items()
    ]


def _sharing_rows(session: Session) -> list[AuditRow]:
    """Whether prompts with several responses were computed once."""
    sharing = session.sharing
    if sharing is None:
        return []
    repeated = any(
        len(set(batch.column("prompt_digest"))) < len(batch)
        for batch in session.batches.values()
    )
    return [
        compare(
            "responses share their prompt's row",
            sharing.sharing is not None,
            "true where a prompt has several responses" if repeated else "",
            sharing.sharing is not None or not repeated,
            f"{sharing.reason}; results are the same, but each response's pass computes "
            "the prompt again; compute.share_prompts: false says that this is known",
            fatal=False,
        )
    ]
