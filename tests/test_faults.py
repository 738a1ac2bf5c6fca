"""One rank fails, is killed, hangs or is interrupted: every rank ends, and one says why.

The ranks run a small body in place of a command, so that a test costs little more than
the start of its processes; tests/test_fault_commands.py plants faults in commands.
"""

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import launching
import pytest

SECONDS_TO_END = 10.0

# Every rank leaves a file when it is about to meet the fault; rank `faulty` meets it,
# the others wait in a collective or compute.
BODY = """
import os, sys, time
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it
from pathlib import Path

import torch

from entropy_ddp.atomic import written_whole
from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.errors import InputError, RunError

folder, fault, faulty, others, timeout = sys.argv[1:]
folder = Path(folder)

def meet(world):
    if fault == "input":
        raise InputError("planted: wrong input")
    if fault == "run":
        raise RunError("planted: not finite")
    if fault == "device memory":
        raise torch.OutOfMemoryError("planted: CUDA out of memory")
    if fault == "memory":
        raise MemoryError("planted")
    if fault == "defect":
        raise KeyError("planted")
    if fault == "holds interpreter":
        # A call into C that lets no other thread of this process run.
        import ctypes
        ctypes.PyDLL(None).sleep(3)
        return
    if fault == "sleep":
        time.sleep(100)
    with written_whole(folder / f"result-{world.rank}"):
        (folder / f"writing-{world.rank}").touch()
        time.sleep(100)

def body(world):
    tensor = torch.ones(3, dtype=torch.float64)
    world.sum(tensor, "test")
    (folder / f"{world.rank}.pid").write_text(str(os.getpid()))
    if str(world.rank) in faulty.split(","):
        meet(world)
    elif others == "compute":
        end = time.monotonic() + 100
        while time.monotonic() < end:
            torch.ones(100, 100) @ torch.ones(100, 100)
    elif others == "sleep in C":
        import ctypes
        ctypes.CDLL(None).sleep(100)
    world.sum(tensor, "test")
    world.gather_objects("any")
    return 0

sys.exit(run_ranks(body, float(timeout)))
"""


class Ranks:
    """Started ranks, by torchrun or each by itself."""

    def __init__(self, folder: Path, size: int, *, agent: bool) -> None:
        self.folder, self.size, self.agent = folder, size, agent
        self.processes: list[subprocess.Popen[str]] = []
        self.begin = 0.0

    def start(
        self, fault: str, faulty: int | str = 1, others: str = "wait", timeout: float = 60
    ) -> None:
        """Start, and wait until every rank is at the fault."""
        script = self.folder / "body.py"
        script.write_text(BODY)
        given = (script, self.folder, fault, str(faulty), others, str(timeout))
        if self.agent:
            self.processes = [launching.start(launching.torchrun(self.size, *given))]
        else:
            self.processes = launching.start_ranks(self.size, launching.python(*given))
        wait_for(lambda: len(list(self.folder.glob("*.pid"))) == self.size, 60)
        self.begin = time.monotonic()

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return int((self.folder / f"{rank}.pid").read_text())

    def signal(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to ranks, as soon as they are in the middle of something."""
        time.sleep(0.3)
        self.begin = time.monotonic()
        for rank in ranks:
            launching.os.kill(self.pid(rank), number)

    def end(self, within: float = SECONDS_TO_END) -> tuple[list[int], str]:
        """Exit codes and what was printed; all end in time, nothing is left."""
        ended = [launching.finish(process, 60) for process in self.processes]
        assert time.monotonic() - self.begin < within
        assert not list(self.folder.glob("*.tmp")) + list(self.folder.glob(".*.tmp"))
        return [e.returncode for e in ended], "".join(e.stderr for e in ended)


def wait_for(holds, seconds: float) -> None:  # noqa: ANN001
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
