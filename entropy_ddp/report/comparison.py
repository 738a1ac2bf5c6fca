"""The page of several checkpoints of a training run, or of several settings of one."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entropy_ddp.answers import shares
from entropy_ddp.answers.cells import (
    Cell,
    Table,
    change,
    level,
    number,
    part,
    share,
    text,
    verdict,
)
from entropy_ddp.answers.headline import subject_of
from entropy_ddp.answers.shares import KINDS, SharesByKind
from entropy_ddp.answers.tables import token_table
from entropy_ddp.answers.words import (
    AXIS_UNITS,
    FIXED,
    GIVEN_E,
    RESOLVED,
    UNITS,
    count,
    linear_error,
    listed,
    missed_error,
    percent,
    percent_with_error,
    relative_error,
    shown_error,
    supported,
    with_error,
)
from entropy_ddp.answers.words import (
    number as in_words,
)
from entropy_ddp.errors import InputError
from entropy_ddp.report.figures.canvas import Figure
from entropy_ddp.report.figures.checkpoints import (
    Stage,
    change_by_step,
    entropy_by_step,
    falls_and_rises,
    kinds_by_step,
    parts_by_step,
    rules_in_all,
    told_entropy,
    what_if_by_step,
)
from entropy_ddp.report.page import Glance, Page, Section
from entropy_ddp.report.run_page import complaints
from entropy_ddp.report.subjects import Subject

PARTS = {
    "momentum": "momentum", "weight decay": "weight_decay", "gradient of U": "gradient",
}  # fmt: skip
NUM_TOKENS = 20
# Rules that begin so choose tokens by their exact shares: nobody can apply them in a
# training, and they bound what the others can reach.
BY_SHARE = "largest entropy "
NOTHING = "nothing left out"
WHAT_STAYS = (
    "Each step is taken again alone: what earlier batches left in the momentum stays, and "
    "only a training without these tokens tells what would come of it."
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
    found = read_causes(subjects, stages, by_step)
    return Page(
        title=f"Entropy change at {count(len(subjects), things)}",
        kicker=f"comparison of {count(len(subjects), things)}",
        alarm=alarm,
        headline=_headline(stages, things),
        lead=_lead(stages, unit),
        glances=[*_glances(stages), *([_glance(found)] if found else [])],
        complaints=_complaints(named),
        checked=checked,
        sections=[
            _progress(subjects, stages, by_step),
            *(_causes(found) if found else []),
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
        return f"about {in_words(stage.entropy, 2)}"
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


def _complaints(named: Sequence[tuple[str, Subject]]) -> list[dict[str, str]]:
    """What checks complain of, once for all checkpoints that share it."""
    found: dict[tuple[str, ...], list[tuple[str, dict[str, str]]]] = {}
    for label, subject in named:
        for row in complaints(subject.document["audit"]):
            same = (row["verdict"], row["name"], row["expected"], row["hint"])
            found.setdefault(same, []).append((label, row))
    together = [
        rows[0][1]
        | {
            "name": f"{listed(label for label, _ in rows)}: {rows[0][1]['name']}",
            "value": listed(row["value"] for _, row in rows),
        }
        for rows in found.values()
    ]
    return sorted(together, key=lambda row: row["verdict"])


def _table(subjects: Sequence[Subject], stages: Sequence[Stage], unit: str) -> Table:
    rows = []
    for subject, stage in zip(subjects, stages, strict=True):
        of_entropy = share(None)
        if stage.entropy:
            ratio, error = (x / stage.entropy for x in (stage.truth, stage.truth_error))
            of_entropy = share(ratio, error=error, signed=True)
        rows.append(
            (
                text(stage.label),
                level(stage.entropy, stage.entropy_error),
                change(stage.truth, stage.truth_error),
                of_entropy,
                change(stage.linear, stage.linear_error),
                number(subject.document["truth"]["ess_fraction"]),
                _verdict(subject),
            )
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
        return verdict("fail", status)
    warned = sum(row["verdict"] == "warn" for row in subject.document["audit"])
    return verdict("warn", count(warned, "warning")) if warned else verdict("ok")


def _differences(subjects: Sequence[Subject], stages: Sequence[Stage]) -> Table:
    """Where the runs lie, and what they were made of."""
    rows = []
    for subject, stage in zip(subjects, stages, strict=True):
        config, document = subject.main.config, subject.document
        checkpoint = config.checkpoint
        rows.append(
            (
                text(stage.label),
                text(", ".join(str(run.folder) for run in subject.runs)),
                text(checkpoint.path or checkpoint.adapter or checkpoint.base),
                text(subject_of(document["update"])),
                number(document["update"]["learning_rate_used"]),
                number(document["E"]["num_sequences"]),
                number(document["U"]["num_sequences"] if "U" in document else None),
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


# What moved the entropy


@dataclass(frozen=True, kw_only=True)
class Causes:
    """The attributions of several checkpoints.

    Attributes:
        stages: the checkpoints that have one.
        documents: their results.
        by_kind: the shares of their tokens by kind.
        by_step: whether the checkpoints stand at their training steps.
        num_runs: all checkpoints of the page.
    """

    stages: list[Stage]
    documents: list[dict[str, Any]]
    by_kind: list[SharesByKind]
    by_step: bool
    num_runs: int

    @property
    def normalize(self) -> str:
        """What entropies are divided by; the same for all."""
        return str(self.documents[0]["linear"]["normalize"])

    @property
    def unit(self) -> str:
        """Unit of all changes."""
        return UNITS[self.normalize]

    @property
    def scope(self) -> str:
        """Over what sums are taken."""
        noun = "probed step" if self.by_step else "run"
        found = count(len(self.stages), noun)
        if len(self.stages) < self.num_runs:
            found += f" with an attribution (of {self.num_runs})"
        return found

    @property
    def linear_error(self) -> float:
        """Standard error of the summed first-order change; each has its own E."""
        return math.hypot(*(stage.linear_error for stage in self.stages))

    @property
    def truth_error(self) -> float:
        """The same of the summed measured change."""
        return math.hypot(*(stage.truth_error for stage in self.stages))

    def part(self, name: str) -> list[float]:
        """A part of the first-order change at every checkpoint."""
        return [d["attribution"][PARTS[name]] for d in self.documents]

    def rules(self) -> list[str]:
        """What-if rules that every checkpoint has, in the order of the first."""
        found = [list(self._rows(place)) for place in range(len(self.documents))]
        return [rule for rule in found[0] if all(rule in names for names in found)]

    def row(self, place: int, rule: str) -> dict[str, Any]:
        """A what-if row of one checkpoint."""
        return self._rows(place)[rule]

    def _rows(self, place: int) -> dict[str, dict[str, Any]]:
        rows = self.documents[place]["attribution"]["what_if"]
        return {row["rule"]: row for row in rows}


def read_causes(
    subjects: Sequence[Subject], stages: Sequence[Stage], by_step: bool
) -> Causes | None:
    """The attributions among these, each file of tokens read once; None if none is.

    Raises:
        InputError: a file of a run directory is absent or damaged.
    """
    found = Causes(
        stages=[], documents=[], by_kind=[], by_step=by_step, num_runs=len(stages)
    )
    for subject, stage in zip(subjects, stages, strict=True):
        run = subject.run_with("attribution")
        if run is not None:
            sums = SharesByKind()
            for row in run.tokens():
                sums.add(row)
            found.stages.append(stage)
            found.documents.append(subject.document)
            found.by_kind.append(sums)
    return found if found.stages else None


def _causes(causes: Causes) -> list[Section]:
    """Who moved the entropy along the run, and what if it had been left out."""
    total = shares.together(causes.by_kind)
    moved = Section(
        id="attribution",
        title="Who moved the entropy",
        lead=" ".join(
            [shares.sentence(total, causes.unit, causes.linear_error), *_scope(causes)]
        ),
        figures=(_parts(causes), _kinds(causes, total)),
        tables=(
            shares.table(
                total, causes.unit, f"the {causes.scope}", causes.linear_error
            ),
            _top_tokens(causes),
            _parts_by_step(causes),
        ),
    )
    rules = causes.rules()
    return [moved, _what_if(causes, rules)] if rules else [moved]


def _what_if(causes: Causes, rules: Sequence[str]) -> Section:
    best = _best(causes, rules)
    sums = _sums(causes, rules)
    unit = AXIS_UNITS[causes.normalize]
    whole, left = (_told(causes, sums, rule) for rule in (NOTHING, best))
    lead = f"Summed over the {causes.scope}, the change is "
    lead += f"{whole} {causes.unit}, and without {best} it is {left}. "
    return Section(
        id="what-if",
        title="What if some tokens were left out",
        lead=lead + WHAT_STAYS,
        figures=(_best_by_step(causes, best), rules_in_all(sums, unit, causes.scope)),
        tables=(_rules(causes, sums), _rules_by_step(causes, rules)),
    )


def _glance(causes: Causes) -> Glance:
    """The kind of token that does most, for the top of the page."""
    total = shares.together(causes.by_kind)
    answer = "No token"
    if total.share:
        answer = shares.named(total.leading())
    return Glance(
        question="What in the gradient did it?",
        answer=answer,
        detail=f"{shares.sentence(total, causes.unit, causes.linear_error)} Summed over the {causes.scope}.",
    )


def _scope(causes: Causes) -> list[str]:
    """What the sums are, and what they are not."""
    sums = {name: math.fsum(causes.part(name)) for name in PARTS}
    total, error = math.fsum(list(sums.values())), causes.linear_error
    told = [
        f"{name} {supported(value, error, 3, signed=True)}"
        for name, value in sums.items()
        if value
    ]
    limits = ", not over the whole run" if causes.by_step else ""
    said = [f"All sums are over the {causes.scope}{limits}."]
    if told:
        said.append(
            f"First order adds up to {with_error(total, error)} {causes.unit}: "
            f"{listed(told)}. {GIVEN_E}"
        )
    return said


def _parts(causes: Causes) -> Figure:
    parts = {name: causes.part(name) for name in PARTS}
    downs = sum(value < 0 for value in parts["gradient of U"])
    title = f"The gradient of U has a negative part at {downs} of {len(causes.stages)}"
    if 2 * downs < len(causes.stages):
        ups = sum(value > 0 for value in parts["gradient of U"])
        title = (
            f"The gradient of U has a positive part at {ups} of {len(causes.stages)}"
        )
    unit = AXIS_UNITS[causes.normalize]
    return parts_by_step(causes.stages, parts, causes.by_step, unit, title)


def _kinds(causes: Causes, total: SharesByKind) -> Figure:
    values = {
        kind: [sums.sums[kind].share for sums in causes.by_kind] for kind in KINDS
    }
    title = "No token of U has a share"
    if total.share:
        verb = "lower" if total.share < 0 else "raise"
        title = f"{shares.named(total.leading())} {verb} the entropy most"
    unit = AXIS_UNITS[causes.normalize]
    return kinds_by_step(causes.stages, values, causes.by_step, unit, title)


def _top_tokens(causes: Causes) -> Table:
    pairs = [
        (token, stage.label)
        for stage, document in zip(causes.stages, causes.documents, strict=True)
        for token in document["attribution"]["top_tokens"]
    ]
    pairs.sort(key=lambda pair: -abs(pair[0]["share"]))
    pairs = pairs[:NUM_TOKENS]
    return token_table(
        "The tokens that matter most, of all runs",
        [token for token, _ in pairs],
        causes.unit,
        max(map(relative_error, causes.documents)),
        [label for _, label in pairs],
    )


def _is_verified(causes: Causes, rules: Sequence[str]) -> bool:
    """Whether every step without tokens was really taken."""
    places = range(len(causes.stages))
    return all("delta_h_true" in causes.row(p, rule) for p in places for rule in rules)


def _best(causes: Causes, rules: Sequence[str]) -> str:
    """The rule that leaves least of the summed change, as first order predicts it."""
    usable = [rule for rule in rules if not rule.startswith(BY_SHARE)] or rules
    return min(
        usable, key=lambda rule: abs(math.fsum(_changes(causes, rule, "delta_h1")))
    )


def _changes(causes: Causes, rule: str, key: str) -> list[float]:
    return [causes.row(place, rule)[key] for place in range(len(causes.stages))]


def _sums(
    causes: Causes, rules: Sequence[str]
) -> dict[str, tuple[float, float | None]]:
    """Predicted and measured change with nothing left out and by each rule, summed."""
    linear = math.fsum([stage.linear for stage in causes.stages])
    truth = math.fsum([stage.truth for stage in causes.stages])
    verified = _is_verified(causes, rules)
    sums = {NOTHING: (linear, truth if verified else None)}
    for rule in rules:
        left = math.fsum(_changes(causes, rule, "delta_h_true")) if verified else None
        sums[rule] = (math.fsum(_changes(causes, rule, "delta_h1")), left)
    return sums


def _told(
    causes: Causes, sums: dict[str, tuple[float, float | None]], rule: str
) -> str:
    """The measured change where there is one, otherwise the predicted one."""
    linear, truth = sums[rule]
    if truth is not None:
        return with_error(truth, _sum_error(causes, rule))
    if rule == NOTHING:
        return with_error(linear, causes.linear_error)
    return supported(linear, causes.linear_error, 3, signed=True)


def _sum_error(causes: Causes, rule: str) -> float:
    """Standard error of the summed measured change without a rule's tokens."""
    if rule == NOTHING:
        return causes.truth_error
    return math.hypot(*_changes(causes, rule, "se"))


def _best_by_step(causes: Causes, rule: str) -> Figure:
    before = [(stage.linear, stage.linear_error) for stage in causes.stages]
    after = [(value, 0.0) for value in _changes(causes, rule, "delta_h1")]
    verified = _is_verified(causes, causes.rules())
    if verified:
        before = [(stage.truth, stage.truth_error) for stage in causes.stages]
        errors = _changes(causes, rule, "se")
        after = list(zip(_changes(causes, rule, "delta_h_true"), errors, strict=True))
    pairs = list(zip(before, after, strict=True))
    raised = sum(b[0] < a[0] for b, a in pairs)
    return what_if_by_step(
        causes.stages,
        {NOTHING: before, f"without {rule}": after},
        causes.by_step,
        AXIS_UNITS[causes.normalize],
        f"Without {rule} it is higher at {raised} of {len(before)}",
        verified,
    )


def _rules(causes: Causes, sums: dict[str, tuple[float, float | None]]) -> Table:
    verified = sums[NOTHING][1] is not None
    rows = []
    for rule, (linear, truth) in sums.items():
        left_out = 0
        if rule != NOTHING:
            left_out = sum(map(int, _changes(causes, rule, "num_tokens")))
        first = part(linear, causes.linear_error)
        row = [text(rule), number(left_out), first]
        if truth is not None:
            row.append(change(truth, _sum_error(causes, rule)))
        rows.append(row)
    columns = ["left out", "tokens", "first order"] + ["step taken"] * verified
    return Table(
        title="All rules as numbers",
        columns=columns,
        rows=rows,
        caption=(
            f"Changes in {causes.unit}, summed over the {causes.scope}. Rules that choose "
            "by exact share (largest entropy loss or gain) are a bound: shares are known "
            "afterwards only. Of the others, the one above leaves least of the "
            "first-order change."
        ),
    )


def _rules_by_step(causes: Causes, rules: Sequence[str]) -> Table:
    verified = _is_verified(causes, rules)
    rows = [[text("nothing"), *(_whole(stage, verified) for stage in causes.stages)]]
    for rule in rules:
        found = [causes.row(place, rule) for place in range(len(causes.stages))]
        pairs = zip(found, causes.stages, strict=True)
        rows.append([text(rule), *(_left(row, s, verified) for row, s in pairs)])
    how = "steps really taken and measured" if verified else "first order"
    return Table(
        title="What if, at each checkpoint",
        columns=["left out", *(stage.label for stage in causes.stages)],
        rows=rows,
        caption=f"Changes in {causes.unit}: {how}.",
        folded=True,
    )


def _whole(stage: Stage, verified: bool) -> Cell:
    if verified:
        return change(stage.truth, stage.truth_error)
    return change(stage.linear, stage.linear_error)


def _left(row: dict[str, Any], stage: Stage, verified: bool) -> Cell:
    if verified:
        return change(row["delta_h_true"], row["se"])
    return part(row["delta_h1"], stage.linear_error)


def _parts_by_step(causes: Causes) -> Table:
    present = [
        kind for kind in KINDS if any(s.sums[kind].num_tokens for s in causes.by_kind)
    ]
    rows = []
    for place, stage in enumerate(causes.stages):
        values = [causes.part(name)[place] for name in PARTS]
        values += [causes.by_kind[place].sums[kind].share for kind in present]
        cells = (part(value, stage.linear_error) for value in values)
        rows.append([text(stage.label), *cells])
    return Table(
        title="Parts and shares, at each checkpoint",
        columns=["run", *PARTS, *map(shares.unbroken, present)],
        rows=rows,
        caption=(
            f"In {causes.unit}; the kinds of tokens add up to the gradient of U. {GIVEN_E}"
        ),
        folded=True,
    )
