"""What moved the entropy at several checkpoints, from the attribution of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entropy_ddp.report import kinds
from entropy_ddp.report.details import token_table
from entropy_ddp.report.figures.causes import (
    kinds_by_step,
    parts_by_step,
    rules_in_all,
    what_if_by_step,
)
from entropy_ddp.report.figures.progress import Stage
from entropy_ddp.report.kinds import KINDS, SharesByKind
from entropy_ddp.report.subjects import Subject
from entropy_ddp.report.view import (
    Cell,
    Glance,
    Section,
    Table,
    digits,
    given_e,
    measured,
    words,
)
from entropy_ddp.report.words import (
    AXIS_UNITS,
    GIVEN_E,
    UNITS,
    count,
    listed,
    relative_error,
    supported,
    with_error,
)

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


def sections(causes: Causes) -> list[Section]:
    """Who moved the entropy along the run, and what if it had been left out."""
    total = kinds.together(causes.by_kind)
    moved = Section(
        id="attribution",
        title="Who moved the entropy",
        lead=" ".join(
            [kinds.sentence(total, causes.unit, causes.linear_error), *_scope(causes)]
        ),
        figures=(_parts(causes), _kinds(causes, total)),
        tables=(
            kinds.table(total, causes.unit, f"the {causes.scope}", causes.linear_error),
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


def glance(causes: Causes) -> Glance:
    """The kind of token that does most, for the top of the page."""
    total = kinds.together(causes.by_kind)
    answer = "No token"
    if total.share:
        name = kinds.named(total.leading())
        answer = name[0].upper() + name[1:]
    return Glance(
        question="What in the gradient did it?",
        answer=answer,
        detail=f"{kinds.sentence(total, causes.unit, causes.linear_error)} Summed over the {causes.scope}.",
    )


def _sum(values: Sequence[float]) -> float:
    return math.fsum(values)


def _scope(causes: Causes) -> list[str]:
    """What the sums are, and what they are not."""
    sums = {name: _sum(causes.part(name)) for name in PARTS}
    total, error = _sum(list(sums.values())), causes.linear_error
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


def _parts(causes: Causes) -> Any:
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


def _kinds(causes: Causes, total: SharesByKind) -> Any:
    values = {
        kind: [sums.sums[kind].share for sums in causes.by_kind] for kind in KINDS
    }
    title = "No token of U has a share"
    if total.share:
        leading, verb = total.leading(), "lower" if total.share < 0 else "raise"
        name = kinds.named(leading)
        title = f"{name[0].upper()}{name[1:]} {verb} the entropy most"
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
    return min(usable, key=lambda rule: abs(_sum(_changes(causes, rule, "delta_h1"))))


def _changes(causes: Causes, rule: str, key: str) -> list[float]:
    return [causes.row(place, rule)[key] for place in range(len(causes.stages))]


def _sums(
    causes: Causes, rules: Sequence[str]
) -> dict[str, tuple[float, float | None]]:
    """Predicted and measured change with nothing left out and by each rule, summed."""
    linear = _sum([stage.linear for stage in causes.stages])
    truth = _sum([stage.truth for stage in causes.stages])
    verified = _is_verified(causes, rules)
    sums = {NOTHING: (linear, truth if verified else None)}
    for rule in rules:
        left = _sum(_changes(causes, rule, "delta_h_true")) if verified else None
        sums[rule] = (_sum(_changes(causes, rule, "delta_h1")), left)
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


def _best_by_step(causes: Causes, rule: str) -> Any:
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
        first = given_e(linear, causes.linear_error)
        row = [words(rule), digits(left_out), first]
        if truth is not None:
            row.append(measured(truth, _sum_error(causes, rule)))
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
    rows = [[words("nothing"), *(_whole(stage, verified) for stage in causes.stages)]]
    for rule in rules:
        found = [causes.row(place, rule) for place in range(len(causes.stages))]
        pairs = zip(found, causes.stages, strict=True)
        rows.append([words(rule), *(_left(row, s, verified) for row, s in pairs)])
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
        return measured(stage.truth, stage.truth_error)
    return measured(stage.linear, stage.linear_error)


def _left(row: dict[str, Any], stage: Stage, verified: bool) -> Cell:
    if verified:
        return measured(row["delta_h_true"], row["se"])
    return given_e(row["delta_h1"], stage.linear_error)


def _parts_by_step(causes: Causes) -> Table:
    present = [
        kind for kind in KINDS if any(s.sums[kind].num_tokens for s in causes.by_kind)
    ]
    rows = []
    for place, stage in enumerate(causes.stages):
        values = [causes.part(name)[place] for name in PARTS]
        values += [causes.by_kind[place].sums[kind].share for kind in present]
        cells = (given_e(value, stage.linear_error) for value in values)
        rows.append([words(stage.label), *cells])
    return Table(
        title="Parts and shares, at each checkpoint",
        columns=["run", *PARTS, *map(kinds.unbroken, present)],
        rows=rows,
        caption=(
            f"In {causes.unit}; the kinds of tokens add up to the gradient of U. {GIVEN_E}"
        ),
        folded=True,
    )
