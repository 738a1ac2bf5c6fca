"""Is the reference right? It is checked against itself, by a second way each time.

Slopes against central differences, standard errors against differentiation by group
weights, probabilities and unbiasedness against enumeration of every response.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import reference as ref
import torch
from reference import LossSettings, Objective, Row
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

STEP = 0.02  # of central differences along a direction of norm 1
RTOL_DIFFERENCE = 1e-9  # what the extrapolated difference reaches; 1e-7 is asked for
RTOL_EXACT = 1e-12  # the same sums in another order
EPSILON = torch.finfo(torch.float64).eps
TEMPERATURE = 0.8


@dataclass
class Case:
    """A model, a ragged batch and what is computed from them once."""

    model: nn.Module
    rows: list[Row]

    @cached_property
    def direction(self) -> dict[str, Tensor]:
        return ref.random_direction(self.model, seed=5)

    @cached_property
    def scores_at(self) -> Callable[[float], ref.Scores]:
        return ref.scores_along(self.model, self.rows, self.direction, TEMPERATURE)

    @cached_property
    def tokens(self) -> list[ref.TokenDerivatives]:
        return [
            ref.token_derivatives(self.model, row, self.direction, TEMPERATURE)
            for row in self.rows
        ]


CASES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "gpt2-lora": lambda: (
        ref.with_lora(ref.tiny_gpt2(0), 1, ["c_attn", "c_proj"]),
        13,
    ),
    "qwen2-lora": lambda: (
        ref.with_lora(ref.tiny_qwen2(0), 1, ["q_proj", "v_proj", "down_proj"]),
        17,
    ),
    "llama-full": lambda: (ref.tiny_llama(0), 15),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    model, vocabulary = CASES[request.param]()
    rows = ref.random_rows(
        3, responses=[1, 2, 3, 2], vocabulary=vocabulary, with_empty=True
    )
    return Case(model, rows)


@pytest.fixture(scope="module")
def gpt2() -> Case:
    rows = ref.random_rows(3, groups=5, responses=[1, 2, 3, 2, 2], with_empty=True)
    return Case(CASES["gpt2-lora"]()[0], rows)


def close(value: float, expected: float, rtol: float) -> bool:
    return math.isclose(value, expected, rel_tol=rtol, abs_tol=0.0)


def truth_objectives(clip_c: float) -> list[Objective]:
    """Every importance-weighted value there is."""
    objectives = []
    for normalize in ref.NORMALIZATIONS:
        for integrand in ("rb", "surprisal"):
            snis = Objective(normalize=normalize, integrand=integrand)
            objectives += [snis, replace(snis, is_mode="clip", clip_c=clip_c)]
        if normalize != "per_sequence_token_mean":
            objectives.append(Objective(normalize=normalize, is_mode="per_decision"))
    return objectives


# Models


class Float32Spy(TorchDispatchMode):
    """Counts float32 tensors among the results of all operations."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor) and item.dtype == torch.float32:
                self.count += 1
        return result


def test_true_float64_leaves_no_float32(case: Case) -> None:
    row = max(case.rows, key=lambda r: len(r.response_ids))
    with Float32Spy() as spy:
        logp, entropy = ref.token_scores(case.model, row, TEMPERATURE)
        (logp.sum() + entropy.sum()).backward()
    case.model.zero_grad()
    assert spy.count == 0


def test_float32_is_there_without_true_float64() -> None:
    model = ref.tiny_qwen2(0)
    with Float32Spy() as spy, torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    assert spy.count > 0


@pytest.mark.parametrize("make", [ref.tiny_gpt2, ref.tiny_qwen2, ref.tiny_llama])
def test_attention_implementations_agree(make: Callable[..., nn.Module]) -> None:
    row = Row(0, [1, 2, 3], [4, 5, 6, 7])
    for eager, sdpa in zip(
        ref.token_scores(make(0), row, 1.0),
        ref.token_scores(make(0, attention="sdpa"), row, 1.0),
        strict=True,
    ):
        torch.testing.assert_close(sdpa, eager, rtol=1e-12, atol=1e-13)


def test_models_are_as_described(case: Case) -> None:
    assert not case.model.training
    assert {p.dtype for p in case.model.parameters()} == {torch.float64}
    assert all(p.abs().max() > 0 for p in ref.trainable(case.model).values())
    uniform = math.log(case.model.config.vocab_size)
    entropies = torch.cat([h for _, h in case.scores_at(0.0)])
    assert 0.2 * uniform < entropies.mean() < 0.8 * uniform
    assert entropies.std() > 0.1


def test_embeddings_are_tied_or_not() -> None:
    for make, tied in ((ref.tiny_gpt2, 1), (ref.tiny_qwen2, 1), (ref.tiny_llama, 0)):
        model = make(0)
        head = model.get_output_embeddings().weight
        assert (head is model.get_input_embeddings().weight) == bool(tied)


def test_lora_trains_the_adapter_only_and_changes_the_policy() -> None:
    row = Row(0, [1, 2], [3, 4])
    plain, _ = ref.token_scores(ref.tiny_qwen2(0), row, 1.0)
    model = ref.with_lora(ref.tiny_qwen2(0), 1, ["q_proj"])
    adapted, _ = ref.token_scores(model, row, 1.0)
    assert all("lora_" in name for name in ref.trainable(model))
    assert (plain - adapted).abs().min() > 1e-3


def test_parameters_are_restored_exactly(gpt2: Case) -> None:
    def bits() -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in gpt2.model.named_parameters()}

    before = bits()
    with (
        pytest.raises(RuntimeError, match="inside"),
        ref.parameters_shifted(gpt2.model, gpt2.direction, 0.3),
    ):
        shifted = bits()
        raise RuntimeError("inside")
    for name, v in gpt2.direction.items():
        assert torch.equal(shifted[name], before[name] + 0.3 * v)
    assert all(torch.equal(value, before[name]) for name, value in bits().items())


# Batches and scores


def test_random_rows_are_ragged_and_reproducible() -> None:
    rows = ref.random_rows(7, groups=5, responses=[1, 3, 2, 2, 4], with_empty=True)
    assert rows == ref.random_rows(
        7, groups=5, responses=[1, 3, 2, 2, 4], with_empty=True
    )
    lengths = [len(row.response_ids) for row in rows]
    assert lengths.count(0) == 3
    assert len(set(lengths)) > 2
    assert all(len(row.prompt_ids) > 0 for row in rows)
    assert all(len(row.response_ids) > 0 for row in ref.random_rows(7))


def test_probabilities_of_all_responses_sum_to_one() -> None:
    model = ref.tiny_qwen2(2, vocabulary=5)
    rows = ref.all_rows([1, 2], vocabulary=5, eos=0, length=3)
    scores = ref.scores(model, rows, TEMPERATURE)
    logp = [math.fsum(values.tolist()) for values, _ in scores]
    entropy = [math.fsum(values.tolist()) for _, values in scores]
    assert close(math.fsum(map(math.exp, logp)), 1.0, RTOL_EXACT)
    # The chain rule: E[-l] = E[sum_k H_k].
    surprisal = math.fsum(-math.exp(x) * x for x in logp)
    rao_blackwell = math.fsum(
        math.exp(x) * h for x, h in zip(logp, entropy, strict=True)
    )
    assert close(surprisal, rao_blackwell, RTOL_EXACT)


# The truth


@pytest.mark.bits
@pytest.mark.parametrize("objective", truth_objectives(clip_c=1.01), ids=str)
def test_contributions_sum_and_errors_match_group_weights(
    gpt2: Case, objective: Objective
) -> None:
    """d/dw_g of the estimator with every group g counted w_g times, by autograd."""
    old, new = gpt2.scores_at(0.0), gpt2.scores_at(0.2)
    truth = ref.delta_h_true(gpt2.rows, old, new, objective)
    # Every part of either value is rounded once, and so are both values.
    rounding = 2 * EPSILON * (truth.H_orig + truth.H_upd)
    assert abs(math.fsum(truth.contributions) - truth.delta_h_true) <= rounding
    assert truth.H_orig == ref.entropy_value(gpt2.rows, old, old, objective)
    assert truth.H_upd == ref.entropy_value(gpt2.rows, old, new, objective)
    assert 1 < truth.ess < len(gpt2.rows)

    parts = [
        torch.tensor(ref.ratio_parts(gpt2.rows, old, x, objective), dtype=torch.float64)
        for x in (old, new)
    ]
    index = torch.tensor([row.group for row in gpt2.rows])
    n = 5

    def estimate(weights: Tensor) -> Tensor:
        (a0, d0), (a1, d1) = (part @ weights for part in parts)
        if objective.normalize == "sum":
            return a1 - a0
        return a1 / d1 - a0 / d0

    group_weights = torch.ones(n, dtype=torch.float64, requires_grad=True)
    (influence,) = torch.autograd.grad(estimate(group_weights[index]), group_weights)
    if objective.normalize != "sum":
        assert abs(float(influence.sum())) < 1e-13
    spread = (influence - influence.mean()).square().sum()
    assert close(truth.se, math.sqrt(n / (n - 1) * float(spread)), 1e-9)


def test_values_written_out_for_two_sequences() -> None:
    rows = [Row(0, [1], [1, 2]), Row(1, [1], [])]
    empty = torch.zeros(0, dtype=torch.float64)

    def scores(logp: list[float], entropy: list[float]) -> ref.Scores:
        tensors = torch.tensor([logp, entropy], dtype=torch.float64)
        return [(tensors[0], tensors[1]), (empty, empty)]

    old, new = scores([-1.0, -2.0], [0.5, 0.7]), scores([-0.9, -2.4], [0.6, 0.8])
    w, prefix = math.exp(-0.3), math.exp(0.1)
    expected = {
        ("per_token", "snis"): 1.4 / 2,
        ("per_sequence", "snis"): w * 1.4 / (w + 1),
        ("per_sequence_token_mean", "snis"): w * 0.7 / (w + 1),
        ("sum", "snis"): w * 1.4,
        ("per_sequence", "clip"): 0.5 * 1.4 / (0.5 + 0.5),
        ("sum", "clip"): 0.5 * 1.4,
        ("per_token", "per_decision"): (0.6 + prefix * 0.8) / (1 + prefix),
        ("per_sequence", "per_decision"): (0.6 + prefix * 0.8) / 2,
        ("sum", "per_decision"): 0.6 + prefix * 0.8,
    }
    for (normalize, mode), value in expected.items():
        objective = Objective(normalize=normalize, is_mode=mode, clip_c=0.5)
        assert close(ref.entropy_value(rows, old, new, objective), value, RTOL_EXACT)
    surprisal = Objective(normalize="sum", integrand="surprisal")
    value = ref.entropy_value(rows, old, new, surprisal)
    assert close(value, w * 3.3, RTOL_EXACT)
    truth = ref.delta_h_true(rows, old, new, Objective())
    assert close(truth.ess, (w + 1) ** 2 / (w * w + 1), RTOL_EXACT)
    assert truth.log_weights == pytest.approx([-0.3, 0.0], abs=1e-15)


def test_per_token_error_is_the_written_formula(gpt2: Case) -> None:
    old, new = gpt2.scores_at(0.0), gpt2.scores_at(0.2)
    truth = ref.delta_h_true(gpt2.rows, old, new, Objective())
    length = [len(row.response_ids) for row in gpt2.rows]
    w = [math.exp(x) for x in truth.log_weights]
    N, n = len(length), 5
    mean = sum(length) / N
    weighted_mean = sum(a * b for a, b in zip(w, length, strict=True)) / N
    total, first = [0.0] * n, [0.0] * n
    for i, row in enumerate(gpt2.rows):
        before = float(old[i][1].sum()) - truth.H_orig * length[i]
        after = w[i] * (float(new[i][1].sum()) - truth.H_upd * length[i])
        total[row.group] += after / weighted_mean - before / mean
        first[row.group] += before / mean
    expected = math.sqrt(sum(t * t for t in total) * n / (n - 1)) / N
    assert close(truth.se, expected, 1e-9)
    expected = math.sqrt(sum(t * t for t in first) * n / (n - 1)) / N
    assert close(truth.H_orig_se, expected, 1e-9)


# The slope


def test_differences_of_known_functions() -> None:
    def f(x: float) -> float:
        return math.exp(math.sin(x) + 0.3 * x)

    assert close(ref.slope_by_central_difference(f, STEP), 1.3, 1e-12)
    assert close(ref.curvature_by_central_difference(f, STEP), 1.3**2, 1e-9)


@pytest.mark.parametrize("integrand", ["rb", "surprisal"])
@pytest.mark.parametrize("normalize", ref.NORMALIZATIONS)
def test_full_slope_is_the_derivative_of_snis(
    case: Case, normalize: str, integrand: str
) -> None:
    objective = Objective(
        normalize=normalize, integrand=integrand, temperature=TEMPERATURE
    )
    result = ref.slope_from_tokens(case.tokens, objective)
    f = ref.entropy_along(case.rows, case.scores_at, objective)
    expected = ref.slope_by_central_difference(f, STEP)
    assert close(result.slope, expected, RTOL_DIFFERENCE)
    assert close(math.fsum(result.contributions), result.slope, 1e-10)
    has_denominator = normalize != "sum"
    assert (result.denominator != 0) == has_denominator


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", "sum"])
def test_to_go_slope_is_the_derivative_of_per_decision(
    case: Case, normalize: str
) -> None:
    objective = Objective(
        normalize=normalize, is_mode="per_decision", temperature=TEMPERATURE
    )
    result = ref.slope_from_tokens(case.tokens, objective, score="to_go", baseline="hk")
    f = ref.entropy_along(case.rows, case.scores_at, objective)
    expected = ref.slope_by_central_difference(f, STEP)
    assert close(result.slope, expected, RTOL_DIFFERENCE)
    assert close(math.fsum(result.contributions), result.slope, 1e-10)
    assert (result.denominator != 0) == (normalize == "per_token")


def test_curvature_does_not_depend_on_the_step(case: Case) -> None:
    objective = Objective(temperature=TEMPERATURE)
    f = ref.entropy_along(case.rows, case.scores_at, objective)
    fine, coarse = (ref.curvature_by_central_difference(f, h) for h in (0.02, 0.04))
    assert close(fine, coarse, 1e-6)


@pytest.mark.parametrize("integrand", ["rb", "surprisal"])
@pytest.mark.parametrize(
    ("score", "baseline"), [("full", "none"), ("to_go", "none"), ("to_go", "hk")]
)
def test_slope_is_unbiased(
    enumeration: tuple[Case, list[float], float],
    score: str,
    baseline: str,
    integrand: str,
) -> None:
    """sum_s p(s) * (the slope's share of s) = d/d eta of sum_s p(s) H_s."""
    case, probability, expected = enumeration
    objective = Objective(normalize="sum", integrand=integrand)
    result = ref.slope_from_tokens(
        case.tokens, objective, score=score, baseline=baseline
    )
    mean = math.fsum(
        p * c for p, c in zip(probability, result.contributions, strict=True)
    )
    assert close(mean, expected, RTOL_DIFFERENCE)


@pytest.mark.parametrize(
    ("score", "baseline"), [("full", "none"), ("to_go", "none"), ("to_go", "hk")]
)
def test_denominator_is_unbiased(
    enumeration: tuple[Case, list[float], float], score: str, baseline: str
) -> None:
    """What the mean entropy multiplies has the mean d/d eta of sum_s p(s) T_s."""
    case, probability, _ = enumeration

    def length(eta: float) -> float:
        logp = [values for values, _ in case.scores_at(eta)]
        return math.fsum(len(x) * math.exp(math.fsum(x.tolist())) for x in logp)

    pieces = ref.slope_from_tokens(
        case.tokens, Objective(), score=score, baseline=baseline
    ).pieces
    mean = float(pieces.remaining @ torch.tensor(probability, dtype=torch.float64))
    expected = ref.slope_by_central_difference(length, STEP)
    assert close(mean, expected, RTOL_DIFFERENCE)


@pytest.fixture(scope="module")
def enumeration() -> tuple[Case, list[float], float]:
    """Every response of one prompt, its probability, and the exact entropy's slope."""
    model = ref.with_lora(ref.tiny_gpt2(2, vocabulary=4), 1, ["c_attn"])
    case = Case(model, ref.all_rows([1, 2], vocabulary=4, eos=0, length=3))

    def entropy(eta: float) -> float:
        logp = [math.fsum(values.tolist()) for values, _ in case.scores_at(eta)]
        return math.fsum(-math.exp(x) * x for x in logp)

    probability = [
        math.exp(math.fsum(values.tolist())) for values, _ in case.scores_at(0.0)
    ]
    return case, probability, ref.slope_by_central_difference(entropy, STEP)


@pytest.mark.parametrize("score", ["full", "to_go"])
@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", "sum"])
def test_slope_errors(gpt2: Case, normalize: str, score: str) -> None:
    """The delta method written out; the jackknife redone from the batch's rows."""
    objective = Objective(normalize=normalize, temperature=TEMPERATURE)
    result = ref.slope_from_tokens(gpt2.tokens, objective, score=score)
    pieces = result.pieces
    error = ref.slope_standard_error(gpt2.rows, pieces, normalize)
    D = 1.0 if normalize == "sum" else float(pieces.size.sum())
    H, R = float(pieces.value.sum()) / D, float(pieces.remaining.sum()) / D
    influence = pieces.score + pieces.pathwise - H * pieces.remaining
    if normalize != "sum":
        influence = influence - R * (pieces.value - H * pieces.size)
        influence = influence - result.slope * pieces.size
    influence = (influence / D).tolist()
    expected = ref.clustered_standard_error(gpt2.rows, influence)
    assert close(error, expected, 1e-10)

    def again(keep: list[int]) -> float:
        tokens = [gpt2.tokens[i] for i in keep]
        return ref.slope_from_tokens(tokens, objective, score=score).slope

    jackknife = ref.slope_jackknife(gpt2.rows, pieces, normalize)
    assert close(jackknife, ref.jackknife(gpt2.rows, again, normalize), 1e-10)
    if normalize == "sum":
        assert close(jackknife, error, 1e-10)


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", "sum"])
def test_slope_errors_describe_the_spread(normalize: str) -> None:
    """Made-up pieces, 60 groups of 3 that share an effect, 400 batches."""
    rows = [Row(i // 3, [1], [1]) for i in range(180)]
    generator = torch.Generator().manual_seed(0)
    slopes, errors = [], []
    for _ in range(400):
        noise = torch.randn(4, 180, generator=generator, dtype=torch.float64)
        shared = torch.randn(60, generator=generator, dtype=torch.float64)
        score, pathwise, remaining, value = noise + shared.repeat_interleave(3)
        size = torch.ones_like(value)
        if normalize == "per_token":
            size = 5.0 + remaining.abs() + value.abs()
        if normalize == "sum":
            remaining = torch.zeros_like(value)
        pieces = ref.SlopePieces(score + 0.5, pathwise, remaining, value + 3.0, size)
        slopes.append(ref.assemble_slope(pieces, normalize).slope)
        errors.append(ref.slope_standard_error(rows, pieces, normalize))
    spread = float(torch.tensor(slopes).std())
    assert abs(sum(errors) / len(errors) / spread - 1) < 0.1  # 1/sqrt(800) is 0.035
    jackknife = ref.slope_jackknife(rows, pieces, normalize)
    assert abs(jackknife / errors[-1] - 1) < 0.05


def test_slope_of_a_model_is_that_of_its_tokens(gpt2: Case) -> None:
    objective = Objective(temperature=TEMPERATURE)
    direct = ref.slope(gpt2.model, gpt2.rows, gpt2.direction, objective)
    assert direct.slope == ref.slope_from_tokens(gpt2.tokens, objective).slope


def test_combinations_that_do_not_exist(gpt2: Case) -> None:
    mean = "per_sequence_token_mean"
    with pytest.raises(ValueError, match="no to-go form"):
        ref.slope_from_tokens(gpt2.tokens, Objective(normalize=mean), score="to_go")
    with pytest.raises(ValueError, match="no such pair"):
        ref.slope_from_tokens(gpt2.tokens, Objective(), baseline="hk")
    for wrong in ({"normalize": mean}, {"integrand": "surprisal"}):
        with pytest.raises(ValueError, match="per_decision does not apply"):
            Objective(is_mode="per_decision", **wrong)


# The update step


def test_advantages() -> None:
    rows = ref.random_rows(1, groups=3, responses=[3, 2, 4])
    centered = torch.tensor(ref.advantages(rows, "centered"))
    standardized = torch.tensor(ref.advantages(rows, "standardized"))
    for start, stop in ((0, 3), (3, 5), (5, 9)):
        rewards = torch.tensor([row.reward for row in rows[start:stop]])
        expected = rewards - rewards.mean()
        torch.testing.assert_close(centered[start:stop], expected)
        expected = expected / (rewards.std() + 1e-4)
        torch.testing.assert_close(standardized[start:stop], expected)
    given = [replace(row, advantage=0.25) for row in rows[:2]] + rows[2:]
    assert ref.advantages(given, "centered")[:2] == [0.25, 0.25]
    assert ref.advantages(given, "centered")[2:] == ref.advantages(rows, "centered")[2:]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Lengths 3, 1 | 0, 2 with L_b = 3 | 2, N_b = 2, N = 4, T = 6.
        (LossSettings(), [1 / 12, 1 / 12, 0.0, 1 / 8]),
        (LossSettings(length_norm=10), [1 / 40, 1 / 40, 0.0, 1 / 40]),
        (LossSettings(loss="grpo"), [1 / 12, 1 / 4, 0.0, 1 / 8]),
        (LossSettings(loss="dapo"), [1 / 6, 1 / 6, 0.0, 1 / 6]),
        (LossSettings(loss="nll"), [1 / 6, 1 / 6, 0.0, 1 / 6]),
    ],
    ids=str,
)
def test_token_weights_of_the_losses(
    gpt2: Case, settings: LossSettings, expected: list[float]
) -> None:
    responses = [[1, 2, 3], [4], [], [5, 6]]
    rows = [Row(i // 2, [i // 2], ids) for i, ids in enumerate(responses)]
    advantage = [0.5, -0.5, 0.2, -0.2]
    loss = ref.rl_loss(gpt2.model, rows, advantage, settings)
    value = 0.0
    for row, A, weight in zip(rows, advantage, expected, strict=True):
        logp, _ = ref.token_scores(gpt2.model, row, 1.0)
        scale = 1.0 if settings.loss == "nll" else A
        value -= weight * scale * float(logp.detach().sum())
    assert close(float(loss.detach()), value, RTOL_EXACT)


@pytest.mark.parametrize("loss", ["dr_grpo", "grpo", "dapo"])
def test_clipped_ratio(gpt2: Case, loss: str) -> None:
    """At ratio 1 the gradient is the on-policy one; clipped tokens have none."""
    advantage = ref.advantages(gpt2.rows, "centered")

    def gradient(noise: float, **settings: Any) -> Tensor:
        rows = ref.with_sampling_logprobs(gpt2.model, gpt2.rows, 4, noise=noise)
        value = ref.rl_loss(gpt2.model, rows, advantage, LossSettings(**settings))
        parameters = list(ref.trainable(gpt2.model).values())
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

    on_policy = gradient(0.0, loss=loss)
    at_one = gradient(0.0, loss=loss, ratio="clipped")
    torch.testing.assert_close(at_one, on_policy, rtol=1e-10, atol=1e-13)
    off = gradient(0.5, loss=loss, ratio="clipped")
    wide = gradient(0.5, loss=loss, ratio="clipped", epsilon_low=1.0, epsilon_high=99.0)
    assert (off - wide).norm() > 1e-2 * wide.norm()


def test_clipped_surrogate_of_one_token(gpt2: Case) -> None:
    settings = LossSettings(loss="dapo", ratio="clipped", epsilon_high=0.3)
    ((scored, _),) = ref.scores(gpt2.model, [Row(0, [1], [2])], 1.0)
    logp = float(scored)
    for rho, A, expected in (
        (1.5, 2.0, 2.6),
        (1.5, -2.0, -3.0),
        (0.5, 2.0, 1.0),
        (0.5, -2.0, -1.6),
        (1.1, 2.0, 2.2),
    ):
        row = Row(0, [1], [2], sampling_logprobs=[logp - math.log(rho)])
        loss = ref.rl_loss(gpt2.model, [row], [A], settings)
        assert close(float(loss.detach()), -expected, RTOL_EXACT)


def test_adamw_is_that_of_torch() -> None:
    """Four steps, two groups, the norm clipped in some; one parameter is left out."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Tensor]:
        shapes = {"a": (3, 2), "b": (4,), "c": (2, 2), "without_gradient": (3,)}
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    values, state = draw(), {}
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    first = {"lr": 3e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    second = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    groups = [{"names": ["a", "without_gradient"], **first}]
    groups.append({"names": ["b", "c"], **second})
    optimizer = torch.optim.AdamW(
        [
            {**settings, "params": [parameters[name] for name in group["names"]]}
            for group, settings in zip(groups, (first, second), strict=True)
        ]
    )
    for max_norm in (1.0, 0.0, 100.0, 0.5):
        gradients = draw()
        del gradients["without_gradient"]
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.clone()
        clipped, norm, coefficient = ref.clip_gradients(gradients, max_norm)
        if max_norm:
            total = nn.utils.clip_grad_norm_(parameters.values(), max_norm)
            assert close(norm, float(total), RTOL_EXACT)
        assert (coefficient < 1) == (0 < max_norm < norm)
        optimizer.step()
        values, state = ref.adamw_step_naive(values, clipped, state, groups)
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                values[name], parameter.detach(), rtol=1e-13, atol=1e-15
            )
    assert state["a"]["step"] == 4
    assert "without_gradient" not in state
