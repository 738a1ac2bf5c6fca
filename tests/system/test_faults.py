"""One rank fails, is killed, hangs or is interrupted: every rank ends, and one says why.

The ranks run a small body in place of a command, so that a test costs little more than
the start of its processes; tests/system/test_fault_commands.py plants faults in commands.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import launching
import pytest

SECONDS_TO_END = 10.0

# Every rank leaves a file when it is about to meet the fault; rank `faulty` meets it,
# the others wait in a collective or compute.
BODY = """
import ctypes, functools, os, signal, sys, time
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it
from pathlib import Path

import torch

from entropy_ddp import distributed
from entropy_ddp.files import written_whole
from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.errors import InputError, RunError

folder, fault, faulty, others, timeout = sys.argv[1:]
folder = Path(folder)
if others == "wait 3 s":
    distributed.process_group = functools.partial(
        distributed.process_group, timeout_seconds=3
    )

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
        ctypes.PyDLL(None).sleep(3)
        return
    if fault == "sleeps in C":
        # As in a backward pass: a signal reaches the process, not this call.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        with written_whole(folder / f"result-{world.rank}"):
            ctypes.CDLL(None).sleep(100)
    if fault == "rests":
        time.sleep(4)
        return
    if fault == "sleeps":
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
        ctypes.CDLL(None).sleep(100)
    world.sum(tensor, "test")
    world.gather_objects("any")
    return 0

sys.exit(run_ranks(body, float(timeout)))
"""


class Ranks:
    """Started ranks, by torchrun or each by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[launching.Process] = []
        self.begin = 0.0

    def start(
        self,
        size: int,
        fault: str,
        faulty: int | str = 1,
        *,
        others: str = "wait",
        timeout: float = 60,
        agent: bool = False,
        launched: bool = True,
        fresh: bool = False,
    ) -> None:
        """Start ranks, and wait until every one is at the fault."""
        script = self.folder / "body.py"
        script.write_text(BODY)
        given = (script, self.folder, fault, str(faulty), others, str(timeout))
        if agent:
            command = launching.torchrun(size, *given)
            self.processes = [launching.start(command, fresh=fresh)]
        elif not launched:
            self.processes = [launching.start(launching.python(*given))]
        else:
            self.processes = launching.start_ranks(size, launching.python(*given))
        wait_for(lambda: len(self.pids()) == size, 60)
        # Of a file that is there, the content may not be.
        time.sleep(0.3)
        self.begin = time.monotonic()

    def pids(self) -> dict[int, int]:
        """The processes of the ranks that are at the fault."""
        paths = self.folder.glob("*.pid")
        return {int(p.stem): int(p.read_text() or -1) for p in paths}

    def signal(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to ranks, in the middle of what they do."""
        pids = self.pids()
        self.begin = time.monotonic()
        for rank in ranks:
            os.kill(pids[rank], number)

    def end(self, but: Sequence[int] = ()) -> tuple[list[int], str]:
        """Exit codes and what was printed, of ranks that ended in time, in order."""
        awaited = [p for i, p in enumerate(self.processes) if i not in but]
        ended = [launching.finish(process, 60) for process in awaited]
        assert time.monotonic() - self.begin < SECONDS_TO_END
        return [e.returncode for e in ended], "".join(e.stderr for e in ended)

    def kill(self) -> None:
        """Leave nothing behind."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
        for pid in self.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Ranks to be started; none of them outlives the test."""
    started = Ranks(tmp_path)
    yield started
    started.kill()


@pytest.mark.parametrize(
    ("fault", "faulty", "others", "code", "message", "tracebacks"),
    [
        ("input", 1, "wait", 2, "planted: wrong input", 0),
        ("run", 2, "compute", 1, "planted: not finite", 0),
        ("device memory", 1, "sleep in C", 1, "planted: CUDA out of memory", 1),
        ("memory", 0, "compute", 1, "planted", 1),
        ("defect", 0, "wait", 1, "'planted'", 1),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_message_and_code(
    ranks: Ranks,
    fault: str,
    faulty: int,
    others: str,
    code: int,
    message: str,
    tracebacks: int,
) -> None:
    """Nobody stops the others: they wait, or compute, or do not come back from C."""
    ranks.start(3, fault, faulty, others=others)
    codes, printed = ranks.end()
    assert codes == [code] * 3
    assert printed.count(f"error: rank {faulty}: {message}\n") == 1
    assert printed.count("error: ") == 1
    assert printed.count("Traceback") == tracebacks


def test_ranks_that_fail_at_once_say_so_once(ranks: Ranks) -> None:
    """The first to claim the failure prints, whichever it is."""
    ranks.start(3, "run", "0,1,2")
    codes, printed = ranks.end()
    assert codes == [1, 1, 1]
    assert re.fullmatch(r"error: rank \d: planted: not finite\n", printed)


def test_the_launcher_s_summary_names_the_rank_that_failed(ranks: Ranks) -> None:
    """torchrun takes its first cause from the file that this rank leaves."""
    ranks.start(4, "input", 2, agent=True)
    (code,), printed = ranks.end()
    assert code != 0
    assert printed.count("planted: wrong input") == 1
    cause = printed.partition("Root Cause")[2]
    assert "rank      : 2 " in cause
    assert "rank 2 failed first; its message is printed above" in cause


SILENT = (
    r"error: rank {} has not answered for {} s: stopped, killed \(.*\), or on a .*\n"
)


def test_a_rank_that_is_killed_is_named(ranks: Ranks) -> None:
    """By one of those that lose their connection to it, and nothing else is printed."""
    ranks.start(3, "sleeps")
    ranks.signal(signal.SIGKILL, [1])
    codes, printed = ranks.end()
    assert codes == [1, -signal.SIGKILL, 1]
    assert re.fullmatch(SILENT.format(1, 4), printed)


def test_a_rank_that_is_killed_is_named_under_a_launcher(ranks: Ranks) -> None:
    """The launcher stops the others within a moment; they find out who is missing."""
    ranks.start(3, "sleeps", agent=True, fresh=True)
    ranks.signal(signal.SIGKILL, [1])
    (code,), printed = ranks.end()
    assert code != 0
    assert len(re.findall(SILENT.format(1, 4), printed)) == 1
    assert printed.count("error: ") == 1
    assert "Connection closed" not in printed


def test_a_killed_rank_that_held_the_store_is_named(ranks: Ranks) -> None:
    """The ranks cannot agree who prints: the lowest one that was alive does."""
    ranks.start(3, "sleeps", 0)
    ranks.signal(signal.SIGKILL, [0])
    codes, printed = ranks.end()
    assert codes == [-signal.SIGKILL, 1, 1]
    assert re.fullmatch(
        "error: rank 0, which holds the ranks' store, is gone.*\n", printed
    )


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (1, SILENT.format(1, 2)),
        (
            0,
            r"error: rank 0, which holds the ranks' store, has not answered for \d s: .*\n",
        ),
    ],
)
def test_a_stopped_rank_is_named_after_the_timeout(
    ranks: Ranks, rank: int, message: str
) -> None:
    """Its connections stay open: only its silence tells. Let go on, it ends as well."""
    ranks.start(3, "sleeps", rank, timeout=2)
    ranks.signal(signal.SIGSTOP, [rank])
    codes, printed = ranks.end(but=[rank])
    assert codes == [1, 1]
    assert re.fullmatch(message, printed)
    ranks.signal(signal.SIGCONT, [rank])
    ended = launching.finish(ranks.processes[rank], SECONDS_TO_END)
    assert ended.returncode == 1


def test_a_lost_connection_does_not_wait_for_a_store_that_hangs(ranks: Ranks) -> None:
    """Rank 2 is killed while rank 0, which could tell, is stopped: rank 1 ends in time."""
    ranks.start(3, "sleeps", 0, timeout=2)
    ranks.signal(signal.SIGSTOP, [0])
    ranks.signal(signal.SIGKILL, [2])
    codes, printed = ranks.end(but=[0])
    assert codes == [1, -signal.SIGKILL]
    assert re.fullmatch(
        r"error: rank 0, which holds the ranks' store, has not answered for \d s: .*\n",
        printed,
    )


def test_a_busy_rank_is_not_taken_for_a_stopped_one(ranks: Ranks) -> None:
    """For a while it gives no sign, as a call into C keeps its interpreter."""
    ranks.start(2, "holds interpreter", timeout=10)
    codes, printed = ranks.end()
    assert (codes, printed) == ([0, 0], "")


def test_ranks_that_are_all_stopped_go_on(ranks: Ranks) -> None:
    """A suspended job: after it, the others' silence means nothing."""
    ranks.start(2, "rests", timeout=2)
    ranks.signal(signal.SIGSTOP, [0, 1])
    time.sleep(5)
    ranks.signal(signal.SIGCONT, [0, 1])
    codes, printed = ranks.end()
    assert (codes, printed) == ([0, 0], "")


def test_a_rank_that_does_not_come_to_a_collective_is_named(ranks: Ranks) -> None:
    """It lives, but hangs in what it does: the others wait for a limited time."""
    ranks.start(3, "sleeps", 2, others="wait 3 s")
    codes, printed = ranks.end()
    assert codes == [1, 1, 1]
    message = r"error: rank [01]: the ranks have waited 3 s for rank 2, which .*\n"
    assert re.fullmatch(message, printed)


@pytest.mark.parametrize(
    ("number", "sent_to", "word"),
    [
        (signal.SIGINT, [0, 1, 2], "interrupted"),
        (signal.SIGINT, [1], "interrupted"),
        (signal.SIGTERM, [0], "terminated"),
    ],
)
def test_a_signal_ends_all_with_one_line(
    ranks: Ranks, number: signal.Signals, sent_to: list[int], word: str
) -> None:
    """Ctrl-C in a terminal reaches all, a scheduler's signal perhaps one of them.

    Rank 1 is writing a file, which leaves nothing; the others wait in a collective.
    """
    ranks.start(3, "writes")
    assert (ranks.folder / "writing-1").exists()
    ranks.signal(number, sent_to)
    codes, printed = ranks.end()
    assert (codes, printed) == ([1, 1, 1], f"{word}\n")
    left = {path.name for path in ranks.folder.iterdir()}
    assert left == {"body.py", "writing-1", "0.pid", "1.pid", "2.pid"}


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_ends_a_call_into_c(ranks: Ranks, size: int) -> None:
    """Python sees no signal before it is back: another thread ends the process.

    A process alone has no other to wait for; two say so once. What was being written
    is gone.
    """
    ranks.start(size, "sleeps in C", "0,1", launched=size > 1)
    ranks.signal(signal.SIGINT, range(size))
    codes, printed = ranks.end()
    assert (codes, printed) == ([1] * size, "interrupted\n")
    left = {path.name for path in ranks.folder.iterdir()}
    assert left == {"body.py", *(f"{rank}.pid" for rank in range(size))}


def test_a_launcher_that_is_interrupted_ends_all_with_one_line(ranks: Ranks) -> None:
    """torchrun hands Ctrl-C on, and prints a traceback of its own, of no rank."""
    ranks.start(2, "writes", agent=True)
    ranks.begin = time.monotonic()
    ranks.processes[0].send_signal(signal.SIGINT)
    (code,), printed = ranks.end()
    assert code != 0
    assert printed.count("interrupted\n") == 1
    assert "error: " not in printed
    assert "body.py" not in printed
    assert not list(ranks.folder.glob(".*"))


def test_a_rank_that_never_starts_ends_the_others(tmp_path: Path) -> None:
    """Within the timeout, and with what to look at."""
    (tmp_path / "body.py").write_text(BODY)
    given = (tmp_path / "body.py", tmp_path, "run", "1", "wait", "2")
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = {"MASTER_PORT": str(launching.free_port())}
    ended = launching.run(launching.python(*given), alone | port)
    assert ended.returncode == 1
    assert "error: the ranks did not all start within 2 s" in ended.stderr
    assert "Traceback" not in ended.stderr
