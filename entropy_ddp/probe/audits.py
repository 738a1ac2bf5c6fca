"""The audits of a probe: facts from every rank, turned into rows with a verdict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp import audit
from entropy_ddp.errors import InputError
from entropy_ddp.policy.forward_mode import weight_norms
from entropy_ddp.policy.implementations import slower_routes
from entropy_ddp.policy.parameters import (
    ParameterLayout,
    frozen_fingerprint,
    global_norm,
    inner_product,
)
from entropy_ddp.policy.scores import TokenScores
from entropy_ddp.policy.trained_settings import contradictions
from entropy_ddp.policy.training_arguments import (
    find_training_arguments,
    read_training_arguments,
)
from entropy_ddp.probe.gradient_dot import obstacle
from entropy_ddp.probe.measure import Measured
from entropy_ddp.probe.phases import SteppedScores
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow, GradientDotResult
from entropy_ddp.rollouts.batch import Batch, Ragged
from entropy_ddp.rollouts.microbatch import plan_microbatches
from entropy_ddp.update.step import Step, learning_rate_of

# Of the term scale: the largest of the sums whose difference is the slope.
GAP_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What only some jobs find out; None where it was not asked for.

    Attributes:
        ratios: change and prediction at lr over those at lr / 10.
        signal: norm of the gradient of mean log p.
        dot: the gradient-dot form.
    """

    ratios: tuple[float, float] | None = None
    signal: float | None = None
    dot: GradientDotResult | None = None


def audit_rows(session: Session, measured: Measured, extras: Extras) -> list[AuditRow]:
    """All audits of a probe."""
    rows = [
        *_stored_rows(session),
        *_vector_rows(session, measured),
        *_step_rows(session, measured),
        *_update_batch_rows(session),
        *_training_rows(session),
        *_batch_rows(session),
        *_moment_rows(session),
        *_scale_rows(session, measured),
        *_sampler_rows(session, measured),
        _on_policy_row(session, measured),
        audit.close(
            "duality gap",
            measured.duality.gap,
            tolerance_of(session, GAP_TOLERANCE),
            "forward and reverse mode disagree: an operation of this model loses or "
            "detaches a derivative; try compute.attention: eager",
        ),
        *_truth_rows(session, measured),
        *_state_rows(session, measured.stepped),
        *_communication_rows(session),
    ]
    if session.config.gradient_dot.enabled == "auto":
        rows += _gradient_dot_row(session)
    if extras.dot is not None:
        rows += [
            audit.fact("U_cross, ten decimals", f"{extras.dot.u_cross:.10f}"),
            audit.fact("U_cross, ten digits", f"{extras.dot.u_cross:.10e}"),
            audit.fact("deltaH1 of the gradient-dot form", extras.dot.deltaH1),
        ]
    if extras.ratios is not None:
        rows += audit.proportionality_checks(extras.ratios)
    if extras.signal is not None:
        rows.append(audit.signal_check(extras.signal))
    return rows


def tolerance_of(session: Session, tolerances: Mapping[torch.dtype, float]) -> float:
    """The tolerance of the narrower of the dtypes of model and parameter buffers."""
    return max(tolerances[d] for d in (session.policy.dtype, session.buffer_dtype))


def _gradient_dot_row(session: Session) -> list[AuditRow]:
    """Why the gradient-dot form was not computed, where it was not."""
    reason = obstacle(session.batches)
    return [] if reason is None else [audit.fact("gradient-dot form", "no", reason)]


def _stored_rows(session: Session) -> list[AuditRow]:
    """Which weights are used in another dtype than they are stored in."""
    policy = session.policy
    used = str(policy.dtype).removeprefix("torch.")
    return [
        audit.fact(f"weights of the {part} are stored as", stored, f"used as {used}")
        for part, stored in policy.stored.items()
        if stored != used
    ]


def _vector_rows(session: Session, measured: Measured) -> list[AuditRow]:
    gradient, duality, step = measured.gradient, measured.duality, measured.step
    layout = session.passes.layout
    total = len(layout.shapes)
    norm, norm_of_v = global_norm(duality.gradient), step.direction_norm
    dot = inner_product(duality.gradient, step.delta) / step.learning_rate
    cosine = dot / (norm * norm_of_v) if norm * norm_of_v else 0.0
    products = {
        name: inner_product(x.reshape(-1), delta.reshape(-1))
        / (step.learning_rate * duality.denominator)
        for (name, x), delta in zip(
            layout.views(duality.gradient).items(), layout.views(step.delta).values()
        )
    }
    largest = sorted(products, key=lambda name: -abs(products[name]))[:10]
    loss_rows = []
    if gradient is not None:
        loss_rows = [
            audit.coverage_check(
                "gradient coverage: loss (Y)",
                _num_nonzero(layout, gradient),
                total,
                has_signal=_has_signal(session),
            ),
            audit.fact("norm of the loss gradient", global_norm(gradient)),
        ]
    return [
        audit.check(
            "trainable tensors",
            total,
            "> 0",
            total > 0,
            "nothing is trainable: is the adapter loaded?",
        ),
        audit.fact("trainable elements", layout.numel),
        audit.coverage_check(
            "gradient coverage: entropy (X)",
            _num_nonzero(layout, duality.gradient),
            total,
        ),
        *loss_rows,
        audit.fact("sequences in audits with a pass", duality.num_sequences),
        audit.fact("norm of the entropy gradient", norm / duality.denominator),
        audit.fact("norm of v", norm_of_v),
        audit.fact("cosine of entropy gradient and v", cosine),
        audit.fact(
            "entropy gradient . v, first three parameters",
            {name: products[name] for name in list(products)[:3]},
        ),
        audit.fact(
            "entropy gradient . v, ten largest",
            {name: products[name] for name in largest},
        ),
    ]


def _num_nonzero(layout: ParameterLayout, flat: Tensor) -> int:
    """Number of parameters with an element that is not zero."""
    return sum(bool(view.any()) for view in layout.views(flat).values())


def _has_signal(session: Session) -> bool:
    """Whether any advantage of U is not zero."""
    no_advantages = session.config.update.loss == "nll"
    return no_advantages or bool(session.batches["U"].advantages.any())


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
        total += float(rest.double().square().sum())
    return math.sqrt(total / layout.numel)


def _step_rows(session: Session, measured: Measured) -> list[AuditRow]:
    step = measured.step
    change = step.learning_rate * measured.slope.value
    if session.change is not None:
        return [
            audit.fact("optimizer steps", 0, "0: update.delta gives the change"),
            *_size_rows(step),
        ]
    return [
        audit.fact("learning rate", step.learning_rate),
        audit.fact("delta_h1, ten decimals", f"{change:.10f}"),
        audit.fact("delta_h1, ten digits", f"{change:.10e}"),
        audit.check(
            "optimizer steps",
            step.num_optimizer_steps,
            "1",
            step.num_optimizer_steps == 1,
            "the optimizer stepped more than once",
        ),
        *_size_rows(step),
        audit.step_size_check(_rms_without_decay(session, step) / step.learning_rate),
    ]


def _size_rows(step: Step) -> list[AuditRow]:
    """Whether the change is one, and survives rounding."""
    return [
        audit.check(
            "norm of the parameter change",
            global_norm(step.delta),
            "> 0",
            bool(step.delta.any()),
            "the step changed nothing: gradient, momentum and weight decay are all "
            "zero, or the learning rate is below the rounding of the weights (then use "
            "precision.model: float64); a given change may be of the same weights",
        ),
        audit.unchanged_check(1 - int(step.delta.count_nonzero()) / len(step.delta)),
    ]


def _update_batch_rows(session: Session) -> list[AuditRow]:
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


def _batch_rows(session: Session) -> list[AuditRow]:
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
                "most responses were cut off: raise max_new_tokens",
                fatal=False,
            ),
        ]
        rows += _ending_rows(session, batch)
        if split in session.num_redraws:
            rows.append(audit.fact(f"{split} redraws", session.num_redraws[split]))
    return rows


def _training_rows(session: Session) -> list[AuditRow]:
    """Where the configuration says another thing than the trainer did."""
    path = find_training_arguments(session.config.checkpoint)
    if path is None:
        return []
    try:
        arguments = read_training_arguments(path)
    except InputError as error:
        # Nothing is taken from it: the probe does not depend on it.
        return [audit.fact("training arguments", "not readable", str(error))]
    update = session.batches.get("U")
    given = update is None or all(s.advantage is not None for s in update.sequences)
    return [
        audit.check(
            f"trainer's setting: {found.key}",
            found.configured,
            str(found.trained),
            False,
            f"the step probed is not the one that {path} describes; set "
            f"{found.key} to what the trainer used if it is to be that one",
            fatal=False,
        )
        for found in contradictions(session.config, arguments)
        if not (given and found.key == "batches.advantage")
    ]


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


def _moment_rows(session: Session) -> list[AuditRow]:
    if session.optimizer is None:
        return []
    zero = tiny = total = 0
    with_state = {id(p) for p, state in session.optimizer.state.items() if state}
    parameters = session.policy.parameters.values()
    stateless = sum(id(p) not in with_state for p in parameters)
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            moment = session.optimizer.state[parameter]["exp_avg_sq"]
            zero += int((moment == 0).sum())
            tiny += int((moment < group["eps"] ** 2).sum())
            total += moment.numel()
    return [
        audit.check(
            "parameters without optimizer state",
            stateless,
            "0",
            stateless == 0,
            "their step is not the trainer's",
        ),
        *audit.moment_checks(tiny / total, zero / total),
    ]


def _scale_rows(session: Session, measured: Measured) -> list[AuditRow]:
    world, batch, base = session.world, session.batches["E"], measured.base
    size = measured.estimates.original.denominator
    local = torch.tensor(
        [base.num_microbatches / size, float(base.logp.isfinite().sum())],
        dtype=torch.float64,
    )
    scale_sum, used = world.sum(local, "scalars").tolist()
    budget = session.config.compute.tokens_per_microbatch
    planned = sum(
        len(plan_microbatches(block.shard, budget, session.passes.sharing))
        for rank in range(world.world_size)
        for block in batch.shard(rank, world.world_size).blocks()
    )
    return audit.scale_checks(scale_sum, planned, size, (int(used), batch.num_tokens))


def _sampler_rows(session: Session, measured: Measured) -> list[AuditRow]:
    rows = []
    scores_of: dict[str, TokenScores] = {"E": measured.base}
    if measured.update_scores is not None:
        scores_of["U"] = measured.update_scores
    for split, scores in scores_of.items():
        shard = session.shard(session.batches[split])
        count, total, largest = 0, 0.0, 0.0
        starts = shard.ragged.starts.tolist()
        for start, sequence in zip(starts, shard.sequences):
            if sequence.sampling_logprobs is not None and sequence.num_tokens:
                own = scores.logp[start : start + sequence.num_tokens]
                differences = (own - sequence.sampling_logprobs).abs()
                count += len(differences)
                total += float(differences.sum())
                largest = max(largest, float(differences.max()))
        sums = torch.tensor([count, total], dtype=torch.float64)
        count, total = session.world.sum(sums, "scalars").tolist()
        largest = session.world.max(largest)
        if count:
            rows += audit.sampler_checks(split, total / count, largest)
    return rows


def _on_policy_row(session: Session, measured: Measured) -> AuditRow:
    """Sum of (-log p - H) over E in standard deviations; a martingale for samples."""
    local = measured.surprise.clone()
    total, variance = session.world.sum(local, "scalars").tolist()
    return audit.on_policy_check("E", total / math.sqrt(variance) if variance else 0.0)


def _truth_rows(session: Session, measured: Measured) -> list[AuditRow]:
    truth, change = session.config.truth, measured.change
    eta = measured.step.learning_rate
    return [
        *audit.ess_checks(change.ess_fraction, truth.ess_warn, truth.ess_abort),
        audit.noise_check(measured.noise_floor, change.value),
        *audit.linearity_checks(
            (eta, measured.eta_star),
            change.value - eta * measured.slope.value,
            change.se,
            measured.noise_floor,
        ),
    ]


def _state_rows(session: Session, stepped: SteppedScores) -> list[AuditRow]:
    before, after_step, restored = stepped.hashes
    model = session.policy.model
    all_hashes = session.world.gather_objects(
        (before, after_step, restored, frozen_fingerprint(model))
    )
    equal = [len(set(hashes)) == 1 for hashes in zip(*all_hashes)]
    rows = [
        audit.check(
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
            audit.check(
                f"equal on all ranks: {name}",
                same,
                "true",
                same,
                "ranks hold different weights: do all machines read the same files?",
            )
        )
    for item in session.self_checks:
        rows.append(
            audit.close(
                f"self-check: {item.name}",
                item.error,
                item.tolerance,
                "such a model is refused when it is opened",
            )
        )
    return [*rows, *_route_rows(session), *_sharing_rows(session)]


def _route_rows(session: Session) -> list[AuditRow]:
    """Parts of the model that take the plain, slower code path."""
    policy, asked = session.policy, session.config.compute.attention
    rows = []
    if weight_norms(policy.model):
        text = "not the derivative: DoRA holds weight norms fixed"
        rows.append(audit.fact("the trainer's gradient", text))
    return rows + [
        audit.fact(f"{route.part} implementation", f"eager: {route.reason}")
        for route in slower_routes(policy.model, asked, policy.dtype)
    ]


def _sharing_rows(session: Session) -> list[AuditRow]:
    """Whether prompts with several responses were computed once."""
    sharing = session.sharing
    if sharing is None:
        return []
    repeated = any(
        len({s.prompt_ids.numpy().tobytes() for s in batch.sequences}) < len(batch)
        for batch in session.batches.values()
    )
    return [
        audit.check(
            "responses share their prompt's row",
            sharing.sharing is not None,
            "true where a prompt has several responses" if repeated else "",
            sharing.sharing is not None or not repeated,
            f"{sharing.reason}; results are the same, but each response's pass computes "
            "the prompt again; compute.share_prompts: false says that this is known",
            fatal=False,
        )
    ]


def _communication_rows(session: Session) -> list[AuditRow]:
    return [
        audit.fact(f"collectives: {purpose}", f"{number}, {size} bytes")
        for purpose, (number, size) in session.world.collectives.items()
    ]
