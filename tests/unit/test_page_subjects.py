"""Are runs of one step joined on one page, and all others compared or refused?"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_directories import CURVATURE, sweep_part, write_run

from entropy_ddp.errors import InputError
from entropy_ddp.report.comparison import comparison_page
from entropy_ddp.report.page import Page, shown
from entropy_ddp.report.run_page import run_page
from entropy_ddp.report.subjects import Subject, group_runs
from entropy_ddp.report.writing import write_report
from entropy_ddp.results.reading import read_run

TEXTS = [["1", "2"], ["3"], ["4", "5", "6"]]
COMPLAINT = {
    "name": "what is swept", "value": 1, "expected": "2", "verdict": "warn", "hint": "h",
}  # fmt: skip


def subjects_of(*folders: Path) -> list[Subject]:
    """What these run directories are about."""
    return group_runs([read_run(folder) for folder in folders])


def compare(*folders: Path) -> Page:
    """The comparison of these run directories."""
    return comparison_page(subjects_of(*folders))


def test_probe_sweep_and_attribution_make_one_page(tmp_path: Path) -> None:
    """In any order; settings of the sweep or of the machine do not part them."""
    probe = write_run(tmp_path / "probe", {"curvature": CURVATURE})
    sweep = write_run(
        tmp_path / "sweep",
        {**sweep_part(), "audit": [COMPLAINT], "run.world_size": 4},
        {"sweep.num_points": 3, "compute.tokens_per_microbatch": 64, "out": "runs/x"},
    )
    shares = write_run(
        tmp_path / "shares", config={"attribution.verify": True}, texts=TEXTS
    )
    (subject,) = subjects_of(sweep, shares, probe)
    assert [run.command for run in subject.runs] == ["probe", "attribute", "sweep"]
    page = run_page(subject)
    ids = [section.id for section in page.sections]
    assert ids == ["prediction", "sweep", "responses", "attribution", "run"]
    assert [c["name"] for c in page.complaints] == ["sweep: what is swept"]


def test_a_part_that_no_run_has_is_left_out(tmp_path: Path) -> None:
    """No empty boxes."""
    page = run_page(subjects_of(write_run(tmp_path / "probe"))[0])
    assert [section.id for section in page.sections] == [
        "prediction",
        "responses",
        "run",
    ]
    assert [glance.question for glance in page.glances] == [
        "How much?", "How sure?", "To be trusted?",
    ]  # fmt: skip


def test_an_audit_is_called_by_its_name(tmp_path: Path) -> None:
    """It leaves the parts of a probe; the file says which job it was."""
    audit = write_run(tmp_path / "audit", {"run.command": "audit"})
    assert run_page(subjects_of(audit)[0]).kicker.split(" · ")[1] == "audit"
    probe = write_run(tmp_path / "probe", {"run.command": "probe"})
    (subject,) = subjects_of(audit, probe)
    assert [run.command for run in subject.runs] == ["probe", "audit"]
    other = write_run(tmp_path / "other", {"run.command": "sing"})
    with pytest.raises(InputError, match="run.command to be one of .*found 'sing'"):
        subjects_of(other)


def test_the_worst_status_is_the_page_s(tmp_path: Path) -> None:
    """An untrusted sweep cannot hide behind a trusted probe."""
    probe = write_run(tmp_path / "probe")
    sweep = write_run(tmp_path / "sweep", {**sweep_part(), "status": "untrusted"})
    (subject,) = subjects_of(probe, sweep)
    page = run_page(subject)
    assert page.alarm.startswith("This run is untrusted")
    assert page.glances[2].answer == "No"
    assert page.sign == ""


def test_two_answers_to_one_question_are_refused(tmp_path: Path) -> None:
    """Two probes of the same step: which one would the headline be from?"""
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(InputError, match=r"one and .*two: two probe runs of the same"):
        subjects_of(*runs)


def test_contradicting_runs_are_refused(tmp_path: Path) -> None:
    """The same configuration, but a batch file or the checkpoint was exchanged."""
    probe = write_run(tmp_path / "probe")
    for key, value in (("truth.delta_h_true", -0.003), ("truth.H_orig", 0.3)):
        sweep = write_run(tmp_path / key, {**sweep_part(), key: value})
        with pytest.raises(InputError, match="changed between them: run both again"):
            subjects_of(probe, sweep)


def test_rounding_does_not_part_runs(tmp_path: Path) -> None:
    """Another number of ranks gives other last digits."""
    probe = write_run(tmp_path / "probe")
    changes = {"truth.delta_h_true": -0.0020000001, "truth.H_orig": 0.2500001}
    sweep = write_run(tmp_path / "sweep", {**sweep_part(), **changes})
    assert len(subjects_of(probe, sweep)) == 1


OTHERS = {
    "checkpoint": ({}, {"checkpoint.path": "out/checkpoint-40"}),
    "batch file": ({}, {"batches.E.file": "other.jsonl"}),
    "batch size": ({"E.num_sequences": 39}, {}),
    "loss": ({}, {"update.loss": "grpo"}),
    "temperature": ({}, {"objective.temperature": 0.7}),
    "estimator": ({}, {"truth.is_mode": "per_decision"}),
    "seed": ({}, {"seed": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_runs_that_differ_are_never_joined(tmp_path: Path, name: str) -> None:
    """In whatever the numbers depend on."""
    changes, config = OTHERS[name]
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", {**changes, **sweep_part()}, config)
    assert len(subjects_of(one, two)) == 2


def test_a_comparison_lies_beside_its_runs(tmp_path: Path) -> None:
    """Not in one of them, whose own page it would replace."""
    one = write_run(tmp_path / "runs" / "one")
    two = write_run(tmp_path / "runs" / "two", config={"seed": 1})
    written = write_report([one, two], None)
    assert written.page == tmp_path / "runs" / "report.html"
    assert written.plots == tmp_path / "runs" / "report-plots"
    assert {path.name for path in one.iterdir()} == {
        "config.yaml", "per_sequence.jsonl", "results.json",
    }  # fmt: skip


def test_checkpoints_stand_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """Whatever the order on the command line; each has one row and its verdict."""
    entropies = {40: 0.2, 20: 0.25, 100: 0.1}
    runs = [
        write_run(
            tmp_path / f"step{step}",
            {"truth.H_orig": entropy, "status": "untrusted" if step == 40 else "ok"},
            {"checkpoint.path": f"out/checkpoint-{step}"},
        )
        for step, entropy in entropies.items()
    ]
    page = compare(*runs)
    rows = page.sections[0].tables[0].rows
    assert [row[0].value for row in rows] == [
        "step\N{NO-BREAK SPACE}20",
        "step\N{NO-BREAK SPACE}40",
        "step\N{NO-BREAK SPACE}100",
    ]
    assert [row[1].value for row in rows] == [0.25, 0.2, 0.1]
    assert [shown(row[-1]) for row in rows] == ["ok", "untrusted", "ok"]
    assert (
        page.alarm == "1 of 3 checkpoints not to be trusted: step\N{NO-BREAK SPACE}40."
    )
    assert (
        "".join(page.headline) == "One step lowers the entropy at 2 of 3 checkpoints."
    )
    assert page.figures[0].title == (
        "The entropy falls by 0.1500\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.0085"
    )


def entropies_told(tmp_path: Path, *runs: dict[str, Any]) -> tuple[str, str]:
    """What the first figure and the lead say of two runs: H, its error, the folder."""
    written = []
    for place, run in enumerate(runs):
        values = {f"truth.{key}": run[key] for key in ("H_orig", "H_orig_se")}
        config = {
            "checkpoint.path": run["path"],
            "batches.E": {"file": f"{place}.jsonl"},
        }
        written.append(write_run(tmp_path / f"run{place}", values, config))
    page = compare(*written)
    return tuple(
        text.replace("\N{NO-BREAK SPACE}", " ")
        for text in (page.figures[0].title, page.lead)
    )


def test_runs_of_one_checkpoint_are_no_fall(tmp_path: Path) -> None:
    """Two batches E: 1.583 and 1.526, whatever their order and their errors."""
    runs = [
        {"H_orig": H, "H_orig_se": 1e-4, "path": "out/checkpoint-9"}
        for H in (1.583, 1.526)
    ]
    title, lead = entropies_told(tmp_path, *runs)
    assert title == "The entropy of one checkpoint, by the responses of each run"
    assert not re.search("falls|rises", title + lead.split(". ")[0])
    assert "from 1.58300 ± 0.00010" in lead and "to 1.52600 ± 0.00010" in lead


@pytest.mark.parametrize(
    ("error", "said"),
    [(0.01, "falls by 0.057 ± 0.014"), (0.05, "too little to tell from zero")],
)
def test_a_fall_is_one_beyond_the_error_of_both(
    tmp_path: Path, error: float, said: str
) -> None:
    """Of two checkpoints on responses of their own: errors add up in squares."""
    runs = [
        {"H_orig": H, "H_orig_se": error, "path": f"out/checkpoint-{step}"}
        for step, H in ((10, 1.583), (20, 1.526))
    ]
    title, lead = entropies_told(tmp_path, *runs)
    assert said in title and said in lead


def test_runs_that_recorded_no_error_of_the_entropy_claim_nothing(
    tmp_path: Path,
) -> None:
    """As of a version that had none."""
    runs = []
    for step in (10, 20):
        run = write_run(
            tmp_path / f"run{step}", None, {"checkpoint.path": f"checkpoint-{step}"}
        )
        document = json.loads((run / "results.json").read_text())
        for key in ("H_orig_se", "H_upd_se", "noise_floor"):
            del document["truth"][key]
        (run / "results.json").write_text(json.dumps(document))
        runs.append(run)
    page = compare(*runs)
    assert "did not record" in page.figures[0].title


def test_what_several_checkpoints_complain_of_is_said_once(tmp_path: Path) -> None:
    """With all their values; every check counts."""
    runs = [
        write_run(
            tmp_path / f"step{step}",
            {"audit": [COMPLAINT | {"value": step}]},
            {"checkpoint.path": f"out/checkpoint-{step}"},
        )
        for step in (20, 40, 60)
    ]
    page = compare(*runs)
    (complaint,) = page.complaints
    steps = [f"step\N{NO-BREAK SPACE}{step}" for step in (20, 40, 60)]
    assert complaint["name"] == f"{steps[0]}, {steps[1]} and {steps[2]}: what is swept"
    assert complaint["value"] == "20, 40 and 60"
    assert page.checked == "3 of 3 checks complain."


def test_runs_without_steps_keep_their_order(tmp_path: Path) -> None:
    """Two settings of one checkpoint have the same step: the given order counts."""
    runs = [
        write_run(tmp_path / name, config={"update.loss": loss})
        for name, loss in (("second", "grpo"), ("first", "dapo"))
    ]
    page = compare(*runs)
    rows = page.sections[0].tables[0].rows
    assert [row[0].value for row in rows] == ["second", "first"]
    same = write_run(tmp_path / "other" / "first", config={"update.loss": "nll"})
    rows = compare(runs[1], same).sections[0].tables[0].rows
    assert [row[0].value for row in rows] == [str(runs[1]), str(same)]


def test_different_units_are_not_compared(tmp_path: Path) -> None:
    """Nats per token and nats per sequence cannot stand on one axis."""
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", config={"objective.normalize": "per_sequence"})
    with pytest.raises(InputError, match="cannot stand on one axis"):
        compare(one, two)
