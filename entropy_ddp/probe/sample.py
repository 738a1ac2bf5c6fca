"""Rollouts as a job of their own: E and U sampled from the checkpoint into files."""

from pathlib import Path
from typing import Any

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.policy.checkpoint import find_checkpoint
from entropy_ddp.probe.session import Progress, open_policy, sample_batch
from entropy_ddp.results import prepare_folder
from entropy_ddp.rollouts.files import write_jsonl


def run_sample(
    config: Config, world: World, out: Path, overwrite: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Sample every batch of the configuration that has a `sample` section.

    Writes E.jsonl and U.jsonl into `out`.

    Returns:
        For each batch: split, sizes, response length, share truncated,
        mean reward (of each term too, if there are several), groups without signal
        (their rewards are all equal) and number of redraws.

    Raises:
        InputError: nothing is to be sampled, or a file exists and may not be replaced.
        RunError: a reward or a log-probability is not finite.
    """
    given = config.batches.sources
    sources = {split: s for split, s in given.items() if s.sample is not None}
    if not sources:
        raise InputError(
            "batches: neither E nor U has a `sample` section; there is nothing to sample"
        )
    files = {split: out / f"{split}.jsonl" for split in sources}
    for path in files.values():
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists; give --overwrite or another --out")
    if world.is_main:
        prepare_folder(out, overwrite=True)
    session = open_policy(config, world, find_checkpoint(config.checkpoint), progress)
    rows_of = {s: sample_batch(session, s, source) for s, source in sources.items()}
    if world.is_main:
        for split, rows in rows_of.items():
            write_jsonl(files[split], rows)
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
