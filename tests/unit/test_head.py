"""Are the closed forms of log p, H and their derivatives those of autograd?"""

import math

import pytest
import torch
from torch import Tensor

from entropy_ddp.model import head
from entropy_ddp.model.head import (
    directional_derivatives,
    distribution_features,
    logits_gradient,
    row_blocks,
    softmax_of,
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
    softmax = softmax_of(logits, targets)
    logp, entropy = softmax.logp, softmax.entropy
    for i, target in enumerate(targets.tolist()):
        expected_logp, expected_entropy = statistics_of_row(logits[i], target)
        assert_close(logp[i], expected_logp)
        assert_close(entropy[i], expected_entropy)
    probabilities = softmax.weights / softmax.total[:, None]
    assert_close(probabilities, logits.softmax(-1))
    assert softmax.shifted.isfinite().all()
    assert (softmax.weights[logits == -torch.inf] == 0).all()


def test_one_possible_token_has_no_entropy() -> None:
    logits = LOGITS["masked"]
    softmax = softmax_of(logits[-1:], torch.tensor([0]))
    assert (float(softmax.logp), float(softmax.entropy)) == (0.0, 0.0)


def test_entropy_of_equal_logits_is_the_logarithm_of_their_number() -> None:
    logits = LOGITS["uniform"]
    entropy = softmax_of(logits, torch.zeros(TOKENS).long()).entropy
    assert_close(entropy, torch.full_like(entropy, math.log(VOCABULARY)))


def test_an_impossible_target_has_log_probability_minus_infinity() -> None:
    logits = LOGITS["masked"][-1:]
    softmax = softmax_of(logits, torch.tensor([1]))
    assert float(softmax.logp) == -math.inf


@pytest.mark.parametrize("with_means", [False, True])
def test_gradient_is_that_of_autograd(logits: Tensor, with_means: bool) -> None:
    targets, a, b = (
        likely_targets(logits),
        random(TOKENS, seed=5),
        random(TOKENS, seed=6),
    )
    values = random(TOKENS, VOCABULARY, seed=13) if with_means else None
    gradient = logits_gradient(softmax_of(logits, targets), (a, b), targets, values)
    leaf = logits.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(targets.tolist()):
        row_logp, row_entropy = statistics_of_row(leaf[i], target)
        total = total + a[i] * row_logp + b[i] * row_entropy
        if values is not None:
            total = total + leaf[i].softmax(0) @ values[i]
    (expected,) = torch.autograd.grad(total, leaf)
    assert_close(gradient, expected)
    assert (gradient[logits == -torch.inf] == 0).all()
    assert_close(gradient.sum(-1), torch.zeros(TOKENS, dtype=torch.float64))


def test_directional_derivatives_are_those_of_autograd(logits: Tensor) -> None:
    targets, tangent = likely_targets(logits), random(TOKENS, VOCABULARY, seed=7)
    softmax = softmax_of(logits, targets)
    dlogp, dentropy = directional_derivatives(softmax, tangent.clone(), targets)
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
    softmax = softmax_of(logits, targets)
    derivatives = directional_derivatives(softmax, tangent.clone(), targets)
    up, down = (softmax_of(logits + sign * step * tangent, targets) for sign in (1, -1))
    pairs = ((up.logp, down.logp), (up.entropy, down.entropy))
    for actual, (above, below) in zip(derivatives, pairs, strict=True):
        assert_close(actual, (above - below) / (2 * step), DIFFERENCE_RTOL)


def test_a_constant_added_to_logits_or_tangents_changes_nothing() -> None:
    logits, tangent = LOGITS["ordinary"], random(TOKENS, VOCABULARY, seed=9)
    targets, shift = likely_targets(logits), random(TOKENS, 1, seed=10, scale=5.0)

    def derivatives(z: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
        softmax = softmax_of(z, targets)
        derivatives = directional_derivatives(softmax, dz.clone(), targets)
        return softmax.logp, softmax.entropy, *derivatives

    for actual, expected in zip(
        derivatives(logits + shift, tangent - shift),
        derivatives(logits, tangent),
        strict=True,
    ):
        assert_close(actual, expected)


def test_features_are_those_of_the_definition(logits: Tensor) -> None:
    """Sums over the vocabulary of each row, written out."""
    targets, tangent = likely_targets(logits), random(TOKENS, VOCABULARY, seed=11)
    softmax, centred = softmax_of(logits, targets), tangent.clone()
    directional_derivatives(softmax, centred, targets)
    table = random(VOCABULARY, 3, seed=12)
    found = distribution_features(softmax, centred, targets, table)
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
            "embedding": table[target],
            "dembedding": (p * d_log_p) @ table[allowed],
        }
        if ranked[0] != second:  # of equally likely tokens any may be the top one
            expected["dtop"] = p[top] * d_log_p[top]
            is_top = target == allowed.nonzero()[top].item()
            assert float(found["is_top"][i]) == float(is_top)
        for name, value in expected.items():
            assert_close(found[name][i], value)


def test_the_softmax_leaves_the_logits_alone() -> None:
    logits = LOGITS["masked"].clone()
    softmax_of(logits, likely_targets(logits))
    assert torch.equal(logits, LOGITS["masked"])


def test_temperature_divides_the_logits() -> None:
    logits = LOGITS["ordinary"]
    targets = likely_targets(logits)
    found = softmax_of(logits, targets, temperature=0.7)
    expected = softmax_of(logits / 0.7, targets)
    assert_close(found.logp, expected.logp)
    assert_close(found.entropy, expected.entropy)


def test_sums_over_a_large_vocabulary_are_as_exact_as_float64() -> None:
    """Float32 logits, float64 sums: no error of the order of float32 anywhere."""
    logits = random(4, 20_000, seed=12, scale=3.0).float()
    targets = likely_targets(logits)
    softmax = softmax_of(logits, targets)
    log_pi = logits.double().log_softmax(-1)
    assert_close(softmax.logp, log_pi.gather(1, targets[:, None]).squeeze(1))
    assert_close(softmax.entropy, -(log_pi.exp() * log_pi).sum(-1))


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (7, 1 << 16), (3, 1 << 20)])
def test_blocks_cover_every_row_once(rows: int, width: int) -> None:
    blocks = list(row_blocks(torch.empty(rows, width, device="meta")))
    assert [i for block in blocks for i in range(rows)[block]] == list(range(rows))
    on_cpu = list(row_blocks(torch.empty(1, width).expand(rows, width)))
    assert [i for block in on_cpu for i in range(rows)[block]] == list(range(rows))
    assert len(on_cpu) == -(-rows // max(1, head.BLOCK_ELEMENTS // width))
