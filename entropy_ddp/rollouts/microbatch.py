"""How a rank's sequences are cut into microbatches for the model.

Rows of similar length share a microbatch, filled up to a budget of padded tokens (rows
times the longest row). They are padded on the right only: under a causal model nothing
to the right of a token can change it, so that padding changes no result.

A *flat* row is one prompt + response; it needs no attention mask. A *tree* row is one
prompt with several responses to it, its branches, behind one another: each branch sees
the prompt and itself, and positions count from the end of the prompt in every branch.
The prompt is then computed once, but attention is over the square of the whole row. A
cost model chooses (`PromptSharing`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from entropy_ddp.rollouts.batch import Shard

# Elements of one microbatch's attention mask.
MASK_ELEMENTS = 1 << 24
# A tree is chosen where it is estimated to cost less than this part of flat rows.
WORTHWHILE = 0.95


@dataclass(frozen=True)
class PromptSharing:
    """When responses to the same prompt share a row.

    Attributes:
        pair_cost: cost of attention from one token to another, as a part of the cost of
            everything else that the model does for one token.
        longest_path: prompt + response for which attention is certain to reach all
            earlier tokens (a sliding window's size); None if there is no limit.
    """

    pair_cost: float
    longest_path: int | None = None

    def flat_cost(self, length: int) -> float:
        """Cost of a flat row; causal attention computes half of the square."""
        return length + self.pair_cost * length**2 / 2

    def tree_cost(self, length: int) -> float:
        """Cost of a tree row; a masked square is computed whole."""
        return length + self.pair_cost * length**2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row to be: a prompt and the responses behind it.

    Attributes:
        sequences: places of its sequences in the shard.
        prompt: length of the prompt.
        length: length of the row; nothing is predicted from a response's last token,
            which is left out.
    """

    sequences: tuple[int, ...]
    prompt: int
    length: int

    @property
    def is_tree(self) -> bool:
        """Whether several responses share the prompt."""
        return len(self.sequences) > 1


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Rows for one forward pass, and where their response tokens are.

    B rows of length L hold m response tokens in all.

    Attributes:
        input_ids: right-padded, int64, [B, L].
        row: row of the hidden state that predicts each response token, int64, [m].
        column: column of that hidden state, int64, [m].
        target_ids: the response token it predicts, int64, [m].
        token: place of the token in the shard's flat token arrays, int64, [m].
        branch: of tree rows, the number of each position's branch from 1; 0 in the
            prompt, -1 in the padding; int64, [B, L]. None: flat rows.
        position: of tree rows, positions along each branch, int64, [B, L].
    """

    input_ids: Tensor
    row: Tensor
    column: Tensor
    target_ids: Tensor
    token: Tensor
    branch: Tensor | None = None
    position: Tensor | None = None

    @property
    def sees(self) -> Tensor | None:
        """Which positions (last) each position attends to, bool, [B, 1, L, L]."""
        if self.branch is None:
            return None
        length = self.branch.shape[1]
        column = torch.arange(length, device=self.branch.device)
        own, other = self.branch[:, :, None], self.branch[:, None, :]
        seen = (other == 0) | (own == other)
        return (seen & (column[:, None] >= column))[:, None]

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with what the model reads on this device.

        Places in the shard's arrays stay on the CPU, where those arrays are.
        """
        names = ("input_ids", "row", "column", "target_ids", "branch", "position")
        tensors = {name: getattr(self, name) for name in names}
        return replace(
            self, **{n: t.to(device) for n, t in tensors.items() if t is not None}
        )


def plan_microbatches(
    shard: Shard, tokens_per_microbatch: int, sharing: PromptSharing | None = None
) -> list[list[Row]]:
    """Rows of a shard, in microbatches of at most `tokens_per_microbatch` padded tokens.

    A sequence longer than the budget gets a microbatch of its own. Sequences without
    response tokens need no forward pass and are in none. Tree rows and flat rows do not
    share a microbatch.

    Args:
        shard: the sequences.
        tokens_per_microbatch: the budget.
        sharing: when prompts are shared; None for flat rows only.
    """
    rows = _make_rows(shard, tokens_per_microbatch, sharing)
    microbatches: list[list[Row]] = []
    for kind in (True, False):
        waiting: list[Row] = []
        same_kind = (row for row in rows if row.is_tree is kind)
        for row in sorted(same_kind, key=lambda row: -row.length):
            if waiting:
                count, longest = len(waiting) + 1, waiting[0].length
                full = count * longest > tokens_per_microbatch
                if full or (kind and count * longest**2 > MASK_ELEMENTS):
                    microbatches.append(waiting)
                    waiting = []
            waiting.append(row)
        if waiting:
            microbatches.append(waiting)
    return microbatches


def make_microbatches(
    shard: Shard, tokens_per_microbatch: int, sharing: PromptSharing | None = None
) -> Iterator[Microbatch]:
    """The microbatches of `plan_microbatches`, one after another."""
    for rows in plan_microbatches(shard, tokens_per_microbatch, sharing):
        yield _build(shard, rows)


def _make_rows(shard: Shard, budget: int, sharing: PromptSharing | None) -> list[Row]:
    sequences = shard.sequences
    flat = [
        Row(
            sequences=(place,),
            prompt=len(sequence.prompt_ids),
            length=len(sequence.prompt_ids) + sequence.num_tokens - 1,
        )
        for place, sequence in enumerate(sequences)
        if sequence.num_tokens
    ]
    if sharing is None:
        return flat
    by_prompt: dict[bytes, list[Row]] = defaultdict(list)
    for row in flat:
        prompt = sequences[row.sequences[0]].prompt_ids
        by_prompt[prompt.numpy().tobytes()].append(row)
    return [
        row for rows in by_prompt.values() for row in _shared(rows, budget, sharing)
    ]


def _shared(rows: list[Row], budget: int, sharing: PromptSharing) -> Iterable[Row]:
    """Flat rows of one prompt as they are, or laid into trees if that is cheaper."""
    longest = max(row.length for row in rows)
    limit = sharing.longest_path
    if len(rows) == 1 or (limit is not None and longest > limit):
        return rows
    trees: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.length):
        tree = trees[-1] if trees else None
        if tree is not None:
            joined = Row(
                sequences=tree.sequences + row.sequences,
                prompt=row.prompt,
                length=tree.length + row.length - row.prompt,
            )
            growth = sharing.tree_cost(joined.length) - sharing.tree_cost(tree.length)
            fits = joined.length <= budget and joined.length**2 <= MASK_ELEMENTS
            if fits and growth <= sharing.tree_cost(row.length):
                trees[-1] = joined
                continue
        trees.append(row)
    flat_cost = sum(sharing.flat_cost(row.length) for row in rows)
    cost = sum(
        (sharing.tree_cost if tree.is_tree else sharing.flat_cost)(tree.length)
        for tree in trees
    )
    return trees if cost < WORTHWHILE * flat_cost else rows


def _build(shard: Shard, rows: list[Row]) -> Microbatch:
    built = [_build_row(shard, row) for row in rows]
    counts = torch.tensor([len(row["target_ids"]) for row in built])
    joined = {
        name: torch.cat([row[name] for row in built])
        for name in ("column", "target_ids", "token")
    }
    joined["row"] = torch.repeat_interleave(torch.arange(len(rows)), counts)
    # The pad value is never read by a response token; 0 exists in every vocabulary.
    padded = {"input_ids": 0}
    if any(row.is_tree for row in rows):
        padded |= {"branch": -1, "position": 0}
    for name, value in padded.items():
        joined[name] = torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in built], batch_first=True, padding_value=value
        )
    return Microbatch(**joined)


def _build_row(shard: Shard, row: Row) -> dict[str, Tensor]:
    """One row's ids, branches and positions [L], and its tokens' places [m]."""
    sequences = [shard.sequences[place] for place in row.sequences]
    lengths = [row.prompt, *(sequence.num_tokens - 1 for sequence in sequences)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = shard.ragged.starts
    return {
        "input_ids": torch.cat(
            [sequences[0].prompt_ids, *(s.response_ids[:-1] for s in sequences)]
        ),
        "branch": torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths)
        ),
        "position": torch.cat(
            [
                torch.arange(row.prompt),
                *(torch.arange(row.prompt, row.prompt + n) for n in lengths[1:]),
            ]
        ),
        "column": torch.cat(
            [_columns(row.prompt, begin, end) for begin, end in pairwise(ends)]
        ),
        "target_ids": torch.cat([s.response_ids for s in sequences]),
        "token": torch.cat(
            [
                int(starts[place]) + torch.arange(sequence.num_tokens)
                for place, sequence in zip(row.sequences, sequences)
            ]
        ),
    }


def _columns(prompt: int, begin: int, end: int) -> Tensor:
    """Where a branch in columns [begin, end) is predicted from: the prompt, then itself."""
    return torch.cat([torch.tensor([prompt - 1]), torch.arange(begin, end)])
