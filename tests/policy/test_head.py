"""Are the closed forms of log p, H and their derivatives those of autograd?"""

import math

import pytest
import torch
from torch import Tensor

from entropy_ddp.policy.head import (
    directional_derivatives,
    distribution_features,
    log_softmax_statistics,
    logits_gradient,
)

RTOL = 1e-12  # the same sums over a dozen terms in another order
DIFFERENCE_RTOL = 1e-7  # central differences with a step of 1e-5
TOKENS, VOCABULARY = 6, 13


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def masked(logits: Tensor) -> Tensor:
    """Minus infinity at other places in every row; the last row keeps one token."""
    logits = logits.clone()
    for row in range(len(logits)):
        logits[row, row :: len(logits)] = -torch.inf
    logits[-1, 1:] = -torch.inf
    logits[-1, 0] = 0.3
    return logits


LOGITS: dict[str, Tensor] = {
    "ordinary": random(TOKENS, VOCABULARY, seed=0),
    "peaked": random(TOKENS, VOCABULARY, seed=1, scale=20.0),
    "underflowing": random(TOKENS, VOCABULARY, seed=2, scale=1000.0),
    "uniform": torch.zeros(TOKENS, VOCABULARY, dtype=torch.float64),
    "shifted": random(TOKENS, VOCABULARY, seed=3) + 1e4,
    "masked": masked(random(TOKENS, VOCABULARY, seed=4)),
}


@pytest.fixture(params=LOGITS)
def logits(request: pytest.FixtureRequest) -> Tensor:
    return LOGITS[request.param].clone()


def likely_targets(logits: Tensor) -> Tensor:
    """The most likely token of even rows, the second of odd ones if it is allowed."""
    order = logits.argsort(dim=-1, descending=True)
    second = torch.arange(len(logits)) % 2
    second[logits.gather(1, order[:, 1:2]).squeeze(1) == -torch.inf] = 0
    return order[torch.arange(len(logits)), second]


def statistics_of_row(row: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """log p and H of one token over its allowed tokens only, differentiable."""
    allowed = (row.detach() > -torch.inf).nonzero().squeeze(1)
    log_pi = row[allowed] - torch.logsumexp(row[allowed], 0)
    place = allowed.tolist().index(target)
    return log_pi[place], -(log_pi.exp() * log_pi).sum()


def assert_close(actual: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Equal up to rtol of the largest value (and of 1, the size of probabilities)."""
    scale = max(1.0, float(expected.abs().max()))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=rtol * scale)


def test_values_are_those_of_the_definition(logits: Tensor) -> None:
    targets = likely_targets(logits)
    logp, entropy, probabilities, log_probabilities = log_softmax_statistics(
        logits, targets
    )
    for i, target in enumerate(targets.tolist()):
        expected_logp, expected_entropy = statistics_of_row(logits[i], target)
        assert_close(logp[i], expected_logp)
        assert_close(entropy[i], expected_entropy)
    assert_close(probabilities, logits.softmax(-1))
    assert log_probabilities.isfinite().all()
    assert (log_probabilities[logits == -torch.inf] == 0).all()


def test_one_possible_token_has_no_entropy() -> None:
    logits = LOGITS["masked"]
    logp, entropy, *_ = log_softmax_statistics(logits[-1:], torch.tensor([0]))
    assert (float(logp), float(entropy)) == (0.0, 0.0)


def test_entropy_of_equal_logits_is_the_logarithm_of_their_number() -> None:
    logits = LOGITS["uniform"]
    _, entropy, *_ = log_softmax_statistics(logits, torch.zeros(TOKENS).long())
    assert_close(entropy, torch.full_like(entropy, math.log(VOCABULARY)))


def test_an_impossible_target_has_log_probability_minus_infinity() -> None:
    logits = LOGITS["masked"][-1:]
    logp, *_ = log_softmax_statistics(logits, torch.tensor([1]))
    assert float(logp) == -math.inf


def test_gradient_is_that_of_autograd(logits: Tensor) -> None:
    targets, a, b = (
        likely_targets(logits),
        random(TOKENS, seed=5),
        random(TOKENS, seed=6),
    )
    _, entropy, *softmax = log_softmax_statistics(logits, targets)
    gradient = logits_gradient((a, b), targets, entropy, *softmax)
    leaf = logits.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(targets.tolist()):
        row_logp, row_entropy = statistics_of_row(leaf[i], target)
        total = total + a[i] * row_logp + b[i] * row_entropy
    (expected,) = torch.autograd.grad(total, leaf)
    assert_close(gradient, expected)
    assert (gradient[logits == -torch.inf] == 0).all()
    assert_close(gradient.sum(-1), torch.zeros(TOKENS, dtype=torch.float64))


def test_directional_derivatives_are_those_of_autograd(logits: Tensor) -> None:
    targets, tangent = likely_targets(logits), random(TOKENS, VOCABULARY, seed=7)
    _, _, *softmax = log_softmax_statistics(logits, targets)
    dlogp, dentropy = directional_derivatives(tangent, targets, *softmax)
    leaf = logits.clone().requires_grad_()
    for i, target in enumerate(targets.tolist()):
        for actual, value in zip(
            (dlogp[i], dentropy[i]), statistics_of_row(leaf[i], target), strict=True
        ):
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            assert_close(actual, (gradient * tangent).sum())


@pytest.mark.parametrize("name", ["ordinary", "peaked", "masked"])
def test_directional_derivatives_are_central_differences(name: str) -> None:
    logits, step = LOGITS[name], 1e-5
    targets, tangent = likely_targets(logits), random(TOKENS, VOCABULARY, seed=8)
    _, _, *softmax = log_softmax_statistics(logits, targets)
    derivatives = directional_derivatives(tangent, targets, *softmax)
    up, down = (
        log_softmax_statistics(logits + sign * step * tangent, targets)[:2]
        for sign in (1, -1)
    )
    for actual, above, below in zip(derivatives, up, down, strict=True):
        assert_close(actual, (above - below) / (2 * step), DIFFERENCE_RTOL)


def test_a_constant_added_to_logits_or_tangents_changes_nothing() -> None:
    logits, tangent = LOGITS["ordinary"], random(TOKENS, VOCABULARY, seed=9)
    targets, shift = likely_targets(logits), random(TOKENS, 1, seed=10, scale=5.0)

    def derivatives(z: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
        logp, entropy, *softmax = log_softmax_statistics(z, targets)
        return logp, entropy, *directional_derivatives(dz, targets, *softmax)

    for actual, expected in zip(
        derivatives(logits + shift, tangent - shift),
        derivatives(logits, tangent),
        strict=True,
    ):
        assert_close(actual, expected)


def test_features_are_those_of_the_definition(logits: Tensor) -> None:
    """Sums over the vocabulary of each row, written out."""
    targets, tangent = likely_targets(logits), random(TOKENS, VOCABULARY, seed=11)
    _, entropy, *softmax = log_softmax_statistics(logits, targets)
    found = distribution_features(tangent, targets, entropy, *softmax)
    for i, target in enumerate(targets.tolist()):
        allowed = logits[i] > -torch.inf
        p, dz = logits[i][allowed].softmax(0), tangent[i][allowed]
        log_p, d_log_p = logits[i][allowed].log_softmax(0), dz - (p * dz).sum()
        ranked, top = p.sort(descending=True).values, p.argmax()
        second = ranked[1] if len(p) > 1 else torch.zeros(()).double()
        spread = (p * (log_p - (p * log_p).sum()).square()).sum()
        expected = {
            "top_probability": ranked[0],
            "margin": ranked[0] - second,
            "log_variance": spread,
            "collision": p.square().sum(),
            "dcollision": (p.square() * d_log_p).sum(),
        }
        if ranked[0] != second:  # of equally likely tokens any may be the top one
            expected["dtop"] = p[top] * d_log_p[top]
            is_top = target == allowed.nonzero()[top].item()
            assert float(found["is_top"][i]) == float(is_top)
        for name, value in expected.items():
            assert_close(found[name][i], value)


def test_statistics_leave_the_logits_alone() -> None:
    logits = LOGITS["masked"].clone()
    log_softmax_statistics(logits, likely_targets(logits))
    assert torch.equal(logits, LOGITS["masked"])
