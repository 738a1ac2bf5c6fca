"""What a batch of rollouts is, and which part of it one rank holds.

A batch is a list of sequences in file order. Per-token quantities live in *flat token
arrays* of one dimension: the response tokens of sequence 0, then those of sequence 1,
and so on, without padding. `Ragged` says where each sequence begins.

Shape legend: N sequences, T = sum of the response lengths T_i, n and t the same for one
rank's share.
"""

import hashlib
import heapq
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

# Elements of the padded block in which running sums are taken, or of an index.
DENSE_ELEMENTS = 1 << 22
# Response tokens of one block of a shard: what is made for every token of a block is
# reduced before the next block is begun.
BLOCK_TOKENS = 100_000
# Of a digest; two of a million others are equal with a probability of 1e-27.
DIGEST_BYTES = 16
# The columns in which two rows with the same prompt and response are equal.
RESPONSE = ("prompt_digest", "response_digest")


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One prompt with one sampled response.

    Attributes:
        index: 0-based line of the batch file.
        group: number of the group, counted in order of first appearance in the file.
        group_key: the value of the file's `group` key.
        prompt_ids: token ids of the prompt, int64, [P] with P >= 1.
        response_ids: token ids of the response, int64, [T_i]; T_i = 0 is legal.
        reward: the reward, or None if the file has none.
        advantage: the advantage, given or computed from rewards; None in a batch that
            needs none.
        sampling_logprobs: the sampler's log-probabilities, float64, [T_i], in nats.
        finished: whether the end-of-sequence token ended it; None if not recorded.
        ids_from_text: of a response that was tokenised from text, what may make its ids
            others than were sampled (`rows.DOUBTS`, `rows.END_RESTORED`); else None.
        num_prompts_total: size of the set that the batch's prompts were drawn from;
            None if not recorded. The same of all sequences of a batch, as the next.
        with_replacement: whether a prompt could be drawn twice; None if not recorded.
        extra: the row's remaining keys, carried to the per-sequence output.
    """

    index: int
    group: int
    group_key: int | str
    prompt_ids: Tensor
    response_ids: Tensor
    reward: float | None = None
    advantage: float | None = None
    sampling_logprobs: Tensor | None = None
    finished: bool | None = None
    ids_from_text: tuple[str, ...] | None = None
    num_prompts_total: int | None = None
    with_replacement: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Response length T_i, the end-of-sequence token included."""
        return len(self.response_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt length P."""
        return len(self.prompt_ids)

    @property
    def last_id(self) -> int:
        """The response's last token id; -1 if it has none."""
        return int(self.response_ids[-1]) if len(self.response_ids) else -1

    @property
    def has_logprobs(self) -> bool:
        """Whether the sampler's log-probabilities are there."""
        return self.sampling_logprobs is not None

    @property
    def prompt_digest(self) -> bytes:
        """Stands for the prompt's token ids."""
        return _digest(self.prompt_ids)

    @property
    def named_prompt_digest(self) -> bytes:
        """Stands for the prompt's token ids and its place in the source, if it is known.

        Rows of a source with equal text are two prompts: what was sampled says by
        `prompt_index` which one it is.
        """
        name = repr(self.extra.get("prompt_index")).encode()
        return _digest(self.prompt_ids, name)

    @property
    def response_digest(self) -> bytes:
        """Stands for the response's token ids."""
        return _digest(self.response_ids)

    @property
    def logprobs_digest(self) -> bytes:
        """Stands for the sampler's log-probabilities, and for there being none."""
        if self.sampling_logprobs is None:
            return bytes(DIGEST_BYTES)
        return _digest(self.sampling_logprobs)


def _digest(values: Tensor, name: bytes = b"") -> bytes:
    digest = hashlib.blake2b(name, digest_size=DIGEST_BYTES)
    digest.update(values.contiguous().numpy())
    return digest.digest()


class Rows(Protocol):
    """The sequences of a batch as a table: its columns, and parts of it."""

    def column(self, name: str) -> list[Any]:
        """One attribute of every sequence."""

    def chosen(self, places: Tensor) -> AbstractSequence[Sequence]:
        """Some of the sequences, in the order of the places."""

    def with_groups(self, groups: Tensor) -> AbstractSequence[Sequence]:
        """The same sequences in groups of other numbers, [n]."""

    def with_advantages(self, advantages: Tensor) -> AbstractSequence[Sequence]:
        """The same sequences with these advantages [n]."""


@dataclass(frozen=True)
class _WholeRows:
    """Sequences that are all held here."""

    sequences: tuple[Sequence, ...]

    def column(self, name: str) -> list[Any]:
        return [getattr(sequence, name) for sequence in self.sequences]

    def chosen(self, places: Tensor) -> tuple[Sequence, ...]:
        return tuple(self.sequences[place] for place in places.tolist())

    def with_groups(self, groups: Tensor) -> tuple[Sequence, ...]:
        pairs = zip(self.sequences, groups.tolist(), strict=True)
        return tuple(replace(sequence, group=group) for sequence, group in pairs)

    def with_advantages(self, advantages: Tensor) -> tuple[Sequence, ...]:
        pairs = zip(self.sequences, advantages.tolist(), strict=True)
        return tuple(replace(s, advantage=advantage) for s, advantage in pairs)


@dataclass(frozen=True)
class Ragged:
    """Where each sequence lies in a flat token array.

    Attributes:
        lengths: response lengths, int64, [n].
    """

    lengths: Tensor

    @cached_property
    def starts(self) -> Tensor:
        """First flat position of each sequence, [n]."""
        return self.ends - self.lengths

    @cached_property
    def ends(self) -> Tensor:
        """One past the last flat position of each sequence, [n]."""
        return self.lengths.cumsum(0)

    # Not cached: an index for every token would outlive its use.
    @property
    def sequence_of_token(self) -> Tensor:
        """Sequence of each token, [t]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    @property
    def position(self) -> Tensor:
        """0-based position k - 1 of each token in its response, [t]."""
        first = torch.repeat_interleave(self.starts, self.lengths)
        return torch.arange(self.num_tokens).sub_(first)

    @cached_property
    def num_tokens(self) -> int:
        """Total number of tokens t."""
        return int(self.lengths.sum())

    def sequence_at(self, token: Tensor) -> Tensor:
        """Sequence of each of these flat places, [m]; needs no array of all tokens."""
        return torch.searchsorted(self.ends, token, right=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a flat token array [t] within each sequence, [n].

        Token by token in their order, with an index of some of them at a time.
        """
        total = values.new_zeros(len(self.lengths))
        for first in range(0, self.num_tokens, DENSE_ELEMENTS):
            here = values[first : first + DENSE_ELEMENTS]
            token = torch.arange(first, first + len(here))
            total.index_add_(0, self.sequence_at(token), here)
        return total

    def spread(self, values: Tensor) -> Tensor:
        """Per-sequence values [n] repeated for every token, [t]."""
        return torch.repeat_interleave(values, self.lengths)

    def sum_before(self, values: Tensor) -> Tensor:
        """Sum over the earlier tokens j < k of the same sequence, [t].

        One cumulative sum per sequence, never one over the whole batch: the rounding
        of one sequence does not depend on which others share its rank.
        """
        before = torch.zeros_like(values)
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        rows = max(1, DENSE_ELEMENTS // max(longest, 1))
        for first in range(0, len(self.lengths), rows):
            part = Ragged(self.lengths[first : first + rows])
            begin = int(self.starts[first])
            block = slice(begin, begin + part.num_tokens)
            row, column = part.sequence_of_token, part.position
            # [rows, longest + 1]: token k one column late, so that the running sum up to
            # and including column k is that of the tokens before it.
            dense = values.new_zeros(len(part.lengths), longest + 1)
            dense[row, column + 1] = values[block]
            before[block] = dense.cumsum(1)[row, column]
        return before

    def sum_after(self, values: Tensor) -> Tensor:
        """Sum over the later tokens j > k of the same sequence, [t]."""
        # A token's mirror image in its sequence: start + end - 1 - place, which is its
        # own inverse.
        reversed_within = torch.repeat_interleave(
            2 * self.starts + self.lengths - 1, self.lengths
        ) - torch.arange(self.num_tokens)
        return self.sum_before(values[reversed_within])[reversed_within]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A whole batch file, in file order, the same on every rank but for tokens.

    Attributes:
        split: "E" or "U".
        sequences: the sequences in file order, N of them. Of E read by several ranks a
            rank holds the tokens of its own (`shared_rows`).
    """

    split: str
    sequences: AbstractSequence[Sequence]

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def _rows(self) -> Rows:
        rows = self.sequences
        return _WholeRows(rows) if isinstance(rows, tuple) else rows  # type: ignore[return-value]

    def column(self, name: str) -> list[Any]:
        """One attribute of every sequence (of the tokens, their digests), [N]."""
        return self._rows.column(name)

    @property
    def num_prompts_total(self) -> int | None:
        """Size of the set that the prompts were drawn from; None if not recorded."""
        return self.sequences[0].num_prompts_total if self.sequences else None

    @property
    def with_replacement(self) -> bool | None:
        """Whether a prompt could be drawn twice; None if not recorded."""
        return self.sequences[0].with_replacement if self.sequences else None

    @cached_property
    def num_groups(self) -> int:
        """Number of groups (prompt draws)."""
        return len(self.groups.unique())

    @cached_property
    def lengths(self) -> Tensor:
        """Response lengths T_i, int64, [N]."""
        return torch.tensor(self.column("num_tokens"), dtype=torch.int64)

    @cached_property
    def ragged(self) -> Ragged:
        """Layout of flat token arrays of the whole batch."""
        return Ragged(self.lengths)

    @cached_property
    def prompt_lengths(self) -> Tensor:
        """Prompt lengths P, int64, [N]."""
        return torch.tensor(self.column("num_prompt_tokens"), dtype=torch.int64)

    @cached_property
    def groups(self) -> Tensor:
        """Group number of each sequence, int64, [N]."""
        return torch.tensor(self.column("group"), dtype=torch.int64)

    @cached_property
    def group_sizes(self) -> Tensor:
        """Number of responses of each group, int64, [num_groups]."""
        return torch.bincount(self.groups, minlength=self.num_groups)

    @cached_property
    def prompts(self) -> Tensor:
        """Number of each group's prompt, by first appearance, int64, [num_groups].

        Rows of a source with equal text are two prompts
        (`Sequence.named_prompt_digest`).
        """
        names = dict(zip(self.column("group"), self.column("named_prompt_digest")))
        numbers: dict[bytes, int] = {}
        prompt = torch.empty(self.num_groups, dtype=torch.int64)
        for group, name in names.items():
            prompt[group] = numbers.setdefault(name, len(numbers))
        return prompt

    @cached_property
    def group_order(self) -> Tensor:
        """The rank of each group by the hash of its key, int64, [num_groups].

        A number for each group that does not depend on where in the file it stands.
        """
        keys = dict(zip(self.column("group"), self.column("group_key")))
        digests = {
            group: hashlib.sha256(repr(key).encode()).digest()
            for group, key in keys.items()
        }
        place = torch.empty(len(keys), dtype=torch.int64)
        for rank, group in enumerate(sorted(digests, key=digests.__getitem__)):
            place[group] = rank
        return place

    @cached_property
    def num_tokens(self) -> int:
        """Total number of response tokens T."""
        return int(self.lengths.sum())

    @cached_property
    def advantages(self) -> Tensor:
        """Advantage A_i of each sequence, float64, [N]."""
        return torch.tensor(self.column("advantage"), dtype=torch.float64)

    def with_advantages(self, advantages: Tensor) -> "Batch":
        """The same batch with these advantages [N]."""
        return replace(self, sequences=self._rows.with_advantages(advantages))

    def first(self, count: int) -> "Batch":
        """The first `count` sequences in file order; this batch if it has no more."""
        if count >= len(self):
            return self
        return replace(self, sequences=self._rows.chosen(torch.arange(count)))

    def part(self, chosen: Tensor, world_size: int) -> "Batch":
        """Some of the groups, numbered anew, each on the rank that holds it here.

        Args:
            chosen: whether each group is in it, [num_groups].
            world_size: number of ranks.
        """
        number = chosen.cumsum(0) - 1
        places = chosen[self.groups].nonzero().squeeze(1)
        kept = replace(self, sequences=self._rows.chosen(places))
        found = replace(
            kept, sequences=kept._rows.with_groups(number[self.groups[places]])
        )
        found._owners_of[world_size] = self.owners(world_size)[chosen]
        return found

    def shard(self, rank: int, world_size: int) -> "Shard":
        """The groups that one rank holds; whole groups, balanced by tokens.

        Groups are dealt from the longest to the shortest, each to the rank with the
        fewest tokens so far (prompt tokens count too: they cost a forward pass). A
        rank may get none. Made once for each rank.
        """
        if (rank, world_size) not in self._shards:
            owner = self.owners(world_size)[self.groups]
            mine = (owner == rank).nonzero().squeeze(1)
            self._shards[rank, world_size] = Shard(batch=self, positions=mine)
        return self._shards[rank, world_size]

    @cached_property
    def _shards(self) -> dict[tuple[int, int], "Shard"]:
        return {}

    @cached_property
    def _owners_of(self) -> dict[int, Tensor]:
        return {}

    def owners(self, world_size: int) -> Tensor:
        """The rank that holds each group, int64, by group number."""
        if world_size not in self._owners_of:
            count = int(self.groups.max()) + 1 if len(self) else 0
            # [groups]; exact in integers, so that every rank deals alike.
            cost = torch.zeros(count, dtype=torch.int64)
            cost.index_add_(0, self.groups, self.prompt_lengths + self.lengths)
            owner = [0] * count
            loads = [(0, rank) for rank in range(world_size)]
            for group in cost.argsort(descending=True, stable=True).tolist():
                load, target = loads[0]
                owner[group] = target
                heapq.heapreplace(loads, (load + int(cost[group]), target))
            self._owners_of[world_size] = torch.tensor(owner, dtype=torch.int64)
        return self._owners_of[world_size]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share of a batch: the layout of its flat token arrays.

    Attributes:
        batch: the whole batch.
        positions: places of this rank's sequences in `batch.sequences`, ascending, [n].
    """

    batch: Batch
    positions: Tensor

    @cached_property
    def sequences(self) -> list[Sequence]:
        """This rank's sequences, in file order."""
        return list(self._own.sequences)

    @cached_property
    def prompt_digests(self) -> list[bytes]:
        """Stands for each sequence's prompt; known also of another rank's share, [n]."""
        return self._own.column("prompt_digest")

    @property
    def _own(self) -> Batch:
        return replace(self.batch, sequences=self.batch._rows.chosen(self.positions))

    @cached_property
    def ragged(self) -> Ragged:
        """Layout of this rank's flat token arrays."""
        return Ragged(self.batch.lengths[self.positions])

    @cached_property
    def sampling_logprobs(self) -> Tensor:
        """Log-probabilities that the sampler recorded, nats, [t].

        Every sequence must have them (`require_sampling_logprobs`).
        """
        empty = torch.zeros(0, dtype=torch.float64)
        pieces = [s.sampling_logprobs for s in self.sequences]
        return torch.cat([empty, *(p for p in pieces if p is not None)])

    @property
    def groups(self) -> Tensor:
        """Group number of each of this rank's sequences, [n]."""
        return self.batch.groups[self.positions]

    def by_group(self) -> Iterator[tuple[int, "Block"]]:
        """Each of this rank's groups by number, ascending, and its sequences."""
        numbers, places = _places_by_group(self.groups)
        for number, here in zip(numbers, places):
            yield number, self._block(self._part(here), here)

    def divided(self, part_of_group: Tensor, count: int) -> list["Block"]:
        """The shard's groups divided into parts, each of which may be empty.

        Args:
            part_of_group: number of the part, from 0, of every group, [num_groups].
            count: number of parts.
        """
        part = part_of_group[self.groups]
        places = [(part == number).nonzero().squeeze(1) for number in range(count)]
        return [self._block(self._part(here), here) for here in places]

    def blocks(self) -> Iterator["Block"]:
        """The shard cut into blocks of whole groups, in the order of their numbers.

        Each is filled up to `BLOCK_TOKENS` response tokens; a longer group is a block
        of its own. A shard without sequences has no block. Cut once.
        """
        for places, part in self._cut:
            yield self._block(part, places)

    def empty_block(self) -> "Block":
        """A block without sequences."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return self._block(self._part(nothing), nothing)

    @cached_property
    def _cut(self) -> list[tuple[Tensor, "Shard"]]:
        """Places of each block's sequences, ascending, and the block's shard."""
        numbers, places = _places_by_group(self.groups)
        sizes = torch.bincount(self.groups, self.ragged.lengths)[numbers].long()
        cut: list[list[Tensor]] = []
        count = 0
        for here, added in zip(places, sizes.tolist()):
            if not cut or count + added > BLOCK_TOKENS:
                cut.append([])
                count = 0
            cut[-1].append(here)
            count += added
        joined = [torch.cat(block).sort().values for block in cut]
        return [(block, self._part(block)) for block in joined]

    def _part(self, places: Tensor) -> "Shard":
        return Shard(batch=self.batch, positions=self.positions[places])

    def _block(self, part: "Shard", places: Tensor) -> "Block":
        # Not kept: an index for every token would outlive its use.
        starts = part.ragged.spread(self.ragged.starts[places])
        tokens = starts.add_(part.ragged.position)
        return Block(shard=part, sequences=places, tokens=tokens)


def _places_by_group(groups: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """The groups that occur, ascending, and where each does."""
    numbers, sizes = groups.unique(return_counts=True)
    order = groups.argsort(stable=True)
    return numbers.tolist(), order.split(sizes.tolist())


@dataclass(frozen=True, kw_only=True)
class Block:
    """Whole groups of a shard, few enough to hold anything for each of their tokens.

    Attributes:
        shard: the block's sequences, a shard in itself.
        sequences: their places among the whole shard's, ascending, [n].
        tokens: places of the block's tokens in the whole shard's token arrays, [t].
    """

    shard: Shard
    sequences: Tensor
    tokens: Tensor

    @property
    def ragged(self) -> Ragged:
        """Layout of the block's flat token arrays."""
        return self.shard.ragged
