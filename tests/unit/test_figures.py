"""Is all of a figure seen, and does an axis show what its values can be?"""

import re
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.legend import Legend
from run_directories import CURVATURE, GRADIENT_DOT, sweep_part, write_run

from entropy_ddp.ledger.accumulate import accumulate
from entropy_ddp.ledger.lines import RunLog
from entropy_ddp.report.comparison import comparison_page
from entropy_ddp.report.figures.canvas import Figure
from entropy_ddp.report.figures.ledger import curve_and_sums, parts_by_step
from entropy_ddp.report.run_page import run_page
from entropy_ddp.report.subjects import group_runs
from entropy_ddp.results.reading import read_run


def drawn(figure: Figure) -> MatplotlibFigure:
    """A figure as it is drawn, with the place of everything in it."""
    found = figure._drawn
    FigureCanvasAgg(found).draw()
    return found


def test_nothing_of_a_figure_is_cut_off(tmp_path: Path) -> None:
    """Labels end inside the figure, points inside the axes, in every figure."""
    texts = [["1", "2"], ["3"], ["4"], ["5"]]
    kinds = [
        {"label": f"{10 * d}-{10 * d + 10} %", "share": 1e-4 * (d - 4), "num_tokens": 9}
        for d in range(10)
    ]
    runs = [
        write_run(
            tmp_path / f"run{step}",
            {
                "curvature": CURVATURE,
                "gradient_dot": GRADIENT_DOT,
                **sweep_part(),
                "attribution.summaries": {"probability decile": kinds},
                "truth.H_orig": 0.5 + 0.01 * (step == 2),
            },
            config={"checkpoint.path": f"out/checkpoint-{step}"},
            texts=texts,
        )
        for step in (1, 2, 3)
    ]
    comparison = comparison_page(group_runs([read_run(run) for run in runs]))
    for figure in [
        *run_page(group_runs([read_run(runs[0])])[0]).figures,
        *comparison.figures,
    ]:
        shown = drawn(figure)
        parts = [*shown.legends]
        for axes in shown.axes:
            parts += [axes.xaxis, axes.yaxis, *axes.texts, *axes.findobj(Legend)]
        whole = shown.bbox.padded(1)
        for part in parts:
            box = part.get_tightbbox(shown.canvas.get_renderer())
            assert box is None or whole.x0 <= box.x0, (figure.name, part)
            assert box is None or box.x1 <= whole.x1, (figure.name, part)
            assert box is None or whole.y0 <= box.y0, (figure.name, part)
            assert box is None or box.y1 <= whole.y1, (figure.name, part)
        if figure.name == "entropy-by-step":
            (axes,) = shown.axes
            (line,) = axes.get_lines()
            radius = line.get_markersize() / 72 * shown.dpi / 2
            highest = axes.transData.transform((0, max(line.get_ydata())))[1]
            assert highest + radius <= axes.bbox.y1


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_steps_are_whole(steps: int) -> None:
    """No axis of steps has a tick between two of them."""
    pair = {"value": -0.1, "se": 0.01}
    entries = [
        {
            "step": step, "entropy": {"value": 1 - 0.1 * step, "se": 0.1},
            "first_order": pair, "second_order": pair,
            "parts": {"momentum": -0.1, "decay": 0.0, "gradient": 0.0},
            "tokens": {}, "deciles": [0.1] * 10, "top_tokens": [], "by_token": [],
            "by_prompt": [],
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    ledger = accumulate(RunLog(runs=[], entries=entries, end=None, notes=[]))
    for figure in (curve_and_sums(ledger), parts_by_step(ledger)):
        (axes,) = drawn(figure).axes
        labels = [tick.get_text() for tick in axes.get_xticklabels()]
        assert labels and all(re.fullmatch(r"−?\d+", label) for label in labels)
        low, high = axes.get_xlim()
        assert any(low <= place <= high for place in axes.get_xticks())
