"""The attribution of a change to the update batch, as tables in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_ddp.estimators.attribution import TOP_SHARES
from entropy_ddp.results import AttributionResult, Results
from entropy_ddp.terminal.heading import print_heading, verdict_line
from entropy_ddp.terminal.tables import new_table, number, plus_minus


def print_attribution(console: Console, results: Results, out: str | None) -> None:
    """Parts of the step, tokens that matter most, cheap scores against exact shares."""
    print_heading(console, results)
    print_shares(console, results)
    console.print(verdict_line(results, out))


def print_shares(console: Console, results: Results) -> None:
    """The attribution alone."""
    found = results.attribution
    assert found is not None
    console.print(_parts(found))
    console.print(_top_tokens(found))
    console.print(_summaries(found))
    console.print(_proxies(found))
    console.print(_what_if(found))


def _parts(found: AttributionResult) -> Table:
    table = new_table(
        "ΔH first order by part of the step",
        "part",
        "nats",
        "of the total",
        caption=(
            f"attribution gap {number(found.attribution_gap, 3)}; half of the sum of "
            f"|share| is in {found.concentration:.1%} of U's tokens"
        ),
    )
    parts = {
        "momentum (earlier batches)": found.momentum,
        "weight decay": found.weight_decay,
        "gradient of U": found.gradient,
        "total": found.total,
    }
    for name, value in parts.items():
        # + 0.0: a part of zero has no sign.
        share = f"{value / found.total + 0.0:+.1%}" if found.total else "-"
        table.add_row(name, number(value, 11), share)
    return table


def _top_tokens(found: AttributionResult) -> Table:
    columns = ("share, nats", "log p", "A", "line", "k", "token in its context")
    table = new_table(f"The {len(found.top_tokens)} tokens that matter most", *columns)
    table.columns[0].justify = "right"
    table.columns[-1].justify = "left"
    for row in found.top_tokens:
        context = Text("-")
        if "context" in row:
            before, token, after = row["context"]
            context = Text(before, style="dim")
            context.append(f"[{token}]", style="bold")
            context.append(after, style="dim")
        table.add_row(
            f"{row['share']:+.3e}",
            f"{row['logp']:.3f}",
            f"{row['advantage']:+.3f}",
            str(row["index"] + 1),
            str(row["k"]),
            context,
        )
    return table


def _summaries(found: AttributionResult) -> Table:
    table = new_table("Shares summed by kind of token", "kind", "nats", "tokens")
    for name, rows in found.summaries.items():
        table.add_row(f"by {name}", style="bold")
        for row in rows:
            table.add_row(
                f"  {row['label']}", f"{row['share']:+.4e}", f"{row['num_tokens']:,}"
            )
    return table


def _proxies(found: AttributionResult) -> Table:
    scores = {"covariance": found.covariance, **found.proxies}
    fractions = [f"{fraction:g}" for fraction in TOP_SHARES]
    table = new_table(
        "How well cheap scores rank tokens against their exact share",
        "score",
        "Spearman",
        *(f"overlap of top {float(f):.0%}" for f in fractions),
        caption="a score that predicts entropy loss has a Spearman correlation near -1",
    )
    for name, judged in scores.items():
        correlation = judged.get("spearman")
        table.add_row(
            name,
            "-" if correlation is None else f"{correlation:+.3f}",
            *(_share(judged["top_overlap"].get(f)) for f in fractions),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _what_if(found: AttributionResult) -> Table:
    verified = any("delta_h_true" in row for row in found.what_if)
    table = new_table(
        "What if these tokens had been left out of the update",
        "rule",
        "tokens",
        "ΔH first order",
        *(("ΔH true",) if verified else ()),
        caption=(
            "first order: with the Adam denominator of the whole update; true: the "
            "masked step taken"
        ),
    )
    for row in found.what_if:
        cells = [row["rule"], f"{row['num_tokens']:,}", f"{row['delta_h1']:+.4e}"]
        if verified:
            cells.append(plus_minus(row["delta_h_true"], row["se"]))
        table.add_row(*cells)
    return table
