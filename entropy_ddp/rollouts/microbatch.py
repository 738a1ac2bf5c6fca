"""How a rank's sequences are cut into microbatches for the model.

Sequences of similar length share a microbatch, filled up to a budget of padded tokens
(rows times the longest row). Rows are prompt + response, padded on the right only: under
a causal model nothing to the right of a token can change it, so no attention mask is
needed and padding changes no result.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_ddp.rollouts.batch import Shard


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Rows for one forward pass, and where their response tokens are.

    B rows of length L hold m response tokens in all.

    Attributes:
        input_ids: prompt + response without the last token (nothing is predicted from
            it), right-padded, int64, [B, L].
        row: row of the hidden state that predicts each response token, int64, [m].
        column: column of that hidden state, int64, [m].
        target_ids: the response token it predicts, int64, [m].
        token: place of the token in the shard's flat token arrays, int64, [m].
        sequences: places of the rows in the shard, int64, [B].
    """

    input_ids: Tensor
    row: Tensor
    column: Tensor
    target_ids: Tensor
    token: Tensor
    sequences: Tensor

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with what the model reads on this device.

        Places in the shard's arrays stay on the CPU, where those arrays are.
        """
        names = ("input_ids", "row", "column", "target_ids")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def make_microbatches(shard: Shard, tokens_per_microbatch: int) -> Iterator[Microbatch]:
    """Cut a shard into microbatches of at most `tokens_per_microbatch` padded tokens.

    A sequence longer than the budget gets a microbatch of its own. Sequences without
    response tokens need no forward pass and are in none.
    """
    lengths = torch.tensor(
        [len(s.prompt_ids) + s.num_tokens - 1 for s in shard.sequences],
        dtype=torch.int64,
    )
    waiting: list[int] = []
    for position in lengths.argsort(descending=True, stable=True).tolist():
        if shard.sequences[position].num_tokens == 0:
            continue
        if waiting:
            padded = (len(waiting) + 1) * int(lengths[waiting[0]])
            if padded > tokens_per_microbatch:
                yield _make_microbatch(shard, waiting)
                waiting = []
        waiting.append(position)
    if waiting:
        yield _make_microbatch(shard, waiting)


def _make_microbatch(shard: Shard, positions: list[int]) -> Microbatch:
    sequences = [shard.sequences[position] for position in positions]
    rows = [torch.cat([s.prompt_ids, s.response_ids[:-1]]) for s in sequences]
    counts = [s.num_tokens for s in sequences]
    starts = shard.ragged.starts[positions].tolist()
    # The pad value is never read by a response token; 0 exists in every vocabulary.
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Microbatch(
        input_ids=input_ids,
        row=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)),
        column=torch.cat(
            [
                torch.arange(len(s.prompt_ids) - 1, len(s.prompt_ids) - 1 + count)
                for s, count in zip(sequences, counts)
            ]
        ),
        target_ids=torch.cat([s.response_ids for s in sequences]),
        token=torch.cat(
            [torch.arange(s, s + count) for s, count in zip(starts, counts)]
        ),
        sequences=torch.tensor(positions),
    )
