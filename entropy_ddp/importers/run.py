"""The `import` job: dumps to one rollout file, and what may be wrong with it."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from entropy_ddp.checkpoint.find import find_tokenizer
from entropy_ddp.checkpoint.policy import load_tokenizer
from entropy_ddp.checkpoint.trainer_files import training_arguments
from entropy_ddp.config import Checkpoint
from entropy_ddp.data.files import make_batch
from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.data.rows import (
    DOUBTS,
    END_RESTORED,
    LOG_DIFFERS,
    NEAR_LIMIT,
    OTHER_TEXT,
    TOO_LONG,
    TokenLimits,
    listed_lines,
)
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file
from entropy_ddp.importers.jsonl_dumps import read_nemo_rl, read_prime_rl, read_verl
from entropy_ddp.importers.records import (
    Record,
    Source,
    Tokenising,
    is_templated,
    make_rows,
    tokenises_otherwise,
)
from entropy_ddp.importers.table import read_table
from entropy_ddp.importers.trl import log_notes, read_trl

# Folders of the common trainers: checkpoint-N, global_step_N, step_N.
STEP_FOLDER = re.compile(r"(?:checkpoint-|global_step_?|step_)(\d+)")
READERS: dict[str, Callable[[Path, Source], list[Record]]] = {
    "trl": read_trl,
    "verl": read_verl,
    "prime-rl": read_prime_rl,
    "nemo-rl": read_nemo_rl,
    "table": read_table,
}
REFUSED = {
    "slime": "its --save-debug-rollout-data is a pickle, which may run code when read; "
    "write the samples' tokens, response_length, reward and group_index as JSON lines "
    "(group, prompt_ids, response_ids, reward): that is a rollout file already",
    "openrlhf": "it writes no training rollouts; log prompt, response and reward as "
    "JSON lines from its reward function and import them as `table`",
}


def import_rollouts(
    format: str,
    files: Sequence[Path],
    checkpoint: Path,
    output: Path,
    source: Source,
    *,
    overwrite: bool = False,
    max_completion_length: int | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> dict[str, Any]:
    """Convert dumps to one rollout file, which appears whole or not at all.

    Args:
        format: one of `READERS`.
        files: the dump's.
        checkpoint: folder of the checkpoint that the rollouts were sampled from.
        output: the rollout file to write.
        source: what the readers are told.
        overwrite: replace an existing output.
        max_completion_length: in tokens; None takes the checkpoint's.
        trust_remote_code: whether code that comes with the tokenizer may be run.
        base: folder or hub id of the model, where the checkpoint does not name it.

    Returns:
        What was imported: counts of rows, groups and tokens, rewards, truncated
        responses, restored end-of-sequence tokens and round-trip differences, and
        `notes`, sentences on what may be wrong.

    Raises:
        InputError: the format is not known, a file, row or key is missing or wrong, or
            the output exists.
        RunError: the output cannot be written.
    """
    reader = _reader(format, files)
    _require_writable(output, overwrite)
    place, base = find_tokenizer(checkpoint, base)
    arguments = training_arguments(Checkpoint(path=str(checkpoint)))
    trained = {} if arguments is None else arguments.values
    size = source.num_generations
    source = _told(source, trained)
    records = [record for path in files for record in reader(path, source)]
    if not records:
        raise InputError(
            f"{files[0]}: expected sequences in the loss, found none; is it the right "
            "step's file?"
        )
    template_options = trained.get("chat_template_kwargs")
    if format != "trl" or not isinstance(template_options, dict):
        template_options = {}
    tokenizer = _load_tokenizer(place, trust_remote_code)
    tokenising = Tokenising(
        tokenizer=tokenizer,
        end_ids=_end_ids(base, checkpoint, tokenizer.eos_token_id),
        max_length=trained.get("max_completion_length")
        if max_completion_length is None
        else max_completion_length,
        template_options=template_options,
    )
    rows = make_rows(records, tokenising)
    _require_sizes(rows, size, files[0])
    if source.num_prompts_total is not None:
        _say_draws(rows, source.num_prompts_total, tokenising.limits)
    logged: dict[int, str] = {}
    if format == "trl":
        steps = [record.step for record in records]
        logged = log_notes(files, rows, steps)
        for row, step in zip(rows, steps):
            if step in logged:
                row["ids_from_text"].append(LOG_DIFFERS)
    summary = _summarise(records, rows, tokenising)
    notes = [
        *_step_notes(records, checkpoint),
        *_group_notes(records, rows, trained),
        *_doubt_notes(rows, summary),
        *logged.values(),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(output, rows)
    return summary | {"notes": notes}


def _reader(
    format: str, files: Sequence[Path]
) -> Callable[[Path, Source], list[Record]]:
    if format in REFUSED:
        raise InputError(f"import: {format} is not read: {REFUSED[format]}")
    if format not in READERS:
        raise InputError(
            f"import: expected one of {', '.join(READERS)}, found {format!r}; for other "
            "trainers write a `table`"
        )
    for path in files:
        if path.suffix in (".pt", ".pth", ".pkl", ".bin"):
            raise InputError(
                f"{path}: expected a file of {format}, found a pickle, which may run "
                f"code when read; {REFUSED['slime'].partition('; ')[2]}"
            )
    return READERS[format]


def _require_writable(output: Path, overwrite: bool) -> None:
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(
            f"--output {output}: expected a name ending in .jsonl or .jsonl.gz"
        )
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; give --overwrite or another name")


def _require_sizes(rows: list[dict[str, Any]], size: int | None, file: Path) -> None:
    """Groups of as many responses as the command line says."""
    found = set(Counter(row["group"] for row in rows).values())
    if size is not None and found != {size}:
        raise InputError(
            f"--num-generations {size}: expected so many responses in every group, found "
            f"{min(found)} to {max(found)} in {file}; rows are missing, or the dump "
            "merges several draws of a prompt: give their own group to each in a table"
        )


def _say_draws(rows: list[dict[str, Any]], total: int, limits: TokenLimits) -> None:
    """Let every row say that its prompt was drawn from so many, without replacement."""
    for row in rows:
        row |= {"num_prompts_total": total, "with_replacement": False}
    make_batch(rows, f"--num-prompts-total {total}: row", "E", limits)


def _told(source: Source, trained: dict[str, Any]) -> Source:
    """What the readers are told, with what the trainer's settings say beside it."""
    weights, size = trained.get("reward_weights"), trained.get("num_generations")
    if isinstance(weights, list):
        source = replace(source, reward_weights=weights)
    if source.num_generations is None and type(size) is int and size > 0:
        source = replace(source, num_generations=size)
    return source


def _load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if tokenizer is None:
        raise InputError(
            f"{folder}: expected a tokenizer in the checkpoint or its base model, found "
            "no tokenizer_config.json; save it there"
        )
    return tokenizer


def _end_ids(base: str, checkpoint: Path, end_id: int | None) -> set[int]:
    """Token ids that end a response: the tokenizer's and the model's own."""
    ids = set() if end_id is None else {end_id}
    for folder in (checkpoint, Path(base)):
        path = folder / "generation_config.json"
        if path.is_file():
            ids |= _declared_end_ids(path)
    return ids


def _declared_end_ids(path: Path) -> set[int]:
    def describe(reason: str) -> str:
        return f"{path}: not a readable configuration: {reason}; copy it again"

    with fault_of_file(str(path), describe):
        declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids = {declared} if isinstance(declared, int) else set(declared or ())
        if not all(isinstance(number, int) for number in ids):
            raise ValueError(f"eos_token_id is {declared!r}")
        return ids


def _summarise(
    records: list[Record], rows: list[dict[str, Any]], tokenising: Tokenising
) -> dict[str, Any]:
    """Counts of what was imported, by name."""
    known = [
        row["response_ids"]
        for record, row in zip(records, rows)
        if record.response_ids is not None
    ]
    sizes = Counter(row["group"] for row in rows)
    lengths = [len(row["response_ids"]) for row in rows]
    rewards = [row["reward"] for row in rows if "reward" in row]
    summary: dict[str, Any] = {
        "sequences": len(rows),
        "groups": len(sizes),
        "responses_per_group": _range(list(sizes.values())),
        "response_tokens": sum(lengths),
        "response_length": _range(lengths),
        "max_completion_length": tokenising.max_length,
        "truncated_responses": sum(not row["finished"] for row in rows),
        "end_tokens_restored": len(_marked(rows, END_RESTORED)),
        "prompts_through_chat_template": sum(
            is_templated(record, tokenising) for record in records
        ),
        "tokens_dropped_after_responses": sum(r.num_dropped for r in records),
        "sequences_with_advantage": sum("advantage" in row for row in rows),
        "sequences_with_reward": len(rewards),
    }
    if rewards:
        summary["mean_reward"] = sum(rewards) / len(rewards)
        summary["rewards"] = _range(rewards)
    if known:
        summary["round_trip_known_ids"] = len(known)
        summary["round_trip_other_ids"] = sum(
            tokenises_otherwise(ids, tokenising) for ids in known
        )
    if len(known) < len(rows):
        summary["round_trip_unknown_ids"] = len(rows) - len(known)
        summary["round_trip_altered_text"] = len(_marked(rows, OTHER_TEXT))
        summary["responses_in_doubt"] = len(_marked(rows, *DOUBTS))
    return summary


def _marked(rows: list[dict[str, Any]], *marks: str) -> list[int]:
    """Numbers of the rows, from 1, whose `ids_from_text` has one of these marks."""
    wanted = set(marks)
    return [
        n for n, r in enumerate(rows, 1) if wanted & set(r.get("ids_from_text", ()))
    ]


def _range(values: list[Any]) -> dict[str, Any]:
    return {"min": min(values), "max": max(values)}


def _step_notes(records: list[Record], checkpoint: Path) -> list[str]:
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


def _group_notes(
    records: list[Record], rows: list[dict[str, Any]], trained: dict[str, Any]
) -> list[str]:
    """Sentences where the groups are not the trainer's own."""
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


def _doubt_notes(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """Sentences where text did not lead back to the sampled tokens, with the lines."""
    notes = []
    if summary.get("round_trip_other_ids"):
        notes.append(
            f"{summary['round_trip_other_ids']} of {summary['round_trip_known_ids']} "
            "responses tokenise to other ids than were sampled; the sampled ids were kept"
        )
    for mark, what in _WHAT_IT_MEANS.items():
        lines = _marked(rows, mark)
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
