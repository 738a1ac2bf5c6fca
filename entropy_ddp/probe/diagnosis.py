"""The audits of a probe: the facts they need, collected from ranks and small passes.

Audits that need a pass of their own (forward against reverse mode, the noise floor) run
on the first sequences of E, at most `SAMPLE_SEQUENCES` of them, the same at every world
size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp import audit
from entropy_ddp.estimators.entropy import as_ratio, integrand_tokens
from entropy_ddp.estimators.errors import relative_difference
from entropy_ddp.estimators.linear import sequence_terms, slope_weights
from entropy_ddp.policy.parameters import (
    frozen_fingerprint,
    global_norm,
    inner_product,
)
from entropy_ddp.policy.scoring import TokenScores
from entropy_ddp.probe.estimation import (
    EntropyEstimates,
    baseline_predictions,
    derivatives_of,
)
from entropy_ddp.probe.phases import SteppedScores, gather_sums
from entropy_ddp.probe.session import Session
from entropy_ddp.results import AuditRow
from entropy_ddp.rollouts.batch import Batch, Ragged, Shard
from entropy_ddp.rollouts.microbatch import make_microbatches

SAMPLE_SEQUENCES = 64
# Of the term scale: the largest of the sums whose difference is the slope.
GAP_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass(frozen=True, kw_only=True)
class Duality:
    """Forward against reverse mode on a sample of E.

    Attributes:
        gap: relative difference of the two slopes.
        gradient: gradient of the entropy estimator on the sample, flat, [P].
        num_sequences: size of the sample.
    """

    gap: float
    gradient: Tensor
    num_sequences: int


def check_duality(
    session: Session, base: TokenScores, mean_entropy: float, direction: Tensor
) -> Duality:
    """<grad, v> from a backward pass against the slope from the forward-mode pass.

    The weights c and the pathwise weights are shared; both slopes are of the sample's
    terms with the whole batch's mean entropy and denominator left out.
    """
    config = session.config
    sample, shard, here = _sample(session)
    tokens, ragged = derivatives_of(_select(base, here)), shard.ragged
    estimator = (
        config.objective.integrand,
        config.objective.normalize,
        config.linear.score,
        config.linear.baseline,
    )
    predictions = {}
    if config.linear.baseline in ("loo", "ridge"):
        predictions = baseline_predictions(
            session.world,
            session.shard(session.batches["E"]),
            base,
            config.objective.integrand,
        )
    prediction = predictions.get(config.linear.baseline)
    weights = slope_weights(
        tokens,
        ragged,
        mean_entropy,
        estimator,
        None if prediction is None else prediction[here],
    )
    terms = sequence_terms(tokens, ragged, weights, config.objective.integrand)
    gathered = session.world.gather_rows(terms, shard.positions, len(sample))
    centred, score, pathwise, counts = gathered.sum(0).tolist()
    on_logp, on_entropy = weights.centred, weights.pathwise
    if config.objective.integrand == "surprisal":
        on_logp = on_logp - weights.pathwise
        on_entropy = torch.zeros_like(weights.pathwise)
    with session.phase("audit: reverse mode", ragged.num_tokens):
        gradient, _ = session.passes.gradient(
            shard,
            lambda token, *_: (on_logp[token.cpu()], on_entropy[token.cpu()]),
            session.buffer_dtype,
        )
        session.world.sum(gradient, "parameter buffers")
    reverse = inner_product(gradient, direction)
    scale = max(map(abs, (centred, score, pathwise, mean_entropy * counts)))
    return Duality(
        gap=relative_difference(reverse, centred, scale),
        gradient=gradient,
        num_sequences=len(sample),
    )


def measure_noise_floor(session: Session, base: TokenScores) -> float:
    """|Delta H| of the sample when it is only scored again, in other microbatches.

    The number is of the sample's size: that of all of E is smaller, as the rounding of
    sequences is independent.
    """
    sample, shard, here = _sample(session)
    objective = session.config.objective
    with session.phase("audit: noise floor", shard.ragged.num_tokens):
        budget = max(1, session.config.compute.tokens_per_microbatch // 5)
        again = session.passes.with_budget(budget).score(shard)
    scores = _select(base, here)
    sums = gather_sums(
        session.world, shard, scores.logp, scores.entropy, again.logp, again.entropy
    )
    values = [
        as_ratio(
            objective.normalize,
            integrand_tokens(objective.integrand, logp, entropy),
            sample.lengths,
        ).value
        for logp, entropy in (sums[:2], sums[2:])
    ]
    return abs(values[1] - values[0])


def _sample(session: Session) -> tuple[Batch, Shard, Tensor]:
    """The sample, this rank's share of it, and where its tokens lie in E's arrays."""
    shard = session.shard(session.batches["E"])
    sample = session.batches["E"].first(SAMPLE_SEQUENCES)
    here = shard.positions < len(sample)
    return (
        sample,
        Shard(batch=sample, positions=shard.positions[here]),
        shard.ragged.spread(here),
    )


def _select(scores: TokenScores, here: Tensor) -> TokenScores:
    names = ("logp", "entropy", "dlogp", "dentropy")
    return TokenScores(**{name: getattr(scores, name)[here] for name in names})


def audit_rows(
    session: Session,
    gradient: Tensor,
    stepped: SteppedScores,
    estimates: EntropyEstimates,
    checks: tuple[Duality, float, TokenScores, TokenScores],
) -> list[AuditRow]:
    """All audits of a probe.

    Args:
        session: the run.
        gradient: gradient of the loss, summed over ranks, [P].
        stepped: the step and the hashes around it.
        estimates: truth and prediction.
        checks: duality, noise floor, this rank's tokens of E at theta and of U.
    """
    duality, noise_floor, base, update_scores = checks
    rows = [
        *_vector_rows(session, gradient, stepped, duality),
        *_step_rows(session, stepped, estimates),
        *_update_batch_rows(session),
        *_batch_rows(session),
        *_moment_rows(session),
        *_scale_rows(session, base, estimates),
        *_sampler_rows(session, {"E": base, "U": update_scores}),
        audit.close(
            "duality gap",
            duality.gap,
            GAP_TOLERANCE[session.policy.dtype],
            "forward and reverse mode disagree: an operation of this model loses or "
            "detaches a derivative; try compute.attention: eager",
        ),
        *_truth_rows(session, estimates, noise_floor),
        *_state_rows(session, stepped),
        *_communication_rows(session),
    ]
    return rows


def _vector_rows(
    session: Session, gradient: Tensor, stepped: SteppedScores, duality: Duality
) -> list[AuditRow]:
    layout = session.passes.layout
    total = len(layout.shapes)
    direction = stepped.step.direction
    norms = [global_norm(x) for x in (duality.gradient, gradient, direction)]
    dot = inner_product(duality.gradient, direction)
    cosine = dot / (norms[0] * norms[2]) if norms[0] * norms[2] else 0.0
    products = {
        name: inner_product(x.reshape(-1), v.reshape(-1))
        for (name, x), v in zip(
            layout.views(duality.gradient).items(), layout.views(direction).values()
        )
    }
    largest = sorted(products, key=lambda name: -abs(products[name]))[:10]
    nonzero = [
        sum(bool(view.any()) for view in layout.views(flat).values())
        for flat in (duality.gradient, gradient)
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
        audit.coverage_check("gradient coverage: entropy (X)", nonzero[0], total),
        audit.coverage_check("gradient coverage: loss (Y)", nonzero[1], total),
        audit.fact(
            f"norm of entropy gradient, {duality.num_sequences} sequences", norms[0]
        ),
        audit.fact("norm of the loss gradient", norms[1]),
        audit.fact("norm of v", norms[2]),
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


def _step_rows(
    session: Session, stepped: SteppedScores, estimates: EntropyEstimates
) -> list[AuditRow]:
    step, linear = stepped.step, session.config.linear
    slope = estimates.slopes[linear.score, linear.baseline, linear.control_variates]
    change = step.learning_rate * slope.value
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
        audit.check(
            "norm of the parameter change",
            global_norm(step.delta),
            "> 0",
            bool(step.delta.any()),
            "the step changed nothing: the learning rate is below the rounding of the "
            "weights' dtype; use precision.model: float32 or float64",
        ),
    ]


def _update_batch_rows(session: Session) -> list[AuditRow]:
    batch = session.batches["U"]
    if session.config.update.loss == "nll":
        return []
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
    zero = tiny = total = 0
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            moment = session.optimizer.state[parameter]["exp_avg_sq"]
            zero += int((moment == 0).sum())
            tiny += int((moment < group["eps"] ** 2).sum())
            total += moment.numel()
    return [
        audit.fact("parameters without optimizer state", 0, "0"),
        *audit.moment_checks(tiny / total, zero / total),
    ]


def _scale_rows(
    session: Session, base: TokenScores, estimates: EntropyEstimates
) -> list[AuditRow]:
    world, batch = session.world, session.batches["E"]
    size = estimates.original.denominator
    local = torch.tensor(
        [base.num_microbatches / size, float(base.logp.isfinite().sum())],
        dtype=torch.float64,
    )
    scale_sum, used = world.sum(local, "scalars").tolist()
    budget = session.config.compute.tokens_per_microbatch
    planned = sum(
        sum(1 for _ in make_microbatches(batch.shard(rank, world.world_size), budget))
        for rank in range(world.world_size)
    )
    return audit.scale_checks(scale_sum, planned, size, (int(used), batch.num_tokens))


def _sampler_rows(
    session: Session, scores_of: dict[str, TokenScores]
) -> list[AuditRow]:
    rows = []
    for split, scores in scores_of.items():
        shard = session.shard(session.batches[split])
        differences = []
        starts = shard.ragged.starts.tolist()
        for start, sequence in zip(starts, shard.sequences):
            if sequence.sampling_logprobs is not None:
                own = scores.logp[start : start + sequence.num_tokens]
                differences += (own - sequence.sampling_logprobs).abs().tolist()
        shares = session.world.gather_objects(differences)
        rows += audit.sampler_checks(split, [x for share in shares for x in share])
    return rows


def _truth_rows(
    session: Session, estimates: EntropyEstimates, noise_floor: float
) -> list[AuditRow]:
    truth = session.config.truth
    change = estimates.changes[truth.is_mode]
    return [
        *audit.ess_checks(change.ess_fraction, truth.ess_warn, truth.ess_abort),
        audit.noise_check(noise_floor, change.value),
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
                f"self-check: {item.name}", item.error, item.tolerance, "refused"
            )
        )
    return rows


def _communication_rows(session: Session) -> list[AuditRow]:
    return [
        audit.fact(f"collectives: {purpose}", f"{number}, {size} bytes")
        for purpose, (number, size) in session.world.collectives.items()
    ]
