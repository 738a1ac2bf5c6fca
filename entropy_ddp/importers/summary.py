"""What an import says about what it read, and about what may be wrong with it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from entropy_ddp.data.rows import (
    DOUBTS,
    END_RESTORED,
    NEAR_LIMIT,
    OTHER_TEXT,
    TOO_LONG,
    listed_lines,
)
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
    summary: dict[str, Any] = {
        "sequences": len(rows),
        "groups": len(sizes),
        "responses_per_group": _range(list(sizes.values())),
        "response_tokens": sum(lengths),
        "response_length": _range(lengths),
        "max_completion_length": max_length,
        "truncated_responses": sum(not row["finished"] for row in rows),
        "end_tokens_restored": len(marked(rows, END_RESTORED)),
        "prompts_through_chat_template": tally.templated,
        "tokens_dropped_after_responses": tally.num_dropped,
        "sequences_with_advantage": sum("advantage" in row for row in rows),
        "sequences_with_reward": len(rewards),
    }
    if rewards:
        summary["mean_reward"] = sum(rewards) / len(rewards)
        summary["rewards"] = _range(rewards)
    if tally.known_ids:
        summary["round_trip_known_ids"] = tally.known_ids
        summary["round_trip_other_ids"] = tally.retokenised
    if tally.known_ids < len(rows):
        summary["round_trip_unknown_ids"] = len(rows) - tally.known_ids
        summary["round_trip_altered_text"] = len(marked(rows, OTHER_TEXT))
        summary["responses_in_doubt"] = len(marked(rows, *DOUBTS))
    return summary


def marked(rows: list[dict[str, Any]], *marks: str) -> list[int]:
    """Numbers of the rows, from 1, whose `ids_from_text` has one of these marks."""
    wanted = set(marks)
    return [
        n for n, r in enumerate(rows, 1) if wanted & set(r.get("ids_from_text", ()))
    ]


def _range(values: list[Any]) -> dict[str, Any]:
    return {"min": min(values), "max": max(values)}


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


def group_notes(
    records: list[Record], rows: list[dict[str, Any]], trained: dict[str, Any]
) -> list[str]:
    """Sentences where the groups are not the trainer's own.

    Args:
        records: what was read.
        rows: the row of each in the rollout file.
        trained: settings of the checkpoint's training_args.bin.
    """
    notes = []
    sizes = Counter(row["group"] for row in rows)
    expected = trained.get("num_generations")
    others = sum(size != expected for size in sizes.values())
    merged = (
        "rows are missing, or several draws of a prompt are one group, as the dump does "
        "not name them; where the trainer kept them apart, its advantages and weights "
        "in the loss are others"
    )
    if expected is not None and others:
        notes.append(
            f"{others} of {len(sizes)} groups have not the {expected} responses that "
            f"the trainer drew for a prompt: {merged}"
        )
    elif any(r.grouped_by_prompt for r in records) and len(set(sizes.values())) > 1:
        low, high = min(sizes.values()), max(sizes.values())
        notes.append(f"groups have {low} to {high} responses: {merged}")
    generated = trained.get("steps_per_generation") or 1
    accumulated = trained.get("gradient_accumulation_steps") or 1
    if generated > accumulated:
        notes.append(
            f"the trainer generated for {generated / accumulated:g} optimizer steps at "
            "a time: a step saw only a part of these rows"
        )
    return notes


def doubt_notes(rows: list[dict[str, Any]], tally: Tally) -> list[str]:
    """Sentences where text did not lead back to the sampled tokens, with the lines."""
    notes = []
    if tally.retokenised:
        notes.append(
            f"{tally.retokenised} of {tally.known_ids} responses tokenise to other ids "
            "than were sampled; the sampled ids were kept"
        )
    for mark, what in _WHAT_IT_MEANS.items():
        lines = marked(rows, mark)
        if lines:
            notes.append(f"{len(lines)} {what} ({listed_lines(lines)})")
    return notes


_WHAT_IT_MEANS = {
    OTHER_TEXT: "responses are not what their tokens decode to: the sampled tokens were "
    "others",
    NEAR_LIMIT: "responses got the end-of-sequence token back although they nearly have "
    "the maximum completion length: truncated ones whose text lacks a token would look "
    "the same",
    TOO_LONG: "responses have more tokens than the maximum completion length: the "
    "sampled tokens were others, or the length is another",
}
