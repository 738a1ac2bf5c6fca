"""What an import says about what it read, and about what may be wrong with it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from entropy_ddp.importers.records import Record
from entropy_ddp.importers.tokenising import Tally

# Folders of the common trainers: checkpoint-N, global_step_N, step_N.
STEP_FOLDER = re.compile(r"(?:checkpoint-|global_step_?|step_)(\d+)")


def summarise(
    rows: list[dict[str, Any]], tally: Tally, max_length: int | None
) -> dict[str, Any]:
    """Counts of what was imported, by name.

    Args:
        rows: rows of the rollout file.
        tally: what was counted while they were made.
        max_length: maximum completion length, tokens.
    """
    sizes = Counter(row["group"] for row in rows)
    lengths = [len(row["response_ids"]) for row in rows]
    rewards = [row["reward"] for row in rows if "reward" in row]
    with_advantage = sum("advantage" in row for row in rows)
    summary: dict[str, Any] = {
        "sequences": len(rows),
        "groups": len(sizes),
        "responses per group": _range(list(sizes.values())),
        "response tokens": sum(lengths),
        "response length": _range(lengths),
        "maximum completion length": max_length,
        "truncated responses": sum(not row["finished"] for row in rows),
        "end-of-sequence tokens restored": tally.restored,
        "prompts through the chat template": tally.templated,
        "tokens after responses dropped": tally.num_dropped,
        "sequences with an advantage": with_advantage,
        "sequences with a reward": len(rewards),
    }
    if rewards:
        summary["mean reward"] = sum(rewards) / len(rewards)
        summary["rewards"] = _range(rewards)
    if tally.known_ids:
        summary["round trip: responses with known ids"] = tally.known_ids
        summary["round trip: text tokenises to other ids"] = tally.retokenised
    if tally.known_ids < len(rows):
        summary["round trip: ids not known"] = len(rows) - tally.known_ids
        summary["round trip: text altered by the tokenizer"] = tally.altered
    return summary


def _range(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def step_notes(records: list[Record], checkpoint: Path) -> list[str]:
    """A sentence unless the rows are of the step that is taken from the checkpoint."""
    steps = sorted({record.step for record in records if record.step is not None})
    # verl keeps its models some folders below the one that is named by the step.
    folders = map(STEP_FOLDER.fullmatch, reversed(checkpoint.resolve().parts))
    found = next((match for match in folders if match), None)
    if not steps or found is None or steps == [int(found[1]) + 1]:
        return []
    name, number = found[0], int(found[1])
    note = (
        f"the rows are of step {', '.join(map(str, steps))}, but the step taken from "
        f"{name} is step {number + 1}: as U they are not the batch of the step that is "
        "probed"
    )
    return [note]


def group_notes(rows: list[dict[str, Any]], trained: dict[str, Any]) -> list[str]:
    """Sentences where the groups are not the trainer's own.

    Args:
        rows: rows of the rollout file.
        trained: settings of the checkpoint's training_args.bin.
    """
    notes = []
    sizes = Counter(row["group"] for row in rows)
    expected = trained.get("num_generations")
    others = sum(size != expected for size in sizes.values())
    if expected is not None and others:
        notes.append(
            f"{others} of {len(sizes)} groups have not the {expected} responses that "
            "the trainer drew for a prompt (rows missing, or a prompt drawn twice)"
        )
    generated = trained.get("steps_per_generation") or 1
    accumulated = trained.get("gradient_accumulation_steps") or 1
    if generated > accumulated:
        notes.append(
            f"the trainer generated for {generated / accumulated:g} optimizer steps at "
            "a time: a step saw only a part of these rows"
        )
    return notes


def tally_notes(tally: Tally) -> list[str]:
    """Sentences where text did not lead back to the sampled tokens."""
    notes = []
    if tally.retokenised:
        notes.append(
            f"{tally.retokenised} of {tally.known_ids} responses tokenise to other ids "
            "than were sampled; the sampled ids were kept"
        )
    if tally.altered:
        notes.append(
            f"{tally.altered} responses are not what their tokens decode to: the "
            "sampled tokens were others"
        )
    if tally.nearly_full:
        notes.append(
            f"{tally.nearly_full} responses got the end-of-sequence token back although "
            "they nearly have the maximum completion length: truncated ones whose text "
            "lacks a token would look the same"
        )
    if tally.longer:
        notes.append(
            f"{tally.longer} responses have more tokens than the maximum completion "
            "length: the sampled tokens were others, or the length is another"
        )
    return notes
