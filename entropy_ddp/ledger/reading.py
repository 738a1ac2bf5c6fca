"""`ledger.jsonl` as it was appended to: runs, restarts, probed steps, the end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_ddp.errors import InputError

LEDGER_FILE = "ledger.jsonl"
# Kinds of lines, and what each must have.
NEEDED = {
    "run": ("first_step", "steps"),
    "step": ("step", "entropy", "first_order"),
    "end": ("step", "entropy"),
}


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """A ledger file.

    Attributes:
        runs: the line of the start and of every restart.
        entries: the probed steps, ascending; of a step that was trained twice, the one
            that the training went on from.
        end: the last line of a training that ended; None of one that goes on.
        notes: sentences on what was left out.
    """

    runs: list[dict[str, Any]]
    entries: list[dict[str, Any]]
    end: dict[str, Any] | None
    notes: list[str]


def read_ledger(folder: Path) -> RunLog:
    """Read the ledger of a run.

    A restart from a checkpoint takes back what was written of later steps. A last line
    without its end is of a process that was killed, and left out.

    Raises:
        InputError: there is none, or a line is no line of a ledger.
    """
    file = folder / LEDGER_FILE
    if not file.is_file():
        raise InputError(
            f"{file}: expected a run's ledger, found no such file; name the folder that "
            "the callback was given as `out`"
        )
    text = file.read_text(encoding="utf-8")
    lines, notes = text.split("\n"), []
    if lines.pop():
        notes.append("the last line is cut off (the training was killed): left out")
    log = RunLog(runs=[], entries=[], end=None, notes=notes)
    for number, line in enumerate(lines, start=1):
        log = _with_line(log, _parsed(line, f"{file}:{number}"))
    if not log.entries:
        raise InputError(
            f"{file}: expected at least one probed step, found none; let the training "
            "go on, or probe more often (`every`)"
        )
    return log


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{where}: expected a JSON object, found {line[:40]!r}"
        ) from error
    kind = str(found.get("kind")) if isinstance(found, dict) else "none"
    missing = [key for key in NEEDED.get(kind, ()) if key not in found]
    if kind not in NEEDED or missing:
        raise InputError(
            f"{where}: expected a line of kind {', '.join(NEEDED)} with all of its keys, "
            f"found kind {kind!r}{' without ' + missing[0] if missing else ''}; is this "
            "a ledger of this version?"
        )
    return found


def _with_line(log: RunLog, line: dict[str, Any]) -> RunLog:
    runs, entries, end = [*log.runs], log.entries, log.end
    notes = [*log.notes]
    if line["kind"] == "end":
        end = line
    if line["kind"] == "step":
        entries = [*entries, line]
    if line["kind"] == "run":
        kept = [entry for entry in entries if entry["step"] < line["first_step"]]
        if len(kept) < len(entries):
            notes.append(
                f"restarted at step {line['first_step']}: {len(entries) - len(kept)} "
                "lines of steps that were taken back are left out"
            )
        runs, entries, end = [*runs, line], kept, None
    return RunLog(runs=runs, entries=entries, end=end, notes=notes)
