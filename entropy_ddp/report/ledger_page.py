"""The page of a run's ledger."""

from entropy_ddp.ledger.accumulate import NAMES, PART_NAMES, TOKEN_NAMES, Entry, Ledger
from entropy_ddp.report.figures.ledger import (
    curve_and_sums,
    gradient_by_probability,
    parts_by_step,
)
from entropy_ddp.report.view import (
    Cell,
    Page,
    Section,
    Table,
    digits,
    given_e,
    in_context,
    words,
)
from entropy_ddp.report.words import (
    GIVEN_E,
    count,
    differing,
    is_resolved,
    one_line,
    with_error,
)

# Characters of a prompt that are shown; hovering shows all.
PROMPT = 160


def ledger_page(ledger: Ledger, name: str) -> Page:
    """The page, as it is rendered by `render_page`.

    Args:
        ledger: the run's ledger.
        name: what the run is called.
    """
    steps = ledger.steps
    total = ledger.totals.get("truth", ledger.totals["first_order"])
    value, error = total["value"], total["se"]
    told = is_resolved(value, error) and ledger.trusted
    sections = [_run(ledger)]
    if ledger.parts:
        sections += [_parts(ledger), _influence(ledger)]
    sections.append(_checks(ledger))
    return Page(
        title=f"{name}: entropy ledger",
        kicker=f"Entropy ledger of {name}, steps {steps['first']:,} to {steps['last']:,}",
        alarm="" if ledger.trusted else "A truth of this run is not to be trusted.",
        headline=_headline(steps["probed"], value, error),
        sign=("cold" if value < 0 else "warm") if told else "",
        lead=" ".join([_measured_curve(ledger), *map(_sentence, ledger.notes)]),
        checked=f"{steps['probed']:,} of {steps['total']:,} steps were probed.",
        sections=sections,
    )


def _headline(probed: int, value: float, error: float) -> tuple[str, str, str]:
    """A verb only where the sum stands out of its error."""
    steps = count(probed, "step")
    if not is_resolved(value, error):
        begin = f"{steps} changed the entropy by "
        after = " nats per token: too little to tell from zero"
        return begin, with_error(value, error), after
    verb = "lowered" if value < 0 else "raised"
    pair = with_error(abs(value), error, signed=False)
    return f"{steps} {verb} the entropy by ", pair, " nats per token"


def _measured_curve(ledger: Ledger) -> str:
    begin, end = ledger.curve[0], ledger.curve[-1]
    return (
        f"On fresh responses it went from {with_error(begin['value'], begin['se'], signed=False)} to "
        f"{with_error(end['value'], end['se'], signed=False)}."
    )


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


def _run(ledger: Ledger) -> Section:
    columns = ["quantity", "nats/token"]
    if ledger.scaled is not None:
        columns.append(f"scaled to {ledger.steps['total']:,} steps")
    rows = []
    for name, label in NAMES.items():
        if name in ledger.totals:
            row = [words(label), _measured(ledger.totals[name])]
            if ledger.scaled is not None:
                row.append(_measured(ledger.scaled.get(name, {})))
            rows.append(row)
    table = Table(title="Sums over the run", columns=columns, rows=rows)
    return Section(
        id="run", title="The run", figures=[curve_and_sums(ledger)], tables=[table]
    )


def _parts(ledger: Ledger) -> Section:
    errors, error = ledger.part_errors, ledger.share_error

    def cell(value: float, own: float | None) -> Cell:
        if own is None:
            return given_e(value, error)
        return _measured({"value": value, "se": own})

    parts = [
        [words(PART_NAMES[n]), cell(v, errors.get(n))] for n, v in ledger.parts.items()
    ]
    total = sum(ledger.parts.values())
    parts.append([words("total"), cell(total, errors.get("total"))])
    tokens = [
        [words(TOKEN_NAMES[n]), given_e(v, error)] for n, v in ledger.tokens.items()
    ]
    return Section(
        id="parts",
        title="What it is made of",
        lead=(
            f"Of the {ledger.steps['attributed']:,} steps that are split into parts. "
            f"{GIVEN_E}"
        ),
        figures=[parts_by_step(ledger), gradient_by_probability(ledger)],
        tables=[
            Table(
                title="The change by part", columns=["part", "nats/token"], rows=parts
            ),
            Table(
                title="The gradient's part by sign of the advantage",
                columns=["tokens", "nats/token"],
                rows=tokens,
            ),
        ],
    )


def _influence(ledger: Ledger) -> Section:
    caption = "Sums over the steps in which they were among the largest."

    def share(row: Entry) -> Cell:
        return given_e(row["share"], ledger.relative_error * abs(row["share"]))

    tokens = [
        [
            in_context(row["share"], ("", row["text"], "")),
            share(row),
            _count(row),
        ]
        for row in ledger.by_token
    ]
    texts = differing([row["prompt"] for row in ledger.by_prompt])
    prompts = [
        [share(row), _prompt(text, row["prompt"]), _count(row)]
        for text, row in zip(texts, ledger.by_prompt, strict=True)
    ]
    single = [
        [words(row["step"]), share(row), digits(row["logp"])]
        + [digits(row["advantage"], signed=True), _context(row)]
        for row in ledger.top_tokens
    ]
    columns = ["nats/token", "tokens trained on"]
    return Section(
        id="influence",
        title="Who moved it most",
        tables=[
            Table(
                title="Tokens",
                columns=["token", *columns],
                rows=tokens,
                caption=caption,
            ),
            Table(
                title="Prompts",
                columns=[columns[0], "prompt", columns[1]],
                rows=prompts,
                caption=caption,
            ),
            Table(
                title="Single tokens",
                columns=["step", "share", "log p", "A", "token in its context"],
                rows=single,
                folded=True,
            ),
        ],
    )


def _checks(ledger: Ledger) -> Section:
    rows = [
        [words(name.replace("_", " ")), digits(value)]
        for name, value in ledger.checks.items()
    ]
    table = Table(title="The worst of all steps", columns=["check", "value"], rows=rows)
    return Section(id="checks", title="Checks", tables=[table])


def _measured(value: Entry) -> Cell:
    if "se" not in value:
        return words("–")
    return Cell(text=with_error(value["value"], value["se"]), is_number=True)


def _count(row: Entry) -> Cell:
    return Cell(text=f"{row['num_tokens']:,}", is_number=True)


def _context(row: Entry) -> Cell:
    if "context" not in row:
        return words("–")
    return in_context(row["share"], row["context"])


def _prompt(text: str, whole: str) -> Cell:
    return Cell(text=one_line(text, PROMPT), title=whole, is_long=True)
