"""The benchmarks run, and what they compare are two ways to the same numbers."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import entropy_floor, instead
from benchmarks.__main__ import main
from benchmarks.comparison import (
    CPU,
    Comparison,
    Setting,
    count_operations,
    time_in_turns,
)
from benchmarks.memory import peak_bytes
from benchmarks.models import make_passes
from benchmarks.probes import scale_rows
from benchmarks.rows import GPU_ROWS, ROWS, default_rows
from benchmarks.table import cpu_name
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import shifted
from entropy_ddp.model.precision import precision_context

SETTING = Setting(size="tiny", repeats=1)
# Starts processes that probe a checkpoint.
LONG = ("ranks", "probe", "all-reduce")
# Two ways to the same sums in float32; a slope of two ranks.
TOLERANCE = 1e-5


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the benchmarks are forked; the row `all-reduce` starts its own."""

    def run(
        command: Sequence[str], *, env: Mapping[str, str], timeout: float, **_: Any
    ) -> launching.Finished:
        return launching.run(command, env, timeout)

    monkeypatch.setattr("benchmarks.processes.subprocess.run", run)


@cache
def rows_of(name: str) -> list[Comparison]:
    """The lines of a row at tiny size; skips a row this version has no API for."""
    try:
        return list(ROWS[name](SETTING))
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in ROWS],
)
def test_a_row_compares_what_is_equal(
    name: str, request: pytest.FixtureRequest
) -> None:
    if name == "ranks":
        request.getfixturevalue("forked_processes")
    lines = rows_of(name)
    assert lines
    for line in lines:
        assert line.part and line.over
        assert bool(line.values) is not bool(line.says)
        if line.says:
            assert line.median is line.met is None
            continue
        assert all(0 < value < float("inf") for value in line.values)
        assert min(line.values) <= line.median <= max(line.values)
        assert line.difference is None or line.difference <= TOLERANCE
        assert (line.met is None) == (line.target is None)
    assert len({line.part + line.over for line in lines}) == len(lines)


@pytest.mark.parametrize("name", ["score", "head", "order-1", "pull-back"])
def test_every_timed_line_has_a_common_result(name: str) -> None:
    assert all(line.difference is not None for line in rows_of(name))


def test_the_slope_is_that_of_the_entropy_one_would_difference() -> None:
    """In float64, where a central difference is exact to the square of its step."""
    case = instead.make_case(SETTING)
    model = case.model.double()
    direction = {name: tangent.double() for name, tangent in case.direction.items()}
    passes, values = make_passes(model), instead.plain_values(case, case.E)
    scores, ends = passes.score(case.E, direction), []
    with torch.no_grad(), precision_context(torch.float64):
        before, _ = values(passes.parameters)
        for step in (1e-4, -1e-4):
            with shifted(passes.parameters, direction, step):
                ends.append(values(passes.parameters))
    above, below = (instead.estimated_entropy(case.E, before, *end) for end in ends)
    difference = float(above - below) / 2e-4
    assert instead.slope_of(case.E, scores) == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [("order-1", 1.9, 2.6), ("order-2", 3.8, 5.2), ("pull-back", 1.9, 2.6)],
)
def test_operations_are_those_of_the_method(
    name: str, lowest: float, highest: float
) -> None:
    """A tangent doubles every product; a backward pass costs one product more."""
    counted = [line.flops for line in rows_of(name) if line.flops is not None]
    assert counted
    assert all(lowest <= value <= highest for value in counted), counted


def test_operations_of_products_and_attention() -> None:
    query = torch.ones(2, 3, 5, 7)
    left, right = torch.ones(4, 6), torch.ones(6, 8)

    def run() -> Tensor:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        return left @ right

    operations, result = count_operations(run)
    assert operations == 2 * 4 * 6 * 8 + 2 * (2 * 3) * (5 * 5) * (7 + 7)
    assert result.shape == (4, 8)


def test_the_peak_is_of_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            first = torch.ones(1000)
            second = first + 1
            del first, second

    assert 8000 <= peak_bytes(run, CPU) < 12_000


def test_variants_take_turns() -> None:
    order: list[str] = []
    timings = time_in_turns(
        lambda: order.append("a"), lambda: order.append("b"), Setting(repeats=3)
    )
    # Once each to warm up; then who comes first alternates.
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(seconds) for seconds in timings.seconds] == [3, 3]


@pytest.mark.parametrize(
    ("values", "at_least", "met"),
    [([1.0, 3.0, 9.0], False, True), ([1.0, 4.0, 2.5], True, False)],
)
def test_the_median_meets_the_target(
    values: list[float], at_least: bool, met: bool
) -> None:
    line = Comparison(part="", over="", values=values, target=3.0, at_least=at_least)
    assert line.met is met


def test_a_row_for_a_gpu_is_run_on_one_only() -> None:
    assert not set(GPU_ROWS) & set(default_rows(SETTING))
    gpu = Setting(size="tiny", device=torch.device("cuda"))
    assert default_rows(gpu) == list(ROWS)


def test_the_command_prints_and_writes_the_table(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    arguments = ["--rows", "head", "--rows", "pull-back", "--size", "tiny"]
    finished = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert finished.exit_code == 0, finished.output
    document = json.loads(out.read_text())
    assert document["versions"]["torch"] == torch.__version__
    assert document["cpu"] == cpu_name() != ""
    assert document["threads"] == 1
    assert set(document["seconds_by_row"]) == {"head", "pull-back"}
    assert len(document["rows"]) == 5
    for row in document["rows"]:
        assert row["part"].split(",")[0] in finished.output
        assert row["met"] == (row["median"] <= row["target"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "gpu-probe"], "needs --device cuda"),
        (["--rows", "nothing"], "is not one of"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], message: str) -> None:
    finished = CliRunner().invoke(main, arguments)
    assert finished.exit_code == 2
    assert message in finished.output


@pytest.mark.usefixtures("forked_processes")
def test_communication_does_not_grow_with_the_batch() -> None:
    small, large = scale_rows(SETTING)
    assert large["num_sequences"] == 2 * small["num_sequences"]
    numbers = [
        {purpose: number for purpose, (number, _) in cost["collectives"].items()}
        for cost in (small, large)
    ]
    assert numbers[0] == numbers[1]
    assert all(
        cost["peak_bytes"] >= cost["peak_bytes_before"] for cost in (small, large)
    )


@pytest.mark.parametrize("name", ["floor-repo", "clip-cov", "kl-cov"])
def test_trainings_of_the_entropy_floor_are_made_once_and_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of a policy that has learned nothing; lines of other settings stay out."""
    pytest.importorskip("trl")
    for constant, value in {
        "STEPS": 2, "SETTLED": 0, "SUPERVISED_STEPS": 2, "NUM_HELD_OUT": 4,
        "PROMPTS_PER_BATCH": 2, "PAGE": tmp_path / "page.md",
        "FIGURE": tmp_path / "figure.png",
    }.items():  # fmt: skip
        monkeypatch.setattr(entropy_floor, constant, value)
    file = tmp_path / "results.jsonl"
    older = {"method": name, "seed": 0, "settings": {"trainer": {"epsilon": 9}}}
    file.write_text(json.dumps(older) + "\n")
    options = ["--out", str(file), "--base", str(tmp_path / "base")]
    options += ["--seeds", "2", "--method", name]
    for _ in range(2):
        run = CliRunner().invoke(entropy_floor.main, ["train", *options])
        assert run.exit_code == 0, run.output
    lines = entropy_floor.read_results(file)
    assert [line["seed"] for line in lines] == [0, 1]
    assert len(file.read_text().splitlines()) == 3
    for line in lines:
        assert 0 <= line["sampled"] <= line["best"] <= 1
        assert 0 < line["entropy"] < 3
    (tmp_path / "page.md").write_text("before <!-- results --> <!-- end of results -->")
    drawn = CliRunner().invoke(entropy_floor.main, ["draw", "--out", str(file)])
    assert drawn.exit_code == 0, drawn.output
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before <!-- results -->\n\n| method | seeds | sampled |")
    assert f"| {entropy_floor.METHODS[name].says} | 2 | " in page
    assert (tmp_path / "figure.png").stat().st_size > 1000
