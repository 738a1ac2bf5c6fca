"""What finished phases of a run leave, so that a run that was interrupted can go on.

Below the run directory, `unfinished/` holds

    run.json                    what the run depends on (`identity`), and its name
    PHASE.R-of-W.NAME           what rank R of W has of a phase: safetensors
    rollouts/E.jsonl, U.jsonl   batches that the run sampled

A phase is finished when the files of all W ranks are there. Each is whole or absent, and
of this run: its name is in theirs. What belongs to a token or to a sequence is stored
with the sequence's place in the batch, so that the run may go on with another number of
ranks; sums over a rank's tokens are added up then.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from entropy_ddp.data.batch import Ragged, Shard
from entropy_ddp.data.jsonlines import read_rows, write_jsonl
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError, raise_if_out_of_memory
from entropy_ddp.files import write_tensors, written_whole
from entropy_ddp.model.walk import PassCount
from entropy_ddp.probe.identity import differences
from entropy_ddp.results import RUN_FILE

_NAME = re.compile(r"(?P<phase>.+)\.(?P<rank>\d+)-of-(?P<ranks>\d+)\.(?P<run>\w+)")
Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a phase leaves on one rank.

    Attributes:
        tokens: arrays over the tokens of the shard, [t, ...].
        sequences: arrays over its sequences, [n, ...].
        sums: of which only the sum over ranks matters.
        shared: the same on every rank.
    """

    tokens: Named = field(default_factory=dict)
    sequences: Named = field(default_factory=dict)
    sums: Named = field(default_factory=dict)
    shared: Named = field(default_factory=dict)


@dataclass(kw_only=True)
class Costs:
    """What a phase has cost one rank.

    Attributes:
        performed: passes over the model by kind and batch.
        collectives: number and bytes by purpose.
        seconds: wall-clock time by name.
        retries: calls that ran out of memory.
    """

    performed: dict[tuple[str, str], PassCount] = field(default_factory=dict)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    retries: int = 0

    def less(self, other: "Costs") -> "Costs":
        """These costs without others that they include."""
        performed = {}
        for key, count in self.performed.items():
            fresh = count.less(other.performed.get(key, PassCount()))
            if fresh.sequences:
                performed[key] = fresh
        collectives = {
            key: (number - before, size - known)
            for key, (number, size) in self.collectives.items()
            for before, known in [other.collectives.get(key, (0, 0))]
            if number > before
        }
        seconds = {
            key: value - other.seconds.get(key, 0.0)
            for key, value in self.seconds.items()
            if value > other.seconds.get(key, 0.0)
        }
        return Costs(
            performed=performed,
            collectives=collectives,
            seconds=seconds,
            retries=self.retries - other.retries,
        )

    def to_json(self) -> str:
        """As text, for `of_json`."""
        passes = [[*key, asdict(count)] for key, count in self.performed.items()]
        return json.dumps(asdict(self) | {"performed": passes})

    @classmethod
    def of_json(cls, text: str) -> "Costs":
        """From the text of `to_json`."""
        read = json.loads(text)
        return cls(
            performed={
                (kind, split): PassCount(**count)
                for kind, split, count in read["performed"]
            },
            collectives={k: (n, size) for k, (n, size) in read["collectives"].items()},
            seconds=read["seconds"],
            retries=read["retries"],
        )


@dataclass(kw_only=True)
class Unfinished:
    """The records of one run, as seen from one of its ranks.

    Attributes:
        folder: where they are.
        rank, world_size: which rank, and of how many.
        run: name of the run, in the names of its files.
        finished: phases that an earlier start has finished, and by how many ranks.
        used: those that were taken from there, in order.
    """

    folder: Path
    rank: int
    world_size: int
    run: str
    finished: dict[str, int] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)

    def write(self, phase: str, shard: Shard, record: Record, costs: Costs) -> None:
        """Keep what a phase left on this rank.

        Raises:
            RunError: there is no room for it.
        """
        parts = {
            "tokens": record.tokens,
            "sequences": record.sequences,
            "sums": record.sums,
            # Once is enough.
            "shared": record.shared if self.rank == 0 else {},
        }
        tensors = {
            f"{part}.{name}": tensor
            for part, named in parts.items()
            for name, tensor in named.items()
        }
        tensors["positions"] = shard.positions
        path = self._path(phase, self.rank, self.world_size)
        write_tensors(path, tensors, {"costs": costs.to_json()})

    def read(self, phase: str, shard: Shard) -> tuple[Record, Costs]:
        """What a finished phase left, as this rank's part; and what it had cost.

        Raises:
            InputError: a file of it is damaged.
        """
        count = self.finished[phase]
        files = [self._path(phase, rank, count) for rank in range(count)]
        costs = self._costs(files)
        if count == self.world_size:
            record, positions = _read(files[self.rank])
            if torch.equal(positions, shard.positions):
                shared = record if self.rank == 0 else _read(files[0], "shared")[0]
                return Record(
                    tokens=record.tokens,
                    sequences=record.sequences,
                    sums=record.sums,
                    shared=shared.shared,
                ), costs
        return _cut_anew((_read(path) for path in files), shard, self.rank), costs

    def keep_rollouts(
        self, split: str, rows: list[dict[str, Any]], redraws: int
    ) -> None:
        """Keep a sampled batch; called on one rank.

        Raises:
            RunError: there is no room for it.
        """
        path = self._rollouts(split)
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, rows)
        note = {"run": self.run, "content": _content(path), "redraws": redraws}
        with written_whole(path.with_suffix(".json")) as stream:
            stream.write(json.dumps(note).encode())

    def rollouts(self, split: str) -> tuple[list[dict[str, Any]], int] | None:
        """Rows of a batch that an earlier start sampled, and its redraws; None for none.

        Called on one rank.

        Raises:
            InputError: the file has been changed since.
        """
        path = self._rollouts(split)
        try:
            note = json.loads(path.with_suffix(".json").read_bytes())
        except FileNotFoundError:
            return None
        if note["run"] != self.run:
            return None
        if not path.exists() or _content(path) != note["content"]:
            raise InputError(
                f"{path}: expected the batch that the unfinished run sampled, found "
                "another content; restore it, or give --overwrite to begin anew"
            )
        return list(read_rows(path)), note["redraws"]

    def _rollouts(self, split: str) -> Path:
        return self.folder / "rollouts" / f"{split}.jsonl"

    def _costs(self, files: list[Path]) -> Costs:
        """This rank's part of what the ranks of an earlier start have spent."""
        known = [Costs.of_json(_opened(path).metadata()["costs"]) for path in files]
        own = known[self.rank :: self.world_size]
        total = Costs(collectives=known[0].collectives, seconds=known[0].seconds)
        for costs in own:
            total.retries += costs.retries
            for key, passes in costs.performed.items():
                total.performed.setdefault(key, PassCount()).add(passes)
        return total

    def _path(self, phase: str, rank: int, count: int) -> Path:
        return self.folder / f"{phase}.{rank}-of-{count}.{self.run}"


def _content(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise_if_out_of_memory(error)
        # Whatever the library raises, it is this file that it cannot read.
        raise InputError(
            f"{path}: expected what a finished phase left, found a damaged file "
            f"({error}); delete the file, and its phase is done again"
        ) from error


def _read(path: Path, *parts: str) -> tuple[Record, Tensor]:
    """A rank's record (or parts of it), and the places of its sequences in the batch."""
    opened = _opened(path)
    named: dict[str, Named] = {}
    for key in opened.keys():  # noqa: SIM118
        part, _, name = key.partition(".")
        if name and (not parts or part in parts):
            # A copy lies in memory as a new tensor does, not as it does in the file:
            # matrix products, too, depend on that in the last bit.
            named.setdefault(part, {})[name] = opened.get_tensor(key).clone()
    return Record(**named), opened.get_tensor("positions")


def _cut_anew(
    records: Iterator[tuple[Record, Tensor]], shard: Shard, rank: int
) -> Record:
    """This rank's part of the records of all ranks of an earlier start."""
    mine = Record()
    for number, (record, positions) in enumerate(records):
        mine.shared.update(record.shared)
        here = torch.isin(positions, shard.positions).nonzero().squeeze(1)
        places = torch.searchsorted(shard.positions, positions[here])
        theirs = Ragged(shard.batch.lengths[positions])
        common = Ragged(shard.batch.lengths[positions[here]])
        sources = common.spread(theirs.starts[here]) + common.position
        targets = common.spread(shard.ragged.starts[places]) + common.position
        for found, own, size, (source, target) in (
            (record.tokens, mine.tokens, shard.ragged.num_tokens, (sources, targets)),
            (record.sequences, mine.sequences, len(shard.positions), (here, places)),
        ):
            for name, values in found.items():
                if name not in own:
                    own[name] = values.new_zeros(size, *values.shape[1:])
                own[name][target] = values[source]
        for name, values in record.sums.items():
            if number == 0:
                mine.sums[name] = torch.zeros_like(values)
            # All of it on one rank: the sum over ranks is what it was.
            if rank == 0:
                mine.sums[name] += values
    return mine


def open_unfinished(
    folder: Path, world: World, make_identity: Callable[[], dict[str, Any]]
) -> Unfinished:
    """Go on with the run in a folder, or begin one there if there is none.

    Args:
        folder: where its records are, or will be.
        world: the ranks.
        make_identity: what the run depends on; called on rank 0.

    Raises:
        InputError: the run there depends on something else, or is damaged.
    """
    told: tuple[str, dict[str, int], str | None] = ("", {}, None)
    if world.is_main:
        told = _go_on_or_begin(folder, make_identity())
    run, finished, problem = world.gather_objects(told)[0]
    if problem is not None:
        raise InputError(problem)
    folder.mkdir(parents=True, exist_ok=True)
    # A rank on another machine may not see the same folder.
    for seen in world.gather_objects(finished_phases(folder, run)):
        finished = dict(finished.items() & seen.items())
    return Unfinished(
        folder=folder,
        rank=world.rank,
        world_size=world.world_size,
        run=run,
        finished=finished,
    )


def _go_on_or_begin(
    folder: Path, identity: dict[str, Any]
) -> tuple[str, dict[str, int], str | None]:
    """Name of the run, its finished phases, and why it cannot be gone on with."""
    try:
        earlier = _begun(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (
            "",
            {},
            (
                f"{folder / RUN_FILE}: expected what the unfinished run depends on, found a "
                f"damaged file ({error}); give --overwrite to begin anew"
            ),
        )
    # As a file gives it back.
    identity = json.loads(json.dumps(identity))
    if earlier is None:
        return _begin(folder, identity), {}, None
    run, before = earlier
    differing = differences(before, identity)
    if differing:
        return (
            "",
            {},
            (
                f"{folder}: the unfinished run there is of another configuration, "
                f"checkpoint or batch: {'; '.join(differing)}; start it as it was, or give "
                "--overwrite to begin anew"
            ),
        )
    return run, finished_phases(folder, run), None


def _begin(folder: Path, identity: dict[str, Any]) -> str:
    """Note what a new run depends on; the run's name."""
    run = secrets.token_hex(4)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / RUN_FILE) as stream:
        document = {"run": run, "depends on": identity}
        stream.write(json.dumps(document, indent=2).encode() + b"\n")
    return run


def _begun(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Name of the run that was interrupted, and what it depends on; None for none."""
    path = folder / RUN_FILE
    if not path.exists():
        return None
    document = json.loads(path.read_bytes())
    return document["run"], document["depends on"]


def finished_phases(folder: Path, run: str) -> dict[str, int]:
    """Phases of which the files of all ranks are there, and the number of ranks."""
    seen: dict[tuple[str, int], set[int]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is not None and match["run"] == run:
            key = (match["phase"], int(match["ranks"]))
            seen.setdefault(key, set()).add(int(match["rank"]))
    complete = {key for key, ranks in seen.items() if len(ranks) == key[1]}
    return dict(sorted(complete))
