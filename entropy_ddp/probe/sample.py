"""Rollouts as a job of their own: E and U sampled from the checkpoint into files."""

import os
from pathlib import Path
from typing import Any

from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.config import Config, require_job
from entropy_ddp.distributed import World
from entropy_ddp.probe.opening import (
    keep_unfinished,
    open_policy,
    plan_sample,
    sampled_rows,
)
from entropy_ddp.probe.session import Progress
from entropy_ddp.results import UNFINISHED, discard_unfinished


def sampled_files(config: Config, out: Path) -> dict[str, Path]:
    """The files that `run_sample` writes into `out`, by split.

    Raises:
        InputError: nothing is to be sampled.
    """
    require_job(config, "sample")
    return {split: out / f"{split}.jsonl" for split in config.batches.samples}


def run_sample(
    config: Config, world: World, out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Sample every batch of the configuration that has a `sample` section.

    Writes E.jsonl and U.jsonl into `out`, or what an unfinished run there did not yet.

    Returns:
        For each batch: split, sizes, response length, share truncated,
        mean reward (of each term too, if there are several), groups without signal
        (their rewards are all equal) and number of redraws.

    Raises:
        InputError: nothing is to be sampled, anything that sampling needs is wrong, or
            the unfinished run in `out` depends on something else.
        RunError: a reward or a log-probability is not finite.
    """
    files = sampled_files(config, out)
    session = open_policy(config, world, find_checkpoint(config.checkpoint), progress)
    for split in files:
        plan_sample(session, split)
    keep_unfinished(session, out, "sample")
    rows_of = {s: sampled_rows(session, s) for s in files}
    if world.is_main:
        for path in files.values():
            os.replace(out / UNFINISHED / "rollouts" / path.name, path)
        discard_unfinished(out)
    return [
        {"split": split} | _summary(rows) | {"redraws": session.num_redraws[split]}
        for split, rows in rows_of.items()
    ]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every mean is over all sequences."""
    count = len(rows)
    lengths = [len(row["response_ids"]) for row in rows]
    num_truncated = sum(not row["finished"] for row in rows)
    return {
        "num_groups": len({row["group"] for row in rows}),
        "num_sequences": count,
        "num_tokens": sum(lengths),
        "mean_response_length": sum(lengths) / count,
        "longest_response": max(lengths),
        "truncated_share": num_truncated / count,
    } | _reward_summary(rows)


def _reward_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Nothing for rollouts without rewards."""
    if "reward" not in rows[0]:
        return {}
    count = len(rows)
    rewards_of: dict[int, list[float]] = {}
    for row in rows:
        rewards_of.setdefault(row["group"], []).append(row["reward"])
    summary: dict[str, Any] = {
        "mean_reward": sum(row["reward"] for row in rows) / count
    }
    for label in rows[0].get("reward_terms", {}):
        total = sum(row["reward_terms"][label] for row in rows)
        summary[f"mean_reward_{label}"] = total / count
    if len(rows) > len(rewards_of):
        summary["groups_without_signal"] = sum(
            len(set(rewards)) == 1 for rewards in rewards_of.values()
        )
    return summary
