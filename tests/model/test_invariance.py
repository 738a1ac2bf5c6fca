"""Does nothing but the checkpoint, the batches and the objective decide the results?

Microbatches, chunks, attention blocks, padding, the order of rows and a second run:
each must leave every number of a probe as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import reference as ref
import torch
from reference import Row
from tiny_runs import TinyRun, make_run
from torch import Tensor

from entropy_ddp.model import forward_mode, response_tokens
from entropy_ddp.results import Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64; entropies and shares are of order 1
RTOL_FLOAT32 = 1e-5  # the contract's bar for float32, of the term scale

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-lora": ("qwen2", {}),
    "gpt2-full-tied": ("gpt2", {"full": True}),
}
COMPUTE = {"device": "cpu", "tokens_per_microbatch": 24}
SECTIONS: dict[str, Any] = {
    "truth": {"is_mode": "per_decision"},
    "linear": {"score": "to_go", "baseline": "hk"},
    "update": {"max_grad_norm": 0.1, "lr_override": 0.02, "save_delta": True},
    "compute": COMPUTE,
}
Patch = Callable[[pytest.MonkeyPatch], None]
RunMaker = Callable[[str], TinyRun]


@pytest.fixture(scope="module")
def make_named_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Each checkpoint is written once."""

    @cache
    def make(name: str) -> TinyRun:
        family, options = CASES[name]
        run = make_run(tmp_path_factory.mktemp(name), family, **options)
        vocabulary = run.saved.model.config.vocab_size
        rows = ref.random_rows(
            7, groups=12, responses=[1, 2] * 6, vocabulary=vocabulary, with_empty=True
        )
        return replace(run, E=rows)

    return make


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, make_named_run: RunMaker) -> TinyRun:
    return make_named_run(request.param)


@pytest.fixture(scope="module")
def expected(run: TinyRun) -> Probed:
    return run.probe(**SECTIONS)


def numbers(probed: Probed) -> dict[str, float]:
    """Every estimate of a probe, by name; the sequences in file order."""
    document = probed.results.to_dict()
    document["linear"].pop("duality_gap")  # rounding, and nothing else
    document["truth"].pop("largest_sequence")  # a place in the file
    found: dict[str, float] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                collect(item, f"{name}.{key}")
        elif isinstance(value, int | float):
            found[name] = value

    for section in ("update", "truth", "truth_all", "linear", "linear_all"):
        collect(document[section], section)
    collect(list(probed.sequences), "sequences")
    assert probed.delta is not None
    for name, delta in probed.delta.items():
        collect(delta.flatten().tolist(), name)
    return found


def assert_same(found: Probed, expected: Probed) -> None:
    values, expected_values = numbers(found), numbers(expected)
    assert values.keys() == expected_values.keys()
    assert len(values) > 500
    for name, value in expected_values.items():
        assert abs(values[name] - value) <= RTOL * max(1.0, abs(value)), name


def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is replaced."""


def chunks_of(tokens: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(response_tokens, "CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(response_tokens, "CHUNK_TOKENS", tokens)

    return patch


def single_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_mode, "ATTENTION_BLOCK_ELEMENTS", 1)


def other_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded with a token that is in use, not with 0."""
    pad = torch.nn.utils.rnn.pad_sequence

    def pad_with_garbage(rows: list[Tensor], batch_first: bool) -> Tensor:
        return pad(rows, batch_first=batch_first, padding_value=5)

    monkeypatch.setattr(torch.nn.utils.rnn, "pad_sequence", pad_with_garbage)


VARIATIONS: dict[str, tuple[dict[str, Any], Patch]] = {
    "one sequence at a time": ({"tokens_per_microbatch": 1}, untouched),
    "7 tokens": ({"tokens_per_microbatch": 7}, untouched),
    "all at once": ({"tokens_per_microbatch": 10_000}, untouched),
    "eager attention": ({"attention": "eager"}, untouched),
    "snapshot on the device": ({"snapshot_device": "device"}, untouched),
    "chunks of one token": ({}, chunks_of(1)),
    "chunks of three tokens": ({}, chunks_of(3)),
    "attention query by query": ({}, single_query_blocks),
    "other padding": ({"tokens_per_microbatch": 10_000}, other_padding),
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_way_of_computing_does_not_matter(
    run: TinyRun, expected: Probed, monkeypatch: pytest.MonkeyPatch, variation: str
) -> None:
    compute, patch = VARIATIONS[variation]
    patch(monkeypatch)
    probed = run.probe(**SECTIONS | {"compute": COMPUTE | compute})
    assert_same(probed, expected)
    same_counts = probed.results.run.passes == expected.results.run.passes
    assert same_counts == ("tokens_per_microbatch" not in compute)


def permuted(rows: list[Row], seed: int) -> tuple[list[Row], list[int]]:
    """The rows in another order, groups interleaved, and the place each came from."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[place] for place in order], order


def test_order_of_rows_does_not_matter(run: TinyRun, expected: Probed) -> None:
    """Groups in another order and interleaved; each row keeps its own numbers."""
    (E, order_E), (U, order_U) = permuted(run.E, 1), permuted(run.U, 2)
    for rows in (E, U):
        changes = sum(a.group != b.group for a, b in pairwise(rows))
        assert changes >= len({row.group for row in rows})  # some group is split
    probed = replace(run, E=E, U=U).probe(**SECTIONS)
    places = [*order_E, *(len(order_E) + place for place in order_U)]
    rows = list(probed.sequences)
    back = [rows[places.index(place)] for place in range(len(places))]
    for row, original in zip(back, expected.sequences, strict=True):
        row["index"] = original["index"]
    assert_same(replace(probed, sequences=back), expected)


@pytest.mark.bits
def test_a_repeated_run_gives_the_same_bits(run: TinyRun, expected: Probed) -> None:
    again = run.probe(**SECTIONS)
    documents = [probed.results.to_dict() for probed in (again, expected)]
    for document in documents:
        for key in ("started", "seconds", "memory"):
            document["run"].pop(key)
    assert documents[0] == documents[1]
    assert list(again.sequences) == list(expected.sequences)
    assert again.delta is not None and expected.delta is not None
    assert again.delta.keys() == expected.delta.keys()
    for name, delta in again.delta.items():
        assert torch.equal(delta, expected.delta[name]), name


@pytest.mark.parametrize("buffers", ["float32", "float64"])
def test_microbatches_do_not_matter_in_float32(run: TinyRun, buffers: str) -> None:
    precision = {"model": "float32", "buffers": buffers}
    first, second = (
        run.probe(
            **SECTIONS
            | {"precision": precision}
            | {"compute": COMPUTE | {"tokens_per_microbatch": budget}}
        ).results
        for budget in (1, 10_000)
    )
    for name in ("H_orig", "H_upd", "delta_h_true"):
        difference = getattr(first.truth, name) - getattr(second.truth, name)
        assert abs(difference) <= RTOL_FLOAT32 * first.truth.H_orig, name
    scale = max(map(abs, first.linear.terms.values()))
    assert abs(first.linear.slope - second.linear.slope) <= RTOL_FLOAT32 * scale
