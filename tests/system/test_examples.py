"""Do the examples run?"""

from pathlib import Path

import launching
import pytest
from live_training import steps_of

from entropy_ddp.demo import train_demo

pytest.importorskip("trl")


def test_the_training_with_a_probe_keeps_a_ledger(tmp_path: Path) -> None:
    """Two steps of it, on a base model that has learned next to nothing."""
    train_demo(tmp_path / "demo", supervised_steps=3, grpo_steps=1)
    script = launching.REPOSITORY / "examples" / "train_with_probe.py"
    arguments = ["--out", tmp_path / "run", "--demo", tmp_path / "demo", "--steps", "2"]
    launching.run(
        launching.python(script, *arguments), timeout_seconds=180
    ).require_success()
    assert [entry["step"] for entry in steps_of(tmp_path / "run")] == [1, 2]
