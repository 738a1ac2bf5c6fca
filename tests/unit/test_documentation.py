"""Do the pages lead where they say, and name every key and command that there is?"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import entropy_ddp
from entropy_ddp.cli import main
from entropy_ddp.config import Config

ROOT = Path(entropy_ddp.__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The places that headings of a page make, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the repository, and to headings in them."""
    for link in LINK.findall(page.read_text()):
        if re.match(r"https?:", link):
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not place or place in anchors(target), link


# A path in running text or in a command; capitals and stars stand for any name.
PLACE = re.compile(
    r"\b(?:benchmarks|configs|docs|entropy_ddp|examples|launch|tests)/[\w./*-]*\w"
)
MODULE = re.compile(r"`([\w/]+\.py)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """By their path, by their path in the package, or by their name alone."""
    text = page.read_text()
    for place in PLACE.findall(text):
        assert re.search(r"NAME|\*", place) or (ROOT / place).exists(), place
    names = {path.name for path in ROOT.glob("*/**/*.py")}
    for module in MODULE.findall(text):
        is_there = (ROOT / module).exists() or (ROOT / "entropy_ddp" / module).exists()
        assert is_there or module in names or "NAME" in module, module


def keys(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of the configuration, `section.key`."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and not before:
            yield from keys(kind, f"{name}.")
        else:
            yield f"{before}{name}"


def test_the_table_of_the_configuration_names_every_key() -> None:
    """Whole, or as `.key` beside another one."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    table = text.partition("## Keys")[2].partition("\n## ")[0]
    for key in keys(Config):
        short = f"`.{key.partition('.')[2]}`"
        assert f"`{key}`" in table or f"`{key}." in table or short in table, key


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for name in main.commands:
        assert f"| `{name}` |" in text, name
