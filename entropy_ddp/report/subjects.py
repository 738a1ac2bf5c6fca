"""Which runs are about the same step, and so belong on one page.

A probe, a sweep and an attribution of one checkpoint, the same batches and the same step
answer one question together. Runs that differ in any of these are compared, not joined.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entropy_ddp.errors import InputError
from entropy_ddp.results.reading import COMMANDS, StoredRun

# Sections and keys of a configuration that choose parts of a page, or how a run is
# computed, but not what its numbers mean.
BESIDE_THE_POINT = (
    ("sweep",),
    ("attribution",),
    ("curvature",),
    ("compute",),
    ("out",),
    ("gradient_dot", "enabled"),
    ("gradient_dot", "variance_method"),
    ("update", "save_delta"),
)
OPTIONAL_PARTS = ("curvature", "gradient_dot", "sweep", "sweep_summary", "attribution")
STATUSES = ("ok", "untrusted", "failed")
# Headlines of one step differ by rounding only, which is far below their error.
ERROR_TOLERANCE, ENTROPY_TOLERANCE = 0.1, 1e-3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One checkpoint, its batches and the step that was probed.

    Attributes:
        runs: the runs about it, the one that the headline comes from first.
        document: their results together; `audit` holds every check once, the others
            with the command they come from.
    """

    runs: tuple[StoredRun, ...]
    document: dict[str, Any]

    @property
    def main(self) -> StoredRun:
        """The run that the headline comes from."""
        return self.runs[0]

    def run_with(self, part: str) -> StoredRun | None:
        """The run that holds a part of the results."""
        return next((run for run in self.runs if part in run.document), None)


def group_runs(runs: Sequence[StoredRun]) -> list[Subject]:
    """Runs by what they are about, in the order in which they are given.

    Raises:
        InputError: two runs answer the same question, or runs that should be about the
            same step measured different changes.
    """
    groups: dict[str, list[StoredRun]] = {}
    for run in runs:
        groups.setdefault(_subject_key(run), []).append(run)
    return [_join(group) for group in groups.values()]


def _subject_key(run: StoredRun) -> str:
    config = run.config.model_dump()
    for *sections, key in BESIDE_THE_POINT:
        place = config
        for section in sections:
            place = place[section]
        place.pop(key)
    facts = {split: run.document.get(split) for split in ("E", "U")}
    return json.dumps([config, facts], sort_keys=True)


def _join(runs: list[StoredRun]) -> Subject:
    by_command: dict[str, StoredRun] = {}
    for run in runs:
        other = by_command.setdefault(run.command, run)
        if other is not run:
            raise InputError(
                f"{other.folder} and {run.folder}: two {run.command} runs of the same "
                "checkpoint, batches and step; give one of them"
            )
    ordered = sorted(runs, key=lambda run: COMMANDS.index(run.command))
    for run in ordered[1:]:
        _require_agreement(ordered[0], run)
    document = dict(ordered[0].document)
    for run in ordered[1:]:
        for part in OPTIONAL_PARTS:
            if part in run.document:
                document.setdefault(part, run.document[part])
    document["status"] = max(
        (run.document["status"] for run in runs), key=STATUSES.index
    )
    document["audit"] = _all_checks(ordered)
    return Subject(runs=tuple(ordered), document=document)


def _require_agreement(one: StoredRun, other: StoredRun) -> None:
    """Runs of one configuration must have measured one change."""
    first, second = one.document["truth"], other.document["truth"]
    apart = abs(first["delta_h_true"] - second["delta_h_true"])
    allowed = ERROR_TOLERANCE * first["se"] + 1e-6 * abs(first["H_orig"])
    entropies = abs(first["H_orig"] - second["H_orig"])
    if apart > allowed or entropies > ENTROPY_TOLERANCE * abs(first["H_orig"]):
        raise InputError(
            f"{one.folder} and {other.folder}: the same configuration, but entropies of "
            f"{first['H_orig']:.6g} and {second['H_orig']:.6g} and changes of "
            f"{first['delta_h_true']:.4e} and {second['delta_h_true']:.4e}; a checkpoint "
            "or batch file changed between them: run both again"
        )


def _all_checks(runs: Sequence[StoredRun]) -> list[dict[str, Any]]:
    """The checks of the first run, and of the others what it lacks or what complains."""
    rows = [dict(row) for row in runs[0].document["audit"]]
    known = {(row["name"], row["verdict"]) for row in rows}
    names = {row["name"] for row in rows}
    for run in runs[1:]:
        for row in run.document["audit"]:
            new = row["name"] not in names
            complains = row["verdict"] != "ok"
            if new or (complains and (row["name"], row["verdict"]) not in known):
                rows.append({**row, "name": f"{run.command}: {row['name']}"})
    return rows
