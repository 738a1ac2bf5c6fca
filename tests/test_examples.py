"""Do the examples run?"""

from pathlib import Path

import launching
import pytest
from live_training import steps_of

pytest.importorskip("trl")


@pytest.mark.slow
def test_the_training_with_a_probe_keeps_a_ledger(tmp_path: Path) -> None:
    """From nothing; two steps of it."""
    script = launching.REPOSITORY / "examples" / "train_with_probe.py"
    arguments = ["--out", tmp_path / "run", "--demo", tmp_path / "demo", "--steps", "2"]
    launching.run(
        launching.python(script, *arguments), timeout_seconds=180
    ).require_success()
    assert [entry["step"] for entry in steps_of(tmp_path / "run")] == [1, 2]
