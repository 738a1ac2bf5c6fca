"""Does Python get what the command line gets, job after job, on any number of ranks?"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import run_attribution, run_audit, run_probe, run_sweep
from launching import REPOSITORY, python, run, torchrun
from tiny_runs import TinyRun, make_run

from entropy_ddp.api import InputError, Run, open_run, read_results
from entropy_ddp.distributed import World
from entropy_ddp.model.parameters import fingerprint
from entropy_ddp.results import Results
from entropy_ddp.update.step import optimizer_tensors

JOBS: dict[str, Callable[..., Any]] = {
    "probe": run_probe,
    "sweep": run_sweep,
    "attribute": run_attribution,
    "audit": run_audit,
}
# What two runs of the same job may differ in.
OF_THE_MOMENT = {"started", "seconds", "memory"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), "qwen2")


@pytest.fixture(scope="module")
def opened(tiny: TinyRun) -> Run:
    return open_run(tiny.config(sweep={"etas": [0.001, 0.01]}))


def numbers(results: Results) -> dict[str, Any]:
    """Everything that does not depend on the moment."""
    document = results.to_dict()
    kept = {k: v for k, v in document["run"].items() if k not in OF_THE_MOMENT}
    return document | {"run": kept}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_on_an_open_run_is_the_job_of_the_command_line(
    opened: Run, name: str
) -> None:
    """Bit for bit, its audits and counts of passes too, whatever was done before."""
    expected = JOBS[name](opened.config, World(), None, lambda *progress: None)
    for _ in range(2):
        found = getattr(opened, name)()
        assert numbers(found.results) == numbers(expected.results)
        assert found.sequences == list(expected.sequences)


def test_jobs_leave_the_policy_as_it_was(opened: Run) -> None:
    session = opened._session
    assert session.optimizer is not None

    def state() -> str:
        tensors = optimizer_tensors(session.optimizer)
        return fingerprint([*session.policy.model.named_parameters(), *tensors])

    before = state()
    opened.probe()
    opened.attribute(attribution={"verify": True})
    assert state() == before


def test_a_job_may_set_keys_for_itself(opened: Run) -> None:
    chosen = {"score": "to_go", "baseline": "hk"}
    best = ("to_go", "action_value")
    slopes = {
        (row["score"], row["baseline"]): row["slope"]
        for row in opened.probe().results.linear_all
        if not row["control_variates"]
    }
    found = opened.probe(linear=chosen).results.linear
    assert found.slope == slopes["to_go", "hk"] != slopes[best]
    assert opened.probe().results.linear.slope == slopes[best]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"update": {"loss": "grpo"}}, "`update` is settled when a run is opened"),
        ({"linear": {"scor": "full"}}, "did you mean `score`"),
        ({"sweep": {"etas": [0.0]}}, "`etas` must be positive"),
    ],
)
def test_what_a_job_may_not_set_is_named(
    opened: Run, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened.probe(**sections)


def test_shares_of_tokens_sum_to_the_part_of_the_gradient(opened: Run) -> None:
    measured = opened.attribute()
    found = measured.results.attribution
    assert found is not None
    total = math.fsum(row["share"] for row in measured.tokens)
    assert abs(total - found.gradient) <= 1e-12 * max(
        abs(r["share"]) for r in measured.tokens
    )
    with pytest.raises(InputError, match=r"run attribute\(\)"):
        _ = opened.probe().tokens


@pytest.mark.parametrize("name", JOBS)
def test_what_is_saved_is_read_back(opened: Run, name: str, tmp_path: Path) -> None:
    """As the same dataclasses; and never over other results by accident."""
    measured = getattr(opened, name)()
    out = tmp_path / "made" / "here"
    measured.save(out)
    assert read_results(out) == measured.results
    assert json.loads((out / "results.json").read_text()) == measured.to_dict()
    rows = (out / "per_sequence.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == measured.sequences
    with pytest.raises(InputError, match="holds the results of an earlier run"):
        measured.save(out)
    measured.save(out, overwrite=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the results of a run"),
        ("{", "expected the results of a run"),
        ('{"schema_version": 99}', "expected schema_version 1, found 99"),
        ("[]", "expected schema_version 1, found None"),
        ('{"schema_version": 1}', "not the results of a run"),
    ],
)
def test_a_folder_without_results_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_results(tmp_path)


def test_a_file_a_mapping_and_a_configuration_are_one(
    tiny: TinyRun, tmp_path: Path
) -> None:
    config = tiny.config()
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    assert open_run(file).config == config
    assert open_run(config.model_dump()).config == config
    assert open_run(str(file), "seed=3").config == config.model_copy(update={"seed": 3})
    with pytest.raises(InputError, match="expected a file to change"):
        open_run(config, "seed=3")


def test_representations_say_what_there_is(opened: Run) -> None:
    assert f"{len(opened.E)} sequences" in repr(opened)
    measured = opened.probe()
    truth = measured.results.truth
    verb = "lowers" if truth.delta_h_true < 0 else "raises"
    sure = abs(truth.delta_h_true) >= 2 * truth.se
    assert (verb if sure else "changes the entropy by") in repr(measured)
    assert f"Audits: {measured.results.status}" in repr(measured)
    html = measured._repr_html_()
    assert html.startswith("<pre>") and f"{truth.delta_h_true:+.4e}" in html
    assert "<script" not in replace(measured)._repr_html_()


SCRIPT = """
import sys
from pathlib import Path
from entropy_ddp.api import open_run, ranks

with ranks() as world:
    measured = open_run(sys.argv[1], world=world).probe()
    if world.is_main:
        measured.save(sys.argv[2])
"""


def test_a_script_of_two_ranks_finds_the_same(
    tiny: TinyRun, opened: Run, tmp_path: Path
) -> None:
    config, script = tmp_path / "run.yaml", tmp_path / "script.py"
    config.write_text(yaml.safe_dump(opened.config.model_dump()))
    script.write_text(SCRIPT)
    run(torchrun(2, script, config, tmp_path / "out")).require_success()
    found, alone = read_results(tmp_path / "out"), opened.probe().results
    assert found.run.world_size == 2
    scale = max(abs(term) for term in alone.linear.terms.values())
    assert abs(found.linear.slope - alone.linear.slope) <= 1e-10 * scale
    assert math.isclose(
        found.truth.delta_h_true, alone.truth.delta_h_true, rel_tol=1e-9
    )


def test_the_example_runs(tiny: TinyRun, tmp_path: Path) -> None:
    """On a small checkpoint in place of the demo's."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.config().model_dump()))
    example = REPOSITORY / "examples" / "from_python.py"
    finished = run(python(example, config, tmp_path / "out")).require_success()
    assert "the entropy" in finished.stdout
    assert (tmp_path / "out" / "results.json").exists()
