"""Finished passes of a run are kept, so that a run that was interrupted can go on.

Below the run directory, `unfinished/` holds

    run.json                    what the run depends on, and its name
    PASS.R-of-W.NAME            what rank R of W has of a pass: safetensors
    rollouts/E.jsonl, U.jsonl   batches that the run sampled

A pass is finished when the files of all W ranks are there. Each is whole or absent, and
of this run: its name is in theirs. What belongs to a token or to a sequence is stored
with the sequence's place in the batch, so that the run may go on with another number of
ranks; sums over a rank's tokens are added up then.

A run depends on its configuration: keys stand with their values, except those that change
no number (how the work is cut) and paths, in whose place the content stands: a hash of
the parameters, the optimizer state, the batches; the device stands there as it was
chosen, and beside the version a hash of the code. Names are what a message calls them by.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import entropy_ddp
from entropy_ddp.checkpoint.policy import Policy
from entropy_ddp.config import Config
from entropy_ddp.data.batch import Batch, Ragged, Shard
from entropy_ddp.data.jsonlines import read_rows, write_jsonl
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import WholeLayers
from entropy_ddp.errors import InputError, raise_if_out_of_memory
from entropy_ddp.files import write_tensors, written_whole
from entropy_ddp.model.parameters import fingerprint, frozen_fingerprint
from entropy_ddp.results import RUN_FILE
from entropy_ddp.update.step import optimizer_tensors

_FILE = re.compile(r"(?P<name>.+)\.(?P<rank>\d+)-of-(?P<ranks>\d+)\.(?P<run>\w+)")
_NOT_IN_FILE_NAMES = re.compile(r"[^\w.=+-]+")
Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a pass gives on one rank, by how it is divided among ranks.

    Attributes:
        tokens: arrays over the tokens of the shard, or over the first of them, [t, ...].
        sequences: arrays over its sequences, [n, ...].
        sums: of which only the sum over ranks matters.
        shared: the same on every rank.
        vectors: flat, over the trainable elements that this rank has: all, [P], or its
            parts of a model in parts.
    """

    tokens: Named = field(default_factory=dict)
    sequences: Named = field(default_factory=dict)
    sums: Named = field(default_factory=dict)
    shared: Named = field(default_factory=dict)
    vectors: Named = field(default_factory=dict)


@dataclass(kw_only=True)
class Unfinished:
    """What the passes of one run have left, as seen from one of its ranks.

    Attributes:
        folder: where the files are.
        rank, world_size: which rank, and of how many.
        run: name of the run, in the names of its files.
        layers: the model's; joins and cuts vectors.
        finished: file names of passes that an earlier start finished, and its ranks.
        used: names of the passes that were read from there, in order.
    """

    folder: Path
    rank: int
    world_size: int
    run: str
    layers: WholeLayers = field(default_factory=WholeLayers)
    finished: dict[str, int] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)

    def read_or_run(
        self, name: str, shard: Shard, run: Callable[[], PassResult]
    ) -> PassResult:
        """What a pass gave before the run was interrupted; else run it, and keep it.

        Args:
            name: of the pass; every pass of a run has another.
            shard: the sequences of its arrays.

        Raises:
            InputError: a file of it is damaged.
            RunError: there is no room for it.
        """
        if _file_name(name) in self.finished:
            self.used.append(name)
            return self._read(_file_name(name), shard)
        result = run()
        self.write(name, shard, result)
        return result

    def write(self, name: str, shard: Shard, result: PassResult) -> None:
        """Keep what a pass gave on this rank.

        Raises:
            RunError: there is no room for it.
        """
        parts = {
            "tokens": result.tokens,
            "sequences": result.sequences,
            "sums": result.sums,
            # Once is enough.
            "shared": result.shared if self.rank == 0 else {},
            "vectors": self._joined(result.vectors),
        }
        tensors = {
            f"{part}.{key}": tensor
            for part, named in parts.items()
            for key, tensor in named.items()
        }
        tensors["positions"] = shard.positions
        write_tensors(self._path(_file_name(name), self.rank, self.world_size), tensors)

    def _joined(self, vectors: Named) -> Named:
        """Whole vectors, to be kept by rank 0; nothing on the others."""
        joined = ((key, self.layers.joined(vector)) for key, vector in vectors.items())
        return {key: v for key, v in joined if v is not None and self.rank == 0}

    def _read(self, name: str, shard: Shard) -> PassResult:
        """This rank's part of what the ranks of an earlier start left of a pass."""
        count = self.finished[name]
        files = [self._path(name, rank, count) for rank in range(count)]
        result = self._read_arrays(files, shard)
        first = _opened(files[0])
        for key in first.keys():  # noqa: SIM118
            if key.startswith("vectors."):
                vector = self.layers.cut(first.get_slice(key))
                result.vectors[key.removeprefix("vectors.")] = vector
        return result

    def _read_arrays(self, files: list[Path], shard: Shard) -> PassResult:
        """The same, without vectors."""
        count = len(files)
        if count == self.world_size:
            result, positions = _read(files[self.rank])
            if torch.equal(positions, shard.positions):
                shared = result if self.rank == 0 else _read(files[0], "shared")[0]
                return PassResult(
                    tokens=result.tokens,
                    sequences=result.sequences,
                    sums=result.sums,
                    shared=shared.shared,
                )
        return _divided_anew((_read(path) for path in files), shard, self.rank)

    def read_or_sample(
        self,
        world: World,
        split: str,
        sample: Callable[[], tuple[list[dict[str, Any]], int]],
    ) -> tuple[list[dict[str, Any]], int]:
        """Rows of a sampled batch, and its redraws; sampled only if they are not kept.

        Args:
            world: the ranks; the first of them reads and writes.
            sample: gives rows and number of redraws, on every rank.

        Raises:
            InputError: the file has been changed since.
            RunError: there is no room for it.
        """
        found, *_ = world.from_all_ranks(
            lambda: self._kept_rollouts(split) if world.is_main else None
        )
        if found is not None:
            self.used.append(f"sample {split}")
            return found
        rows, redraws = sample()
        if world.is_main:
            path = self._rollouts(split)
            path.parent.mkdir(exist_ok=True)
            write_jsonl(path, rows)
            note = {"run": self.run, "content": _content(path), "redraws": redraws}
            with written_whole(path.with_suffix(".json")) as stream:
                stream.write(json.dumps(note).encode())
        return rows, redraws

    def _kept_rollouts(self, split: str) -> tuple[list[dict[str, Any]], int] | None:
        """What an earlier start sampled, and its redraws; None for nothing."""
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

    def _path(self, name: str, rank: int, count: int) -> Path:
        return self.folder / f"{name}.{rank}-of-{count}.{self.run}"


def _file_name(name: str) -> str:
    """A pass's name as part of a file's."""
    return _NOT_IN_FILE_NAMES.sub("-", name)


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
            f"{path}: expected what a finished pass left, found a damaged file "
            f"({error}); delete the file, and its pass is done again"
        ) from error


def _read(path: Path, *parts: str) -> tuple[PassResult, Tensor]:
    """What a rank left of a pass (or parts of it), and the places of its sequences in the batch."""
    opened = _opened(path)
    named: dict[str, Named] = {}
    for key in opened.keys():  # noqa: SIM118
        part, _, name = key.partition(".")
        if name and part != "vectors" and (not parts or part in parts):
            # A copy lies in memory as a new tensor does, not as it does in the file:
            # matrix products, too, depend on that in the last bit.
            named.setdefault(part, {})[name] = opened.get_tensor(key).clone()
    return PassResult(**named), opened.get_tensor("positions")


def _divided_anew(
    results: Iterable[tuple[PassResult, Tensor]], shard: Shard, rank: int
) -> PassResult:
    """This rank's part of what all ranks of an earlier start left of a pass."""
    mine = PassResult()
    of_tokens: dict[str, list[tuple[Tensor, Tensor]]] = {}
    of_sequences: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for result, positions in results:
        mine.shared.update(result.shared)
        here = torch.isin(positions, shard.positions).nonzero().squeeze(1)
        places = torch.searchsorted(shard.positions, positions[here])
        theirs = Ragged(shard.batch.lengths[positions])
        common = Ragged(shard.batch.lengths[positions[here]])
        sources = common.spread(theirs.starts[here]) + common.position
        targets = common.spread(shard.ragged.starts[places]) + common.position
        for name, values in result.tokens.items():
            within = sources < len(values)
            piece = targets[within], values[sources[within]]
            of_tokens.setdefault(name, []).append(piece)
        for name, values in result.sequences.items():
            of_sequences.setdefault(name, []).append((places, values[here]))
        for name, values in result.sums.items():
            # All of it on one rank: the sum over ranks is what it was.
            before = mine.sums.get(name, torch.zeros_like(values))
            mine.sums[name] = before + values if rank == 0 else before
    for pieces_of, arrays in (
        (of_tokens, mine.tokens),
        (of_sequences, mine.sequences),
    ):
        for name, pieces in pieces_of.items():
            size = sum(len(places) for places, _ in pieces)
            arrays[name] = pieces[0][1].new_zeros(size, *pieces[0][1].shape[1:])
            for places, values in pieces:
                arrays[name][places] = values
    return mine


def open_unfinished(
    folder: Path,
    world: World,
    make_identity: Callable[[], dict[str, Any]],
    layers: WholeLayers,
) -> Unfinished:
    """Go on with the run in a folder, or begin one there if there is none.

    Args:
        folder: where its records are, or will be.
        make_identity: what the run depends on; called on rank 0.
        layers: the model's.

    Raises:
        InputError: the run there depends on something else, or is damaged.
    """
    found, *_ = world.from_all_ranks(
        lambda: _go_on_or_begin(folder, make_identity()) if world.is_main else None
    )
    assert found is not None
    run, finished = found
    folder.mkdir(parents=True, exist_ok=True)
    # A rank on another machine may not see the same folder.
    for seen in world.gather_objects(finished_passes(folder, run)):
        finished = dict(finished.items() & seen.items())
    return Unfinished(
        folder=folder,
        rank=world.rank,
        world_size=world.world_size,
        run=run,
        layers=layers,
        finished=finished,
    )


def _go_on_or_begin(
    folder: Path, identity: dict[str, Any]
) -> tuple[str, dict[str, int]]:
    """Name of the run, and its finished passes."""
    try:
        earlier = _begun(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / RUN_FILE}: expected what the unfinished run depends on, found a "
            f"damaged file ({error}); give --overwrite to begin anew"
        ) from error
    # As a file gives it back.
    identity = json.loads(json.dumps(identity))
    if earlier is None:
        return _begin(folder, identity), {}
    run, before = earlier
    differing = differences(before, identity)
    if differing:
        raise InputError(
            f"{folder}: the unfinished run there is of another configuration, "
            f"checkpoint or batch: {'; '.join(differing)}; start it as it was, or give "
            "--overwrite to begin anew"
        )
    return run, finished_passes(folder, run)


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


def finished_passes(folder: Path, run: str) -> dict[str, int]:
    """Passes of which the files of all ranks are there, and the number of ranks."""
    seen: dict[tuple[str, int], set[int]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FILE.fullmatch(path.name)
        if match is not None and match["run"] == run:
            key = (match["name"], int(match["ranks"]))
            seen.setdefault(key, set()).add(int(match["rank"]))
    complete = {key for key, ranks in seen.items() if len(ranks) == key[1]}
    return dict(sorted(complete))


_LEFT_OUT = (
    # What stands there by its content.
    "checkpoint",
    "batches.E.file",
    "batches.U.file",
    "update.delta",
    # Whose values stand there, whoever gave them.
    "update.from_checkpoint",
    # A point depends on its own eta: a grid may be extended.
    "sweep",
    # What is written and shown.
    "out",
    "update.save_delta",
    "attribution.top",
    "compute.count_operations",
    # What a number is held against when all are there.
    "truth.ess_warn",
    "truth.ess_abort",
    "truth.ess_least",
    "truth.resolve",
    # How the work is cut, where it is done, and how long ranks wait for each other.
    "compute.device",
    "compute.tokens_per_microbatch",
    "compute.snapshot_device",
    "compute.rank_timeout_seconds",
    "compute.shard",
    "compute.shard_group",
    "batches.E.sample.sequences_per_call",
    "batches.U.sample.sequences_per_call",
)
_HASH_DIGITS = 16


def identity_of_configuration(config: Config, command: str) -> dict[str, Any]:
    """What the command line and the configuration say."""
    identity: dict[str, Any] = {"command": command, "entropy_ddp": _own_version()}
    identity["torch"] = torch.__version__
    return identity | _flat(config.model_dump(mode="json"), "")


def _own_version() -> str:
    """The version and a hash of the code, which in a clone changes without it."""
    digest = hashlib.sha256()
    folder = Path(entropy_ddp.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"{entropy_ddp.__version__} (code {digest.hexdigest()[:_HASH_DIGITS]})"


def _flat(section: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A nested mapping as one with dotted keys, without what is left out."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if name in _LEFT_OUT:
            continue
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def identity_of_checkpoint(
    policy: Policy,
    optimizer: torch.optim.Optimizer | None,
    change: torch.Tensor | None,
    layers: WholeLayers | None = None,
) -> dict[str, Any]:
    """Content of the trained and frozen weights, and of what the step is made of.

    Args:
        layers: gathers those of which this rank has a part; None: it has them whole.
    """
    layers = layers or WholeLayers()
    identity = {
        "device": policy.device.type,
        "trained weights": fingerprint(
            (name, layers.whole(name, p)) for name, p in policy.parameters.items()
        )[:_HASH_DIGITS],
        "other weights": frozen_fingerprint(policy.model, layers.gathered)[
            :_HASH_DIGITS
        ],
    }
    if optimizer is not None:
        state = fingerprint(_whole_state(policy, optimizer, layers))
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        identity["optimizer state"] = state[:_HASH_DIGITS]
        identity["optimizer settings"] = repr(groups)
    if change is not None:
        identity["update.delta"] = fingerprint([("", change)])[:_HASH_DIGITS]
    return identity


def _whole_state(
    policy: Policy, optimizer: torch.optim.Optimizer, layers: WholeLayers
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizer state, whole, one at a time."""
    names = {id(parameter): name for name, parameter in policy.parameters.items()}
    owners = [
        (names[id(parameter)], parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _ in optimizer.state[parameter]
    ]
    for (label, tensor), (name, parameter) in zip(
        optimizer_tensors(optimizer), owners, strict=True
    ):
        is_part = tensor.shape == parameter.shape and tensor.dim() > 0
        yield label, layers.whole(name, tensor) if is_part else tensor


def identity_of_batch(batch: Batch) -> str:
    """Content of a batch: everything but the keys that are carried to the output."""
    digest = hashlib.sha256()
    numbers = ("group_key", "reward", "advantage", "finished")
    tokens = ("prompt_digest", "response_digest", "has_logprobs", "logprobs_digest")
    for row in zip(*map(batch.column, (*numbers, *tokens))):
        digest.update(repr(row).encode())
    return digest.hexdigest()[:_HASH_DIGITS]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same: the key, its value before, its value now."""
    absent = "not there"
    return [
        f"{key} was {_shown(before.get(key, absent))}, now "
        f"{_shown(now.get(key, absent))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key, absent) != now.get(key, absent)
    ]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
