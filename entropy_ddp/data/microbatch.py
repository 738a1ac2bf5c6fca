"""How a rank's sequences are cut into microbatches for the model.

Rows of similar length share a microbatch, filled up to a number of padded tokens (rows
times the longest row) that is at most the budget: on a CPU fewer are faster. They are
padded on the right only: under a causal model nothing to the right of a token can
change it, so that padding changes no result.

A *flat* row is one prompt + response; it needs no attention mask. A *tree* row is one
prompt with several responses to it, its branches, behind one another: each branch sees
the prompt and itself, and positions count from the end of the prompt in every branch.
The prompt is then computed once, but attention is over the square of the whole row. A
cost model chooses (`PromptSharing`).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_ddp.data.batch import Ragged, Shard

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
        # [B, L, 1] asks, [B, 1, L] is asked for: all see the prompt (0) and their own.
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
    shard: Shard,
    tokens_per_microbatch: int,
    sharing: PromptSharing | None = None,
    places: Collection[int] | None = None,
    fill: int | None = None,
) -> list[list[Row]]:
    """Rows of a shard, in microbatches of at most `tokens_per_microbatch` padded tokens.

    A sequence longer than the budget gets a microbatch of its own. Sequences without
    response tokens need no forward pass and are in none. Tree rows and flat rows do not
    share a microbatch.

    Args:
        sharing: when prompts are shared; None for flat rows only.
        places: of which of the shard's sequences; None for all.
        fill: number of padded tokens beyond which no row joins others, if that is less
            than the budget; a single row, also one of many responses, may have more.
    """
    full_at = min(tokens_per_microbatch, fill or tokens_per_microbatch)
    flat = _flat_rows(shard, range(len(shard.positions)) if places is None else places)
    rows = _make_rows(shard, flat, tokens_per_microbatch, sharing)
    microbatches: list[list[Row]] = []
    for kind in (True, False):
        waiting: list[Row] = []
        same_kind = (row for row in rows if row.is_tree is kind)
        for row in sorted(same_kind, key=lambda row: -row.length):
            if waiting:
                count, longest = len(waiting) + 1, waiting[0].length
                full = count * longest > full_at
                # Trees differ in length by more than flat rows: padding would cost
                # what sharing saves.
                unlike = 2 * row.length < longest or count * longest**2 > MASK_ELEMENTS
                if full or (kind and unlike):
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
        yield make_microbatch(shard, rows)


def _flat_rows(shard: Shard, places: Iterable[int]) -> list[Row]:
    prompts = shard.batch.prompt_lengths[shard.positions].tolist()
    responses = shard.ragged.lengths.tolist()
    return [
        Row(
            sequences=(place,),
            prompt=prompts[place],
            # The last token of a response is predicted, and not read.
            length=prompts[place] + responses[place] - 1,
        )
        for place in places
        if responses[place]
    ]


def _make_rows(
    shard: Shard, flat: list[Row], budget: int, sharing: PromptSharing | None
) -> list[Row]:
    if sharing is None:
        return flat
    prompts = shard.prompt_digests
    by_prompt: dict[bytes, list[Row]] = defaultdict(list)
    for row in flat:
        by_prompt[prompts[row.sequences[0]]].append(row)
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


def make_microbatch(shard: Shard, rows: list[Row]) -> Microbatch:
    """Rows for one forward pass, with the places of their tokens in the shard's arrays.

    All rows at once: a few operations on whole microbatches, none for each row.

    A row is a run of segments: its prompt, then its branches without their last token.
    """
    members = [[shard.sequences[place] for place in row.sequences] for row in rows]
    responses = [sequence.response_ids for group in members for sequence in group]
    pieces: list[Tensor] = []
    lengths: list[int] = []
    branches: list[int] = []
    for group in members:
        pieces += [group[0].prompt_ids, *(s.response_ids[:-1] for s in group)]
        lengths += [len(group[0].prompt_ids), *(s.num_tokens - 1 for s in group)]
        branches += range(len(group) + 1)
    segments = Ragged(torch.tensor(lengths))
    # Of every segment, [segments]: its number in its row, the row, where in the flat
    # values that row begins, and how long the row's prompt is.
    branch = torch.tensor(branches)
    row = (branch == 0).cumsum(0) - 1
    row_start = segments.starts[branch == 0][row]
    prompt = segments.lengths[branch == 0][row]
    is_branch = branch > 0
    # What of a segment holds for each of its positions; then for each of its tokens.
    place = (
        segments.spread(row),
        torch.arange(segments.num_tokens) - segments.spread(row_start),
    )
    # A response's last token is not read, but predicted: one more than its segment.
    tokens = Ragged(segments.lengths[is_branch] + 1)
    # A hidden state predicts the token to its right: the first token of a response is
    # predicted by the prompt's last position, the others by the one before their own.
    before = (prompt - 1)[is_branch]
    own = (segments.starts - row_start)[is_branch] - 1
    first = tokens.position == 0
    padded = {"input_ids": (torch.cat(pieces), 0)}
    if any(row.is_tree for row in rows):
        position = segments.position + segments.spread(prompt * is_branch)
        padded |= {"branch": (segments.spread(branch), -1), "position": (position, 0)}
    shape = (len(rows), max(row.length for row in rows))
    starts = shard.ragged.starts[[place for row in rows for place in row.sequences]]
    return Microbatch(
        **{name: _pad(*values, place, shape) for name, values in padded.items()},
        row=tokens.spread(row[is_branch]),
        column=torch.where(
            first, tokens.spread(before), tokens.spread(own) + tokens.position
        ),
        target_ids=torch.cat(responses),
        token=tokens.spread(starts) + tokens.position,
    )


def _pad(
    values: Tensor, value: int, place: tuple[Tensor, Tensor], shape: tuple[int, int]
) -> Tensor:
    """Flat values at their rows and columns, int64, [B, L]."""
    # The pad value is never read by a response token; 0 exists in every vocabulary.
    padded = torch.full(shape, value, dtype=torch.int64)
    padded[place] = values.long()
    return padded
