"""Are standard errors the written formulas, and do they describe the real spread?"""

import math

import pytest
import torch
from torch import Tensor

from entropy_ddp.errors import InputError
from entropy_ddp.estimators.standard_errors import (
    delta_method_error,
    effective_sample_size,
    group_totals,
    jackknife_error,
    relative_difference,
)

RTOL = 1e-12  # the same few sums in another order


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value: float, expected: float, rtol: float = RTOL) -> bool:
    return math.isclose(value, expected, rel_tol=rtol, abs_tol=0.0)


def test_group_totals() -> None:
    values, groups = double(1, 2, 4, 8, 16), torch.tensor([2, 0, 2, 0, 3])
    assert group_totals(values, groups, 4).tolist() == [10, 0, 5, 16]
    assert group_totals(values[:0], groups[:0], 2).tolist() == [0, 0]


def test_delta_method_error_by_hand() -> None:
    # Deviations -1, 0, 1: 3/2 times 2.
    assert close(delta_method_error(double(1, 2, 3)), math.sqrt(3))
    assert close(delta_method_error(double(-5, 5)), math.sqrt(2 * 50))
    assert delta_method_error(double(4, 4, 4)) == 0.0


def test_jackknife_error_by_hand() -> None:
    # 2/3 times 2.
    assert close(jackknife_error(double(1, 2, 3)), math.sqrt(4 / 3))
    assert jackknife_error(double(4, 4)) == 0.0


def test_both_errors_of_a_mean_are_the_textbook_one() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    n = len(x)
    expected = float(x.std()) / math.sqrt(n)
    assert close(delta_method_error((x - x.mean()) / n), expected)
    assert close(jackknife_error((x.sum() - x) / (n - 1)), expected)


@pytest.mark.parametrize("function", [delta_method_error, jackknife_error])
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_groups_have_no_error(function: object, count: int) -> None:
    with pytest.raises(InputError, match=f"at least 2 groups in E, found {count}"):
        function(torch.zeros(count, dtype=torch.float64))


def test_relative_difference() -> None:
    assert relative_difference(3.0, 2.5, 10.0) == 0.05
    assert relative_difference(2.5, 3.0, 10.0) == 0.05
    assert relative_difference(0.0, 0.0, 0.0) == 0.0


def test_effective_sample_size_by_hand() -> None:
    weights = double(1, 2, 3)
    assert close(effective_sample_size(weights.log()), 36 / 14)
    for n in (1, 3, 10, 4096):
        assert close(effective_sample_size(torch.zeros(n).double()), n)


@pytest.mark.parametrize("shift", [0.0, 700.0, -700.0, 1e5, -1e5])
def test_effective_sample_size_depends_on_ratios_of_weights_only(shift: float) -> None:
    """Also where the weights themselves are beyond float64."""
    log_weights = double(1, 2, 3).log()
    rtol = 1e-15 * max(1.0, abs(shift)) * 100  # rounding of the shifted logarithms
    shifted = effective_sample_size(log_weights + shift)
    assert close(shifted, 36 / 14, rtol)


def test_one_weight_that_dominates_leaves_one_sequence() -> None:
    assert close(effective_sample_size(double(0, 1000, -1000)), 1.0)
    assert close(effective_sample_size(double(-math.inf, 0, 0)), 2.0)
