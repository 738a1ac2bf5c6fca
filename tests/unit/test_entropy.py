"""Is Delta H what pen and paper give, and its error what repeated sampling shows?"""

import math
from itertools import product
from typing import Any

import pytest
import reference as ref
import torch
from enumerable import Policy
from reference import Objective, Row
from torch import Tensor

from entropy_ddp.data.batch import Ragged
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.entropy import (
    EntropyChange,
    Ratio,
    all_entropy_changes,
    as_ratio,
    entropy_change,
    integrand_tokens,
    per_decision_ratio,
    prefix_log_weights,
    prefix_sums,
    reweighted,
)
from entropy_ddp.estimators.standard_errors import Draws

RTOL = 1e-12  # the same few sums in another order
SPREAD_RTOL = 0.1  # three standard deviations of a spread over 400 batches

PER_SEQUENCE_MEAN = "per_sequence_token_mean"


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=RTOL, abs_tol=0.0)


# By hand: lengths 2, 0, 1 in groups 0, 0, 1

LENGTHS = torch.tensor([2, 0, 1])
GROUPS = torch.tensor([0, 0, 1])
LOGP, LOGP_AFTER = double(-1.0, -2.0, -0.5), double(-0.9, -2.4, -0.7)
ENTROPY, ENTROPY_AFTER = double(0.5, 0.7, 1.1), double(0.6, 0.8, 1.3)
W0, W2, PREFIX = math.exp(-0.3), math.exp(-0.2), math.exp(0.1)
CLIP_C = 0.8  # between W0 = 0.74 and W2 = 0.82

BY_HAND = {
    ("per_token", "snis"): (W0 * 1.4 + W2 * 1.3) / (W0 * 2 + W2),
    ("per_sequence", "snis"): (W0 * 1.4 + W2 * 1.3) / (W0 + 1 + W2),
    (PER_SEQUENCE_MEAN, "snis"): (W0 * 0.7 + W2 * 1.3) / (W0 + 1 + W2),
    ("sum", "snis"): W0 * 1.4 + W2 * 1.3,
    ("per_token", "clip"): (W0 * 1.4 + 0.8 * 1.3) / (W0 * 2 + 0.8),
    ("per_sequence", "clip"): (W0 * 1.4 + 0.8 * 1.3) / (W0 + 0.8 + 0.8),
    (PER_SEQUENCE_MEAN, "clip"): (W0 * 0.7 + 0.8 * 1.3) / (W0 + 0.8 + 0.8),
    ("sum", "clip"): W0 * 1.4 + 0.8 * 1.3,
    ("per_token", "per_decision"): (0.6 + PREFIX * 0.8 + 1.3) / (2 + PREFIX),
    ("per_sequence", "per_decision"): (0.6 + PREFIX * 0.8 + 1.3) / 3,
    ("sum", "per_decision"): 0.6 + PREFIX * 0.8 + 1.3,
}
BEFORE_BY_HAND = {
    "per_token": 2.3 / 3,
    "per_sequence": 2.3 / 3,
    PER_SEQUENCE_MEAN: 1.7 / 3,
    "sum": 2.3,
}


def changes(
    normalize: str,
    integrand: str,
    groups: Tensor,
    ragged: Ragged,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    clip_c: float,
) -> dict[Any, EntropyChange]:
    """Delta H in every mode from flat arrays log p, H, log p', H' of tokens."""
    logp, entropy, logp_after, entropy_after = tokens
    before, after = (
        as_ratio(normalize, ragged.sum(values), ragged.lengths)
        for values in (
            integrand_tokens(integrand, logp, entropy),
            integrand_tokens(integrand, logp_after, entropy_after),
        )
    )
    per_decision = None
    if integrand == "rb" and normalize != PER_SEQUENCE_MEAN:
        log_weights = prefix_log_weights(ragged, logp_after - logp)
        shift = float(log_weights.max())
        sums = prefix_sums(ragged, log_weights, entropy_after, shift)
        per_decision = per_decision_ratio(normalize, sums, shift)
    log_weights = ragged.sum(logp_after) - ragged.sum(logp)
    draws = Draws(groups=groups)
    return all_entropy_changes(before, after, log_weights, clip_c, per_decision, draws)


def changes_by_hand(normalize: str, integrand: str = "rb") -> dict[Any, EntropyChange]:
    tokens = (LOGP, ENTROPY, LOGP_AFTER, ENTROPY_AFTER)
    return changes(normalize, integrand, GROUPS, Ragged(LENGTHS), tokens, CLIP_C)


@pytest.mark.parametrize(("normalize", "mode"), BY_HAND)
def test_values_by_hand(normalize: str, mode: str) -> None:
    change = changes_by_hand(normalize)[mode]
    assert change.is_mode == mode
    assert close(change.before.value, BEFORE_BY_HAND[normalize])
    assert close(change.after.value, BY_HAND[normalize, mode])
    assert change.value == change.after.value - change.before.value
    assert abs(float(change.contributions.sum()) - change.value) < 1e-15


def test_surprisal_by_hand() -> None:
    change = changes_by_hand("per_token", "surprisal")["snis"]
    assert close(change.before.value, 3.5 / 3)
    assert close(change.after.value, (W0 * 3.3 + W2 * 0.7) / (W0 * 2 + W2))
    assert set(changes_by_hand("per_token", "surprisal")) == {"snis", "clip"}
    assert set(changes_by_hand(PER_SEQUENCE_MEAN)) == {"snis", "clip"}


def test_effective_sample_size_is_of_the_weights_in_use() -> None:
    found = changes_by_hand("per_token")
    snis = (W0 + 1 + W2) ** 2 / (W0**2 + 1 + W2**2)
    clip = (W0 + 0.8 + 0.8) ** 2 / (W0**2 + 0.8**2 + 0.8**2)
    assert close(found["snis"].ess, snis)
    assert close(found["clip"].ess, clip)
    assert close(found["per_decision"].ess, snis)
    assert close(found["clip"].ess_fraction, clip / 3)


def test_error_by_hand_for_a_sum_and_for_a_ratio() -> None:
    total = changes_by_hand("sum")["snis"]
    c0, c1 = W0 * 1.4 - 1.2, W2 * 1.3 - 1.1
    assert total.contributions.tolist() == pytest.approx([c0, 0.0, c1], rel=RTOL)
    # Two groups: sqrt(2 * 2 * (half the difference)^2).
    assert close(total.se, abs(c0 - c1))
    ratio = changes_by_hand("per_token")["snis"]
    D, before, after = W0 * 2 + W2, ratio.before.value, ratio.after.value
    psi0 = W0 * (1.4 - after * 2) / D - (1.2 - before * 2) / 3
    psi1 = W2 * (1.3 - after) / D - (1.1 - before) / 3
    assert abs(psi0 + psi1) < 1e-15
    assert ratio.change.group_influence.tolist() == pytest.approx(
        [psi0, psi1], rel=RTOL
    )
    assert close(ratio.se, math.sqrt(2 * (psi0**2 + psi1**2)))


def test_a_ratio() -> None:
    ratio = Ratio(numerator=double(1, 2, 3), size=double(2, 0, 2))
    assert (ratio.denominator, ratio.value) == (4.0, 1.5)
    assert ratio.contributions.tolist() == [0.25, 0.5, 0.75]
    draws = Draws(groups=torch.tensor([0, 1, 0]))
    estimate = ratio.estimate(draws)
    assert estimate.value == 1.5
    assert estimate.influence.tolist() == [-0.5, 0.5, 0.0]  # A - 1.5 D over 4
    assert estimate.group_influence.tolist() == [-0.5, 0.5]
    assert estimate.without[1] == 1.0  # (1 + 3) / (2 + 2)
    plain = Ratio(numerator=double(1, 2, 3), size=None)
    assert (plain.denominator, plain.value) == (1.0, 6.0)
    summed = plain.estimate(draws)
    assert summed.group_influence.tolist() == [4.0, 2.0]
    assert summed.without.tolist() == [4.0, 8.0]  # the other group, twice


@pytest.mark.parametrize("shift", [800.0, -800.0])
@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", PER_SEQUENCE_MEAN])
def test_weights_beyond_float64_cancel_in_a_ratio(normalize: str, shift: float) -> None:
    original = as_ratio(normalize, double(1.2, 0.0, 1.1), LENGTHS)
    log_weights = double(-0.3, 0.0, -0.2)
    expected = reweighted(original, log_weights).value
    assert math.isclose(
        reweighted(original, log_weights + shift).value, expected, rel_tol=1e-10
    )


def test_the_largest_weight_is_put_back_into_a_sum() -> None:
    original = as_ratio("sum", double(1.2, 0.0, 1.1), LENGTHS)
    value = reweighted(original, double(5.0, -700.0, 1.0)).value
    assert close(value, math.exp(5.0) * 1.2 + math.exp(1.0) * 1.1)


def test_without_a_change_nothing_changes() -> None:
    tokens = (LOGP, ENTROPY, LOGP, ENTROPY)
    for normalize in ref.NORMALIZATIONS:
        for change in changes(
            normalize, "rb", GROUPS, Ragged(LENGTHS), tokens, 10.0
        ).values():
            assert change.value == 0.0
            assert change.se == 0.0
            assert not change.contributions.any()
            assert close(change.ess, 3)


@pytest.mark.parametrize("num_sequences", [0, 1, 2])
def test_fewer_than_two_groups_raise(num_sequences: int) -> None:
    ratio = Ratio(numerator=torch.ones(num_sequences).double(), size=None)
    draws = Draws(groups=torch.zeros(num_sequences, dtype=torch.int64))
    with pytest.raises(InputError, match="at least 2 groups in E"):
        entropy_change("snis", ratio, ratio, 1.0, draws)


# Clipped weights, over every response of a policy


def clipped_change(policy: Policy, eta: float, clip_c: float) -> float:
    """What `clip` tends to with many responses: sums over all, times probability."""
    table, probability = policy.table(eta), policy.probabilities
    lengths = table.ragged.lengths.double()
    before, after = (
        Ratio(numerator=probability * values, size=probability * lengths)
        for values in (table.integrand("rb"), table.integrand("rb", "_after"))
    )
    found = all_entropy_changes(
        before,
        after,
        table.ragged.sum(table["logp_after"] - table["logp"]),
        clip_c,
        None,
        Draws(groups=torch.arange(len(probability))),
    )
    return found["clip"].value


def test_clip_is_biased_towards_the_pathwise_change() -> None:
    """Not towards none: this step lowers the entropy, and clipped it seems to rise."""
    policy, eta = Policy(vocabulary=3, length=3, seed=30), -0.4
    exact = policy.change(eta, "per_token")
    table, probability = policy.table(eta), policy.probabilities
    moved = table.integrand("rb", "_after") - table.integrand("rb")
    pathwise = float((probability * moved).sum())
    pathwise /= float((probability * table.ragged.lengths).sum())
    found = [clipped_change(policy, eta, c) for c in (1e6, 3.0, 1.5, 1e-6)]
    assert found[0] == pytest.approx(exact, rel=1e-12)
    assert found[-1] == pytest.approx(pathwise, rel=1e-12)
    assert found == sorted(found)
    assert found[1] < -0.02 < 0.01 < found[2]


# Against the reference on made-up tokens


def made_up(seed: int, num_groups: int) -> tuple[list[Row], ref.Scores, ref.Scores]:
    """Rows of 0 to 6 tokens with scores before and after; no model behind them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 4, (num_groups,), generator=generator).tolist()
    rows, old, new = [], [], []
    for group, size in enumerate(sizes):
        for _ in range(size):
            length = int(torch.randint(0, 7, (), generator=generator))
            logp, entropy, change, d_entropy = torch.randn(
                4, length, generator=generator, dtype=torch.float64
            )
            logp, entropy = -logp.abs(), entropy.abs()
            rows.append(Row(group, [1], [1] * length))
            old.append((logp, entropy))
            new.append((logp + 0.2 * change, (entropy + 0.1 * d_entropy).abs()))
    return rows, old, new


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("normalize", "integrand"), product(ref.NORMALIZATIONS, ("rb", "surprisal"))
)
def test_made_up_batches(normalize: str, integrand: str, seed: int) -> None:
    rows, old, new = made_up(seed, num_groups=2 + 3 * seed)
    ragged = Ragged(torch.tensor([len(row.response_ids) for row in rows]))
    groups = torch.tensor([row.group for row in rows])
    tokens = [torch.cat(column) for s in (old, new) for column in zip(*s, strict=True)]
    clip_c = 1.1
    found = changes(normalize, integrand, groups, ragged, tuple(tokens), clip_c)
    for mode, change in found.items():
        objective = Objective(
            normalize=normalize, integrand=integrand, is_mode=mode, clip_c=clip_c
        )
        expected = ref.delta_h_true(rows, old, new, objective)
        scale = max(1.0, abs(expected.H_upd))
        assert abs(change.value - expected.delta_h_true) <= RTOL * scale
        assert abs(change.se - expected.se) <= RTOL * scale
        assert abs(change.before.se - expected.H_orig_se) <= RTOL * scale
        assert abs(change.after.se - expected.H_upd_se) <= RTOL * scale
        assert close(change.ess, expected.ess)
        assert change.contributions.tolist() == pytest.approx(
            expected.contributions, rel=RTOL, abs=RTOL * scale
        )
        assert abs(float(change.contributions.sum()) - change.value) <= 1e-14 * scale


# Against repeated sampling


def draw_batch(generator: torch.Generator, num_groups: int) -> tuple[Any, ...]:
    """Groups of two sequences that share an effect, lengths that go with entropies."""
    shared = torch.randn(num_groups, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(num_groups, 2, generator=generator, dtype=torch.float64)
    effect = (shared + own).flatten()
    lengths = (3 + effect).clamp(0, 6).round().long()
    ragged = Ragged(lengths)
    noise = torch.randn(3, ragged.num_tokens, generator=generator, dtype=torch.float64)
    level = ragged.spread(effect)
    logp = -1.0 - noise[0].abs()
    entropy = 1.5 + 0.3 * level + 0.2 * noise[1]
    logp_after = logp + 0.1 * noise[2] + 0.02 * level
    entropy_after = entropy + 0.05 * level + 0.1 * noise[2]
    groups = torch.arange(num_groups).repeat_interleave(2)
    return groups, ragged, (logp, entropy, logp_after, entropy_after)


@pytest.fixture(scope="module")
def batches() -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [draw_batch(generator, 200) for _ in range(400)]


@pytest.mark.parametrize("normalize", ref.NORMALIZATIONS)
def test_errors_describe_the_spread_over_batches(
    batches: list[tuple[Any, ...]], normalize: str
) -> None:
    """400 batches of 200 groups whose two sequences are not independent."""
    values: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for groups, ragged, tokens in batches:
        for mode, change in changes(
            normalize, "rb", groups, ragged, tokens, 1.2
        ).items():
            values.setdefault(mode, []).append(change.value)
            errors.setdefault(mode, []).append(change.se)
    for mode, estimates in values.items():
        spread = float(torch.tensor(estimates).std())
        mean_error = sum(errors[mode]) / len(errors[mode])
        assert abs(mean_error / spread - 1) < SPREAD_RTOL, mode


@pytest.mark.parametrize("normalize", ref.NORMALIZATIONS)
def test_delta_method_and_jackknife_agree_for_many_groups(normalize: str) -> None:
    """400 groups, each left out in turn; the two differ by the order of 1/400."""
    groups, ragged, tokens = draw_batch(torch.Generator().manual_seed(2), 400)
    logp, entropy, logp_after, entropy_after = map(ragged.sum, tokens)
    before, after = (
        as_ratio(normalize, values, ragged.lengths)
        for values in (entropy, entropy_after)
    )
    rows = [Row(int(group), [1], [1]) for group in groups]

    def estimate(keep: list[int]) -> float:
        def kept(ratio: Ratio) -> Ratio:
            size = None if ratio.size is None else ratio.size[keep]
            return Ratio(numerator=ratio.numerator[keep], size=size)

        weighted = reweighted(kept(after), (logp_after - logp)[keep])
        return weighted.value - kept(before).value

    found = changes(normalize, "rb", groups, ragged, tokens, 1.2)["snis"]
    everyone = list(range(len(rows)))
    assert close(found.value, estimate(everyone))
    jackknife = ref.jackknife(rows, estimate, normalize)
    assert abs(jackknife / found.se - 1) < 0.02
