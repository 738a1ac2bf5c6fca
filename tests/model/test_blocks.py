"""Is E streamed: the same results from any blocks, with little kept of every token?

Kept of a token of E are six float64 numbers, whatever is asked for; collectives are as
many for a large E as for a small one.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
from jobs import run_attribution, run_audit, run_probe, run_sweep
from reference import Row
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun, make_run
from torch import Tensor

from entropy_ddp.config import Config
from entropy_ddp.data import batch
from entropy_ddp.distributed import World
from entropy_ddp.probe.pipeline import Plan, measure
from entropy_ddp.probe.reverse_mode import SAMPLE_SEQUENCES
from entropy_ddp.results import Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-12  # of the largest term: the same float64 sums in another order
BYTES_PER_TOKEN = 6 * 8
# Some four microbatches of E, and fewer where phases are counted and not numbers.
SOME = {"compute": {"device": "cpu", "tokens_per_microbatch": 100}}
FEW = {"compute": {"device": "cpu", "tokens_per_microbatch": 10_000}}
Job = Callable[..., Probed]
JOBS: dict[str, Job] = {
    "probe": run_probe,
    "attribute": run_attribution,
    "audit": run_audit,
    "sweep": run_sweep,
}
# Every baseline is the configured one of some case; groups of E stand interleaved.
CASES: dict[str, dict[str, Any]] = {
    "ridge, attribution": {
        "linear": {"score": "to_go", "baseline": "ridge"},
        "attribution": {"enabled": True},
    },
    "loo, per_decision": {
        "linear": {"score": "to_go", "baseline": "loo"},
        "truth": {"is_mode": "per_decision"},
        "curvature": {"enabled": False},
    },
    "loo, sum, surprisal": {
        "linear": {"score": "to_go", "baseline": "loo"},
        "objective": {"normalize": "sum", "integrand": "surprisal"},
    },
    "token mean": {"objective": {"normalize": "per_sequence_token_mean"}},
}


def rows_of(seed: int, num_groups: int, long: int = 6) -> list[Row]:
    """Ragged groups of one to three, interleaved; some responses are empty."""
    rows = ref.random_rows(
        seed,
        groups=num_groups,
        responses=([1, 2, 3] * num_groups)[:num_groups],
        vocabulary=17,
        max_response=long,
        with_empty=True,
    )
    return rows[::3] + rows[1::3] + rows[2::3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A checkpoint with 24 groups in E: two variates, and more groups than folds."""
    # Two trained matrices are enough: blocks are of tokens.
    root = tmp_path_factory.mktemp("blocks")
    made = make_run(root, "qwen2", targets=["v_proj"])
    return replace(made, E=rows_of(5, 24))


def config_of(run: TinyRun, case: str) -> Config:
    sections = {"update": {"lr_override": 0.02}} | SOME | CASES[case]
    return run.config(**sections)


def quiet(*progress: Any) -> None:
    """Shows nothing."""


def probed_document(config: Config) -> dict[str, Any]:
    probed = run_probe(config, World(), None, quiet)
    return probed.results.to_dict() | {"rows": list(probed.sequences)}


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON document with its place."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, float):
        yield place, value
    for name, item in items:
        yield from numbers(item, f"{place}.{name}")


def estimates(document: dict[str, Any]) -> dict[str, float]:
    """The numbers of a probe that are estimates."""
    names = ("truth", "truth_all", "linear", "linear_all", "gradient_dot", "rows")
    names += ("attribution",)
    kept = {name: document[name] for name in names if name in document}
    return {
        place: value
        for place, value in numbers(kept)
        # Roundings, and nothing else.
        if not place.endswith(("duality_gap", "attribution_gap"))
    }


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    mine, theirs = estimates(found), estimates(expected)
    assert mine.keys() == theirs.keys()
    assert len(theirs) > 300
    terms = map(abs, expected["linear"]["terms"].values())
    scale = max(1.0, expected["truth"]["H_orig"], *terms)
    for place, value in theirs.items():
        assert abs(mine[place] - value) <= RTOL * max(scale, abs(value)), place


def failed(document: dict[str, Any]) -> dict[str, Any]:
    """What the failed audits found: numbers to the rounding of sums over blocks."""
    rows = [row for row in document["audit"] if row["verdict"] == "fail"]
    return {row["name"]: pytest.approx(row["value"], rel=RTOL) for row in rows}


@pytest.fixture(scope="module")
def whole(run: TinyRun) -> dict[str, dict[str, Any]]:
    """Every case in one block."""
    return {case: probed_document(config_of(run, case)) for case in CASES}


@pytest.mark.parametrize("block_tokens", [0, 25])
@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_matter(
    run: TinyRun,
    whole: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    block_tokens: int,
) -> None:
    """One group at a time, and some."""
    monkeypatch.setattr(batch, "BLOCK_TOKENS", block_tokens)
    found = probed_document(config_of(run, case))
    require_same(found, whole[case])
    assert failed(found) == failed(whole[case])


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.long), 3])
def test_blocks_of_several_ranks_do_not_matter(
    run: TinyRun,
    whole: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    num_ranks: int,
) -> None:
    """Five tokens at a time on each rank."""
    monkeypatch.setattr(batch, "BLOCK_TOKENS", 5)
    for case in CASES:
        config = config_of(run, case)
        probed, *_ = run_thread_ranks(
            num_ranks,
            lambda world, config=config: run_probe(config, world, None, quiet),
        )
        found = probed.results.to_dict() | {"rows": list(probed.sequences)}
        assert found["run"]["world_size"] == num_ranks
        require_same(found, whole[case])


# Communication


@pytest.mark.parametrize("job", JOBS)
def test_collectives_do_not_depend_on_the_size_of_E(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: str
) -> None:
    """Nor on the number of blocks: as many buffers and as many tables of scalars."""
    counts = []
    for number, (num_groups, block_tokens) in enumerate(
        [(6, 100_000), (6, 1), (50, 40)]
    ):
        monkeypatch.setattr(batch, "BLOCK_TOKENS", block_tokens)
        config = replace(run, E=rows_of(5, num_groups)).config(
            linear={"score": "to_go", "baseline": "ridge"},
            gradient_dot={"enabled": False},
            sweep={"etas": [1e-4, 1e-3]},
            attribution={"blocks": 4},
            **FEW,
        )
        world, out = World(), tmp_path / str(number)
        out.mkdir()
        JOBS[job](config, world, out, quiet)
        counts.append({name: count for name, (count, _) in world.collectives.items()})
    # The gradient of U, and that of the entropy; an audit has one more, and an
    # attribution one for each of its blocks of E.
    buffers = {"audit": 3, "attribute": 1 + 4}
    assert counts[0]["parameter buffers"] == buffers.get(job, 2)
    assert counts == counts[:1] * len(counts)


# Memory


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor that a value holds, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors(getattr(value, item.name))
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def held_bytes(value: Any) -> int:
    """Bytes of all storages behind a value's tensors, each counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(value)
    }
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("baseline", ["hk", "loo", "ridge"])
def test_six_numbers_are_kept_of_every_token(run: TinyRun, baseline: str) -> None:
    """Two batches with as many sequences, one with responses three times as long."""
    short = [replace(row, response_ids=[3, 1, 4]) for row in run.E]
    long = [replace(row, response_ids=[3, 1, 4] * 3) for row in run.E]
    sizes = []
    for rows in (short, long):
        session = replace(run, E=rows).open(
            linear={"score": "to_go", "baseline": baseline}, **SOME
        )
        sizes.append(held_bytes(measure(session, Plan(audited="gradient"))))
    more_tokens = 6 * len(run.E)
    assert sizes[1] - sizes[0] == BYTES_PER_TOKEN * more_tokens


# No pass too many


def phases_of(job: Job, run: TinyRun, **sections: Any) -> dict[str, int]:
    """The phases of a job, with the tokens each passed over."""
    begun: dict[str, int] = {}

    def note(name: str, done: int, tokens: int) -> None:
        if not done:
            begun[name] = begun.get(name, 0) + tokens

    job(run.config(**sections, **FEW), World(), None, note)
    return begun


def test_attribution_scores_a_sample_again_and_not_all_of_E(run: TinyRun) -> None:
    """Its backward pass is over all of E; the noise floor needs none of that."""
    many = replace(run, E=rows_of(6, 90))
    sample = sum(len(row.response_ids) for row in many.E[:SAMPLE_SEQUENCES])
    total = sum(len(row.response_ids) for row in many.E)
    assert 0 < sample < total
    for job, sections in (
        (run_attribution, {}),
        (run_probe, {"attribution": {"enabled": True}}),
    ):
        phases = phases_of(job, many, **sections)
        assert phases["audit: reverse mode"] == total
        assert phases["audit: noise floor"] == sample


def test_the_noise_floor_costs_no_pass_of_its_own(run: TinyRun) -> None:
    """It is what the backward pass of the other audit gives on its way."""
    many = replace(run, E=rows_of(6, 90))
    lengths = [len(row.response_ids) for row in many.E]
    for job, tokens in (
        (run_probe, sum(lengths[:SAMPLE_SEQUENCES])),
        (run_sweep, sum(lengths[:SAMPLE_SEQUENCES])),
        (run_audit, sum(lengths)),
    ):
        phases = phases_of(job, many)
        assert phases["audit: reverse mode"] == tokens
        assert "audit: noise floor" not in phases


def test_a_sweep_takes_its_own_step_from_the_probe(
    run: TinyRun, tmp_path: Path
) -> None:
    """No pass at the step's learning rate: the truth is that of the probe."""
    names: list[str] = []
    config = run.config(
        update={"lr_override": 0.02}, sweep={"etas": [0.01, 0.02], "symmetric": True}
    )
    probed = run_sweep(config, World(), tmp_path, lambda *p: names.append(p[0]))
    sweeps = {name for name in names if name.startswith("sweep")}
    assert sweeps == {f"sweep: eta = {eta}" for eta in ("0.01", "-0.01", "-0.02")}
    results = probed.results
    assert results.sweep is not None
    (own,) = [point for point in results.sweep if point.eta == 0.02]
    assert own.delta_h_true == results.truth.delta_h_true
    assert own.se == results.truth.se
    assert own.difference_se == results.linear.difference_se
