"""Several checkpoints of a training run side by side, or several settings of one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from entropy_ddp.answers import shares
from entropy_ddp.answers.cells import (
    Cell,
    Row,
    Table,
    change,
    level,
    number,
    part,
    share,
    text,
    verdict,
)
from entropy_ddp.answers.headline import Document, Glance, stands_out
from entropy_ddp.answers.shares import KINDS, SharesByKind, together
from entropy_ddp.answers.tables import token_table
from entropy_ddp.answers.words import (
    AXIS_UNITS,
    FIXED,
    GIVEN_E,
    UNITS,
    count,
    entropy_error,
    is_missed,
    is_resolved,
    linear_error,
    listed,
    missed,
    percent,
    percent_with_error,
    quantile_of,
    relative_error,
    shown_error,
    supported,
    with_error,
)
from entropy_ddp.answers.words import (
    number as in_words,
)

PARTS = {
    "momentum": "momentum", "weight decay": "weight_decay", "gradient of U": "gradient",
}  # fmt: skip
NUM_TOKENS = 20
# Rules that begin so choose tokens by their exact shares: nobody can apply them in a
# training, and they bound what the others can reach.
BY_SHARE = "largest entropy "
NOTHING = "nothing left out"

# A value and its standard error.
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One checkpoint.

    Attributes:
        place: its training step, or its number in the given order.
        label: how it is called.
        checkpoint: the weights it is of.
        document: its results.
        by_kind: the shares of its tokens by kind; None without an attribution.
    """

    place: float
    label: str
    checkpoint: str
    document: Document
    by_kind: SharesByKind | None

    @property
    def entropy(self) -> tuple[float, float | None]:
        """H before the step; old runs did not record its error."""
        truth = self.document["truth"]
        return truth["H_orig"], entropy_error(truth)

    @property
    def quantile(self) -> float:
        """Standard errors that make half of a 95 % interval."""
        return quantile_of(self.document)

    @property
    def truth(self) -> Pair:
        """The measured change."""
        truth = self.document["truth"]
        return truth["delta_h_true"], shown_error(truth)

    @property
    def linear(self) -> Pair:
        """The predicted change."""
        return self.document["linear"]["delta_h1"], linear_error(self.document)

    @property
    def is_trusted(self) -> bool:
        """No check says that its numbers are wrong."""
        return bool(self.document["status"] == "ok")

    @property
    def is_resolved(self) -> bool:
        """Whether the measured change is to be trusted and stands out of its error."""
        return self.is_trusted and stands_out(self.document["truth"])

    @property
    def is_predicted(self) -> bool:
        """Whether first order is right within a tenth, or within its error."""
        missed_by, _ = missed(self.document, "linear")
        within = abs(missed_by) <= 0.1 * abs(self.truth[0])
        return within or not is_missed(self.document, "linear")

    def part(self, name: str) -> float:
        """A part of the first-order change; of a stage with an attribution."""
        return float(self.document["attribution"][PARTS[name]])

    def part_error(self, name: str) -> float | None:
        """Its standard error; old runs have none."""
        return shares.part_error(self.document, PARTS[name])

    def of_kind(self, kind: str) -> float:
        """The shares of a kind of tokens; likewise."""
        assert self.by_kind is not None
        return self.by_kind.shares[kind]

    @property
    def what_if(self) -> dict[str, Document]:
        """What each rule leaves; likewise."""
        return {row["rule"]: row for row in self.document["attribution"]["what_if"]}


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is compared.

    Attributes:
        stages: the checkpoints.
        by_step: whether they stand at their training steps.
    """

    stages: Sequence[Stage]
    by_step: bool

    @property
    def unit(self) -> str:
        """Of entropies and their changes."""
        return UNITS[self.stages[0].document["truth"]["normalize"]]

    @property
    def axis_unit(self) -> str:
        """The same on an axis."""
        return AXIS_UNITS[self.stages[0].document["truth"]["normalize"]]

    @property
    def named(self) -> str:
        """How many, and of what."""
        return count(len(self.stages), "checkpoint" if self.by_step else "run")

    @property
    def falls_and_rises(self) -> tuple[int, int]:
        """Measured changes that are: trusted, and beyond their error."""
        resolved = [stage for stage in self.stages if stage.is_resolved]
        falls = sum(stage.truth[0] < 0 for stage in resolved)
        return falls, len(resolved) - falls

    @property
    def moved(self) -> list[Stage]:
        """Those with an attribution: what follows is of them alone."""
        return [stage for stage in self.stages if stage.by_kind is not None]

    @property
    def by_kind(self) -> SharesByKind:
        """The shares of all tokens by kind."""
        return together(stage.by_kind for stage in self.moved if stage.by_kind)

    @property
    def scope(self) -> str:
        """Over what sums are taken."""
        found = count(len(self.moved), "probed step" if self.by_step else "run")
        if len(self.moved) < len(self.stages):
            found += f" with an attribution (of {len(self.stages)})"
        return found

    @property
    def linear_error(self) -> float:
        """Standard error of the summed first-order change; each has its own E."""
        return math.hypot(*(stage.linear[1] for stage in self.moved))

    @property
    def kind_errors(self) -> dict[str, float]:
        """Standard errors of the sums by kind; empty where a run has none."""
        found = [shares.errors_of_kinds(stage.document) for stage in self.moved]
        return {
            kind: math.hypot(*(errors.get(kind, 0.0) for errors in found))
            for kind in KINDS
            if all(found)
        }

    @property
    def rules(self) -> list[str]:
        """What-if rules that every checkpoint has, in the order of the first."""
        first, *others = (stage.what_if for stage in self.moved)
        return [rule for rule in first if all(rule in rows for rows in others)]

    @property
    def verified(self) -> bool:
        """Whether every step without tokens was really taken."""
        return all(
            "delta_h_true" in stage.what_if[rule]
            for stage in self.moved
            for rule in self.rules
        )

    @property
    def best_rule(self) -> str:
        """The rule that leaves least of the summed change, as first order predicts it."""
        usable = [rule for rule in self.rules if not rule.startswith(BY_SHARE)]
        return min(
            usable or self.rules, key=lambda rule: abs(self.predicted_in_all(rule)[0])
        )

    def predicted(self, stage: Stage, rule: str) -> Pair:
        """The first-order change that a rule leaves.

        Runs that recorded no error of it show that of the whole change.
        """
        if rule == NOTHING:
            return stage.linear
        value, error = shares.left_at_first_order(stage.what_if[rule])
        return value, stage.linear[1] if error is None else error

    def measured(self, stage: Stage, rule: str) -> Pair:
        """The same of the step without these tokens, taken."""
        if rule == NOTHING:
            return stage.truth
        return shares.left_in_truth(stage.what_if[rule])

    def predicted_in_all(self, rule: str) -> Pair:
        """The sum of the first-order changes that a rule leaves."""
        return _summed(self.predicted(stage, rule) for stage in self.moved)

    def measured_in_all(self, rule: str) -> Pair:
        """The sum of the measured ones."""
        return _summed(self.measured(stage, rule) for stage in self.moved)


def _summed(pairs: Iterable[Pair]) -> Pair:
    """The sum of independent values, and its error."""
    values, errors = zip(*pairs)
    return math.fsum(values), math.hypot(*errors)


# In words


def told_entropy(found: Checkpoints) -> str:
    """How the entropy of the last compares with that of the first.

    The two are of different responses: sqrt(se^2 + se^2) is the error of their
    difference, and more than that where runs share a file of E. Runs of one checkpoint
    have one entropy, which each measures by its own responses: no fall and no rise.
    """
    first, last = found.stages[0], found.stages[-1]
    if not (first.is_trusted and last.is_trusted):
        return "The entropy of each, not all of which are to be trusted"
    (before, before_error), (after, after_error) = first.entropy, last.entropy
    if before_error is None or after_error is None:
        return "The entropy of each, whose error these runs did not record"
    if len({stage.checkpoint for stage in found.stages}) == 1:
        return "The entropy of one checkpoint, by the responses of each run"
    value, error = after - before, math.hypot(before_error, after_error)
    if not is_resolved(value, error):
        pair = with_error(value, error)
        return f"The entropy changes by {pair}: too little to tell from zero"
    verb = "falls" if value < 0 else "rises"
    return f"The entropy {verb} by {with_error(abs(value), error, signed=False)}"


def headline(found: Checkpoints) -> tuple[str, str, str]:
    """The answer in one sentence: before the value, the value, after it."""
    falls, rises = found.falls_and_rises
    if not falls + rises:
        after = f" of {found.named} beyond its error."
        return "One step changes the entropy at ", "none", after
    verb = "lowers" if falls >= rises else "raises"
    return (
        f"One step {verb} the entropy at ",
        f"{max(falls, rises)} of {found.named}",
        ".",
    )


def lead(found: Checkpoints) -> str:
    """The entropy from the first to the last, what is counted, and what is left out."""
    ends = []
    for stage in (found.stages[0], found.stages[-1]):
        value, error = stage.entropy
        shown = f"about {in_words(value, 2)}"
        if error is not None:
            shown = with_error(value, error, signed=False)
        ends.append(f"{shown} {found.unit} ({stage.label})")
    falls, rises = found.falls_and_rises
    trusted = sum(stage.is_trusted for stage in found.stages)
    counted = [
        f"{number_of} {one if number_of == 1 else several}{rest}"
        for number_of, one, several, rest in (
            (falls, "falls", "fall", ""),
            (rises, "rises", "rise", ""),
            (trusted - falls - rises, "is", "are", " too small to tell"),
            (len(found.stages) - trusted, "is", "are", " not to be trusted"),
        )
        if number_of
    ]
    return (
        f"{told_entropy(found)}: from {' to '.join(ends)}. Changes whose 95{FIXED}% "
        f"interval leaves zero out are counted: {', '.join(counted)}."
    )


def moved_sentence(found: Checkpoints) -> str:
    """Which kind of tokens does most."""
    return shares.sentence(found.by_kind, found.unit, found.linear_error)


def sums_sentence(found: Checkpoints) -> str:
    """What the sums over checkpoints are, and what they are not."""
    error = found.linear_error
    sums = {name: math.fsum(s.part(name) for s in found.moved) for name in PARTS}
    limits = ", not over the whole run" if found.by_step else ""
    said = f"All sums are over the {found.scope}{limits}."
    told, given = [], ""
    for name, value in sums.items():
        own = [stage.part_error(name) for stage in found.moved]
        spread = math.hypot(*(e for e in own if e is not None))
        if not value:
            continue
        shown = with_error(value, spread)
        if None in own:
            shown, given = supported(value, error, 3, signed=True), f" {GIVEN_E}"
        told.append(f"{name} {shown}")
    if told:
        total = with_error(math.fsum(sums.values()), error)
        said += f" First order adds up to {total} {found.unit}: {listed(told)}.{given}"
    return said


def what_if_sentence(found: Checkpoints) -> str:
    """The summed change with all tokens, and without those of the best rule."""
    best = found.best_rule
    in_all = found.measured_in_all if found.verified else found.predicted_in_all
    whole, left = (with_error(*in_all(rule)) for rule in (NOTHING, best))
    return (
        f"Summed over the {found.scope}, the change is {whole} {found.unit}, and without "
        f"{best} it is {left}. Each step is taken again alone: what earlier batches left "
        "in the momentum stays, and only a training without these tokens tells what would "
        "come of it."
    )


def glances(found: Checkpoints) -> list[Glance]:
    """Where it falls most, whether first order predicts it, and what did it."""
    resolved = [stage for stage in found.stages if stage.is_resolved]
    steepest = min(resolved, key=lambda stage: stage.truth[0], default=None)
    where = Glance(
        question="Where does it fall most?",
        answer="Nowhere",
        detail="No measured change is a fall beyond its error.",
    )
    if steepest is not None and steepest.truth[0] < 0:
        entropy, _ = steepest.entropy
        detail = with_error(*steepest.truth)
        if entropy:
            ratio, error = (x / entropy for x in steepest.truth)
            detail += f" ({percent_with_error(ratio, error)})"
        where = Glance(
            question="Where does it fall most?",
            answer=steepest.label,
            detail=f"{detail}; others may lie within its error.",
        )
    glances = [where]
    if resolved:
        agreeing = sum(stage.is_predicted for stage in resolved)
        of_all = f"{agreeing} of {len(resolved)}"
        glances.append(
            Glance(
                question="Does first order predict it?",
                answer=f"Within {percent(0.1)} or its error at {of_all}",
                detail="Counted where the measured change stands out of its error.",
            )
        )
    if found.moved:
        total = found.by_kind
        sentence = moved_sentence(found)
        glances.append(
            Glance(
                question="What in the gradient did it?",
                answer=shares.named(total.leading()) if total.share else "No token",
                detail=f"{sentence} Summed over the {found.scope}.",
            )
        )
    return glances


# As tables


def numbers(found: Checkpoints) -> Table:
    """Entropy and its change at every checkpoint."""
    rows = []
    for stage in found.stages:
        entropy, truth = stage.entropy[0], stage.truth
        of_entropy = share(None)
        if entropy:
            error = truth[1] / entropy
            of_entropy = share(truth[0] / entropy, error=error, signed=True)
        rows.append(
            (
                text(stage.label),
                level(*stage.entropy),
                change(*truth),
                of_entropy,
                change(*stage.linear),
                number(stage.document["truth"]["ess_fraction"]),
                _verdict(stage.document),
            )
        )
    return Table(
        title="The numbers",
        columns=(
            "run", "H", "measured change", "of H", "first order", "ESS / N", "verdict",
        ),
        rows=rows,
        caption=f"H and its changes in {found.unit}; ± is one standard error.",
    )  # fmt: skip


def _verdict(document: Document) -> Cell:
    if document["status"] != "ok":
        return verdict("fail", document["status"])
    warned = sum(row["verdict"] == "warn" for row in document["audit"])
    return verdict("warn", count(warned, "warning")) if warned else verdict("ok")


def top_tokens(found: Checkpoints) -> Table:
    """The tokens with the largest shares of all checkpoints."""
    pairs = [
        (token, stage.label)
        for stage in found.moved
        for token in stage.document["attribution"]["top_tokens"]
    ]
    pairs = sorted(pairs, key=lambda pair: -abs(pair[0]["share"]))[:NUM_TOKENS]
    title = "The tokens that matter most, of all runs"
    doubtful = [s.label for s in found.moved if not shares.is_reliable(s.document)]
    if doubtful:
        title = (
            "The largest shares of tokens, of all runs; not reliable with the E of "
            f"{listed(doubtful)}"
        )
    return token_table(
        title,
        [token for token, _ in pairs],
        found.unit,
        max(relative_error(stage.document) for stage in found.moved),
        [label for _, label in pairs],
    )


def parts_by_step(found: Checkpoints) -> Table:
    """Parts of the step, and shares of tokens by kind, at every checkpoint."""
    present = [kind for kind in KINDS if found.by_kind.counts[kind]]
    rows = []
    for stage in found.moved:
        own = shares.errors_of_kinds(stage.document)
        values = [(stage.part(name), stage.part_error(name)) for name in PARTS]
        values += [(stage.of_kind(kind), own.get(kind)) for kind in present]
        cells = (
            change(value, spread) if spread else part(value, stage.linear[1])
            for value, spread in values
        )
        rows.append([text(stage.label), *cells])
    given = "± is one standard error of this E."
    if any(stage.part_error("gradient of U") is None for stage in found.moved):
        given = GIVEN_E
    return Table(
        title="Parts and shares, at each checkpoint",
        columns=["run", *PARTS, *map(shares.unbroken, present)],
        rows=rows,
        caption=(
            f"In {found.unit}; the kinds of tokens add up to the gradient of U. {given}"
        ),
        folded=True,
    )


def rules(found: Checkpoints) -> Table:
    """What each rule leaves of the summed change."""
    rows: list[Row] = []
    for rule in (NOTHING, *found.rules):
        left_out = 0
        if rule != NOTHING:
            left_out = sum(stage.what_if[rule]["num_tokens"] for stage in found.moved)
        row = [text(rule), number(left_out, 9)]
        row.append(change(*found.predicted_in_all(rule)))
        if found.verified:
            row.append(change(*found.measured_in_all(rule)))
        rows.append(row)
    return Table(
        title="All rules as numbers",
        columns=["left out", "tokens", "first order"] + ["step taken"] * found.verified,
        rows=rows,
        caption=(
            f"Changes in {found.unit}, summed over the {found.scope}. Rules that choose "
            "by exact share (largest entropy loss or gain) are a bound: shares are known "
            "afterwards only. Of the others, the one above leaves least of the "
            "first-order change."
        ),
    )


def rules_by_step(found: Checkpoints) -> Table:
    """What each rule leaves at every checkpoint."""

    def left(stage: Stage, rule: str) -> Cell:
        pair = found.measured if found.verified else found.predicted
        return change(*pair(stage, rule))

    how = "steps really taken and measured" if found.verified else "first order"
    return Table(
        title="What if, at each checkpoint",
        columns=["left out", *(stage.label for stage in found.moved)],
        rows=[
            [text(rule), *(left(stage, rule) for stage in found.moved)]
            for rule in (NOTHING, *found.rules)
        ],
        caption=f"Changes in {found.unit}: {how}.",
        folded=True,
    )
