"""Does every sequence and every token of U get the share that brute force gives it?

The step is decomposed again by its written formula with the reference's gradients, and
each part's effect is a central difference of the reference's entropy along that part
alone, or the product with its gradient. Groups of U are mixed in the file, and some responses are empty.
"""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
import yaml
from click.testing import CliRunner
from jobs import run_attribution
from naive_attribution import (
    LEARNING_RATE,
    Direction,
    effect_along,
    naive_block_gradients,
    naive_blocks,
    naive_parts,
)
from reference import LossSettings, Objective
from thread_ranks import run_thread_ranks
from tiny_runs import NaiveStep, TinyRun, make_run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from entropy_ddp.cli import main
from entropy_ddp.config import load_config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import fingerprint
from entropy_ddp.probe import pipeline
from entropy_ddp.probe.attribution import score_shares, split_step
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.passes import update_weights
from entropy_ddp.probe.session import Session
from entropy_ddp.results import Probed, write_results
from entropy_ddp.update.step import optimizer_tensors

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64, of the largest number of its kind
GAP = {"float64": 1e-10, "float32": 1e-5}  # of the largest term of the slope
DIFFERENCE_RTOL = 1e-7  # the contract's bar for central differences
VERIFIED_RTOL = 1e-9  # a difference of two entropies
DIFFERENCE_STEP = 0.01  # along a direction of norm 1
FRACTION = 0.2
QUANTILE = 2.5705818  # Student's t at .975, of the 6 groups of E
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-lora": ("gpt2", {}),
    "qwen2-lora": ("qwen2", {}),
    "llama-full": ("llama", {"full": True}),
}
TOKEN_KEYS = (
    "index",
    "k",
    "token_id",
    "text",
    "logp",
    "entropy",
    "advantage",
    "covariance",
    "share",
)


DR_GRPO = LossSettings()
CLIPPED = LossSettings(ratio="clipped")
PER_TOKEN = Objective()


@dataclass(frozen=True)
class Case:
    """A checkpoint, a loss, a limit of the gradient's norm and an entropy."""

    run: str
    loss: LossSettings = DR_GRPO
    max_grad_norm: float = 0.1
    objective: Objective = PER_TOKEN

    def sections(self) -> dict[str, Any]:
        """The sections of the configuration."""
        loss, objective = self.loss, self.objective
        to_go = objective.is_mode == "per_decision"
        return {
            "update": {
                "loss": loss.loss,
                "length_norm": loss.length_norm,
                "ratio": loss.ratio,
                "epsilon_low": loss.epsilon_low,
                "epsilon_high": loss.epsilon_high,
                "max_grad_norm": self.max_grad_norm,
                "lr_override": LEARNING_RATE,
            },
            "objective": {
                "normalize": objective.normalize,
                "integrand": objective.integrand,
                "temperature": objective.temperature,
            },
            "truth": {"is_mode": objective.is_mode},
            "linear": LINEAR["to_go, hk" if to_go else "full"],
        }


CASES = {
    "gpt2 dr_grpo": Case("gpt2-lora"),
    "gpt2 dr_grpo 12 unclipped": Case("gpt2-lora", LossSettings(length_norm=12), 0.0),
    "gpt2 grpo": Case("gpt2-lora", LossSettings(loss="grpo")),
    "gpt2 dapo unclipped": Case("gpt2-lora", LossSettings(loss="dapo"), 0.0),
    "gpt2 nll": Case("gpt2-lora", LossSettings(loss="nll")),
    "gpt2 ratio": Case("gpt2-lora", CLIPPED),
    "gpt2 dapo, ratio unclipped": Case("gpt2-lora", replace(CLIPPED, loss="dapo"), 0.0),
    "gpt2 to_go, hk": Case("gpt2-lora", objective=Objective(is_mode="per_decision")),
    "qwen2 dr_grpo unclipped": Case("qwen2-lora", max_grad_norm=0.0),
    "qwen2 grpo, ratio": Case("qwen2-lora", replace(CLIPPED, loss="grpo")),
    "qwen2 sum, surprisal, warm": Case(
        "qwen2-lora",
        LossSettings(temperature=1.3),
        objective=Objective(normalize="sum", integrand="surprisal", temperature=1.3),
    ),
    "llama dr_grpo": Case("llama-full"),
    "llama nll unclipped": Case("llama-full", LossSettings(loss="nll"), 0.0),
}

# One of every checkpoint and every entropy: what losses and limits change is the
# direction, along which the others take the derivative by autograd.
BY_DIFFERENCES = {
    "gpt2 dr_grpo",
    "gpt2 to_go, hk",
    "qwen2 grpo, ratio",
    "qwen2 sum, surprisal, warm",
    "llama dr_grpo",
}
RunMaker = Callable[[str], TinyRun]


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Each checkpoint is written once."""

    @cache
    def make(name: str) -> TinyRun:
        family, options = RUNS[name]
        return with_mixed_groups(
            make_run(tmp_path_factory.mktemp(name), family, **options)
        )

    return make


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def with_mixed_groups(run: TinyRun) -> TinyRun:
    """The same run; no group's rows of U stand together in the file."""
    mixed = [*run.U[::3], *run.U[1::3], *run.U[2::3]]
    groups = [row.group for row in mixed]
    assert groups != sorted(groups)
    return replace(run, U=mixed)


def quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


def attribute(run: TinyRun, **sections: Any) -> Probed:
    """The whole job on one rank."""
    return run_attribution(run.config(**sections), World(), None, quiet)


@cache
def attributed(run: TinyRun, case: Case) -> Probed:
    return attribute(run, **case.sections())


def update_rows(probed: Probed) -> list[dict[str, Any]]:
    return [row for row in probed.sequences if row["split"] == "U"]


def sequence_shares(probed: Probed) -> list[float]:
    return [row["share"] for row in update_rows(probed)]


def token_shares(probed: Probed) -> list[float]:
    assert probed.tokens is not None
    return [row["share"] for row in probed.tokens]


# Brute force


def sequence_gradients(run: TinyRun, settings: LossSettings) -> list[Direction]:
    """Gradient of every row's share of the loss: all other advantages are 0."""
    parameters = ref.trainable(run.saved.model)
    advantages = [1.0] * len(run.U)
    if settings.loss == "nll":
        settings = replace(settings, loss="dapo")  # `nll` is `dapo` with advantages 1
    else:
        advantages = ref.advantages(run.U, "centered")
    gradients = []
    for number, advantage in enumerate(advantages):
        alone = [0.0] * len(run.U)
        alone[number] = advantage
        loss = ref.rl_loss(run.saved.model, run.U, alone, settings)
        values = torch.autograd.grad(loss, list(parameters.values()))
        gradients.append(dict(zip(parameters, values, strict=True)))
    return gradients


def added(directions: list[Direction]) -> Direction:
    return {n: torch.stack([d[n] for d in directions]).sum(0) for n in directions[0]}


def norm(direction: Direction) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in direction.values()))


def effect_by_differences(
    run: TinyRun, objective: Objective, direction: Direction
) -> float:
    """Derivative of the importance-sampled entropy of E along it, by differences."""
    size = norm(direction)
    if not size:
        return 0.0
    unit = {name: part / size for name, part in direction.items()}
    scores_at = ref.scores_along(run.saved.model, run.E, unit, objective.temperature)
    value = ref.entropy_along(run.E, scores_at, objective)
    return size * ref.slope_by_central_difference(value, DIFFERENCE_STEP)


@cache
def entropy_gradient(run: TinyRun, objective: Objective) -> Direction:
    """Gradient of the SNIS entropy per token at theta: autograd of weights and all."""
    numerator = denominator = torch.zeros((), dtype=torch.float64)
    for row in run.E:
        logp, entropy = ref.token_scores(run.saved.model, row, objective.temperature)
        weight = (logp.sum() - logp.sum().detach()).exp()
        numerator = numerator + weight * entropy.sum()
        denominator = denominator + weight * len(row.response_ids)
    parameters = ref.trainable(run.saved.model)
    values = torch.autograd.grad(numerator / denominator, list(parameters.values()))
    return dict(zip(parameters, values, strict=True))


def effect_by_autograd(
    run: TinyRun, objective: Objective, direction: Direction
) -> float:
    """The same along the gradient of the entropy per token."""
    assert objective == PER_TOKEN
    gradient = entropy_gradient(run, objective)
    return sum(float((gradient[n] * part).sum()) for n, part in direction.items())


@pytest.mark.parametrize("name", CASES)
def test_shares_are_effects_of_the_parts(named_run: RunMaker, name: str) -> None:
    """Sequences one by one, momentum and decay; empty responses have exactly 0."""
    case = CASES[name]
    run = named_run(case.run)
    probed = attributed(run, case)
    result, update = probed.results.attribution, probed.results.update
    assert result is not None
    assert (update.clip_coef < 1) == bool(case.max_grad_norm)
    gradients = sequence_gradients(run, case.loss)
    whole = run.gradient(case.loss)
    total = added(gradients)
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-14)
    parts = naive_parts(run, whole, case.max_grad_norm)
    effect, rtol = (
        (effect_by_differences, DIFFERENCE_RTOL)
        if name in BY_DIFFERENCES
        else (effect_by_autograd, RTOL)
    )
    expected = [
        effect(run, case.objective, parts.of_gradient(gradient))
        for gradient in gradients
    ]
    bar = rtol * max(map(abs, expected))
    for share, value, row in zip(sequence_shares(probed), expected, run.U, strict=True):
        assert abs(share - value) <= bar
        assert bool(share) == bool(row.response_ids)
    for found, direction in (
        (result.momentum, parts.momentum),
        (result.weight_decay, parts.decay),
    ):
        assert found != 0
        assert abs(found - effect(run, case.objective, direction)) <= bar


@pytest.mark.parametrize("name", ["gpt2 ratio", "qwen2 dr_grpo unclipped"])
def test_token_shares_by_autograd_of_each_token(named_run: RunMaker, name: str) -> None:
    """The surrogate of one token at a time, over N_b G_b L_b."""
    case = CASES[name]
    run = named_run(case.run)
    parts = naive_parts(run, run.gradient(case.loss), case.max_grad_norm)
    parameters = ref.trainable(run.saved.model)
    expected, num_cut = [], 0
    for row, advantage in zip(run.U, ref.advantages(run.U, "centered"), strict=True):
        lengths = [len(r.response_ids) for r in run.U if r.group == row.group]
        num_groups = len({r.group for r in run.U})
        logp, _ = ref.token_scores(run.saved.model, row, 1.0)
        for k, value in enumerate(logp):
            surrogate = value * advantage
            if case.loss.ratio == "clipped":
                assert row.sampling_logprobs is not None
                ratio = (value - row.sampling_logprobs[k]).exp()
                surrogate = ratio * advantage
                cut = ratio > 1.2 if advantage > 0 else ratio < 0.8
                num_cut += bool(cut)
                surrogate = 0.0 * surrogate if cut else surrogate
            loss = -surrogate / (num_groups * len(lengths) * max(lengths))
            gradients = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True
            )
            direction = parts.of_gradient(dict(zip(parameters, gradients, strict=True)))
            expected.append(effect_by_autograd(run, case.objective, direction))
    assert bool(num_cut) == (case.loss.ratio == "clipped")
    bar = RTOL * max(map(abs, expected))
    for share, value in zip(token_shares(attributed(run, case)), expected, strict=True):
        assert abs(share - value) <= bar


# Sums


def test_everything_sums_to_the_prediction(named_run: RunMaker, case: Case) -> None:
    """Tokens to sequences, sequences to the gradient's part, the parts to delta_h1."""
    run = named_run(case.run)
    probed = attributed(run, case)
    result, linear = probed.results.attribution, probed.results.linear
    assert result is not None
    assert probed.tokens is not None
    scale = LEARNING_RATE * max(map(abs, linear.terms.values()))
    for row in update_rows(probed):
        tokens = [t["share"] for t in probed.tokens if t["index"] == row["index"]]
        assert len(tokens) == row["num_tokens"]
        assert abs(math.fsum(tokens) - row["share"]) <= RTOL * scale
    sequences = math.fsum(sequence_shares(probed))
    assert abs(sequences - result.gradient) <= RTOL * scale
    parts = result.momentum + result.weight_decay + result.gradient
    assert abs(parts - result.total) <= RTOL * scale
    assert abs(result.total - linear.delta_h1) <= RTOL * scale
    assert result.attribution_gap <= GAP["float64"]
    for rows in result.summaries.values():
        assert abs(sum(r["share"] for r in rows) - result.gradient) <= RTOL * scale
        assert sum(r["num_tokens"] for r in rows) == len(list(probed.tokens))


LINEAR = {
    "full": {"score": "full", "baseline": "none"},
    "to_go": {"score": "to_go", "baseline": "none"},
    "to_go, hk": {"score": "to_go", "baseline": "hk"},
    "to_go, loo": {"score": "to_go", "baseline": "loo"},
    "to_go, ridge": {"score": "to_go", "baseline": "ridge"},
    "to_go, action_value": {},
}


@pytest.mark.parametrize(
    ("name", "dtype", "linear"),
    [
        *(("gpt2-lora", "float64", name) for name in LINEAR),
        *(("qwen2-lora", "float32", name) for name in ("full", "to_go, hk")),
        ("llama-full", "float32", "full"),
    ],
)
def test_attribution_gap(
    named_run: RunMaker, name: str, dtype: str, linear: str
) -> None:
    """The parts add up to what the linear estimator predicts, whichever it is."""
    run = named_run(name)
    probed = attribute(run, precision={"model": dtype}, linear=LINEAR[linear])
    result = probed.results.attribution
    assert result is not None
    terms = probed.results.linear.terms
    scale = LEARNING_RATE * max(map(abs, terms.values()))
    gap = GAP[dtype]
    if dtype == "float32":
        gap += rounding_of_the_step(run, probed) / scale
    assert result.attribution_gap <= gap
    (row,) = (r for r in probed.results.audit if r.name == "attribution gap")
    assert (row.value, row.verdict) == (result.attribution_gap, "ok")
    assert abs(result.total - probed.results.linear.delta_h1) <= gap * scale


def rounding_of_the_step(run: TinyRun, probed: Probed) -> float:
    """What delta_h1 may be off by as weights are stored after the step, in nats.

    Every element of the change carries half an ulp of its weight, which the parts of
    the step, computed without a weight, do not: |grad H . rounding| <= |grad H| |theta| eps/2.
    """
    weights = [p.detach() for p in run.saved.model.parameters() if p.requires_grad]
    size = float(torch.stack([w.norm() for w in weights]).norm())
    norms = {row.name: row.value for row in probed.results.audit}
    eps = torch.finfo(torch.float32).eps
    return norms["norm of the entropy gradient"] * size * eps / 2


def test_batch_without_advantages_moves_by_momentum_alone(named_run: RunMaker) -> None:
    """Equal rewards: no share, no rank correlation, and nothing that is not finite."""
    run = named_run("gpt2-lora")
    equal = replace(run, U=[replace(row, reward=0.1) for row in run.U])
    probed = attribute(equal)
    document = probed.results.to_dict()["attribution"]
    assert document["gradient"] == 0
    assert document["momentum"] != 0
    assert document["total"] == document["momentum"] + document["weight_decay"]
    assert document["gradient_se"] == document["gradient_se_jackknife"] == 0
    assert document["attribution_gap"] <= GAP["float64"]
    assert set(token_shares(probed)) == set(sequence_shares(probed)) == {0.0}
    for judged in (document["covariance"], *document["proxies"].values()):
        assert "spearman" not in judged
    for row in document["what_if"]:
        for key in ("delta_h1", "delta_h1_cross_fitted"):
            # Sums of the same terms in another order.
            assert row[key] == pytest.approx(document["total"], rel=1e-12)
    assert "reliability" not in document


def test_top_tokens_are_the_largest_shares(named_run: RunMaker) -> None:
    run = named_run("gpt2-lora")
    probed = attribute(run, attribution={"top": 5})
    result, tokens = probed.results.attribution, probed.tokens
    assert result is not None
    assert tokens is not None
    wanted = sorted(tokens, key=lambda row: -abs(row["share"]))[:5]
    keys = ("index", "k", "share", "logp", "entropy", "advantage")
    assert result.top_tokens == [{key: row[key] for key in keys} for row in wanted]


# What if


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedRun(TinyRun):
    """A run whose loss has the coefficient 0 on every token that is not kept."""

    keep: list[list[bool]]

    def gradient(
        self, settings: LossSettings, advantage: str = "centered"
    ) -> dict[str, Tensor]:
        """That of dr_grpo, term by term; all tokens of a group count in L_b."""
        parameters = ref.trainable(self.saved.model)
        loss = torch.zeros((), dtype=torch.float64)
        num_groups = len({row.group for row in self.U})
        for row, value, keep in zip(
            self.U, ref.advantages(self.U, advantage), self.keep, strict=True
        ):
            lengths = [len(r.response_ids) for r in self.U if r.group == row.group]
            logp, _ = ref.token_scores(self.saved.model, row, settings.temperature)
            kept = sum((x for x, k in zip(logp, keep, strict=True) if k), 0.0 * loss)
            loss = loss - value * kept / (num_groups * len(lengths) * max(lengths))
        values = torch.autograd.grad(loss, list(parameters.values()))
        return dict(zip(parameters, values, strict=True))


def chosen_tokens(tokens: list[dict[str, Any]]) -> list[set[int]]:
    """Which rows every rule leaves out, in the rules' order."""
    count = round(FRACTION * len(tokens))
    places = range(len(tokens))
    improbable = {t for t in places if math.exp(tokens[t]["logp"]) < 0.5}
    failed = {t for t in places if tokens[t]["advantage"] < 0}
    return [
        set(sorted(places, key=lambda t: tokens[t]["share"])[:count]),
        set(sorted(places, key=lambda t: -tokens[t]["share"])[:count]),
        set(sorted(places, key=lambda t: -tokens[t]["covariance"])[:count]),
        failed & improbable,
        improbable - failed,
        failed,
        set(places) - failed,
    ]


def naive_token_effects(run: TinyRun, case: Case, count: int) -> Tensor:
    """Share of every token of U by block of E, [T, K]: dr_grpo without ratios."""
    parts = naive_parts(run, run.gradient(case.loss), case.max_grad_norm)
    blocks = naive_block_gradients(run, count)
    parameters = ref.trainable(run.saved.model)
    num_groups = len({row.group for row in run.U})
    effects = []
    for row, advantage in zip(run.U, ref.advantages(run.U, "centered"), strict=True):
        lengths = [len(r.response_ids) for r in run.U if r.group == row.group]
        logp, _ = ref.token_scores(run.saved.model, row, 1.0)
        for value in logp:
            loss = -value * advantage / (num_groups * len(lengths) * max(lengths))
            gradients = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True
            )
            direction = parts.of_gradient(dict(zip(parameters, gradients, strict=True)))
            effects.append([effect_along(block, direction) for block in blocks])
    return torch.tensor(effects, dtype=torch.float64)


def masked_step(run: TinyRun, case: Case, left_out: set[int]) -> NaiveStep:
    """The naive step without these tokens, numbered through all of U."""
    places = iter(range(sum(len(row.response_ids) for row in run.U)))
    keep = [[next(places) not in left_out for _ in row.response_ids] for row in run.U]
    return MaskedRun(**vars(run), keep=keep).naive_step(
        case.loss, max_grad_norm=case.max_grad_norm, learning_rate=LEARNING_RATE
    )


def naive_truth(
    run: TinyRun, case: Case, left_out: set[int], rows: list[ref.Row]
) -> ref.Truth:
    """The change of these rows' entropy by the step without some tokens."""
    old = ref.scores(run.saved.model, rows, 1.0)
    step = masked_step(run, case, left_out)
    with ref.parameters_shifted(run.saved.model, step.delta, 1.0):
        new = ref.scores(run.saved.model, rows, 1.0)
    return ref.delta_h_true(rows, old, new, case.objective)


def largest(values: Tensor, count: int) -> set[int]:
    """Places of the largest; of equal ones those that come first."""
    # To three digits: what differs by rounding is equal.
    digits = [float(f"{value:.3g}") for value in values.tolist()]
    return set(sorted(range(len(digits)), key=lambda t: -digits[t])[:count])


def test_what_if_is_a_step_without_these_tokens(
    named_run: RunMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted: the masked shares are missing. True: a masked naive step is taken.

    What is ranked by share is chosen on one half of E and evaluated on the other.
    Afterwards parameters and optimizer state are what they were, bit for bit.
    """
    case = CASES["gpt2 dr_grpo"]
    run, opened = named_run(case.run), []

    def open_and_remember(*arguments: Any) -> Session:
        session = open_session(*arguments)
        opened.append((session, session_fingerprint(session)))
        return session

    open_session = pipeline.open_session
    monkeypatch.setattr(pipeline, "open_session", open_and_remember)
    asked = {"verify": True, "fraction": FRACTION, "blocks": 4}
    probed = attribute(run, **case.sections(), attribution=asked)
    ((session, before),) = opened
    assert session_fingerprint(session) == before

    result, tokens = probed.results.attribution, probed.tokens
    assert result is not None
    assert tokens is not None
    tokens = list(tokens)
    effects = naive_token_effects(run, case, 4)
    of_rows = naive_blocks(run.E, 4)
    # Rows of E in even and in odd blocks.
    halves = [
        [row for row, block in zip(run.E, of_rows, strict=True) if block % 2 == number]
        for number in (0, 1)
    ]
    sizes = [sum(len(row.response_ids) for row in rows) for rows in halves]
    by_share = (-1, 1)  # the sign of the shares that the first two rules choose
    scale = float(effects.abs().max())
    found = []
    chosen_by_rule = chosen_tokens(tokens)
    for number, (row, chosen) in enumerate(
        zip(result.what_if, chosen_by_rule, strict=True)
    ):
        assert row["num_tokens"] == len(chosen) > 0
        shares = math.fsum(tokens[t]["share"] for t in chosen)
        assert abs(row["delta_h1"] - (result.total - shares)) <= RTOL * scale
        by_half = [chosen, chosen]
        if number < len(by_share):
            sign = by_share[number]
            by_half = [
                largest(sign * effects[:, half::2].sum(1), len(chosen))
                for half in (0, 1)
            ]
        left = sum(
            float(effects[list(by_half[1 - half]), half::2].sum()) for half in (0, 1)
        )
        assert abs(row["delta_h1_cross_fitted"] - (result.total - left)) <= RTOL * scale
        if number < len(by_share):
            truths = [
                naive_truth(run, case, by_half[1 - half], halves[half])
                for half in (0, 1)
            ]
            weights = [size / sum(sizes) for size in sizes]
            pairs = list(zip(weights, truths, strict=True))
            value = math.fsum(w * truth.delta_h_true for w, truth in pairs)
            error = math.hypot(*(w * truth.se for w, truth in pairs))
        else:
            truth = naive_truth(run, case, chosen, run.E)
            value, error = truth.delta_h_true, truth.se
        bar = VERIFIED_RTOL * abs(value)
        assert abs(row["delta_h_true"] - value) <= bar
        assert abs(row["delta_h_true_se"] - error) <= VERIFIED_RTOL * error
        found.append(row["delta_h_true"])
    assert result.what_if[0]["delta_h1_cross_fitted"] != result.what_if[0]["delta_h1"]
    # Each choice of tokens gives a step of its own.
    choices = {frozenset(chosen) for chosen in chosen_by_rule}
    assert len({*found, probed.results.truth.delta_h_true}) == len(choices) + 1


def test_errors_of_what_ifs_are_those_of_blocks(named_run: RunMaker) -> None:
    """K / (K - 1) sum (x_b - x d_b)^2 by brute force; none with two blocks."""
    case = CASES["gpt2 dr_grpo"]
    run = named_run(case.run)
    asked = {"fraction": FRACTION, "blocks": 4}
    result = attribute(run, **case.sections(), attribution=asked).results.attribution
    assert result is not None
    effects = naive_token_effects(run, case, 4)
    parts = naive_parts(run, run.gradient(case.loss), case.max_grad_norm)
    whole = [
        effect_along(block, parts.momentum) + effect_along(block, parts.decay)
        for block in naive_block_gradients(run, 4)
    ]
    count = round(FRACTION * len(effects))
    by_half = [largest(-effects[:, half::2].sum(1), count) for half in (0, 1)]
    tokens = [0.0] * 4
    for block, row in zip(naive_blocks(run.E, 4), run.E, strict=True):
        tokens[block] += len(row.response_ids)
    added = [
        whole[b]
        + float(effects[:, b].sum())
        - float(effects[list(by_half[1 - b % 2]), b].sum())
        for b in range(4)
    ]
    total = math.fsum(added)
    squares = [
        (x - total * size / sum(tokens)) ** 2
        for x, size in zip(added, tokens, strict=True)
    ]
    expected = math.sqrt(4 / 3 * math.fsum(squares))
    assert result.what_if[0]["se"] == pytest.approx(expected, rel=1e-8)
    asked = {"fraction": FRACTION, "blocks": 2}
    few = attribute(run, **case.sections(), attribution=asked).results.attribution
    assert few is not None
    assert all("se" not in row for row in few.what_if)


def test_halves_too_small_for_masked_steps_are_refused(named_run: RunMaker) -> None:
    """Before the first pass; without `verify` they are no reason to."""
    run = named_run("gpt2-lora")
    order = naive_blocks(run.E, 8)
    three = replace(
        run, E=[row for row, place in zip(run.E, order, strict=True) if place < 3]
    )
    with pytest.raises(InputError, match=r"attribution.verify: .* found 2 and [01];"):
        attribute(three, attribution={"verify": True})
    assert attribute(three).results.attribution is not None


def session_fingerprint(session: Session) -> str:
    """Hash of every parameter and of every tensor of the optimizer state."""
    assert session.optimizer is not None
    state = optimizer_tensors(session.optimizer)
    return fingerprint([*session.policy.model.named_parameters(), *state])


def test_what_if_is_not_verified_unless_asked(named_run: RunMaker) -> None:
    result = attributed(named_run("gpt2-lora"), CASES["gpt2 dr_grpo"]).results
    assert result.attribution is not None
    for row in result.attribution.what_if:
        assert list(row) == [
            "rule", "num_tokens", "delta_h1", "delta_h1_cross_fitted", "se",
        ]  # fmt: skip


# Blocks of E


def measured_blocks(run: TinyRun, world: World, **sections: Any) -> Measurements:
    """The passes of an attribution."""
    session = pipeline.open_session(run.config(**sections), world, None, quiet)
    plan = pipeline.plan_of("attribute", session.config)
    return pipeline.measure(session, plan)


def test_blocks_of_E_by_brute_force(named_run: RunMaker) -> None:
    """What each block adds to the parts and to the share of every sequence of U."""
    case = CASES["gpt2 dr_grpo"]
    run = named_run(case.run)
    blocks = measured_blocks(
        run, World(), **case.sections(), attribution={"blocks": 4}
    ).block_shares
    assert blocks is not None and blocks.count == 4
    parts = naive_parts(run, run.gradient(case.loss), case.max_grad_norm)
    of_rows = [parts.of_gradient(g) for g in sequence_gradients(run, case.loss)]
    lengths = [len(row.response_ids) for row in run.U]
    sequences = torch.repeat_interleave(torch.arange(len(run.U)), torch.tensor(lengths))
    found = torch.zeros(len(run.U), 4, dtype=torch.float64)
    found.index_add_(0, sequences, blocks.share)
    gradients = naive_block_gradients(run, 4)
    expected = [[effect_along(g, row) for g in gradients] for row in of_rows]
    bar = RTOL * max(abs(x) for row in expected for x in row)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= bar
    for name, values in (("momentum", blocks.momentum), ("decay", blocks.decay)):
        for gradient, value in zip(gradients, values.tolist(), strict=True):
            assert abs(value - effect_along(gradient, getattr(parts, name))) <= bar
    tokens = torch.zeros(4, dtype=torch.float64)
    for block, row in zip(naive_blocks(run.E, 4), run.E, strict=True):
        tokens[block] += len(row.response_ids)
    torch.testing.assert_close(blocks.size, tokens / tokens.sum())


@pytest.mark.parametrize("linear", ["full", "to_go, hk", "to_go, action_value"])
def test_blocks_sum_to_the_shares_of_all_of_E(named_run: RunMaker, linear: str) -> None:
    """However many there are; of fewer groups than blocks each is a block."""
    run = named_run("gpt2-lora")
    groups = len({row.group for row in run.E})
    tables = {}
    for count in (2, 3, 8):
        found = measured_blocks(
            run, World(), linear=LINEAR[linear], attribution={"blocks": count}
        )
        assert found.block_shares is not None and found.token_table is not None
        assert found.block_shares.count == min(count, groups)
        tables[count] = found.token_table.share
        torch.testing.assert_close(
            found.block_shares.share.sum(1), tables[count], rtol=0, atol=1e-18
        )
    # One backward pass over all of E, and one pass over U along its gradient.
    session = run.open(linear=LINEAR[linear])
    plan = pipeline.Plan(audited="gradient", curvature=False)
    measured = pipeline.measure(session, plan)
    assert measured.gradient is not None
    slope = measured.duality.gradient / measured.duality.denominator
    split = split_step(session, measured.gradient, measured.step, slope)
    whole = score_shares(session, update_weights(session), split.direction).share
    bar = RTOL * float(whole.abs().max())
    for share in tables.values():
        assert float((share - whole).abs().max()) <= bar


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_blocks_are_the_same_on_any_number_of_ranks(
    named_run: RunMaker, world_size: int
) -> None:
    """Blocks without a sequence on a rank, and ranks without one of U, included."""
    run = named_run("gpt2-lora")
    alone = measured_blocks(run, World()).block_shares
    assert alone is not None
    bar = RTOL * float(alone.share.abs().max())
    for found in run_thread_ranks(
        world_size, lambda world: measured_blocks(run, world).block_shares
    ):
        assert found is not None
        assert torch.equal(found.size, alone.size)
        for name in ("share", "momentum", "decay"):
            gap = getattr(found, name) - getattr(alone, name)
            assert float(gap.abs().max()) <= bar


def test_a_block_of_empty_responses_adds_nothing(named_run: RunMaker) -> None:
    """And it has no share in the denominator."""
    run = named_run("gpt2-lora")
    of_rows = naive_blocks(run.E, 4)
    emptied = [
        replace(row, response_ids=[], sampling_logprobs=None) if block == 2 else row
        for block, row in zip(of_rows, run.E, strict=True)
    ]
    blocks = measured_blocks(
        replace(run, E=emptied), World(), attribution={"blocks": 4}
    ).block_shares
    assert blocks is not None
    assert blocks.size[2] == blocks.momentum[2] == blocks.decay[2] == 0
    assert not blocks.share[:, 2].any()
    assert blocks.share[:, [0, 1, 3]].any(dim=0).all()


# Errors of the parts


@pytest.mark.parametrize(
    "name", ["gpt2 dr_grpo", "gpt2 to_go, hk", "qwen2 sum, surprisal, warm"]
)
def test_errors_of_the_parts_by_brute_force(named_run: RunMaker, name: str) -> None:
    """Each is that of a slope along its part of the step."""
    case = CASES[name]
    run = named_run(case.run)
    result = attributed(run, case).results.attribution
    assert result is not None
    gradient = run.gradient(case.loss)
    parts = naive_parts(run, gradient, case.max_grad_norm)
    to_go = case.objective.is_mode == "per_decision"
    kind = {"score": "to_go", "baseline": "hk"} if to_go else {}
    directions = {
        "momentum": parts.momentum,
        "weight_decay": parts.decay,
        "gradient": parts.of_gradient(gradient),
    }
    for part, direction in directions.items():
        slope = ref.slope(run.saved.model, run.E, direction, case.objective, **kind)
        normalize = case.objective.normalize
        expected = ref.slope_standard_error(run.E, slope.pieces, normalize)
        assert getattr(result, f"{part}_se") == pytest.approx(expected, rel=1e-8)
        expected = ref.slope_jackknife(run.E, slope.pieces, normalize)
        found = getattr(result, f"{part}_se_jackknife")
        # Groups without tokens leave nothing out.
        assert found == pytest.approx(expected, rel=1e-8)
        assert getattr(result, part) == pytest.approx(slope.slope, rel=1e-7)
        half = QUANTILE * expected
        ends = (slope.slope - half, slope.slope + half)
        assert getattr(result, f"{part}_interval") == pytest.approx(ends, rel=1e-6)


@pytest.mark.parametrize("linear", LINEAR)
def test_parts_are_the_same_in_forward_and_reverse_mode(
    named_run: RunMaker, linear: str
) -> None:
    """A slope along the momentum, weights and all, and a product with the gradient."""
    found = measured_blocks(named_run("gpt2-lora"), World(), linear=LINEAR[linear])
    assert found.parts is not None and found.block_shares is not None
    blocks = found.block_shares
    sums = {
        "momentum": blocks.momentum.sum(),
        "weight_decay": blocks.decay.sum(),
        "gradient": blocks.share.sum(),
    }
    scale = found.step.learning_rate * max(map(abs, found.slope.terms.values()))
    for part, value in sums.items():
        assert abs(found.parts[part].value - float(value)) <= RTOL * scale, part
    whole = found.slope.estimate.scaled(found.step.learning_rate)
    added = found.parts["momentum"].plus(found.parts["weight_decay"])
    added = added.plus(found.parts["gradient"])
    bar = RTOL * float(whole.influence.abs().max())
    assert float((added.influence - whole.influence).abs().max()) <= bar


def test_a_part_that_the_step_has_not_costs_no_pass(tmp_path: Path) -> None:
    """And has neither value nor error: without decay, before the first step."""
    run = make_run(tmp_path, "gpt2")
    for group in run.saved.optimizer.param_groups:
        group["weight_decay"] = 0.0
    torch.save(run.saved.optimizer.state_dict(), run.saved.folder / "optimizer.pt")
    result = attribute(run).results
    assert result.attribution is not None
    assert result.attribution.weight_decay == result.attribution.weight_decay_se == 0
    phases = [name for name in result.run.seconds if name.startswith("errors of")]
    assert phases == ["errors of parts: E along the momentum"]


def test_an_E_of_another_policy_is_attributed_with_its_weights(
    named_run: RunMaker,
) -> None:
    """Parts and shares add up, and the masked steps are measured on halves of it."""
    run = named_run("gpt2-lora")
    rows = ref.with_sampling_logprobs(run.saved.model, run.E, 5, noise=0.3)
    asked = {"verify": True, "fraction": FRACTION}
    other = replace(run, E=rows)
    batches = other.config().batches.model_dump(mode="json")
    batches["E"] |= {"reweight": "sampler"}
    config = other.config(attribution=asked, batches=batches)
    result = run_attribution(config, World(), None, quiet).results
    found = result.attribution
    assert found is not None
    assert found.attribution_gap <= GAP["float64"]
    assert found.total != attribute(run).results.linear.delta_h1
    for row in found.what_if:
        assert math.isfinite(row["delta_h_true"]) and row["delta_h_true_se"] > 0


# Optimizers with another rule


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adamax"])
def test_other_optimizers_are_refused(tmp_path: Path, name: str) -> None:
    kind = getattr(torch.optim, name)
    run = make_run(tmp_path, "gpt2")
    parameters = list(ref.trainable(run.saved.model).values())
    optimizer = kind(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), run.saved.folder / "optimizer.pt")
    with pytest.raises(InputError, match=f"found that of {name} "):
        attribute(run)


# The command and its files


@dataclass(frozen=True)
class Workplace:
    """A checkpoint with a tokenizer, and the configuration of a run on it."""

    run: TinyRun
    config: Path

    def arguments(self, out: Path) -> list[str | Path]:
        options = ("--config", self.config, "--out", out, "--verify", "--quiet")
        return ["attribute", *options]


@dataclass(frozen=True)
class Folder:
    """A run directory."""

    path: Path

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json, which must be JSON without NaN."""
        return json.loads((self.path / "results.json").read_text(), parse_constant=fail)

    @property
    def sequences(self) -> list[dict[str, Any]]:
        """The rows of U."""
        lines = (self.path / "per_sequence.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=fail) for line in lines]
        return [row for row in rows if row["split"] == "U"]

    @property
    def tokens(self) -> list[dict[str, Any]]:
        """The rows of tokens.jsonl.gz."""
        with gzip.open(self.path / "tokens.jsonl.gz", "rt") as stream:
            return [json.loads(line, parse_constant=fail) for line in stream]


def fail(constant: str) -> None:
    raise AssertionError(f"not a number of JSON: {constant}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """U has two groups only: one of three ranks has none of it."""
    root = tmp_path_factory.mktemp("place")
    run = make_run(root, "gpt2")
    mixed = [run.U[i] for i in (2, 0, 3, 1, 4)]
    assert [row.group for row in mixed] == [1, 0, 1, 0, 1]
    run = replace(run, U=mixed)
    words = {f"w{i}": i for i in range(run.saved.model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))
    )
    tokenizer.save_pretrained(run.saved.folder)
    config = run.config(attribution={"fraction": FRACTION})
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    return Workplace(run, path)


@pytest.fixture(scope="module")
def written(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The command, run once on one rank."""
    out = tmp_path_factory.mktemp("written") / "out"
    done = CliRunner().invoke(main, [*map(str, place.arguments(out))])
    assert done.exit_code == 0, done.output
    return Folder(out)


def test_tokens_file(place: Workplace, written: Folder) -> None:
    """Every token of U in file order, with the reference's numbers."""
    rows, model, batch = iter(written.tokens), place.run.saved.model, place.run.U
    scored = ref.scores(model, batch, 1.0)
    advantages = ref.advantages(batch, "centered")
    num_tokens = sum(len(row.response_ids) for row in batch)
    pairs = list(zip(scored, advantages, strict=True))
    mean_logp = math.fsum(float(x.sum()) for x, _ in scored) / num_tokens
    mean_advantage = math.fsum(len(x) * a for (x, _), a in pairs) / num_tokens
    for index, ((logp, entropy), advantage) in enumerate(pairs):
        for k, token_id in enumerate(batch[index].response_ids):
            row = next(rows)
            assert tuple(row) == TOKEN_KEYS
            assert (row["index"], row["k"], row["token_id"]) == (index, k + 1, token_id)
            assert row["text"] == f"w{token_id}"
            covariance = (float(logp[k]) - mean_logp) * (advantage - mean_advantage)
            for key, value in (
                ("logp", float(logp[k])),
                ("entropy", float(entropy[k])),
                ("advantage", advantage),
                ("covariance", covariance),
            ):
                assert abs(row[key] - value) <= RTOL * max(1.0, abs(value)), key
    assert next(rows, None) is None


def test_shares_in_the_sequences_file(place: Workplace, written: Folder) -> None:
    """In file order though groups are mixed; they sum to delta_h1 with the rest."""
    results, rows = written.results, written.sequences
    found, linear = results["attribution"], results["linear"]
    scale = results["update"]["learning_rate_used"] * max(
        map(abs, linear["terms"].values())
    )
    assert [row["index"] for row in rows] == list(range(len(place.run.U)))
    for row, given in zip(rows, place.run.U, strict=True):
        assert row["num_tokens"] == len(given.response_ids)
        assert row["group"] == given.group
        shares = [t["share"] for t in written.tokens if t["index"] == row["index"]]
        assert abs(row["share"] - math.fsum(shares)) <= RTOL * scale
    total = math.fsum(row["share"] for row in rows)
    total += found["momentum"] + found["weight_decay"]
    assert abs(total - linear["delta_h1"]) <= RTOL * scale


def test_results_file(written: Folder) -> None:
    results = written.results
    assert results["status"] == "ok"
    found = results["attribution"]
    assert found.keys() >= {
        "momentum",
        "weight_decay",
        "gradient",
        "total",
        "attribution_gap",
        "covariance",
    }
    assert found["attribution_gap"] <= GAP["float64"]
    assert list(found["covariance"]) == ["spearman", "top_overlap"]
    assert all("delta_h_true" in row for row in found["what_if"])
    assert "curvature" not in results
    top = found["top_tokens"][0]
    token = max(written.tokens, key=lambda row: abs(row["share"]))
    assert (top["index"], top["k"]) == (token["index"], token["k"])
    assert top["context"][1] == token["text"]


def test_three_ranks_give_the_shares_of_one(
    place: Workplace, written: Folder, tmp_path: Path
) -> None:
    """One of them has no sequence of U; every token, sequence, part and what-if."""
    config = load_config(place.config, ("attribution.verify=true",))
    probed, *_ = run_thread_ranks(
        3, lambda world: run_attribution(config, world, None, lambda *_: None)
    )
    (tmp_path / "out").mkdir()
    write_results(tmp_path / "out", probed, "")
    other = Folder(tmp_path / "out")
    assert other.results["run"]["world_size"] == 3
    for mine, theirs in (
        (other.tokens, written.tokens),
        (other.sequences, written.sequences),
    ):
        bar = RTOL * max(abs(row["share"]) for row in theirs)
        for row, expected in zip(mine, theirs, strict=True):
            assert row.keys() == expected.keys()
            assert row["index"] == expected["index"]
            assert abs(row["share"] - expected["share"]) <= bar
    found, expected = other.results["attribution"], written.results["attribution"]
    terms = written.results["linear"]["terms"]
    rate = written.results["update"]["learning_rate_used"]
    scale = rate * max(map(abs, terms.values()))
    errors = ("momentum_se", "weight_decay_se", "gradient_se", "gradient_se_jackknife")
    for key in ("momentum", "weight_decay", "gradient", "total", *errors):
        assert abs(found[key] - expected[key]) <= RTOL * scale, key
    mine, theirs = found["covariance"], expected["covariance"]
    assert mine["top_overlap"] == theirs["top_overlap"]
    assert abs(mine["spearman"] - theirs["spearman"]) <= RTOL
    entropy = written.results["truth"]["H_orig"]
    for mine, theirs in zip(found["what_if"], expected["what_if"], strict=True):
        assert (mine["rule"], mine["num_tokens"]) == (
            theirs["rule"],
            theirs["num_tokens"],
        )
        assert mine.keys() == theirs.keys()
        for key in ("delta_h1", "delta_h1_cross_fitted", "se"):
            assert abs(mine[key] - theirs[key]) <= RTOL * scale
        for key in ("delta_h_true", "delta_h_true_se"):
            assert abs(mine[key] - theirs[key]) <= RTOL * entropy
