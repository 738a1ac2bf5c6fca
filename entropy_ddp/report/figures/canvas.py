"""One figure in three forms: SVG inside the page, SVG and PNG files beside it.

In the page, colours are CSS variables, so that the figure follows the page's light or
dark ground, and text is text in the page's font. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from entropy_ddp.answers.words import MINUS, number, power_of_ten

WIDTH = 440  # CSS pixels at natural size, which the page scales
PNG_PIXELS_PER_POINT = 3
# Beyond this many points a scatter becomes a two-dimensional histogram.
LARGEST_SCATTER = 3000
FONT = "DejaVu Sans"


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The colours of a figure: falls are cold, rises are warm."""

    ink: str
    muted: str
    grid: str
    accent: str
    cold: str
    warm: str
    paper: str


# The light colours of style.css. No two are equal: in the page each becomes the variable
# of its name.
PALETTE = Palette(
    ink="#1c2128",
    muted="#59636e",
    grid="#e2e6ea",
    accent="#6b4fb0",
    cold="#1f6fb4",
    warm="#c2570c",
    paper="#ffffff",
)

Draw = Callable[[MatplotlibFigure, Palette], None]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that can be drawn.

    Attributes:
        name: file name without its ending, and prefix of every id in the page.
        title: what is seen.
        caption: how to read it.
        draw: draws it on an empty matplotlib figure in these colours.
        height: CSS pixels at natural size; the width is `WIDTH`.
    """

    name: str
    title: str
    caption: str
    draw: Draw
    height: int = 280

    def inline_svg(self) -> str:
        """The <svg> element for the page."""
        text = _for_page(self._svg, self.name)
        label = f'role="img" aria-labelledby="{self.name}-title {self.name}-caption"'
        return text.replace("<svg ", f"<svg {label} ", 1)

    def svg_file(self) -> bytes:
        """The content of the SVG file."""
        return self._svg.encode()

    def png_file(self) -> bytes:
        """The content of the PNG file."""
        stream = io.BytesIO()
        with matplotlib.rc_context(_settings(self.name)):
            self._drawn.savefig(
                stream,
                format="png",
                dpi=72 * PNG_PIXELS_PER_POINT,
                metadata={"Software": None},
            )
        return stream.getvalue()

    @cached_property
    def _svg(self) -> str:
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context(_settings(self.name)):
            FigureCanvasSVG(self._drawn).print_svg(stream, metadata=nothing)
        return stream.getvalue()

    @cached_property
    def _drawn(self) -> MatplotlibFigure:
        with matplotlib.rc_context(_settings(self.name)):
            size = (WIDTH / 72, self.height / 72)
            figure = MatplotlibFigure(figsize=size, dpi=72, layout="constrained")
            self.draw(figure, PALETTE)
            # Both files are drawn in the same layout, which costs more than drawing.
            engine = figure.get_layout_engine()
            assert engine is not None
            engine.execute(figure)
            figure.set_layout_engine("none")
        return figure


def _settings(name: str) -> dict[Any, Any]:
    """matplotlib's settings for one figure, whatever a matplotlibrc says."""
    palette = PALETTE
    own = {
        "backend": "agg",
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.family": [FONT],
        "font.size": 12,
        "text.color": palette.ink,
        "axes.labelcolor": palette.muted,
        "axes.labelsize": 12,
        "axes.edgecolor": palette.muted,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.8,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "legend.handlelength": 1.6,
        "figure.facecolor": palette.paper,
        "savefig.facecolor": palette.paper,
        "axes.unicode_minus": True,
    }
    return dict(matplotlib.rcParamsDefault) | own


def _for_page(svg: str, name: str) -> str:
    """What matplotlib writes as a file, as an element among others of one page."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Ids are unique in a file only; those that nothing refers to are not needed.
    wanted = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(
        r' id="([^"]+)"',
        lambda found: f' id="{name}-{found[1]}"' if found[1] in wanted else "",
        svg,
    )
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    # The page's font, and no rotation by nothing.
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    for field in fields(Palette):
        svg = svg.replace(getattr(PALETTE, field.name), f"var(--{field.name})")
    return re.sub(r">\s+<", "><", svg).strip()


def sign_colour(palette: Palette, value: float) -> str:
    """Cold for a fall, warm for a rise, neither for neither."""
    if value == 0:
        return palette.muted
    return palette.cold if value < 0 else palette.warm


def common_exponent(values: list[float]) -> int:
    """The power of ten that labels of these values share: 0 if none is needed."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0 or 1e-2 <= largest < 1e4:
        return 0
    exponent = int(f"{largest:e}".split("e")[1])
    return 3 * (exponent // 3)


def unit_label(text: str, unit: str, exponent: int) -> str:
    """An axis label with its unit and the power of ten that the ticks leave out."""
    power = f"{power_of_ten(exponent)} " if exponent else ""
    return f"{text} [{power}{unit}]"


def scale_ticks(axes: Axes, which: str, exponent: int) -> None:
    """Show an axis' ticks in units of a power of ten, with a true minus."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: _tick(value / 10.0**exponent))
    )


def _tick(value: float) -> str:
    return f"{round(value, 9):,g}".replace("-", MINUS)


def label_below_names(axes: Axes, text: str) -> None:
    """Label the axis below bars or dots whose names take much of the width.

    To the left, below the names: in the middle of what they leave it would be cut off.
    """
    axes.set_xlabel(text, loc="right")


def whole_ticks(axes: Axes, which: str) -> None:
    """Show an axis' ticks at whole numbers only, as of steps and counts."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    # Also where only one of them is in view.
    axis.set_major_locator(
        MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def log_ticks(axes: Axes, which: str) -> None:
    """Show the ticks of a logarithmic axis as powers of ten, in plain text."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _power(value: float) -> str:
    mantissa, exponent = f"{value:e}".split("e")
    if float(mantissa) != 1:
        return number(value, 2)
    return power_of_ten(int(exponent))
