"""The page of several checkpoints of a training run, or of several settings of one."""

import re
from collections.abc import Sequence

from entropy_ddp.errors import InputError
from entropy_ddp.report import answer, causes
from entropy_ddp.report.figures.progress import (
    Stage,
    change_by_step,
    entropy_by_step,
    falls_and_rises,
    told_entropy,
)
from entropy_ddp.report.subjects import Subject
from entropy_ddp.report.view import (
    Cell,
    Complaint,
    Glance,
    Page,
    Section,
    Table,
    digits,
    measured,
)
from entropy_ddp.report.view import words as text_cell
from entropy_ddp.report.words import (
    AXIS_UNITS,
    FIXED,
    RESOLVED,
    UNITS,
    count,
    linear_error,
    listed,
    missed_error,
    number,
    percent,
    percent_with_error,
    shown_error,
    with_error,
)


def comparison_page(subjects: Sequence[Subject]) -> Page:
    """Entropy and its change, predicted and true, one row and one dot for each subject.

    Subjects stand in the order of their training steps if every checkpoint's folder
    names one and no two are equal, otherwise in the given order.

    Raises:
        InputError: the entropies have different units or integrands.
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
    return _page(subjects, stages, by_step)


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
    document = subject.document
    truth, linear = document["truth"], document["linear"]
    checkpoint = subject.main.config.checkpoint
    return Stage(
        place=place,
        label=label,
        checkpoint=str((checkpoint.path, checkpoint.adapter, checkpoint.base)),
        is_trusted=document["status"] == "ok",
        entropy=truth["H_orig"],
        entropy_error=truth.get("H_orig_se"),
        truth=truth["delta_h_true"],
        truth_error=shown_error(truth),
        linear=linear["delta_h1"],
        linear_error=linear_error(document),
        missed_error=missed_error(document, "linear"),
    )


def _page(subjects: Sequence[Subject], stages: Sequence[Stage], by_step: bool) -> Page:
    normalize = subjects[0].document["truth"]["normalize"]
    unit = UNITS[normalize]
    things = "checkpoint" if by_step else "run"
    named = list(zip((stage.label for stage in stages), subjects, strict=True))
    bad = [label for label, s in named if s.document["status"] != "ok"]
    alarm = ""
    if bad:
        of_all = f"{len(bad)} of {count(len(subjects), things)}"
        alarm = f"{of_all} not to be trusted: {', '.join(bad)}."
    checks = sum(len(subject.document["audit"]) for subject in subjects)
    bad_checks = sum(
        row["verdict"] != "ok" for s in subjects for row in s.document["audit"]
    )
    checked = f"All {count(checks, 'check')} passed."
    if bad_checks:
        checked = f"{bad_checks} of {count(checks, 'check')} complain."
    found = causes.read_causes(subjects, stages, by_step)
    return Page(
        title=f"Entropy change at {count(len(subjects), things)}",
        kicker=f"comparison of {count(len(subjects), things)}",
        alarm=alarm,
        headline=_headline(stages, things),
        lead=_lead(stages, unit),
        glances=[*_glances(stages), *([causes.glance(found)] if found else [])],
        complaints=_complaints(named),
        checked=checked,
        sections=[
            _progress(subjects, stages, by_step),
            *(causes.sections(found) if found else []),
            Section(
                id="runs", title="The runs", tables=[_differences(subjects, stages)]
            ),
        ],
    )


def _progress(
    subjects: Sequence[Subject], stages: Sequence[Stage], by_step: bool
) -> Section:
    normalize = subjects[0].document["truth"]["normalize"]
    unit = AXIS_UNITS[normalize]
    return Section(
        id="progress",
        title="Along the run" if by_step else "Run by run",
        figures=(
            entropy_by_step(stages, by_step, unit),
            change_by_step(stages, by_step, unit),
        ),
        tables=[_table(subjects, stages, UNITS[normalize])],
    )


def _headline(stages: Sequence[Stage], things: str) -> tuple[str, str, str]:
    falls, rises = falls_and_rises(stages)
    total = count(len(stages), things)
    if not falls + rises:
        return (
            "One step changes the entropy at ",
            "none",
            f" of {total} beyond its error.",
        )
    if falls >= rises:
        return "One step lowers the entropy at ", f"{falls} of {total}", "."
    return "One step raises the entropy at ", f"{rises} of {total}", "."


def _lead(stages: Sequence[Stage], unit: str) -> str:
    first, last = stages[0], stages[-1]
    ends = [f"{_entropy_of(stage)} {unit} ({stage.label})" for stage in (first, last)]
    return f"{told_entropy(stages)}: from {' to '.join(ends)}. {_counted(stages)}"


def _entropy_of(stage: Stage) -> str:
    """H with its error; without one, to two digits."""
    if stage.entropy_error is None:
        return f"about {number(stage.entropy, 2)}"
    return with_error(stage.entropy, stage.entropy_error, signed=False)


def _counted(stages: Sequence[Stage]) -> str:
    """What the headline counts, and what it leaves out."""
    falls, rises = falls_and_rises(stages)
    trusted = sum(stage.is_trusted for stage in stages)
    small, untrusted = trusted - falls - rises, len(stages) - trusted
    parts = [f"{falls} {'falls' if falls == 1 else 'fall'}"] * (falls > 0)
    parts += [f"{rises} {'rises' if rises == 1 else 'rise'}"] * (rises > 0)
    parts += [f"{small} {'is' if small == 1 else 'are'} too small to tell"] * (
        small > 0
    )
    parts += [f"{untrusted} {'is' if untrusted == 1 else 'are'} not to be trusted"] * (
        untrusted > 0
    )
    return (
        f"Changes of at least {RESOLVED:g} standard errors are counted: "
        f"{', '.join(parts)}."
    )


def _glances(stages: Sequence[Stage]) -> list[Glance]:
    resolved = [stage for stage in stages if stage.is_resolved]
    falling = [stage for stage in resolved if stage.truth < 0]
    steepest = min(falling, key=lambda stage: stage.truth, default=None)
    if steepest is None:
        where = Glance(
            question="Where does it fall most?",
            answer="Nowhere",
            detail="No measured change is a fall beyond its error.",
        )
    else:
        where = Glance(
            question="Where does it fall most?",
            answer=steepest.label,
            detail=f"{with_error(steepest.truth, steepest.truth_error)}"
            f"{_of_entropy(steepest)}; others may lie within its error.",
        )
    if not resolved:
        return [where]
    agreeing = sum(
        abs(stage.truth - stage.linear)
        <= max(0.1 * abs(stage.truth), RESOLVED * stage.missed_error)
        for stage in resolved
    )
    predicted = Glance(
        question="Does first order predict it?",
        answer=f"Within {percent(0.1)} or its error at {agreeing} of {len(resolved)}",
        detail="Counted where the measured change stands out of its error.",
    )
    return [where, predicted]


def _of_entropy(stage: Stage) -> str:
    if not stage.entropy:
        return ""
    share, error = (x / stage.entropy for x in (stage.truth, stage.truth_error))
    return f" ({percent_with_error(share, error)})"


def _complaints(named: Sequence[tuple[str, Subject]]) -> list[Complaint]:
    """What checks complain of, once for all checkpoints that share it."""
    found: dict[tuple[str, ...], list[tuple[str, Complaint]]] = {}
    for label, subject in named:
        for c in answer.complaints(subject.document["audit"]):
            same = (c.verdict, c.name, c.expected, c.hint)
            found.setdefault(same, []).append((label, c))
    together = [
        Complaint(
            verdict=verdict,
            name=f"{listed(label for label, _ in rows)}: {name}",
            value=listed(c.value for _, c in rows),
            expected=expected,
            hint=hint,
        )
        for (verdict, name, expected, hint), rows in found.items()
    ]
    return sorted(together, key=lambda complaint: complaint.verdict)


def _table(subjects: Sequence[Subject], stages: Sequence[Stage], unit: str) -> Table:
    rows = []
    for subject, stage in zip(subjects, stages, strict=True):
        share = Cell(text="–", is_number=True)
        if stage.entropy:
            ratio, error = (x / stage.entropy for x in (stage.truth, stage.truth_error))
            share = Cell(
                text=percent_with_error(ratio, error), title=repr(ratio), is_number=True
            )
        rows.append(
            [
                text_cell(stage.label),
                Cell(
                    text=_entropy_of(stage), title=repr(stage.entropy), is_number=True
                ),
                measured(stage.truth, stage.truth_error),
                share,
                measured(stage.linear, stage.linear_error),
                digits(subject.document["truth"]["ess_fraction"]),
                _verdict(subject),
            ]
        )
    return Table(
        title="The numbers",
        columns=(
            "run", "H", "measured change", "of H", "first order", "ESS / N", "verdict",
        ),
        rows=rows,
        caption=f"H and its changes in {unit}; ± is one standard error.",
    )  # fmt: skip


def _verdict(subject: Subject) -> Cell:
    status = subject.document["status"]
    if status != "ok":
        return Cell(text=status, verdict="fail")
    warned = sum(row["verdict"] == "warn" for row in subject.document["audit"])
    if warned:
        return Cell(text=count(warned, "warning"), verdict="warn")
    return Cell(text="ok", verdict="ok")


def _differences(subjects: Sequence[Subject], stages: Sequence[Stage]) -> Table:
    """Where the runs lie, and what they were made of."""
    rows = []
    for subject, stage in zip(subjects, stages, strict=True):
        config, document = subject.main.config, subject.document
        checkpoint = config.checkpoint
        rows.append(
            [
                text_cell(stage.label),
                text_cell(", ".join(str(run.folder) for run in subject.runs)),
                text_cell(checkpoint.path or checkpoint.adapter or checkpoint.base),
                text_cell(answer.subject_of(document["update"])),
                digits(document["update"]["learning_rate_used"]),
                digits(document["E"]["num_sequences"]),
                digits(document["U"]["num_sequences"] if "U" in document else None),
            ]
        )
    return Table(
        title="Where they come from",
        columns=(
            "run", "run directory", "checkpoint", "step", "learning rate",
            "responses in E", "responses in U",
        ),
        rows=rows,
    )  # fmt: skip
