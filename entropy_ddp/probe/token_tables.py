"""What is shown of the tokens of U and their shares: all, the largest, sums by kind."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from entropy_ddp.estimators.shares import (
    TokenTable,
    covariance_score,
    probability_deciles,
    share_by,
)
from entropy_ddp.probe.session import Session

# Tokens shown on either side of a token in its context.
CONTEXT_TOKENS = 16


def summaries(session: Session, table: TokenTable) -> dict[str, list[Any]]:
    """Shares by sign of advantage, probability, position, reward and pass rate."""
    batch, share = session.batches["U"], table.share
    sign = (table.advantage.sign() + 1).long()
    decile = probability_deciles(table.logp)
    edges = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    place = torch.bucketize(table.position + 1, edges, right=True) - 1
    positions = [
        f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        for low, high in pairwise(edges.tolist())
    ]
    found = {
        "advantage": share_by(["A < 0", "A = 0", "A > 0"], sign, share),
        "probability decile": share_by(
            [f"{10 * d}-{10 * d + 10} %" for d in range(10)], decile, share
        ),
        "position": share_by([*positions, f"{edges[-1]} on"], place, share),
    }
    rewards = [s.reward for s in batch.sequences]
    if all(reward is not None for reward in rewards):
        best = torch.tensor(rewards, dtype=torch.float64)
        passed = (best >= best.max()).double()
        rate = torch.zeros(batch.num_groups, dtype=torch.float64)
        rate.index_add_(0, batch.groups, passed)
        rate /= batch.group_sizes
        quarter = (rate * 4).long().clamp(max=3)[batch.groups]
        ragged = batch.ragged
        found["largest reward"] = share_by(
            ["not reached", "reached"], ragged.spread(passed.long()), share
        )
        found["pass rate of the group"] = share_by(
            ["0-25 %", "25-50 %", "50-75 %", "75-100 %"], ragged.spread(quarter), share
        )
    return found


def token_rows(session: Session, table: TokenTable) -> Iterator[dict[str, Any]]:
    """The rows of tokens.jsonl.gz, one by one: every token of U, k counted from 1."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    covariance = covariance_score(table.logp, table.advantage)
    columns = {
        "logp": table.logp,
        "entropy": table.entropy,
        "advantage": table.advantage,
        "covariance": covariance,
        "share": table.share,
    }
    for sequence, start in zip(batch.sequences, batch.ragged.starts.tolist()):
        here = slice(start, start + sequence.num_tokens)
        values = zip(*(column[here].tolist() for column in columns.values()))
        ids = sequence.response_ids.tolist()
        for k, (token_id, numbers) in enumerate(zip(ids, values), start=1):
            row = {"index": sequence.index, "k": k, "token_id": token_id}
            if tokenizer is not None:
                row["text"] = tokenizer.decode([token_id])
            yield row | dict(zip(columns, numbers))


def top_tokens(session: Session, table: TokenTable) -> list[dict[str, Any]]:
    """The tokens with the largest shares by absolute value, in their context."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    count = min(session.config.attribution.top, len(table.share))
    rows = []
    for place in table.share.abs().topk(count).indices.tolist():
        sequence = batch.sequences[int(table.sequence[place])]
        position = int(table.position[place])
        row: dict[str, Any] = {
            "index": sequence.index,
            "k": position + 1,
            "share": float(table.share[place]),
            "logp": float(table.logp[place]),
            "entropy": float(table.entropy[place]),
            "advantage": float(table.advantage[place]),
        }
        if tokenizer is not None:
            ids = sequence.response_ids.tolist()
            before = [*sequence.prompt_ids.tolist(), *ids[:position]][-CONTEXT_TOKENS:]
            after = ids[position + 1 : position + 1 + CONTEXT_TOKENS]
            pieces = (before, [ids[position]], after)
            row["context"] = [tokenizer.decode(piece) for piece in pieces]
        rows.append(row)
    return rows
