"""The same results from one process and from two, three and four; together or not at all.

Real processes with gloo on the CPU, started by torchrun and by accelerate. Float64
numbers agree to 1e-10, relative to themselves or, where big terms cancel in them, to
those terms; float32 numbers to 1e-5 of the terms.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import launching
import pytest
import yaml
from checkpoints import Saved, run_config, save_checkpoint, write_rows
from jobs import run_probe
from reference import Row, drawn_from, random_rows, with_sampling_logprobs

from entropy_ddp.config import load_config
from entropy_ddp.distributed import World
from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.results import write_results

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
SECONDS_TO_STOP = 20.0
VOCABULARY = 17
# Sections of results.json that hold numbers of the probe, where they are present.
SECTIONS = (
    "E",
    "U",
    "update",
    "truth",
    "truth_all",
    "linear",
    "linear_all",
    "curvature",
    "gradient_dot",
)

# Several probes in one group of processes: starting them is what takes time.
PROBES = """
import sys
from dataclasses import replace
from pathlib import Path

from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.config import load_config, to_yaml
from jobs import run_probe
from entropy_ddp.results import prepare_folder, write_results

def body(world):
    for path in map(Path, sys.argv[2:]):
        config, out = load_config(path, ()), Path(sys.argv[1], path.stem)
        if world.is_main:
            prepare_folder(out, False)
        alone = replace(world, collectives={})
        probed = run_probe(config, alone, out, lambda *progress: None)
        if world.is_main:
            write_results(out, probed, to_yaml(config))
    return 0

sys.exit(run_ranks(body))
"""


@dataclass(frozen=True)
class Probed:
    """A run directory."""

    folder: Path

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return json.loads((self.folder / "results.json").read_text())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of per_sequence.jsonl."""
        lines = (self.folder / "per_sequence.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def audit(self) -> dict[str, Any]:
        """The audits by name."""
        return {row["name"]: row for row in self.results["audit"]}


# Batches


def ragged(seed: int, responses: list[int], *, long: int = 9) -> list[Row]:
    """Groups of these sizes with some empty responses; the groups' rows are mixed."""
    rows = random_rows(
        seed,
        groups=len(responses),
        responses=responses,
        vocabulary=VOCABULARY,
        max_response=long,
        with_empty=True,
    )
    # Every third row first: groups that do not stand together in the file.
    return rows[::3] + rows[1::3] + rows[2::3]


E_RAGGED = ragged(1, [3, 1, 2, 5, 1, 4, 2])
U_RAGGED = ragged(2, [4, 2, 3])

# E, U, and sections of the configuration. U of the first has fewer groups than ranks.
CASES: dict[str, tuple[list[Row], list[Row], dict[str, Any]]] = {
    "ragged": (E_RAGGED, U_RAGGED, {}),
    "few groups in U": (E_RAGGED, ragged(3, [5]), {}),
    "few groups in E": (ragged(4, [4, 3]), ragged(5, [2, 3, 2, 4, 2]), {}),
    "few groups in both": (ragged(6, [1, 4]), ragged(7, [3, 2]), {}),
    "groups without tokens": (
        [replace(row, response_ids=[]) for row in ragged(8, [2, 3, 2])]
        + [replace(row, group=row.group + 9) for row in ragged(9, [3, 1])],
        U_RAGGED,
        {},
    ),
    "per_decision, per_sequence": (
        E_RAGGED,
        U_RAGGED,
        {
            "objective": {"normalize": "per_sequence", "temperature": 0.7},
            "truth": {"is_mode": "per_decision"},
            "linear": {"score": "to_go", "baseline": "hk"},
            "update": {"loss": "grpo", "lr_override": 0.02},
        },
    ),
    "clip, sum, surprisal": (
        E_RAGGED,
        U_RAGGED,
        {
            "objective": {"normalize": "sum", "integrand": "surprisal"},
            "truth": {"is_mode": "clip", "clip_c": 1.01},
            "update": {"loss": "dapo", "max_grad_norm": 0.0},
        },
    ),
    "token mean, clipped ratio": (
        E_RAGGED,
        U_RAGGED,
        {
            "objective": {"normalize": "per_sequence_token_mean"},
            "update": {"ratio": "clipped", "length_norm": 12},
        },
    ),
    "nll, standardized, one row at a time": (
        E_RAGGED,
        U_RAGGED,
        {"update": {"loss": "nll"}, "compute": {"tokens_per_microbatch": 1}},
    ),
    "many groups in E": (ragged(10, [1] * 90), U_RAGGED, {}),
    "float32": (E_RAGGED, U_RAGGED, {"precision": {"model": "float32"}}),
}


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A checkpoint and a configuration file of every case."""

    saved: Saved
    folder: Path

    def config(self, name: str) -> Path:
        """Configuration file of a case."""
        return self.folder / f"{name}.yaml"

    def probe(
        self, num_processes: int, name: str, out: Path, *options: str, fresh: bool
    ) -> Probed:
        """Probe a case with the command line under torchrun."""
        arguments = ("probe", "--config", self.config(name), "--out", out, *options)
        command = launching.torchrun(num_processes, *launching.PACKAGE, *arguments)
        finished = launching.run(command, fresh=fresh).require_success()
        if "--json" in options:
            assert json.loads(finished.stdout) == Probed(out).results
        return Probed(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Everything on disk that the probes read."""
    folder = tmp_path_factory.mktemp("place")
    saved = save_checkpoint(folder, "qwen2")
    place = Workplace(saved=saved, folder=folder)
    for name, (evaluation, update, sections) in CASES.items():
        if sections.get("update", {}).get("ratio") == "clipped":
            update = with_sampling_logprobs(saved.model, update, 3, noise=0.3)
        config = run_config(
            saved,
            write_rows(
                folder / f"{name} E.jsonl", drawn_from(saved.model, evaluation, 3)
            ),
            write_rows(folder / f"{name} U.jsonl", update),
        )
        merged = {
            key: config.get(key, {}) | sections.get(key, {})
            for key in config.keys() | sections.keys()
        }
        place.config(name).write_text(yaml.safe_dump(merged))
    return place


@pytest.fixture(scope="module")
def single(
    place: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Probed]:
    """A case, probed by this process alone."""
    out = tmp_path_factory.mktemp("single")

    @cache
    def probe(name: str) -> Probed:
        config = load_config(place.config(name), ())
        probed = run_probe(config, World(), None, lambda *progress: None)
        (out / name).mkdir()
        write_results(out / name, probed, "")
        return Probed(out / name)

    return probe


@pytest.fixture(scope="module")
def four(
    place: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Probed]:
    """Every case, probed by one group of four processes."""
    out = tmp_path_factory.mktemp("four")
    script = place.folder / "probes.py"
    script.write_text(PROBES)
    configs = [place.config(name) for name in CASES]
    command = launching.torchrun(4, script, out, *configs)
    launching.run(command, launching.HELPERS).require_success()
    return {name: Probed(out / name) for name in CASES}


@pytest.fixture(scope="module")
def two(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """The ragged case, probed by two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    return place.probe(2, "ragged", out, fresh=False)


# Comparison


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a JSON document with its place."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, f"{place}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from numbers(item, f"{place}.{number}")
    else:
        yield place, value


def term_scale(place: str, results: Mapping[str, Any], rows: list[Any]) -> float:
    """Size of the terms that a number is a difference of; 0 for one that is none."""
    entropy = abs(results["truth"]["H_orig"])
    slope = max(map(abs, results["linear"]["terms"].values()))
    rate = results["update"]["learning_rate_used"]
    names = [name for name in place.split(".") if not name.isdigit()]
    # A jackknife error is of the same terms.
    last = names[-1].replace("_jackknife", "")
    quantile = two_sided(results["E"]["num_groups"] - 1)
    # What the ends of an interval have of an error.
    ends = quantile if last.endswith("interval") else 1.0
    if place.startswith(".linear.matched_difference"):
        return ends * (rate * slope + entropy)
    if "log_weight" in place:
        return max(abs(row["logp"]) for row in rows)
    if last in ("effective_degrees_of_freedom", "largest_share"):
        # Powers of influences, which are differences of such terms.
        return 4 * results["truth"][last] * entropy / results["truth"]["se"]
    if last == "control_weight":
        return entropy / (rate * slope)
    if place.startswith((".truth", ".contribution_true")):
        return ends * entropy
    if place.startswith(".curvature"):
        if "matched_difference" in names:
            last = "difference_interval"
        return ends * curvature_scale(last, results, quantile)
    if last in ("bars_dot", "u_cross", "deltaH1"):
        dot = results["gradient_dot"]
        return dot["x_norm"] * dot["y_norm"] * dot["learning_rate"]
    if last in ("delta_h1", "interval", "contribution_linear"):
        return ends * rate * slope
    if last in ("difference_se", "difference_interval"):
        return ends * (rate * slope + entropy)
    return slope if place.startswith(".linear") else 0.0


def curvature_scale(last: str, results: Mapping[str, Any], quantile: float) -> float:
    """The same of a part of `curvature`."""
    entropy = abs(results["truth"]["H_orig"])
    slope = max(map(abs, results["linear"]["terms"].values()))
    rate = results["update"]["learning_rate_used"]
    curvature = results["curvature"]
    # A difference of two slopes: their rounding over the distance between them.
    size = max(abs(curvature["second_derivative"]), slope / curvature["step"])
    second = abs(curvature["second_derivative"])
    relative = size * slope / (second * abs(results["linear"]["slope"]))
    edge = curvature["eta_star"]
    # How near H'' is to the limit of being resolved, where the interval has its pole.
    resolved = abs(second**2 - (quantile * curvature["se"]) ** 2)
    highest = max(filter(None, curvature["eta_star_interval"]), default=edge)
    return {
        "second_derivative": size,
        "se": size,
        "delta_h2": rate * slope + rate**2 * size,
        "delta_h2_se": rate * slope + rate**2 * size,
        "interval": rate * slope + rate**2 * size,
        "difference_se": entropy + rate * slope + rate**2 * size,
        "difference_interval": entropy + rate * slope + rate**2 * size,
        "eta_star": edge * relative,
        # A product of eta* and of errors over H'' and over the slope.
        "eta_star_se": (edge + 3 * (curvature["eta_star_se"] or 0)) * relative,
        "eta_star_interval": highest * size * (second + curvature["se"]) / resolved,
        "step": curvature["step"],
    }[last]


def require_equal(found: Probed, expected: Probed) -> None:
    """The results and every row agree to the tolerance of the model's precision."""
    results, rows = expected.results, expected.rows
    tolerance = TOLERANCE[results["run"]["dtype"]]
    pairs = list(zip(found.rows, rows, strict=True))
    documents = (found.results, results)
    pairs.append(tuple({k: r[k] for k in SECTIONS if k in r} for r in documents))
    for pair in pairs:
        mine, theirs = (dict(numbers(document)) for document in pair)
        assert list(mine) == list(theirs)
        for place, value in theirs.items():
            # A rounding error, and no estimate.
            if place.endswith("duality_gap"):
                continue
            if isinstance(value, float):
                scale = max(abs(value), term_scale(place, results, rows))
                assert abs(mine[place] - value) <= tolerance * scale, place
            else:
                assert mine[place] == value, place
    verdicts = [
        [(row["name"], row["verdict"]) for row in probed.results["audit"]]
        for probed in (found, expected)
    ]
    assert verdicts[0] == verdicts[1]


def test_two_processes_give_the_numbers_of_one(
    place: Workplace, single: Callable[[str], Probed], tmp_path: Path
) -> None:
    """`torchrun -m entropy_ddp probe`, the command as users start it."""
    found = place.probe(2, "ragged", tmp_path / "out", "--json", fresh=True)
    assert found.results["run"]["world_size"] == 2
    require_equal(found, single("ragged"))


@pytest.mark.long
def test_three_processes_give_the_numbers_of_one(
    place: Workplace, single: Callable[[str], Probed], tmp_path: Path
) -> None:
    """The same command with three."""
    found = place.probe(3, "ragged", tmp_path / "out", "--json", fresh=False)
    assert found.results["run"]["world_size"] == 3
    require_equal(found, single("ragged"))


@pytest.mark.parametrize("name", CASES)
def test_four_processes_give_the_numbers_of_one(
    single: Callable[[str], Probed], four: dict[str, Probed], name: str
) -> None:
    """Empty shards of U, of E and of both; every kind of estimate; float32."""
    require_equal(four[name], single(name))


def test_the_cases_have_empty_shards(four: dict[str, Probed]) -> None:
    """Fewer groups than ranks, in one batch or in both: what the cases are for."""
    sizes = {
        name: [probed.results[split]["num_groups"] for split in "EU"]
        for name, probed in four.items()
    }
    assert sizes["ragged"] == [7, 3]
    assert sizes["few groups in U"] == [7, 1]
    assert sizes["few groups in E"] == [2, 5]
    assert sizes["few groups in both"] == [2, 2]
    empty = [row["num_tokens"] == 0 for row in four["few groups in E"].rows]
    assert any(empty)


def test_all_tokens_are_used_and_scaled_by_the_global_count(
    four: dict[str, Probed],
) -> None:
    """sum_deriv_scales = microbatches of all ranks / T; total_tokens_used = T."""
    for probed in four.values():
        for name in ("sum_deriv_scales", "total_tokens_used", "optimizer steps"):
            assert probed.audit[name]["verdict"] == "ok"
        tokens = probed.audit["total_tokens_used"]["value"]
        assert tokens == probed.results["E"]["num_tokens"]


def num_buffer_collectives(probed: Probed) -> int:
    """How many parameter buffers were reduced over the ranks."""
    value = probed.audit["collectives: parameter buffers"]["value"]
    return int(value.partition(",")[0])


def test_the_number_of_collectives_does_not_depend_on_the_batch(
    single: Callable[[str], Probed], four: dict[str, Probed]
) -> None:
    """Parameter buffers are reduced once each, however many microbatches there are."""
    counts = {name: num_buffer_collectives(probed) for name, probed in four.items()}
    for name, count in counts.items():
        assert num_buffer_collectives(single(name)) == count, name
    assert counts["many groups in E"] == counts["ragged"] == counts["few groups in U"]
    one_row = counts["nll, standardized, one row at a time"]
    assert one_row == counts["ragged"] == 2


def test_every_rank_holds_the_same_parameters(four: dict[str, Probed]) -> None:
    """Before the step, after it, and restored: the audits of equality hold."""
    for probed in four.values():
        equal = [
            row for name, row in probed.audit.items() if "equal on all ranks" in name
        ]
        assert len(equal) == 4
        assert all(row["verdict"] == "ok" and row["value"] is True for row in equal)
        (restored,) = [
            r for name, r in probed.audit.items() if name.startswith("restore")
        ]
        assert restored["verdict"] == "ok"


def without_times(probed: Probed) -> dict[str, Any]:
    """results.json without what a clock and the machine say."""
    results = probed.results
    results["run"] = {
        k: v
        for k, v in results["run"].items()
        if k not in ("seconds", "started", "memory")
    }
    return results


def test_accelerate_repeats_torchrun_bit_for_bit(
    place: Workplace, two: Probed, tmp_path: Path
) -> None:
    """The shipped configuration starts two processes; a repetition has the same bits."""
    config = launching.REPOSITORY / "launch" / "accelerate_cpu.yaml"
    arguments = ("probe", "--config", place.config("ragged"), "--out", tmp_path / "out")
    command = launching.accelerate("--config_file", config, *launching.PACKAGE)
    command += map(str, arguments)
    launching.run(command).require_success()
    again = Probed(tmp_path / "out")
    assert again.results["run"]["world_size"] == 2
    assert without_times(again) == without_times(two)
    assert again.rows == two.rows


# Failures

# The command line with a pass that fails on one rank, after so many calls of it.
FAULTY = """
import os
import sys
from pathlib import Path

from entropy_ddp.errors import RunError
from entropy_ddp.model.scoring import Passes

calls = []
score = Passes.score

def faulty(self, *arguments, **options):
    calls.append(1)
    if os.environ["RANK"] == os.environ["FAULTY_RANK"]:
        if len(calls) > int(os.environ["GOOD_CALLS"]):
            Path(os.environ["MARKS"], "failed").touch()
            raise RunError("injected failure")
    return score(self, *arguments, **options)

Passes.score = faulty
Path(os.environ["MARKS"], f"{os.getpid()}.pid").touch()

from entropy_ddp.cli import main

main()
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The command line with a fault in one rank, and what it leaves behind."""

    place: Workplace
    folder: Path
    rank: int
    good_calls: int

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.folder / "out"

    @property
    def arguments(self) -> tuple[str | Path, ...]:
        """The script and a probe."""
        script = self.folder / "faulty.py"
        script.write_text(FAULTY)
        config = self.place.config("ragged")
        return (script, "probe", "--config", config, "--out", self.out)

    @property
    def environment(self) -> dict[str, str]:
        """Which rank fails, when, and where processes leave their marks."""
        return {
            "FAULTY_RANK": str(self.rank),
            "GOOD_CALLS": str(self.good_calls),
            "MARKS": str(self.folder),
        }

    def require_clean_end(self, num_processes: int, errors: str) -> None:
        """All processes ended soon, one of them said why, and there are no results."""
        elapsed = time.time() - (self.folder / "failed").stat().st_mtime
        assert elapsed < SECONDS_TO_STOP
        pids = [int(path.stem) for path in self.folder.glob("*.pid")]
        assert len(pids) == num_processes
        assert not [pid for pid in pids if is_running(pid)]
        message = rf"error: rank {self.rank}: ([\w :-]+: )?injected failure\n"
        assert len(re.findall(message, errors)) == 1
        assert errors.count("injected failure") == 1
        assert errors.count("error: ") == 1
        left = list(self.out.iterdir()) if self.out.exists() else []
        assert [path.name for path in left] in ([], ["unfinished"])


def is_running(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_that_fails_stops_all_under_torchrun(
    place: Workplace, tmp_path: Path
) -> None:
    """Rank 1 fails while the step is taken; the other waits in a collective."""
    fault = Fault(place=place, folder=tmp_path, rank=1, good_calls=3)
    command = launching.torchrun(2, *fault.arguments)
    finished = launching.run(command, fault.environment)
    assert finished.returncode != 0
    assert finished.stdout == ""
    fault.require_clean_end(2, finished.stderr)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_stops_all_without_an_agent(
    place: Workplace, tmp_path: Path, rank: int
) -> None:
    """Nobody kills the others: they notice, and stay silent. The store is on rank 0."""
    fault = Fault(place=place, folder=tmp_path, rank=rank, good_calls=4)
    command = launching.python(*fault.arguments)
    ended = launching.run_ranks(2, command, fault.environment)
    assert [finished.returncode for finished in ended] == [1, 1]
    fault.require_clean_end(2, "".join(finished.stderr for finished in ended))


# The command line on a standard error that takes its time, a remote terminal say.
SLOW_PRINTING = """
import sys
import time

write = sys.stderr.write

def slow(text):
    if "error:" in text:
        time.sleep(4)
    return write(text)

sys.stderr.write = slow

from entropy_ddp.cli import main

main()
"""


def test_a_bad_row_is_told_once(place: Workplace, tmp_path: Path) -> None:
    """Every rank reads the whole file and finds it; one of them gets to say so.

    The launcher stops all ranks when the first one has ended: that must not happen
    before the message is out.
    """
    rows = [
        replace(row, response_ids=[-1]) if index == 6 else row
        for index, row in enumerate(E_RAGGED)
    ]
    write_rows(tmp_path / "E.jsonl", rows)
    script = tmp_path / "slow.py"
    script.write_text(SLOW_PRINTING)
    setting = f"batches.E.file={tmp_path / 'E.jsonl'}"
    config, out = place.config("ragged"), tmp_path / "out"
    arguments = ("probe", "--config", config, "--out", out, "--set", setting)
    command = launching.torchrun(2, script, *arguments)
    finished = launching.run(command)
    assert finished.returncode != 0
    assert finished.stdout == ""
    pattern = r"error: rank [01]: .*E\.jsonl:7: expected token ids from 0 to 16"
    assert len(re.findall(pattern, finished.stderr)) == 1
    assert finished.stderr.count("E.jsonl:7") == 1
    assert not out.exists()
