"""Does docs/where.md name every file of the package, with the phrase it begins with?"""

import ast
from collections.abc import Iterator
from pathlib import Path

import entropy_ddp

PACKAGE = Path(entropy_ddp.__file__).parent
PAGE = PACKAGE.parent / "docs" / "where.md"


def phrases() -> Iterator[str]:
    """A line for each folder, and below it one for each file that says something."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    for folder in folders:
        lines = []
        for path in sorted(folder.glob("*.py")):
            documentation = ast.get_docstring(ast.parse(path.read_text()))
            if documentation is not None:
                first = documentation.partition("\n\n")[0].replace("\n", " ")
                lines.append(f"- `{path.name}`: {first}")
        if lines:
            name = folder.relative_to(PACKAGE.parent).as_posix()
            yield from (f"### `{name}/`", "", *lines, "")


def test_every_file_is_named_with_its_phrase() -> None:
    _, _, section = PAGE.read_text().partition("## Where things are\n\n")
    assert section.splitlines() == [*phrases()][:-1], (
        "the section `Where things are` of docs/where.md should read:\n\n"
        + "\n".join(phrases())
    )
