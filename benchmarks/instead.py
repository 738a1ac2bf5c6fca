"""Rows against what one would write instead, on a language model of 135 million parameters.

The model is SmolLM2-135M where `make real` has left it, or else one of its shape with
random weights; adapters on all seven linear layers, prompts of 90 tokens and responses of
about 31. The other way is a few lines around transformers: padded batches, all logits,
`log_softmax`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparison import Comparison, Setting, time_in_turns
from benchmarks.memory import peak_bytes
from benchmarks.models import (
    ALL_SEVEN,
    SMOLLM2,
    TINY,
    Lengths,
    make_base,
    make_direction,
    make_passes,
    make_shard,
    with_adapter,
)
from benchmarks.passes import relative_difference
from benchmarks.processes import REPOSITORY
from entropy_ddp.data.batch import Sequence, Shard
from entropy_ddp.model.parameters import shifted
from entropy_ddp.model.response_tokens import DirectionalScores
from entropy_ddp.model.scoring import Passes

BASE = REPOSITORY / "build" / "real" / "base"
# Rows of one padded batch of the other way, and the lengths of its differences, of a
# direction of length 1.
BATCH_SIZE = 8
STEPS = (1e-3, 1e-2, 1e-1, 1.0)
Values = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The passes on one model, and two batches.

    Attributes:
        passes: of a model with fused attention.
        name: what the model is called in the table.
        direction: v by parameter name, of length 1.
        E, U: the batches.
        details: their shapes.
    """

    passes: Passes
    name: str
    direction: dict[str, Tensor]
    E: Shard
    U: Shard
    details: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        """The model with its adapter."""
        return self.passes.tokens.causal_lm

    def attend(self, implementation: str) -> None:
        """Let the model compute its attention in this way."""
        self.passes.tokens.causal_lm.get_base_model().set_attn_implementation(
            implementation
        )


def make_case(setting: Setting) -> Case:
    """The model, and batches of random tokens."""
    shape = setting.pick(TINY, SMOLLM2, SMOLLM2)
    if setting.size == "tiny":
        base, name = make_base("llama", shape, device=setting.device), "tiny"
    elif BASE.is_dir():
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        base, name = base.to(setting.device).eval(), "SmolLM2-135M"
    else:
        base = make_base("llama", shape, device=setting.device)
        name = "SmolLM2-135M's shape"
    lengths = setting.pick(
        Lengths(groups=3, prompt=5, response=6, shortest=2),
        Lengths(groups=8, prompt=90, response=40, shortest=22),
        Lengths(groups=64, prompt=90, response=40, shortest=22),
    )
    passes = make_passes(with_adapter(base, ALL_SEVEN).to(setting.device))
    update = lengths.with_groups(max(2, lengths.groups // 2))
    return Case(
        passes=passes,
        name=name,
        direction=make_direction(passes),
        E=make_shard(lengths, shape.vocabulary),
        U=make_shard(update, shape.vocabulary, seed=4),
        details={"model": asdict(shape), "E": asdict(lengths), "U": asdict(update)},
    )


def instead_row(setting: Setting) -> Iterator[Comparison]:
    """Truth, slope and attribution / the same by transformers and torch alone."""
    case = make_case(setting)
    yield _truth(case, setting)
    yield from _slope_by_jvp(case, setting)
    yield from _slope_by_difference(case, setting)
    yield _attribution(case, setting)


# The other way


def plain_values(case: Case, shard: Shard) -> Values:
    """log p and H of the response tokens [t] as a function of the parameters by name."""
    batches = [
        _padded(shard.sequences[first : first + BATCH_SIZE], case.passes.device)
        for first in range(0, len(shard.sequences), BATCH_SIZE)
    ]

    def values(parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        found = []
        for ids, mask, is_response in batches:
            inputs = {"input_ids": ids, "attention_mask": mask}
            output = torch.func.functional_call(
                case.model, dict(parameters), kwargs=inputs
            )
            logs = output.logits[:, :-1].log_softmax(-1)
            logp = logs.gather(-1, ids[:, 1:, None])[..., 0]
            entropy = -(logs.exp() * logs).sum(-1)
            found.append((logp[is_response], entropy[is_response]))
        logps, entropies = zip(*found)
        return torch.cat(logps), torch.cat(entropies)

    return values


def _padded(
    sequences: list[Sequence], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [b, L], attention mask [b, L], and what predicts a response [b, L-1]."""
    longest = max(len(s.prompt_ids) + s.num_tokens for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask, is_response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        prompt, length = len(sequence.prompt_ids), sequence.num_tokens
        ids[row, : prompt + length] = torch.cat(
            [sequence.prompt_ids, sequence.response_ids]
        )
        mask[row, : prompt + length] = 1
        is_response[row, prompt : prompt + length] = True
    return ids.to(device), mask.to(device), is_response[:, 1:].to(device)


def estimated_entropy(
    shard: Shard, before: Tensor, logp: Tensor, entropy: Tensor
) -> Tensor:
    """Entropy per token at other parameters, importance-weighted by sequence.

    Args:
        shard: the batch.
        before: log p of its tokens at the parameters that sampled them, [t].
        logp, entropy: log p and H of the tokens at the others, [t].
    """
    ragged = shard.ragged
    weight = ragged.sum((logp - before).double().cpu()).exp()
    return (weight * ragged.sum(entropy.double().cpu())).sum() / (
        weight * ragged.lengths
    ).sum()


def slope_of(shard: Shard, scores: DirectionalScores) -> float:
    """The derivative of `estimated_entropy` along the scores' direction."""
    ragged = shard.ragged
    dlogp, entropy = ragged.sum(scores.dlogp), ragged.sum(scores.entropy)
    lengths = ragged.lengths.double()
    centred = entropy - entropy.sum() / lengths.sum() * lengths
    return float((dlogp @ centred + scores.dentropy.sum()) / lengths.sum())


# The rows


def _truth(case: Case, setting: Setting) -> Comparison:
    plain, parameters = plain_values(case, case.E), case.passes.parameters

    @torch.no_grad()
    def forward() -> tuple[Tensor, Tensor]:
        return plain(parameters)

    timings = time_in_turns(lambda: case.passes.score(case.E), forward, setting)
    scores, (logp, entropy) = timings.results
    return timings.comparison(
        f"truth, {case.name}",
        "score / forward with log_softmax",
        difference=max(
            relative_difference(scores.logp, logp),
            relative_difference(scores.entropy, entropy),
        ),
        details=case.details,
    )


def _slope_by_jvp(case: Case, setting: Setting) -> Iterator[Comparison]:
    over = "order 1 / torch.func.jvp, full logits"
    plain, parameters = plain_values(case, case.E), dict(case.passes.parameters)

    @torch.no_grad()
    def derive(implementation: str) -> tuple[Tensor, Tensor]:
        case.attend(implementation)
        try:
            return torch.func.jvp(plain, (parameters,), (case.direction,))[1]
        finally:
            case.attend("sdpa")

    def score() -> DirectionalScores:
        return case.passes.score(case.E, case.direction)

    try:
        derive("sdpa")
    except (NotImplementedError, RuntimeError) as error:
        yield Comparison(
            part=f"slope, {case.name}, fused attention",
            over=over,
            values=[],
            says=str(error).partition("\n")[0],
            details=case.details,
        )
    timings = time_in_turns(score, lambda: derive("eager"), setting)
    scores, (dlogp, dentropy) = timings.results
    difference = max(
        relative_difference(scores.dlogp, dlogp),
        relative_difference(scores.dentropy, dentropy),
    )
    part = f"slope, {case.name}, plain attention there"
    yield timings.comparison(
        f"{part}: time", over, difference=difference, details=case.details
    )
    runs: tuple[Callable[[], Any], ...] = (score, lambda: derive("eager"))
    peaks = [peak_bytes(run, setting.device) for run in runs]
    yield Comparison(
        part=f"{part}: peak memory",
        over=over,
        values=[peaks[0] / peaks[1]],
        difference=difference,
        details=case.details | {"peak_bytes": peaks},
    )


def _slope_by_difference(case: Case, setting: Setting) -> Iterator[Comparison]:
    plain, parameters = plain_values(case, case.E), case.passes.parameters

    @torch.no_grad()
    def difference(step: float) -> float:
        ends = []
        for signed in (step, -step):
            with shifted(parameters, case.direction, signed):
                ends.append(plain(parameters))
        # Half of the way from the one to the other is where the responses are from.
        before = (ends[0][0] + ends[1][0]) / 2
        above, below = (estimated_entropy(case.E, before, *end) for end in ends)
        return float(above - below) / (2 * step)

    timings = time_in_turns(
        lambda: case.passes.score(case.E, case.direction),
        lambda: difference(STEPS[1]),
        setting,
    )
    part = f"slope, {case.name}, central difference there"
    yield timings.comparison(
        f"{part}: time", "order 1 / two forwards", details=case.details
    )
    slope = slope_of(case.E, timings.results[0])
    errors = {step: abs(difference(step) / slope - 1) for step in STEPS}
    yield Comparison(
        part=f"{part}: error at the best of {len(STEPS)} steps",
        over="error of the difference / slope",
        values=[max(min(errors.values()), torch.finfo(torch.float64).eps)],
        details=case.details | {"errors_by_step": list(errors.items())},
    )


def _attribution(case: Case, setting: Setting) -> Comparison:
    """Of every token / of every sequence, along one direction."""
    parameters, direction = case.passes.parameters, case.direction
    single = [
        plain_values(case, Shard(batch=case.U.batch, positions=place[None]))
        for place in case.U.positions
    ]

    def one_by_one() -> Tensor:
        shares = []
        for values in single:
            logp, _ = values(parameters)
            gradients = torch.autograd.grad(logp.sum(), list(parameters.values()))
            pairs = zip(parameters, gradients)
            shares.append(sum((g * direction[name]).sum() for name, g in pairs))
        return torch.stack(shares)

    timings = time_in_turns(
        lambda: case.passes.score(case.U, direction), one_by_one, setting
    )
    scores, shares = timings.results
    return timings.comparison(
        f"attribution, {case.name}, |U| = {len(case.U.positions)}",
        "order 1 of U, by token / a backward by sequence",
        difference=relative_difference(case.U.ragged.sum(scores.dlogp), shares),
        details=case.details,
    )
