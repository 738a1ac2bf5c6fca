"""Is a folder that is no finished run refused in one line, and is `report` quick?"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from run_directories import CURVATURE, sweep_part, write_run

from entropy_ddp.cli import main
from entropy_ddp.report import writing
from entropy_ddp.results import UNFINISHED

TEXTS = [["1", "2"], ["3"], ["4", "5", "6"]]


def report(*arguments: str | Path) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def assert_refused(result: Result, *words: str) -> None:
    """One line on standard error with these words, and exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.startswith("error: ") and "\n" not in line
    for word in words:
        assert word in line


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    """Nothing there, a file, a folder of something else, an interrupted sweep."""
    assert_refused(report(tmp_path / "none"), "none", "nothing there")
    file = tmp_path / "file"
    file.write_text("")
    assert_refused(report(file), "found a file")
    assert_refused(report(tmp_path), "without results.json", "run it again")
    (tmp_path / UNFINISHED).mkdir()
    assert_refused(report(tmp_path), "an unfinished run; start it again with --resume")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Another schema, damaged or incomplete results, a key of another version."""
    other = write_run(tmp_path / "other", {"schema_version": 7})
    assert_refused(report(other), "schema_version 1", "found 7")
    damaged = write_run(tmp_path / "damaged")
    (damaged / "results.json").write_text("{")
    assert_refused(report(damaged), "results.json", "JSON")
    (damaged / "results.json").write_text('{"schema_version": 1}')
    assert_refused(report(damaged), "lacks status, run, E")
    unknown = write_run(tmp_path / "unknown", config={"update.los": "grpo"})
    assert_refused(report(unknown), "config.yaml", "los")
    bare = write_run(tmp_path / "bare")
    (bare / "per_sequence.jsonl").unlink()
    assert_refused(report(bare), "per_sequence.jsonl")
    assert not (bare / "report.html").exists()


def test_the_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install, by `report` and by `probe --report` before it runs."""
    found = writing.find_spec
    monkeypatch.setattr(
        writing, "find_spec", lambda name: None if name == "jinja2" else found(name)
    )
    words = ("jinja2", "pip install 'entropy_ddp[report]'")
    assert_refused(report(write_run(tmp_path / "run")), *words)
    config = tmp_path / "run" / "config.yaml"
    arguments = ["probe", "--report", "--config", str(config), "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert_refused(result, *words)


def test_what_is_written_where(tmp_path: Path) -> None:
    """Beside the run, or where --out says, with the plots beside it."""
    run = write_run(tmp_path / "run", {"curvature": CURVATURE, **sweep_part()})
    result = report(run)
    assert result.exit_code == 0
    assert "report.html" in result.stdout
    names = {path.name for path in (run / "plots").iterdir()}
    assert {name.rpartition(".")[2] for name in names} == {"png", "svg"}
    assert {"sweep-change.png", "sweep-change.svg", "weights.png"} <= names
    out = tmp_path / "elsewhere" / "page.html"
    out.parent.mkdir()
    told = report(run, "--out", out, "--json")
    written = json.loads(told.stdout)
    assert written["page"] == str(out) and out.is_file()
    assert Path(written["plots"]) == out.with_name("page-plots")
    assert written["figures"] * 2 == len(names)
    assert_refused(report(run, "--out", tmp_path), "expected a file", "folder")


def test_plots_of_an_earlier_page_do_not_stay(tmp_path: Path) -> None:
    """A figure that this run lacks would be taken for its own."""
    run = write_run(tmp_path / "run")
    plots = run / "plots"
    plots.mkdir()
    for name in ("sweep-change.png", "sweep-change.svg"):
        (plots / name).write_text("old")
    told = report(run, "--quiet")
    assert (told.exit_code, told.output) == (0, "")
    assert not list(plots.glob("sweep-*"))
    assert (plots / "weights.png").read_bytes().startswith(b"\x89PNG")
