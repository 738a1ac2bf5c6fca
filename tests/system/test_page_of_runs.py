"""Does what the jobs really write make a page, and does a job make its own?"""

import json
import re
from pathlib import Path

import launching
import pytest
import yaml
from click.testing import CliRunner
from tiny_runs import make_run

from entropy_ddp.answers.checkpoints import BY_SHARE
from entropy_ddp.answers.holding import FAMILIES
from entropy_ddp.cli import main
from entropy_ddp.report.writing import write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of each job on one tiny checkpoint, by command."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = make_run(folder / "checkpoint", "gpt2")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.config().model_dump()))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in launching.LAUNCHER_VARIABLES:
            patch.delenv(name, raising=False)
        for command in ("probe", "sweep", "attribute", "audit"):
            out = found[command] = folder / command
            extra = ["--report", "--hold", "-0.001"] if command == "attribute" else []
            arguments = ["--config", str(config), "--out", str(out), "--quiet", *extra]
            result = CliRunner().invoke(main, [command, *arguments])
            assert result.exit_code in (0, 3), result.output
    return found


def test_every_part_of_real_runs_has_its_section(runs: dict[str, Path]) -> None:
    """A key that a job renames would be missed here."""
    written = write_report([runs["sweep"], runs["probe"], runs["attribute"]], None)
    html = written.page.read_text()
    sections = re.findall(r'<section id="([^"]+)">', html)
    assert sections == [
        "prediction", "power", "sweep", "responses", "attribution", "run",
    ]  # fmt: skip
    assert written.page.parent == runs["sweep"]
    for command, folder in runs.items():
        document = json.loads((folder / "results.json").read_text())
        assert document["run"]["command"] == command
    truth = json.loads((runs["probe"] / "results.json").read_text())["truth"]
    for key in ("delta_h_true", "se", "H_orig", "ess"):
        assert f'title="{truth[key]!r}"' in html


def test_rules_that_need_shares_are_known_by_name(runs: dict[str, Path]) -> None:
    """A rule that an attribution renames would be missed here."""
    document = json.loads((runs["attribute"] / "results.json").read_text())
    rules = [row["rule"] for row in document["attribution"]["what_if"]]
    assert len(rules) > 2 and sum(rule.startswith(BY_SHARE) for rule in rules) == 2


def test_a_change_to_hold_is_asked_for(runs: dict[str, Path]) -> None:
    """By `--hold`; what it names is on the page, each family by its name."""
    document = json.loads((runs["attribute"] / "results.json").read_text())
    found = document["attribution"]["would_hold"]
    assert found["target"] == -0.001
    assert [row["family"] for row in found["families"]] == list(FAMILIES)
    page = (runs["attribute"] / "report.html").read_text()
    assert "What would have left a change of −0.001" in page
    config = runs["attribute"].parent / "run.yaml"
    arguments = ["attribute", "--config", str(config), "--hold", "nan"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "attribution.hold" in result.output


def test_a_job_leaves_its_page_on_request(runs: dict[str, Path]) -> None:
    """`--report` makes what `report` makes; without it there is no page."""
    assert not (runs["probe"] / "report.html").exists()
    made = (runs["attribute"] / "report.html").read_bytes()
    write_report([runs["attribute"]], None)
    assert (runs["attribute"] / "report.html").read_bytes() == made
