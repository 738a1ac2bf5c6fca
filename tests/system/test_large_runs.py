"""Do the commands of large runs work, but for the size of their models?

The command, the launcher and the configuration are those of docs/running.md; checkpoint
and rollouts are small ones.
"""

import os
import sys
from pathlib import Path

import launching
import pytest
from tiny_runs import make_run

from entropy_ddp.config import load_config
from entropy_ddp.results.reading import read_results

CONFIGS = launching.REPOSITORY / "configs"
RUNNING = (launching.REPOSITORY / "docs" / "running.md").read_text()
COMMANDS = [line for line in RUNNING.splitlines() if line.startswith("launch/single_")]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_is_valid(path: Path) -> None:
    load_config(path, ())


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama3.1_70b_lora", False),
        pytest.param("qwen2.5_7b_full", True, marks=pytest.mark.long),
    ],
)
def test_a_large_run_is_one_command(tmp_path: Path, name: str, full: bool) -> None:
    (line,) = (command for command in COMMANDS if name in command)
    run = make_run(tmp_path, "qwen2", full=full)
    written = run.config()
    sources = written.batches.sources
    settings = {
        "checkpoint.path": run.saved.folder,
        "checkpoint.base": run.saved.base,
        "batches.E.file": sources["E"].file,
        "batches.U.file": sources["U"].file,
        "update": "{from_checkpoint: false}",
        "compute.device": "cpu",
    }
    command, _, out = line.partition(" --out ")
    assert out
    options = [f"--set={key}={value}" for key, value in settings.items()]
    found = tmp_path / "found"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launching.run(
        ["bash", *command.split(), *options, "--out", str(found)],
        {"NGPU": "2", "PATH": path},
        fresh=True,
    ).require_success()
    results = read_results(found)
    assert results.run.world_size == 2
    assert results.status == "ok"
    expected = run.probe(precision={"model": "float32"}, update={})
    assert results.truth.delta_h_true == pytest.approx(
        expected.results.truth.delta_h_true, rel=1e-3
    )
