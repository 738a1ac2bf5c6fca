"""The page of several checkpoints of a training run, or of several settings of one."""

import re
from collections.abc import Sequence

from entropy_ddp.answers import checkpoints as answers
from entropy_ddp.answers import holding, shares
from entropy_ddp.answers.cells import Table, number, text
from entropy_ddp.answers.checkpoints import Checkpoints, Stage
from entropy_ddp.answers.headline import subject_of
from entropy_ddp.answers.shares import SharesByKind
from entropy_ddp.answers.words import (
    FIXED,
    count,
    listed,
)
from entropy_ddp.errors import InputError
from entropy_ddp.report.figures import checkpoints as figures
from entropy_ddp.report.page import Page, PageSection, complaints
from entropy_ddp.report.subjects import Subject


def comparison_page(subjects: Sequence[Subject]) -> Page:
    """Entropy and its change, predicted and true, one row and one dot for each subject.

    Subjects stand in the order of their training steps if every checkpoint's folder
    names one and no two are equal, otherwise in the given order.

    Raises:
        InputError: the entropies have different units or integrands, or a file of a run
            directory is absent or damaged.
    """
    _require_one_unit(subjects)
    steps = [training_step(subject) for subject in subjects]
    by_step = None not in steps and len(set(steps)) == len(steps)
    if by_step:
        order = sorted(range(len(steps)), key=lambda place: steps[place] or 0)
        subjects = [subjects[place] for place in order]
        steps = [steps[place] for place in order]
    places = steps if by_step else range(1, len(subjects) + 1)
    labels = [f"step{FIXED}{step:,}" for step in steps] if by_step else _names(subjects)
    stages = [
        _stage(subject, place or 0, label)
        for subject, place, label in zip(subjects, places, labels, strict=True)
    ]
    return _page(subjects, Checkpoints(stages=stages, by_step=by_step))


def training_step(subject: Subject) -> int | None:
    """The training step that the checkpoint's folder names, as in checkpoint-200."""
    checkpoint = subject.main.config.checkpoint
    for path in (checkpoint.path, checkpoint.adapter):
        found = re.search(r"(?:checkpoint|global_step|step)[-_](\d+)", path or "")
        if found:
            return int(found[1])
    return None


def _require_one_unit(subjects: Sequence[Subject]) -> None:
    kinds: dict[tuple[str, str], str] = {}
    for subject in subjects:
        objective = subject.main.config.objective
        kind = (objective.integrand, objective.normalize)
        kinds.setdefault(kind, str(subject.main.folder))
    if len(kinds) > 1:
        found = "; ".join(
            f"{place}: {', '.join(kind)}" for kind, place in kinds.items()
        )
        raise InputError(
            "report: expected runs with one objective.integrand and objective.normalize, "
            f"found {found}; entropies in different units cannot stand on one axis"
        )


def _names(subjects: Sequence[Subject]) -> list[str]:
    """Names of the run directories, or their whole paths if two are equal."""
    folders = [subject.main.folder for subject in subjects]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def _stage(subject: Subject, place: float, label: str) -> Stage:
    """A checkpoint, its file of tokens read once."""
    checkpoint = subject.main.config.checkpoint
    by_kind = None
    run = subject.run_with("attribution")
    if run is not None:
        by_kind = SharesByKind()
        for row in run.tokens():
            by_kind.add(row)
    return Stage(
        place=place,
        label=label,
        checkpoint=str((checkpoint.path, checkpoint.adapter, checkpoint.base)),
        document=subject.document,
        by_kind=by_kind,
    )


def _page(subjects: Sequence[Subject], found: Checkpoints) -> Page:
    named = [(stage.label, stage.document) for stage in found.stages]
    bad = [stage.label for stage in found.stages if not stage.is_trusted]
    alarm = ""
    if bad:
        of_all = f"{len(bad)} of {found.named}"
        alarm = f"{of_all} not to be trusted: {', '.join(bad)}."
    verdicts = [row["verdict"] for _, document in named for row in document["audit"]]
    checks, fine = count(len(verdicts), "check"), verdicts.count("ok")
    checked = f"All {checks} passed."
    if fine < len(verdicts):
        checked = f"{len(verdicts) - fine} of {checks} complain."
    sections = [
        PageSection(
            id="progress",
            title="Along the run" if found.by_step else "Run by run",
            figures=(figures.entropy_by_step(found), figures.change_by_step(found)),
            tables=[answers.numbers(found)],
        )
    ]
    if found.moved:
        sections += _causes(found)
    runs = _differences(subjects, found)
    return Page(
        title=f"Entropy change at {found.named}",
        kicker=f"comparison of {found.named}",
        alarm=alarm,
        headline=answers.headline(found),
        lead=answers.lead(found),
        glances=answers.glances(found),
        complaints=_complaints(found),
        checked=checked,
        sections=[*sections, PageSection(id="runs", title="The runs", tables=[runs])],
    )


def _causes(found: Checkpoints) -> list[PageSection]:
    """Who moved the entropy along the run, and what if it had been left out."""
    by_kind, error = found.by_kind, found.linear_error
    moved = PageSection(
        id="attribution",
        title="Who moved the entropy",
        lead=f"{answers.moved_sentence(found)} {answers.sums_sentence(found)}",
        figures=(figures.parts_by_step(found), figures.kinds_by_step(found)),
        tables=(
            shares.table(
                by_kind, found.unit, f"the {found.scope}", error, found.kind_errors
            ),
            answers.top_tokens(found),
            answers.parts_by_step(found),
        ),
    )
    sections = [moved]
    if found.rules:
        sections.append(_what_if(found))
    curves = holding.curves([(s.label, s.document) for s in found.moved])
    if curves:
        target = holding.target_of(found.moved[0].document)
        # The learning rate holds the entropy by not training, and a curve of it says so.
        drawn = [
            c for c in curves if c.family not in ("learning_rate", "tokens_left_out")
        ]
        held = PageSection(
            id="held",
            title=holding.title(target, found.unit),
            lead=holding.sentence(curves, target, found.unit),
            figures=(figures.held_by_step(found, drawn),),
            tables=(holding.table_by_step(curves, target, found.unit),),
        )
        sections.append(held)
    return sections


def _what_if(found: Checkpoints) -> PageSection:
    """The change without the tokens of each rule."""
    return PageSection(
        id="what-if",
        title="What if some tokens were left out",
        lead=answers.what_if_sentence(found),
        figures=(figures.what_if_by_step(found), figures.rules_in_all(found)),
        tables=(answers.rules(found), answers.rules_by_step(found)),
    )


def _complaints(found: Checkpoints) -> list[dict[str, str]]:
    """What checks complain of, once for all checkpoints that share it."""
    same: dict[tuple[str, ...], list[tuple[str, dict[str, str]]]] = {}
    for stage in found.stages:
        for row in complaints(stage.document["audit"]):
            key = (row["verdict"], row["name"], row["expected"], row["hint"])
            same.setdefault(key, []).append((stage.label, row))
    together = [
        rows[0][1]
        | {
            "name": f"{listed(label for label, _ in rows)}: {rows[0][1]['name']}",
            "value": listed(row["value"] for _, row in rows),
        }
        for rows in same.values()
    ]
    return sorted(together, key=lambda row: row["verdict"])


def _differences(subjects: Sequence[Subject], found: Checkpoints) -> Table:
    """Where the runs lie, and what they were made of."""
    rows = []
    for subject, stage in zip(subjects, found.stages, strict=True):
        document, checkpoint = stage.document, subject.main.config.checkpoint
        rows.append(
            (
                text(stage.label),
                text(", ".join(str(run.folder) for run in subject.runs)),
                text(checkpoint.path or checkpoint.adapter or checkpoint.base),
                text(subject_of(document["update"])),
                number(document["update"]["learning_rate_used"]),
                number(document["E"]["num_sequences"], 9),
                number(document["U"]["num_sequences"] if "U" in document else None, 9),
            )
        )
    return Table(
        title="Where they come from",
        columns=(
            "run", "run directory", "checkpoint", "step", "learning rate",
            "responses in E", "responses in U",
        ),
        rows=rows,
    )  # fmt: skip
