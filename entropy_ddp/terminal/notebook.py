"""The tables of the terminal as HTML, for a notebook."""

import io

from rich.console import Console

from entropy_ddp.results import Results
from entropy_ddp.terminal.heading import print_heading, verdict_line

WIDTH = 100


def as_html(results: Results) -> str:
    """The answer, what is wrong with it, and the verdict, as one preformatted block."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH)
    print_heading(console, results)
    console.print(verdict_line(results, None))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
