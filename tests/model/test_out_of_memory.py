"""When memory runs out in a pass: smaller microbatches, and the same results.

Shortages are planted at whichever microbatch exceeds a limit, in forward and backward
passes of every kind, and compared with passes that were not disturbed.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from shortages import MESSAGES, NUMBERS, SECTIONS, Shortage, close, first_block, planted
from tiny_runs import TinyRun, as_batch, make_passes, make_run
from torch import Tensor

from entropy_ddp.data.batch import Shard
from entropy_ddp.data.microbatch import PromptSharing
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.memory import Allowance, is_shortage, unless_out_of_memory
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe import opening
from entropy_ddp.probe.session import Session
from entropy_ddp.results import Results

TOLERANCE = 1e-12
VOCABULARY = 13
BUDGET = 64
LIMIT = 20
# A microbatch of three rows of 8 tokens would not fit.
ROWS = ref.random_rows(3, groups=6, responses=[4, 1, 3, 2, 1, 4], max_response=6,
                       vocabulary=VOCABULARY, with_empty=True)  # fmt: skip
Numbers = dict[str, Tensor]


def make(dtype: torch.dtype = torch.float64, *, shared: bool = False) -> Passes:
    """Passes over a small model whose output layer is trained, in this dtype."""
    model = ref.tiny_qwen2(5, vocabulary=VOCABULARY, attention="sdpa").to(dtype)
    passes = make_passes(
        model, tokens_per_microbatch=BUDGET, entropy_dtype=torch.float64
    )
    if shared:
        passes.tokens.sharing = PromptSharing(0.0)
    return passes


def shard() -> Shard:
    return as_batch(ROWS, VOCABULARY).shard(0, 1)


def direction(passes: Passes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in passes.parameters.items()
    }


def values(passes: Passes) -> Numbers:
    scores = passes.score(shard())
    return {"logp": scores.logp, "entropy": scores.entropy}


def derivatives(passes: Passes) -> Numbers:
    scores = passes.score(shard(), direction(passes), with_features=True)
    names = ("logp", "entropy", "dlogp", "dentropy", *scores.features)
    return {name: scores.array(name).double() for name in names}


def second_derivatives(passes: Passes) -> Numbers:
    logp, entropy = passes.score_twice(shard(), direction(passes), 1e-3)
    return {"logp": logp, "entropy": entropy}


def gradient(passes: Passes) -> Numbers:
    weights = torch.linspace(-1, 1, shard().ragged.num_tokens, dtype=torch.float64)
    flat, scores = passes.gradient(
        shard(),
        lambda token, *_: (weights[token], weights[token] / 3),
        torch.float64,
    )
    assert all(p.grad is None for p in passes.parameters.values())
    return {"gradient": flat, "logp": scores.logp, "entropy": scores.entropy}


CASES: dict[str, tuple[Callable[[Passes], Numbers], str]] = {
    "order 0": (values, "forward"),
    "order 1": (derivatives, "forward"),
    "order 2": (second_derivatives, "forward"),
    "pull_back, forward": (gradient, "forward"),
    "pull_back, backward": (gradient, "backward"),
}


@pytest.mark.parametrize("shared", [False, True], ids=["flat", "trees"])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_an_undisturbed_pass(name: str, shared: bool) -> None:
    """To 1e-12 in float64; nothing of a failed attempt is held, the limit stays."""
    compute, when = CASES[name]
    expected = compute(make(shared=shared))
    passes = make(shared=shared)
    shortage = Shortage(LIMIT, when)
    with planted(passes.tokens.causal_lm, shortage):
        found = compute(passes)
    assert shortage.failed and all(size > LIMIT for size in shortage.failed)
    assert shortage.held == 0
    assert len(shortage.failed) == passes.allowance.num_retries
    assert LIMIT / 2 <= passes.allowance.of(BUDGET) <= BUDGET / 2
    assert found.keys() == expected.keys()
    # Differences of first derivatives, which are divided by their distance.
    tolerance = TOLERANCE * (1e3 if name == "order 2" else 1)
    for key, array in found.items():
        scale = float(expected[key].abs().max())
        assert float((array - expected[key]).abs().max()) <= tolerance * scale, key


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_every_allocator_is_understood(kind: str, when: str) -> None:
    expected = gradient(make())["gradient"]
    passes = make()
    with planted(passes.tokens.causal_lm, Shortage(LIMIT, when, kind)) as shortage:
        found = gradient(passes)["gradient"]
    assert shortage.failed
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.norm())


def test_gradients_that_are_collected_lose_only_the_failed_microbatch() -> None:
    """In bfloat16 every microbatch's gradient is moved to the sum in float32."""
    passes, expected = make(torch.bfloat16), gradient(make(torch.bfloat16))["gradient"]
    seen: list[int] = []
    passes.advance = seen.append
    with planted(passes.tokens.causal_lm, Shortage(LIMIT, "backward")) as shortage:
        found = gradient(passes)["gradient"]
    assert shortage.failed
    # Nothing was undone, and the cut into microbatches only rounds.
    assert min(seen) > 0 and sum(seen) == shard().ragged.num_tokens
    assert float((found - expected).norm()) <= 0.02 * float(expected.norm())


def test_progress_goes_back_with_a_sum_that_is_made_anew() -> None:
    """A later microbatch fails: the earlier ones are made again with it."""
    passes = make()
    seen: list[int] = []
    passes.advance = seen.append
    calls = 0

    def fail_second(module: Any, inputs: Any, output: Any) -> None:
        nonlocal calls
        hidden = output[0] if isinstance(output, tuple) else output
        calls += 1
        if calls == 2:
            hidden.register_hook(_raise)

    handle = first_block(passes.tokens.causal_lm).register_forward_hook(fail_second)
    found = gradient(passes)["gradient"]
    handle.remove()
    assert any(count < 0 for count in seen)
    assert sum(seen) == shard().ragged.num_tokens
    expected = gradient(make())["gradient"]
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.norm())


def _raise(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


@pytest.mark.parametrize("name", ["order 0", "order 1", "pull_back, backward"])
def test_a_single_sequence_that_does_not_fit_ends_the_run(name: str) -> None:
    """One line: which sequence, what was tried, whose words, what to change."""
    compute, when = CASES[name]
    passes = make()
    before = copy.deepcopy(passes.tokens.state_dict())
    expected = (
        r"out of memory with a single sequence, line \d+ of batch E \(\d+ tokens\), "
        rf"after \d+ smaller microbatches \(configured: {BUDGET} tokens\): "
        r"CUDA out of memory\. .*; free memory on this device.*precision\.model"
    )
    with (
        planted(passes.tokens.causal_lm, Shortage(2, when)),
        pytest.raises(RunError, match=expected) as caught,
    ):
        compute(passes)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in passes.parameters.values())
    after = passes.tokens.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    # No dual number is left in the model: the next pass is an ordinary one.
    logp, others = values(passes)["logp"], values(make())["logp"]
    assert float((logp - others).abs().max()) <= TOLERANCE * float(others.abs().max())


def test_other_errors_are_not_tried_again() -> None:
    for error in (
        RuntimeError("shape mismatch"),
        RuntimeError(7),
        RuntimeError(),
        ValueError("out of memory."),
        RunError("CUDA out of memory."),
        InputError("CUDA out of memory."),
    ):
        assert not is_shortage(error)
        calls: list[int] = []

        def call(error: Exception = error, calls: list[int] = calls) -> None:
            calls.append(1)
            raise error

        with pytest.raises(type(error)):
            unless_out_of_memory(call)
        assert calls == [1]


def test_an_allowance_halves_and_never_reaches_zero() -> None:
    allowance = Allowance()
    assert allowance.of(100) == 100
    for used, left in ((100, 50), (33, 16), (1, 1)):
        allowance.halve(used)
        assert allowance.of(100) == left
    assert allowance.num_retries == 3
    assert allowance.of(1) == 1


# A whole probe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), "qwen2", full=True)


@contextmanager
def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, shortage: Shortage
) -> Iterator[None]:
    """Every session that is opened has the shortage in its model, after its checks."""
    opened: list[Session] = []
    verify = opening.verify_model

    with monkeypatch.context() as patch:
        contexts: list[Any] = []

        def verify_and_plant(session: Session) -> None:
            verify(session)
            opened.append(session)
            context = planted(session.policy.model, shortage)
            context.__enter__()
            contexts.append(context)

        patch.setattr(opening, "verify_model", verify_and_plant)
        yield
        for context in contexts:
            context.__exit__(None, None, None)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_probe_with_attribution(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Same numbers and audits; what happened is reported once."""
    expected = run.probe(**SECTIONS).results
    shortage = Shortage(14, when)
    with short_of_memory(monkeypatch, shortage):
        found = run.probe(**SECTIONS).results
    assert shortage.failed and shortage.held == 0
    document, other = found.to_dict(), expected.to_dict()
    for section in NUMBERS:
        close(document[section], other[section], section)
    assert found.run.out_of_memory_retries == len(shortage.failed)
    assert found.run.tokens_per_microbatch < 32
    assert expected.run.out_of_memory_retries == 0
    assert expected.run.tokens_per_microbatch == 32
    told = [row for row in found.audit if "want of memory" in row.name]
    assert [row.verdict for row in told] == ["warn"]
    assert str(found.run.tokens_per_microbatch) in told[0].hint
    rest = {row.name: row.verdict for row in found.audit if row not in told}
    assert rest == {row.name: row.verdict for row in expected.audit}
    if when == "forward":
        scales = [audit_value(r, "sum_deriv_scales") for r in (found, expected)]
        assert scales[0] > scales[1]
    for field in ("sequences", "tokens"):
        counts = [[row[field] for row in r.run.passes] for r in (found, expected)]
        assert counts[0] == counts[1]


def audit_value(results: Results, name: str) -> Any:
    return next(row.value for row in results.audit if row.name == name)


def test_a_reference_pass_too(run: TinyRun, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Log p under the reference policy, the model without its adapter."""
    lora = make_run(tmp_path, "qwen2")
    sections = SECTIONS | {"update": {"kl_coefficient": 0.1}, "attribution": {}}
    expected = lora.probe(**sections).results.to_dict()
    with short_of_memory(monkeypatch, Shortage(14)) as _:
        found = lora.probe(**sections).results.to_dict()
    assert found["run"]["out_of_memory_retries"] > 0
    for section in ("update", "truth", "linear"):
        close(found[section], expected[section], section)
