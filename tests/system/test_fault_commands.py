"""Faults of commands on several ranks, and the same on one: message, code, no hang."""

import os
import re
import signal
import time
from pathlib import Path

import launching
import pytest
import yaml
from checkpoints import run_config, write_rows
from tiny_runs import TinyRun, make_run

SECONDS_TO_END = 10.0

# The command line with a fault planted on one rank; the others keep their time.
FAULTY = """
import os, sys, time
from pathlib import Path

marks, fault, faulty, *arguments = sys.argv[1:]
rank = os.environ.get("RANK", "0")
begin = time.monotonic()

def mark():
    Path(marks, f"{rank}.pid").write_text(str(os.getpid()))

if fault == "no configuration" and rank == faulty:
    arguments[arguments.index("--config") + 1] = "missing.yaml"
if fault == "interrupted import":
    import signal
    class Interrupting:
        def find_spec(self, name, path, target=None):
            if name != "transformers":
                return
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except BaseException:
                pass  # a library that takes any failure for one of its own
    sys.meta_path.insert(0, Interrupting())
if fault in ("NaN", "damaged", "sleeps"):
    from entropy_ddp.model.scoring import Passes
    score = Passes.score
    def planted(passes, shard, *others, **options):
        mark()
        if rank != faulty:
            return score(passes, shard, *others, **options)
        if fault == "sleeps":
            time.sleep(100)
        if fault == "damaged":
            raise RuntimeError("planted defect")
        def spoil(module, inputs, output):
            output.last_hidden_state.mul_(float("nan"))
        passes.tokens.transformer.register_forward_hook(spoil)
        return score(passes, shard, *others, **options)
    # Not while the model is checked with made-up rows.
    import entropy_ddp.probe.opening as opening
    verify = opening.verify_model
    def verify_model(*given):
        verify(*given)
        Passes.score = planted
    opening.verify_model = verify_model

from entropy_ddp.cli import main

main(arguments)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A checkpoint and two batches."""
    return make_run(tmp_path_factory.mktemp("tiny"), "qwen2")


@pytest.fixture
def config(tiny: TinyRun, tmp_path: Path) -> Path:
    """The configuration of a probe."""
    files = [
        write_rows(tmp_path / f"{split}.jsonl", rows)
        for split, rows in (("E", tiny.E), ("U", tiny.U))
    ]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tiny.saved, *files)))
    return path


def faulty(folder: Path, fault: str, rank: int, *arguments: str | Path) -> list[str]:
    """The command line with a fault on one rank."""
    script = folder / "faulty.py"
    script.write_text(FAULTY)
    return launching.python(script, folder, fault, str(rank), *arguments)


def said(*ended: launching.Finished) -> list[str]:
    """Lines of standard error, but for the memory that is needed and free."""
    lines = "".join(finished.stderr for finished in ended).splitlines()
    return [line for line in lines if not line.startswith("memory: ")]


def end(folder: Path, num_ranks: int, command: list[str]) -> tuple[list[int], str]:
    """Exit codes and errors of ranks without an agent; they end soon after the fault."""
    ended = launching.run_ranks(num_ranks, command)
    marks = [path.stat().st_mtime for path in folder.glob("*.pid")]
    assert not marks or time.time() - max(marks) < SECONDS_TO_END
    assert not any(finished.stdout for finished in ended)
    return [f.returncode for f in ended], "".join(f.stderr for f in ended)


@pytest.mark.parametrize(
    ("fault", "code", "message", "tracebacks"),
    [
        ("NaN", 1, r"rank 1: .*finite.*", 0),
        ("damaged", 1, "rank 1: planted defect", 1),
        ("no configuration", 2, r"rank 1: missing\.yaml: .*", 0),
    ],
)
def test_a_fault_on_one_rank_ends_a_probe_on_all(
    config: Path, tmp_path: Path, fault: str, code: int, message: str, tracebacks: int
) -> None:
    """Also one from before the process group: the other has read its configuration."""
    out = tmp_path / "out"
    probe = ("probe", "--config", config, "--out", out)
    codes, errors = end(tmp_path, 2, faulty(tmp_path, fault, 1, *probe))
    assert codes == [code, code]
    assert len(re.findall(f"^error: {message}$", errors, re.MULTILINE)) == 1
    assert errors.count("error: ") == 1
    assert errors.count("Traceback") == tracebacks
    left = list(out.iterdir()) if out.exists() else []
    assert [path.name for path in left] in ([], ["unfinished"])


def test_a_folder_that_rank_0_refuses_ends_all(config: Path, tmp_path: Path) -> None:
    """The others have no part in it, and would wait in their first collective."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("{}")
    command = ("probe", "--config", config, "--out", out)
    codes, errors = end(tmp_path, 3, launching.python(*launching.PACKAGE, *command))
    assert codes == [2, 2, 2]
    assert re.fullmatch(r"error: rank 0: .*: holds the results of .*\n", errors)


def test_a_wrong_configuration_is_told_once_under_a_launcher(tmp_path: Path) -> None:
    """Every rank finds the mistake; none waits for another."""
    command = ("check", "--config", "missing.yaml")
    finished = launching.run(launching.torchrun(2, *launching.PACKAGE, *command))
    assert finished.returncode != 0
    assert len(re.findall(r"error: rank \d: missing\.yaml", finished.stderr)) == 1
    assert finished.stderr.count("missing.yaml") == 1


def test_untrusted_results_of_two_ranks_end_with_3(
    config: Path, tmp_path: Path
) -> None:
    """The rank that writes them says so; its tables begin with the reason."""
    probe = ("probe", "--config", config, "--out", tmp_path / "out")
    # Of 6 sequences, one always counts as an effective size of 1/6.
    values = ("update.lr_override=5.0", "truth.ess_abort=0.99", "truth.ess_warn=1")
    options = [option for value in values for option in ("--set", value)]
    command = launching.python(*launching.PACKAGE, *probe, *options)
    first, second = launching.run_ranks(2, command)
    assert (first.returncode, second.returncode) == (3, 0)
    # The rollouts' sampler is of other weights, which is the other check.
    reason, *_ = first.stdout.splitlines()
    assert reason.startswith("NOT TO BE TRUSTED: failed the check")
    assert "ESS / N" in reason
    assert (said(first, second), second.stdout) == ([], "")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_interrupted_probe_says_so_in_one_line(
    config: Path, tmp_path: Path, num_ranks: int
) -> None:
    """Ctrl-C in the middle of a pass; nothing of an unfinished file is left."""
    out = tmp_path / "out"
    probe = ("probe", "--config", config, "--out", out)
    command = faulty(tmp_path, "sleeps", num_ranks - 1, *probe)
    if num_ranks > 1:
        processes = launching.start_ranks(num_ranks, command)
    else:
        processes = [launching.start(command)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < num_ranks:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    begin = time.monotonic()
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    ended = [launching.finish(process) for process in processes]
    assert time.monotonic() - begin < SECONDS_TO_END
    assert [finished.returncode for finished in ended] == [1] * num_ranks
    assert said(*ended) == ["interrupted"]
    left = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert ".tmp" not in left and not (out / "results.json").exists()


def test_an_interrupted_start_says_so_in_one_line(config: Path, tmp_path: Path) -> None:
    """Libraries take seconds to import; Ctrl-C then shows none of them.

    Some of them go on whatever is raised, and fail later of something else.
    """
    check = ("check", "--config", config)
    command = faulty(tmp_path, "interrupted import", 0, *check)
    finished = launching.run(command, fresh=True)
    assert (finished.returncode, said(finished)) == (1, ["interrupted"])
