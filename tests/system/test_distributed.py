"""The process group: one path for any number of ranks, every collective counted."""

import json
import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import launching
import pytest
import torch

from entropy_ddp.distributed import (
    LAUNCHER_VARIABLES,
    process_group,
    single_process_warning,
)
from entropy_ddp.distributed import failure as failure_module
from entropy_ddp.distributed.failure import Failure, Sign, Watch
from entropy_ddp.distributed.group import announced_as_errors
from entropy_ddp.errors import InputError

RANKS = """
import json, sys, time
import torch
from pathlib import Path
from entropy_ddp.distributed import process_group

shares = json.loads(sys.argv[2])
with process_group() as world:
    mine = shares[world.rank]
    rows = torch.tensor([[float(i), -2.0 * i] for i in mine], dtype=torch.float64)
    found = {
        "rank": world.rank,
        "size": world.world_size,
        "main": world.is_main,
        "sum": world.sum(torch.full((3,), 10.0**world.rank), "buffers").tolist(),
        "max": world.max(-float(world.rank) - 0.5),
        "rows": world.gather_rows(
            rows.reshape(-1, 2), torch.tensor(mine, dtype=torch.int64), 7
        ).tolist(),
        "objects": world.gather_objects({"rank": world.rank, "share": mine}),
        "exchanged": world.exchange(
            torch.tensor([10 * world.rank + to for to in (1, 2, 2)]),
            [0, 1, 2],
            [world.rank] * 3,
        ).tolist(),
        "collectives": world.collectives,
    }
    linear = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(linear.weight, float(world.rank))
    wrapped = world.wrap(linear)
    with wrapped.no_sync():
        for _ in mine:
            wrapped(torch.ones(1, 2)).sum().backward()
    found["weight"] = linear.weight.detach().tolist()
    found["gradient"] = [] if linear.weight.grad is None else linear.weight.grad.tolist()
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
"""


def test_without_a_launcher_every_function_works_on_the_local_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """World size 1 takes the same path, and counts its collectives too."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    rows = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    module = torch.nn.Linear(2, 2)
    with process_group() as world:
        assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
        assert world.sum(torch.ones(4), "parameter buffers").tolist() == [1.0] * 4
        assert world.max(-3.0) == -3.0
        gathered = world.gather_rows(rows, torch.tensor([2, 0, 1]), 3)
        assert gathered.tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 1.0]]
        assert world.gather_objects("mine") == ["mine"]
        assert world.exchange(torch.arange(2), [2], [2]).tolist() == [0, 1]
        assert world.wrap(module) is module
        assert world.collectives == {
            "parameter buffers": (1, 16),
            "scalars": (2, 8 + 48),
            "objects": (2, 16),
        }
    assert not torch.distributed.is_initialized()


SHARES: list[list[int]] = [[4, 0, 6], [], [2, 3, 5, 1]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three gloo processes found; one of them has no rows."""
    folder = tmp_path_factory.mktemp("ranks")
    command = launching.python("-c", RANKS, folder, json.dumps(SHARES))
    for finished in launching.run_ranks(len(SHARES), command):
        finished.require_success()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


def test_sums_and_gathers_are_the_same_on_every_rank(
    ranks: list[dict[str, Any]],
) -> None:
    """Uneven and empty shares need no padding; objects come in the order of ranks."""
    for rank, own in enumerate(ranks):
        assert (own["rank"], own["size"], own["main"]) == (rank, 3, rank == 0)
        assert own["sum"] == [111.0] * 3
        assert own["max"] == -0.5
        assert own["rows"] == [[float(i), -2.0 * i] for i in range(7)]
        assert own["objects"] == [
            {"rank": i, "share": share} for i, share in enumerate(SHARES)
        ]
        # Of each what it has for this one: none, one or two elements.
        assert own["exchanged"] == [
            10 * i + rank for i in range(3) for _ in range(rank)
        ]


def test_collectives_and_their_bytes_are_counted(ranks: list[dict[str, Any]]) -> None:
    """One entry for each purpose, the same on every rank."""
    expected = {
        "buffers": [1, 12],
        "scalars": [2, 8 + 7 * 16],
        "objects": [2, 3 * 8],
    }
    assert all(own["collectives"] == expected for own in ranks)


def test_a_wrapped_module_keeps_its_own_parameters(ranks: list[dict[str, Any]]) -> None:
    """Wrapping does not broadcast: that ranks hold the same weights is checked."""
    assert [own["weight"] for own in ranks] == [[[r, r]] for r in (0.0, 1.0, 2.0)]


def test_ranks_run_different_numbers_of_backward_passes(
    ranks: list[dict[str, Any]],
) -> None:
    """Under `no_sync` a rank without microbatches keeps no other rank waiting."""
    assert [own["gradient"] for own in ranks] == [[[3.0, 3.0]], [], [[4.0, 4.0]]]


@pytest.mark.parametrize(
    "present",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
    ],
)
def test_half_a_launcher_s_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, present: dict[str, str]
) -> None:
    """No silent fall-back to one process: what is missing is named."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in present.items():
        monkeypatch.setenv(name, value)
    missing = ", ".join(n for n in LAUNCHER_VARIABLES if n not in present)
    message = f"has {', '.join(present)} but not {missing}: start with torchrun"
    with pytest.raises(InputError, match=re.escape(message)), process_group():
        pass


@pytest.mark.parametrize(
    "present",
    [
        {"MASTER_ADDR": "localhost"},
        {"MASTER_PORT": "29500"},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_an_address_alone_starts_no_group(
    monkeypatch: pytest.MonkeyPatch, present: dict[str, str]
) -> None:
    """Shells export the address; only RANK and WORLD_SIZE mean a launcher."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in present.items():
        monkeypatch.setenv(name, value)
    with process_group() as world:
        assert (world.world_size, world.store) == (1, None)


ACCELERATE_ALONE = {
    "ACCELERATE_USE_CPU": "true",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        ({}, False),
        ({"MASTER_ADDR": "localhost"}, False),
        ({"WORLD_SIZE": "2", "SLURM_NTASKS": "2"}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"SLURM_NTASKS": "1"}, False),
        (ACCELERATE_ALONE, True),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_running_alone_when_several_were_asked_for_is_said(
    environment: dict[str, str], warns: bool
) -> None:
    """A launcher that sets no WORLD_SIZE runs copies that know nothing of each other."""
    warning = single_process_warning(environment)
    assert (warning is not None) == warns
    if warning is not None:
        assert "this process runs alone; start with torchrun" in warning


def test_a_rank_that_has_ended_keeps_nobody_waiting() -> None:
    """Its last sign stays its last, though another thread gives signs as well."""
    store = torch.distributed.TCPStore(
        "127.0.0.1", launching.free_port(), is_master=True, wait_for_workers=False
    )
    told: list[str] = []
    for number in range(20):
        pair = torch.distributed.PrefixStore(str(number), store)
        watches = [Watch(pair, rank, 2, 60.0, told.append) for rank in (0, 1)]
        for watch in watches:
            watch.start()
        time.sleep(0.01 * number)
        watches[1].finish()
        # As the other thread would, had it been about to.
        watches[1]._exchange(Sign(number=1000))
        begin = time.monotonic()
        watches[0].finish()
        assert time.monotonic() - begin < 5
    assert not told


class CountedStore:
    """A store in this process that counts the values read from it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.reads = 0

    def clone(self) -> "CountedStore":
        return self

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.reads += len(keys)
        return [self.values[key] for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        assert not expected
        return self.values.setdefault(key, desired.encode())

    def wait(self, keys: list[str], seconds: Any) -> None:
        assert self.check(keys)


class Clock:
    """In place of `time`: it stands still, and is set on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Watched:
    """Watches of many ranks without threads, over one store."""

    store: CountedStore
    clock: Clock
    watches: list[Watch]
    told: list[str]

    def rounds(self, count: int, silent: Collection[int] = ()) -> None:
        """Every rank but the silent ones looks, half a second apart."""
        for _ in range(count):
            self.clock.now += 0.5
            for rank, watch in enumerate(self.watches):
                if rank not in silent:
                    watch._exchange(Sign(number=int(2 * self.clock.now)))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Forty ranks that have seen each other."""
    clock, store, told = Clock(), CountedStore(), []
    monkeypatch.setattr(failure_module, "time", clock)
    monkeypatch.setattr(Watch, "_unwind", lambda self: None)
    watches = [Watch(store, rank, 40, 10.0, told.append) for rank in range(40)]
    found = Watched(store, clock, watches, told)
    found.rounds(2)
    return found


def test_reads_of_the_store_grow_with_the_ranks_not_with_their_square(
    watched: Watched,
) -> None:
    before = watched.store.reads
    watched.rounds(10)
    assert watched.store.reads - before <= 10 * 3 * 40
    assert not watched.told


@pytest.mark.parametrize(
    ("silent", "names"),
    [([17], "rank 17 has"), ([5, 17, 39], "ranks 5, 17, 39 have"), ([0], "rank 0 has")],
)
def test_all_silent_ranks_are_named_once(
    watched: Watched, silent: list[int], names: str
) -> None:
    """By rank 0, or by one of the others where it is silent itself."""
    watched.rounds(30, silent)
    (message,) = watched.told
    assert message.startswith(f"{names} not answered for 10 s")
    alive = [w for rank, w in enumerate(watched.watches) if rank not in silent]
    ends = {watch._failure and watch._failure.message for watch in alive}
    assert ends == {message}


def test_the_lowest_rank_that_is_alive_speaks(watched: Watched) -> None:
    """When the store is gone nobody can be asked: each knows one that is below it."""
    watched.rounds(60, [1, 2, 3, 11])
    watched.told.clear()
    for watch in watched.watches[1:]:
        # As of a store that rank 0 holds, and that is gone with it.
        watch._store_rank, watch._failure = 0, None
    speakers = [
        rank
        for rank, watch in enumerate(watched.watches)
        if rank not in (0, 1, 2, 3, 11) and watch._is_speaker()
    ]
    assert speakers == [4]


def test_a_rank_that_comes_late_to_a_collective_is_known_to_all(
    watched: Watched,
) -> None:
    for rank, watch in enumerate(watched.watches):
        watch._sign(watch._store, Sign(number=9, collectives=7 - (rank == 23)))
        watch.collectives = 7
    assert watched.watches[5].behind() == [23]
    assert watched.watches[23].behind() == []


def test_one_of_the_ranks_that_lose_a_connection_looks_who_is_gone(
    watched: Watched,
) -> None:
    """The others take its word."""
    watched.rounds(1)
    gone = watched.watches[3]._fallen_silent()
    assert gone == [rank for rank in range(40) if rank != 3]
    before = watched.store.reads
    watched.watches[4]._failure = Failure(rank=3, code=1, message="gone")
    assert watched.watches[4]._fallen_silent() == []
    assert watched.store.reads == before


def test_what_a_library_announces_is_no_output(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Results that are printed as JSON stay whole, whatever torch tells of its groups."""
    with announced_as_errors():
        os.write(1, b"connected\n")
    print("{}")
    assert capfd.readouterr() == ("{}\n", "connected\n")
