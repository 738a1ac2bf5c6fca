"""Is the step AdamW's, and is every bit back afterwards, whatever happened?"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import reference as ref
import torch
from reference import LossSettings
from tiny_runs import TinyRun, make_run
from torch import Tensor, nn

from entropy_ddp.config import Update
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.model.parameters import ParameterLayout, fingerprint
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.passes import loss_gradient, score_after_step
from entropy_ddp.probe.session import Session
from entropy_ddp.update.step import Step, one_step, optimizer_tensors

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64, of the norm
LEARNING_RATE = 1e-3  # the saved one

STEPS: dict[str, dict[str, Any]] = {
    "dr_grpo": {},
    "dr_grpo, constant": {"length_norm": 32},
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo"},
    "nll": {"loss": "nll"},
    "dr_grpo, clipped ratio": {"ratio": "clipped"},
    "dr_grpo, constant, clipped ratio": {"length_norm": 32, "ratio": "clipped"},
    "grpo, clipped ratio": {"loss": "grpo", "ratio": "clipped", "epsilon_high": 0.1},
    "dapo, clipped ratio": {"loss": "dapo", "ratio": "clipped", "epsilon_low": 0.1},
    "norm clipped": {"max_grad_norm": 0.05},
    "norm clipped a lot": {"max_grad_norm": 1e-6},
    "norm not clipped": {"max_grad_norm": 0.0},
    "norm below the limit": {"max_grad_norm": 1e3},
    "other learning rate": {"lr_override": 0.03},
    "everything": {
        "loss": "dapo",
        "ratio": "clipped",
        "max_grad_norm": 0.05,
        "lr_override": 1e-5,
    },
}
LOSS_KEYS = ("loss", "length_norm", "ratio", "epsilon_low", "epsilon_high")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture
def session(run: TinyRun) -> Session:
    return run.open()


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = {name: found[name] - value}
        assert norm(difference) <= RTOL * norm({name: value}), name


def take_step(session: Session) -> tuple[Step, dict[str, Tensor]]:
    """The configured step and the change it made, by name."""
    gradient, *_ = loss_gradient(session)
    parameters = session.policy.parameters
    layout = ParameterLayout.of(parameters)
    with one_step(
        session.optimizer, parameters, gradient, session.config.update
    ) as step:
        return step, layout.views(step.delta)


# Against AdamW


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("name", STEPS)
def test_step(run: TinyRun, name: str, temperature: float) -> None:
    """Change of every parameter, by the written-out AdamW and by torch's."""
    options = {"max_grad_norm": 0.5} | STEPS[name]
    session = run.open(update=options, objective={"temperature": temperature})
    step, delta = take_step(session)
    loss = {key: value for key, value in options.items() if key in LOSS_KEYS}
    arguments = {
        "settings": LossSettings(**loss, temperature=temperature),
        "max_grad_norm": options["max_grad_norm"],
        "learning_rate": options.get("lr_override"),
    }
    naive = run.naive_step(**arguments)
    assert_same(delta, naive.delta)
    assert_same(delta, run.torch_step(**arguments))
    assert step.grad_norm == pytest.approx(naive.grad_norm, rel=RTOL)
    assert step.clip_coef == pytest.approx(naive.clip_coef, rel=RTOL)
    assert step.learning_rate == options.get("lr_override", LEARNING_RATE)
    assert step.num_optimizer_steps == 1
    clips = {"norm clipped": 1, "norm not clipped": 0, "norm below the limit": 0}
    if name in clips:
        assert (step.clip_coef < 1) == clips[name]


def test_standardized_advantages_reach_the_step(run: TinyRun) -> None:
    config = run.config()
    batches = config.batches.model_dump() | {"advantage": "standardized"}
    _, delta = take_step(run.open(batches=batches))
    naive = run.naive_step(LossSettings(), max_grad_norm=0.5, advantage="standardized")
    assert_same(delta, naive.delta)
    centered = run.naive_step(LossSettings(), max_grad_norm=0.5)
    moved = {n: delta[n] - value for n, value in centered.delta.items()}
    assert norm(moved) > 1e-3 * norm(delta)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_full_weights_with_and_without_decay(
    tmp_path_factory: pytest.TempPathFactory, family: str
) -> None:
    """Two param groups: biases and norms are in the one without decay."""
    run = make_run(tmp_path_factory.mktemp(family), family, full=True)
    session = run.open(update={"max_grad_norm": 0.5})
    assert [g["weight_decay"] for g in session.optimizer.param_groups] == [0.1, 0.0]
    assert len(session.optimizer.param_groups[1]["params"]) >= 5
    _, delta = take_step(session)
    assert_same(delta, run.naive_step(LossSettings(), max_grad_norm=0.5).delta)


def test_without_a_gradient_momentum_and_decay_remain(
    run: TinyRun, session: Session
) -> None:
    parameters = session.policy.parameters
    layout = ParameterLayout.of(parameters)
    nothing = torch.zeros(layout.numel, dtype=torch.float64)
    with one_step(session.optimizer, parameters, nothing, Update()) as step:
        delta = layout.views(step.delta)
    names = {id(p): n for n, p in ref.trainable(run.saved.model).items()}
    saved = run.saved.optimizer
    (first, second) = (
        {**group, "names": [names[id(p)] for p in group["params"]]}
        for group in saved.param_groups
    )
    before = {n: p.detach() for n, p in parameters.items()}
    after, _ = ref.adamw_step_naive(
        before,
        {n: torch.zeros_like(p) for n, p in before.items()},
        {names[id(p)]: state for p, state in saved.state.items()},
        [first, second],
    )
    assert step.grad_norm == 0.0
    assert step.clip_coef == 1.0
    assert_same(delta, {n: after[n] - before[n] for n in before})


def test_the_change_is_linear_in_the_learning_rate(run: TinyRun) -> None:
    _, large = take_step(run.open(update={"lr_override": 1e-2}))
    _, small = take_step(run.open(update={"lr_override": 1e-3}))
    assert_same({name: 10 * value for name, value in small.items()}, large)


def test_every_group_gets_the_learning_rate(run: TinyRun) -> None:
    session = run.open(update={"lr_override": 1e-2})
    first, second = session.optimizer.param_groups
    moved = second["params"] = first["params"][-2:]
    del first["params"][-2:]
    first["lr"], second["lr"] = 1e-3, 5e-3
    step, delta = take_step(session)
    assert (first["lr"], second["lr"]) == (1e-3, 5e-3)
    assert step.learning_rate == 1e-2
    names = [n for n, p in session.policy.parameters.items() if id(p) in map(id, moved)]
    for name in names:  # Adam's step is of the size of the learning rate
        assert 0.1 < norm({name: delta[name]}) / (1e-2 * delta[name].numel() ** 0.5) < 3


def test_different_saved_rates_are_kept(session: Session) -> None:
    """v is the change over the first group's rate: groups keep their proportions."""
    first, second = session.optimizer.param_groups
    second["params"] = first["params"][-1:]
    del first["params"][-1:]
    _, equal = take_step(session)
    second["lr"] = 3 * first["lr"]
    step, delta = take_step(session)
    assert step.learning_rate == first["lr"]
    expected = dict(equal)
    last = list(equal)[-1]
    expected[last] = 3 * equal[last]
    assert_same(delta, expected)


def test_direction_and_top_parameters(session: Session) -> None:
    step, delta = take_step(session)
    parameters = session.policy.parameters
    layout = ParameterLayout.of(parameters)
    direction = layout.flatten(step.direction(parameters), torch.float64)
    torch.testing.assert_close(
        direction * LEARNING_RATE, step.delta, rtol=1e-15, atol=0.0
    )
    assert step.direction_norm == pytest.approx(float(direction.norm()), rel=1e-14)
    top = step.top_parameters(layout, 3)
    assert len(top) == 3
    sizes = sorted(((norm({n: d}), n) for n, d in delta.items()), reverse=True)
    for (name, size), (expected_size, expected_name) in zip(top, sizes, strict=False):
        assert name == expected_name
        assert size == pytest.approx(expected_size, rel=1e-14)
    assert len(step.top_parameters(layout, 10**6)) == len(delta)


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("weights", "buffer"), DTYPES, ids=str)
def test_the_change_is_rounded_once(weights: torch.dtype, buffer: torch.dtype) -> None:
    """The change itself is rounded to the buffer's dtype, not the weights it is of.

    Never to less than float32: a step vanishes in the spacing of float16.
    """
    values = torch.linspace(-3.0, 3.0, 50, dtype=torch.float64).to(weights)
    parameter = nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, foreach=False)
    gradient = torch.linspace(-1.0, 2.0, 50).to(buffer)
    with one_step(optimizer, {"w": parameter}, gradient, Update()) as step:
        exact = parameter.detach().double() - values.double()
    kept = torch.promote_types(buffer, torch.float32)
    assert step.delta.dtype == kept
    assert torch.equal(step.delta, exact.to(kept))


# What is refused


def test_a_learning_rate_of_zero_is_refused(run: TinyRun, session: Session) -> None:
    for group in session.optimizer.param_groups:
        group["lr"] = 0.0
    before = state_hash(session)
    with pytest.raises(InputError, match=r"learning rate is 0.*lr_override"):
        take_step(session)
    assert state_hash(session) == before
    overridden = run.open(update={"lr_override": 1e-3})
    for group in overridden.optimizer.param_groups:
        group["lr"] = 0.0
    step, _ = take_step(overridden)
    assert step.delta.any()
    assert [g["lr"] for g in overridden.optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(
    session: Session, value: float
) -> None:
    parameters = session.policy.parameters
    gradient = torch.zeros(ParameterLayout.of(parameters).numel, dtype=torch.float64)
    gradient[-1] = value
    before = state_hash(session)
    with (
        pytest.raises(RunError, match=f"norm {value}"),
        one_step(session.optimizer, parameters, gradient, Update()),
    ):
        pass
    assert_restored(session, before)


# The way back


def state_hash(session: Session) -> str:
    """Bits of parameters, optimizer state and learning rates."""
    rates = torch.tensor([g["lr"] for g in session.optimizer.param_groups]).double()
    parameters = session.policy.parameters.items()
    state = optimizer_tensors(session.optimizer)
    return fingerprint([*parameters, *state, ("rates", rates)])


def addresses(session: Session) -> list[int]:
    tensors = [*session.policy.parameters.values()]
    tensors += [tensor for _, tensor in optimizer_tensors(session.optimizer)]
    return [tensor.data_ptr() for tensor in tensors]


def assert_restored(session: Session, before: str) -> None:
    assert state_hash(session) == before
    assert all(p.grad is None for p in session.policy.model.parameters())


class Interrupted(Exception):
    """Not one of the package's own."""


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise Interrupted("in between")


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("error", [None, Interrupted, KeyboardInterrupt, RunError])
def test_every_bit_is_back_after_the_context(
    run: TinyRun, error: type[BaseException] | None, device: torch.device | None
) -> None:
    session = run.open(update={"lr_override": 0.03})
    parameters, optimizer = session.policy.parameters, session.optimizer
    gradient, *_ = loss_gradient(session)
    before, places = state_hash(session), addresses(session)
    with (
        nullcontext() if error is None else pytest.raises(error),
        one_step(
            optimizer, parameters, gradient, session.config.update, device
        ) as step,
    ):
        moved = state_hash(session)
        assert [g["lr"] for g in optimizer.param_groups] == [0.03, 0.03]
        if error is not None:
            raise error("inside")
    assert moved != before
    assert step.delta.any()
    assert_restored(session, before)
    assert addresses(session) == places


def raise_after_the_step(session: Session, patch: pytest.MonkeyPatch) -> None:
    step = session.optimizer.step

    def step_and_fail() -> None:
        step()
        raise Interrupted("in between")

    patch.setattr(session.optimizer, "step", step_and_fail)


def overflow_in_the_step(session: Session, patch: pytest.MonkeyPatch) -> None:
    step = session.optimizer.step

    def step_to_infinity() -> None:
        step()
        with torch.no_grad():
            next(iter(session.policy.parameters.values())).fill_(math.inf)

    patch.setattr(session.optimizer, "step", step_to_infinity)


def step_twice(session: Session, patch: pytest.MonkeyPatch) -> None:
    step = session.optimizer.step
    patch.setattr(session.optimizer, "step", lambda: (step(), step()))


def fail_in_scoring(session: Session, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Passes, "score", interrupt)


FAILURES: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "in the optimizer": (raise_after_the_step, Interrupted, "in between"),
    "weights overflow": (overflow_in_the_step, RunError, "NaN or infinite"),
    "two steps": (step_twice, RunError, "expected one optimizer step, counted 2"),
    "in the scoring pass": (fail_in_scoring, Interrupted, "in between"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_bit_is_back_after_a_failure(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arrange, error, message = FAILURES[name]
    gradient, *_ = loss_gradient(session)
    before = state_hash(session)
    arrange(session, monkeypatch)
    with pytest.raises(error, match=message):
        score_after_step(session, gradient)
    assert_restored(session, before)


def test_the_hashes_of_a_scored_step_prove_the_restore(session: Session) -> None:
    gradient, *_ = loss_gradient(session)
    before = state_hash(session)
    _, _, (first, after_step, restored) = score_after_step(session, gradient)
    assert first == restored != after_step
    assert_restored(session, before)


def test_the_same_step_can_be_taken_again(session: Session) -> None:
    """A restored state gives the same bits: nothing of the first step is left."""
    steps = [take_step(session)[0] for _ in range(2)]
    assert torch.equal(steps[0].delta, steps[1].delta)
    assert steps[0].grad_norm == steps[1].grad_norm
