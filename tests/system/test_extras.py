"""What an installation can do: without any extra, and with each of them alone.

Every test is a process that finds only what pip would install; `.ci/run` tries a real
base installation too.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dumps
import launching
import pyarrow
import pytest
import yaml
from checkpoints import (
    run_config,
    save_character_tokenizer,
    save_checkpoint,
    write_rows,
)
from pyarrow import parquet
from reference import random_rows
from run_directories import write_run

# Modules that make pages; all others are imported without any extra.
PAGES = {
    "comparison", "figures.attribution", "figures.canvas", "figures.change",
    "figures.charts", "figures.checkpoints", "figures.ledger", "ledger_page", "run_page",
}  # fmt: skip
ONLY = "import json, sys, installed; installed.only(*sys.argv[1].split())\n"
MISSING = "print(json.dumps(installed.missing_imports()))"
COMMANDS = """
from click.testing import CliRunner
from entropy_ddp.cli import main

for command in json.loads(sys.argv[2]):
    result = CliRunner().invoke(main, command)
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""
MATHS = """
from entropy_ddp.config.schema import Reward
from entropy_ddp.sampling.rewards import load_rewards

(term,) = load_rewards([Reward(math="answer")])
print(term.score("", "$\\\\frac{1}{2}$", {"answer": "0.5"}))
"""
TRAINING = """
from click.testing import CliRunner
from entropy_ddp.cli import main
from trl import GRPOConfig, GRPOTrainer

print(CliRunner().invoke(main, ["demo", "--out", sys.argv[2]]).stderr)
"""
STEP = {"kind": "step", "step": 1, "entropy": {"value": 0.9, "se": 0.1}}
LEDGER = "".join(
    json.dumps(line) + "\n"
    for line in (
        {"kind": "run", "first_step": 1, "steps": 1},
        STEP | {"first_order": {"value": -0.5, "se": 0.04}},
        {"kind": "end", "step": 1, "entropy": {"value": 0.5, "se": 0.4}},
    )
)


def run_alone(code: str, extras: str, *arguments: str) -> str:
    """What code prints where only these extras are installed."""
    command = launching.python("-c", ONLY + code, extras, *arguments)
    with tempfile.TemporaryDirectory() as cache:
        environment = launching.HELPERS | {"HF_DATASETS_CACHE": cache}
        return launching.run(command, environment).require_success().stdout


def run_commands(
    extras: str, *commands: Sequence[str | Path], before: str = ""
) -> list[Any]:
    """Exit code, standard output and standard error of commands, one after the other.

    What code that comes before them prints is the first entry.
    """
    texts = json.dumps([[str(part) for part in command] for command in commands])
    printed = run_alone(before + COMMANDS, extras, texts)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a tiny run, prompts, a ledger and a dump."""
    folder = tmp_path_factory.mktemp("run")
    saved = save_checkpoint(folder, "qwen2")
    save_character_tokenizer(saved.base)
    evaluation = random_rows(1, groups=6, responses=[2] * 6, vocabulary=17)
    update = random_rows(2, groups=2, responses=[3, 2], vocabulary=17)
    config = run_config(
        saved,
        write_rows(folder / "E.jsonl", evaluation),
        write_rows(folder / "U.jsonl", update),
        sweep={"num_points": 2},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(lines)
    return folder


def sampled(run: Path, **sample: Any) -> list[str]:
    """Options that sample E in place of its file."""
    given = {"prompts": str(run / "prompts.jsonl"), "num_prompts": 2}
    source = json.dumps({"sample": given | {"max_new_tokens": 3} | sample})
    return ["--config", str(run / "run.yaml"), "--set", f"batches.E={source}"]


def test_without_extras_the_commands_run_and_pages_are_refused_at_once(
    run: Path, tmp_path: Path
) -> None:
    """Every module that makes no page is imported; a page is refused before a pass."""
    (tmp_path / "ledger.jsonl").write_text(LEDGER)
    (tmp_path / "ledger.html").write_text("of an earlier ledger")
    config = ["--config", run / "run.yaml"]
    jobs = {name: tmp_path / name for name in ("probe", "sweep", "attribute", "audit")}
    missing, *done, checked, rolled, added, refused, page = run_commands(
        "",
        *([name, *config, "--out", out] for name, out in jobs.items()),
        ["check", *config],
        ["sample", *sampled(run), "--out", tmp_path / "sample"],
        ["ledger", tmp_path, "--quiet"],
        ["probe", *config, "--report", "--out", tmp_path / "none"],
        ["report", jobs["probe"]],
        before=MISSING,
    )
    assert missing == {f"entropy_ddp.report.{name}": "matplotlib" for name in PAGES}
    for (code, out, err), folder in zip(done, jobs.values()):
        assert code in (0, 3), err
        assert "ΔH true" in out and (folder / "results.json").exists()
    assert [result[0] for result in (checked, rolled, added)] == [0, 0, 0]
    assert (tmp_path / "sample" / "E.jsonl").exists()
    assert (tmp_path / "ledger.json").exists()
    needed = "matplotlib not installed; install the extra with pip install "
    needed += "'entropy_ddp[report]'\n"
    assert added[2] == f"warning: no page is made: {needed}"
    assert not (tmp_path / "ledger.html").exists()
    for result in (refused, page):
        assert (result[0], result[2]) == (2, f"error: report: {needed}")
    assert not (tmp_path / "none").exists()


def test_what_needs_an_extra_names_it(run: Path, tmp_path: Path) -> None:
    dump = run / "completions_00005.parquet"
    checkpoint = [
        "--checkpoint",
        run / "checkpoint-3",
        "--output",
        tmp_path / "U.jsonl",
    ]
    results = run_commands(
        "",
        ["import", "trl", dump, *checkpoint],
        ["check", *sampled(run, prompts=str(dump))],
        ["check", *sampled(run, prompts={"dataset": str(run / "data"), "split": "a"})],
        ["check", *sampled(run, reward={"math": "answer"})],
        ["demo", "--out", run],
    )
    for (code, _, err), extra in zip(
        results, ("import", "data", "data", "math", "demo")
    ):
        assert code == 2
        assert err.endswith(f"pip install entropy_ddp[{extra}]\n")


# Each extra alone


@pytest.mark.long
def test_the_report_extra_alone_makes_pages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "ledger.jsonl").write_text(LEDGER)
    missing, *made = run_commands(
        "report", ["report", run], ["ledger", tmp_path], before=MISSING
    )
    assert missing == {}
    assert [result[0] for result in made] == [0, 0], made
    assert (run / "report.html").exists() and (tmp_path / "ledger.html").exists()


@pytest.mark.long
def test_the_import_extra_alone_reads_parquet(tmp_path: Path) -> None:
    checkpoint = dumps.make_checkpoint(tmp_path)
    rows = [
        {
            "step": 5, "prompt": "1+1=", "completion": completion, "reward": reward,
            "advantage": advantage,
        }
        for completion, reward, advantage in (("2", 1.0, 0.5), ("3", 0.0, -0.5))
    ]  # fmt: skip
    file = tmp_path / "completions_00005.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (made,) = run_commands(
        "import", ["import", "trl", file, "--checkpoint", checkpoint,
                   "--output", tmp_path / "U.jsonl", "--max-completion-length", "4"],
    )  # fmt: skip
    assert made[0] == 0, made[2]
    assert len((tmp_path / "U.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
def test_the_data_extra_alone_reads_parquet_and_data_sets(run: Path) -> None:
    file = run / "prompts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "1+1="}] * 3), file)
    folder = {"dataset": str(run / "data"), "split": "train"}
    checked = run_commands(
        "data",
        ["check", *sampled(run, prompts=str(file))],
        ["check", *sampled(run, prompts=folder)],
    )
    assert [result[0] for result in checked] == [0, 0], checked


def test_the_math_extra_alone_compares_answers() -> None:
    assert run_alone(MATHS, "math") == "1.0\n"


@pytest.mark.long
def test_the_demo_extra_alone_has_a_trainer(run: Path) -> None:
    """Up to the first thing that it asks of the folder."""
    assert "an empty folder for the demo, found one in use" in run_alone(
        TRAINING, "demo", str(run)
    )
