"""The ledger of a run as one HTML file that needs nothing beside it."""

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entropy_ddp.errors import InputError
from entropy_ddp.ledger.accumulate import PARTS, Ledger
from entropy_ddp.terminal.ledger import NAMES, PART_NAMES

COLOURS = {"truth": "#1b1b1b", "first_order": "#c0392b", "second_order": "#2471a3"}
TEMPLATES = Path(__file__).parent / "templates"


def ledger_page(ledger: Ledger, title: str) -> str:
    """The page.

    Args:
        ledger: the run's ledger.
        title: what it is called.

    Raises:
        InputError: matplotlib or Jinja2 is not installed.
    """
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise InputError(
            f"ledger: expected {error.name} to be installed for the page, found no such "
            "package; pip install entropy_ddp[report]"
        ) from error
    # Text as text, and the same bytes for the same ledger.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ledger"})
    figures = [_figure(_curves, ledger)]
    if ledger.parts:
        figures += [_figure(_parts, ledger), _figure(_deciles, ledger)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("ledger.html.j2")
    return template.render(
        **asdict(ledger),
        title=title,
        names=NAMES,
        part_names=PART_NAMES,
        figures=figures,
    )


def _figure(draw: Callable[[Any, Ledger], None], ledger: Ledger) -> str:
    """One plot as an SVG element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, ledger)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _curves(axes: Any, ledger: Ledger) -> None:
    """The measured curve, and the sums from where it begins."""
    _band(axes, ledger.curve, "#7f8c8d", "entropy, fresh responses", 0.0)
    begin = ledger.curve[0]
    for name, colour in COLOURS.items():
        if name not in ledger.totals:
            continue
        points = [{"step": begin["step"], "value": 0.0, "se": 0.0}]
        points += [{"step": row["step"], **row[name]} for row in ledger.cumulative]
        line = _band(axes, points, colour, NAMES[name], begin["value"])
        # It lies on the truth, where all is well.
        line.set_linestyle("--" if name == "second_order" else "-")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, fontsize=8)


def _band(
    axes: Any, points: list[dict[str, float]], colour: str, label: str, offset: float
) -> Any:
    steps = [point["step"] for point in points]
    values = [offset + point["value"] for point in points]
    low, high = (
        [value + sign * point["se"] for value, point in zip(values, points)]
        for sign in (-1, 1)
    )
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    return axes.plot(steps, values, color=colour, linewidth=1.3, label=label)[0]


def _parts(axes: Any, ledger: Ledger) -> None:
    """Sums of the parts of the first-order changes."""
    steps = [row["step"] for row in ledger.cumulative_parts]
    for name in PARTS:
        values = [row[name] for row in ledger.cumulative_parts]
        axes.plot(steps, values, linewidth=1.3, label=PART_NAMES[name])
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("sum, nats per token")
    axes.legend(frameon=False, fontsize=8)


def _deciles(axes: Any, ledger: Ledger) -> None:
    """The gradient's part by probability of the token."""
    labels = [f"{10 * d}-{10 * d + 10}" for d in range(len(ledger.deciles))]
    axes.bar(labels, ledger.deciles, color="#2471a3")
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("tokens by probability, percentile")
    axes.set_ylabel("gradient's part, nats per token")
