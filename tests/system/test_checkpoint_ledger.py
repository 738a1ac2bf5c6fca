"""The ledger from checkpoints and batches against the callback's of the same run."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from live_training import ledger_of, steps_of, train

from entropy_ddp import demo
from entropy_ddp.cli import main

pytest.importorskip("trl")
SAMPLE = {"num_prompts": 24, "with_replacement": True, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the callback that kept its checkpoints, all of 4 steps."""
    folder = tmp_path_factory.mktemp("run")
    made = demo.train_demo(folder / "demo", supervised_steps=150, grpo_steps=1)
    train(
        folder,
        base=made.base,
        probe={"num_prompts": 24},
        record=True,
        lora={"target_modules": demo.PROJECTIONS},
        max_steps=4,
        max_completion_length=24,
        learning_rate=3e-3,
        max_grad_norm=0.05,
        save_strategy="steps",
        save_steps=1,
        log_completions=True,
        num_completions_to_print=0,
    )
    return folder


def probe(trained: Path, out: Path, run: Path | None = None, **sample: Any) -> Result:
    """The command on a trainer's folder."""
    source = {"prompts": str(trained / "prompts.jsonl")} | SAMPLE | sample
    arguments = [
        "ledger", str(run or trained / "trainer"), "--out", str(out), "--quiet",
        "--set", f"checkpoint.base={trained / 'demo' / 'base'}",
        "--set", f"batches.E.sample={json.dumps(source)}",
        "--set", "compute.device=cpu",
    ]  # fmt: skip
    return CliRunner().invoke(main, arguments)


def test_checkpoints_of_every_step_give_the_callback_s_ledger(
    trained: Path, tmp_path: Path
) -> None:
    """The same responses of the same weights; and the step is taken again."""
    finished = probe(trained, tmp_path / "out")
    assert finished.exit_code == 0, finished.output
    live = {entry["step"]: entry for entry in steps_of(trained)}
    found = steps_of(tmp_path / "out")
    assert [entry["step"] for entry in found] == [2, 3, 4]
    for entry in found:
        expected = live[entry["step"]]
        for key in ("entropy", "first_order", "second_order", "truth"):
            assert entry[key]["value"] == pytest.approx(
                expected[key]["value"], rel=1e-3, abs=1e-7
            )
            assert entry[key]["se"] == pytest.approx(expected[key]["se"], rel=1e-3)
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        scale = max(map(abs, expected["tokens"].values()))
        for key in ("parts", "tokens", "deciles"):
            assert entry[key] == pytest.approx(expected[key], abs=1e-4 * scale)
        assert entry["checks"]["identity_gap"] < 1e-5
    assert ledger_of(tmp_path / "out")[-1]["entropy"]["value"] == pytest.approx(
        ledger_of(trained)[-1]["entropy"]["value"], rel=1e-4
    )


def test_several_steps_between_checkpoints_are_probed_together(
    trained: Path, tmp_path: Path
) -> None:
    """Steps 2 and 4: one change of two steps, the first split by the texts of its batch."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint-2", "checkpoint-4", "completions"):
        (run / name).symlink_to(trained / "trainer" / name)
    finished = probe(trained, tmp_path / "out", run)
    assert finished.exit_code == 0, finished.output
    (entry,) = steps_of(tmp_path / "out")
    assert (entry["step"], entry["num_steps"]) == (4, 2)
    live = [line["truth"]["value"] for line in steps_of(trained)[2:]]
    # Of other responses than the second of the two steps.
    assert entry["truth"]["value"] == pytest.approx(sum(live), abs=0.05)
    found = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert found["steps"] == {
        "first": 3, "last": 4, "probed": 2, "total": 2, "attributed": 1,
    }  # fmt: skip
    assert set(found["parts"]) == {"momentum", "decay", "gradient"}


def test_what_is_no_run_of_checkpoints_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    """Before anything is opened or written."""
    finished = probe(trained, tmp_path / "out", tmp_path / "none")
    assert finished.exit_code == 2
    assert "expected at least 2 folders checkpoint-N, found 0" in finished.stderr
    arguments = ["--set", "batches.E.file=E.jsonl", "--out", str(tmp_path / "out")]
    command = ["ledger", str(trained / "trainer"), *arguments]
    finished = CliRunner().invoke(main, command)
    assert finished.exit_code == 2
    assert "batches.E: expected a `sample` section" in finished.stderr
    assert not (tmp_path / "out").exists()
