"""Is it known what an evaluation batch can tell, and how large a better one must be?

Batches are drawn from a normal model of two stages: a prompt has a mean, and its
responses spread around it.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from entropy_ddp.estimators.power import Precision, best_responses, between_prompts
from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.estimators.standard_errors import Draws, Estimate

NUM_BATCHES = 2000


@dataclass(frozen=True, kw_only=True)
class Model:
    """Variances between prompts and between the responses to one."""

    between: float
    within: float

    def batches(
        self, units: int, responses: int, set_size: int | None = None
    ) -> Tensor:
        """Values of so many batches, of mean zero over the set, [B, n, G]."""
        generator = torch.Generator().manual_seed(units)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        if set_size is None:
            means = normal(NUM_BATCHES, units)
        else:
            population = normal(set_size)
            population = (population - population.mean()) / population.std()
            order = torch.rand(NUM_BATCHES, set_size, generator=generator)
            means = population[order.argsort(1)[:, :units]]
        spread = normal(NUM_BATCHES, units, responses)
        return (
            math.sqrt(self.between) * means[..., None] + math.sqrt(self.within) * spread
        )

    def share(self, responses: int) -> float:
        return self.between / (self.between + self.within / responses)


MODEL = Model(between=1.0, within=3.0)


def precision_of(batch: Tensor, share: float, set_size: int | None) -> Precision:
    """Of the mean of a batch [n, G], the share between prompts being known."""
    units, responses = batch.shape
    variance = float(batch.mean(1).var()) / units
    if set_size is not None:
        within = float(batch.var(1).mean()) / responses / units
        fraction = units / set_size
        variance = (1 - fraction) * variance + fraction * within
    return Precision(
        se=math.sqrt(variance),
        num_units=units,
        responses=responses,
        between=share,
        set_size=set_size,
    )


@pytest.mark.parametrize("units", [8, 16, 64])
def test_the_smallest_change_is_found_four_times_in_five(units: int) -> None:
    """Counted with the error that a batch estimates, and with the true one."""
    batches = MODEL.batches(units, 2)
    true_error = math.sqrt((1 + 3 / 2) / units)
    known = Precision(se=true_error, num_units=units, responses=2)
    found = []
    for batch in batches:
        precision = precision_of(batch, MODEL.share(2), None)
        found.append(precision.resolves(float(batch.mean()) + known.smallest_change))
    assert sum(found) / NUM_BATCHES == pytest.approx(0.8, abs=0.03)
    assert known.smallest_change == pytest.approx(2.8 * true_error, rel=0.2)


def total_of(values: Tensor, units: Tensor) -> Estimate:
    """The sum of values [N], whose influences they are."""
    draws = Draws(groups=units)
    return Estimate.of(lambda totals: totals[..., 0], values[:, None], draws)


@pytest.mark.parametrize("responses", [2, 5])
def test_the_share_between_prompts_is_estimated(responses: int) -> None:
    """Less a bias of about (1 - share) 2/n, and its error is the spread."""
    units = torch.arange(64).repeat_interleave(responses)
    pairs = []
    for batch in MODEL.batches(64, responses)[:1000]:
        found = between_prompts(total_of(batch.flatten(), units))
        assert found is not None
        pairs.append((found.share, found.error))
    values, errors = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    share = MODEL.share(responses)
    expected = share - 2 / 64 * (1 - share)
    assert float(values.mean()) == pytest.approx(expected, abs=0.02)
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.15)


def test_the_share_is_one_less_what_is_within() -> None:
    """By hand: units (1, 3) and (6, 8, 10)."""
    influence = torch.tensor([1.0, 6, 8, 3, 10], dtype=torch.float64)
    units = torch.tensor([0, 1, 1, 0, 1])
    within = 2 / 1 * (1 + 1) + 3 / 2 * (4 + 0 + 4)
    both = 2 / 1 * (10**2 + 10**2)
    found = between_prompts(total_of(influence, units))
    assert found is not None
    assert found.share == pytest.approx(1 - within / both, rel=1e-12)


@pytest.mark.parametrize(
    ("influence", "units"),
    [([1.0, 2, 3], [0, 0, 1]), ([1.0, 1, 1, 1], [0, 0, 1, 1])],
)
def test_without_two_responses_everywhere_there_is_no_share(
    influence: list[float], units: list[int]
) -> None:
    values = torch.tensor(influence, dtype=torch.float64)
    assert between_prompts(total_of(values, torch.tensor(units))) is None


@pytest.mark.parametrize("set_size", [None, 100])
@pytest.mark.parametrize(("units", "responses"), [(40, 2), (80, 2), (40, 6), (90, 4)])
def test_the_error_of_another_batch_is_foretold(
    set_size: int | None, units: int, responses: int
) -> None:
    pilot = MODEL.batches(30, 2, set_size)
    error = float(pilot.mean((1, 2)).std())
    known = Precision(
        se=error, num_units=30, responses=2, between=MODEL.share(2), set_size=set_size
    )
    other = known.of(units, responses=responses, set_size=set_size)
    spread = float(MODEL.batches(units, responses, set_size).mean((1, 2)).std())
    assert other.se == pytest.approx(spread, rel=0.05)
    assert other.between == pytest.approx(MODEL.share(responses), rel=1e-12)
    back = other.of(30, responses=2, set_size=set_size)
    assert back.se == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("set_size", [None, 500])
@pytest.mark.parametrize("half_width", [3.0, 1.3, 0.5, 0.12, 0.09, 0.01])
def test_units_needed_are_the_fewest(set_size: int | None, half_width: float) -> None:
    known = Precision(
        se=0.2, num_units=100, responses=2, between=0.6, set_size=set_size
    )
    found = known.units_needed(half_width, set_size=set_size)
    if found is None:
        assert set_size is not None
        assert known.of(set_size, set_size=set_size).half_width > half_width
        return
    assert known.of(found, set_size=set_size).half_width <= half_width
    # The interval narrows with every unit.
    fewer = {2, found // 2, found - 2, found - 1} & set(range(2, found))
    for count in fewer:
        assert known.of(count, set_size=set_size).half_width > half_width


def test_all_prompts_with_more_responses_are_enough() -> None:
    known = Precision(se=0.2, num_units=100, responses=2, between=0.6, set_size=500)
    half_width = known.of(500, set_size=500).half_width / 3
    assert known.units_needed(half_width, set_size=500) is None
    needed = known.responses_needed(half_width, 500)
    assert needed == 18
    assert known.of(500, responses=18, set_size=500).half_width <= half_width * (
        1 + 1e-9
    )
    assert known.of(500, responses=17, set_size=500).half_width > half_width


def test_one_response_tells_nothing_of_others() -> None:
    known = Precision(se=0.2, num_units=100, responses=1)
    with pytest.raises(ValueError, match="one response to a prompt does not tell"):
        known.of(200, responses=2)
    assert known.responses_needed(0.1, 500) is None
    assert best_responses(known, 1.0) is None
    assert known.of(400).se == pytest.approx(0.1)


@pytest.mark.parametrize("prompt_cost", [0.1, 1.0, 8.0])
def test_the_best_number_of_responses_is(prompt_cost: float) -> None:
    """Of all numbers, at equal cost; the rounded optimum may be its neighbour."""
    known = Precision(se=0.2, num_units=100, responses=4, between=0.1)
    best = best_responses(known, prompt_cost)

    def error(responses: int) -> float:
        units = round(10**6 / (prompt_cost + responses))
        return known.of(units, responses=responses).se

    errors = {responses: error(responses) for responses in range(1, 100)}
    assert best is not None
    assert errors[best] <= 1.01 * min(errors.values())


def test_the_number_of_units_has_an_error() -> None:
    """Its spread over batches whose change is 6 standard errors."""
    units, responses = 64, 2
    change = 6 * math.sqrt((1 + 3 / 2) / units)
    found, errors = [], []
    for batch in MODEL.batches(units, responses)[:500]:
        precision = precision_of(batch, MODEL.share(2), None)
        value = float(batch.mean()) + change
        needed = precision.units_needed(0.2 * abs(value))
        assert needed is not None
        found.append(math.log(needed))
        errors.append(
            precision.error_of_units_needed(
                needed, precision.se / abs(value), units - 1, None
            )
            / needed
        )
    spread = float(torch.tensor(found).std())
    assert float(torch.tensor(errors).mean()) == pytest.approx(spread, rel=0.15)


def test_nothing_varies() -> None:
    still = Precision(se=0.0, num_units=4, responses=2, set_size=4, between=1.0)
    assert still.smallest_change == 0
    assert still.resolves(1e-9) and not still.resolves(0.0)
    assert still.units_needed(0.1, set_size=4) == 2
    assert still.units_needed(0.0) == 2


def test_the_interval_is_student_s() -> None:
    assert Precision(se=2.0, num_units=10, responses=1).half_width == pytest.approx(
        2 * two_sided(9)
    )
    assert two_sided(9) == pytest.approx(2.262157, rel=1e-6)
