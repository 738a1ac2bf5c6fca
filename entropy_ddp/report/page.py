"""A page as one HTML file: nothing is fetched, and text from files stays text.

Every text is escaped. The one script is named by its digest in the page's content
security policy, so that a browser runs no other.
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from entropy_ddp import __version__
from entropy_ddp.report.figures.canvas import Figure
from entropy_ddp.report.view import Page


def render_page(page: Page) -> str:
    """The HTML document of a page."""
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            version=__version__,
            # Both are files of this package.
            style=Markup(_asset("style.css")),
            script=Markup(script),
            script_digest=f"sha256-{digest}",
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("entropy_ddp.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.globals["svg"] = _svg
    return environment


def _svg(figure: Figure) -> Markup:
    """A figure's element; matplotlib has escaped the text in it."""
    return Markup(figure.inline_svg())


def _asset(name: str) -> str:
    return files("entropy_ddp.report").joinpath("templates", name).read_text("utf-8")
