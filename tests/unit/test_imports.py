"""Imports point down only, and a few libraries are imported in one place only."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import entropy_ddp

PACKAGE = Path(entropy_ddp.__file__).parent
# From the bottom up: a room may import from the rooms before it, and from itself.
ROOMS = (
    "__init__",
    "errors",
    "files",
    "interruption",
    "memory",
    "config",
    "distributed",
    "data",
    "model",
    "checkpoint",
    "sampling",
    "importers",
    "update",
    "estimators",
    "results",
    "ledger",
    "answers",
    "terminal",
    "report",
    "probe",
    "demo",
    "api",
    "training",
    "cli",
    "__main__",
)
# Module prefixes and the only rooms, files or folders that may import them.
RESERVED = {
    "torch.distributed": {"distributed"},
    "torch.nn.parallel": {"distributed"},
    "click": {"cli"},
    "rich": {"cli", "terminal"},
    "pydantic": {"config"},
    "yaml": {"config"},
    "matplotlib": {"report/figures"},
    "jinja2": {"report/page.py"},
}
HEAVY = {"torch", "numpy", "transformers", "peft", "accelerate", "trl", "safetensors"}
# What `pip install entropy_ddp` alone does not bring.
EXTRAS = {
    "jinja2",
    "markupsafe",
    "matplotlib",
    "trl",
    "datasets",
    "pyarrow",
    "math_verify",
}
# What runs before a command does, help and usage errors, and after it: no model.
LIGHT_ROOMS = {
    "__init__", "__main__", "errors", "files", "interruption",
    "config", "ledger", "results", "answers", "terminal", "cli",
}  # fmt: skip
# A configuration is complete before torch is needed, with what a trainer left of it.
LIGHT_FILES = {"checkpoint/find.py", "checkpoint/trainer_settings.py"}
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """A file as Python reads it."""
    return ast.parse(path.read_text())


@cache
def all_imported(path: Path) -> list[tuple[str, int]]:
    """Everything that a file imports anywhere, with line numbers."""
    return list(imported_modules(tree_of(path)))


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Full names of everything imported anywhere in a file, with line numbers.

    `from a import b` yields a and a.b, as b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)


def room_of(path: Path) -> str:
    """The room that a file lies in: the folder or the module below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def places_of(path: Path) -> set[str]:
    """The room of a file, every folder below the package that it lies in, and itself."""
    place = path.relative_to(PACKAGE)
    return {room_of(path), str(place), *map(str, place.parents)}


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    """The rooms that a file imports from, with line numbers."""
    for name, line in all_imported(path):
        parts = name.split(".")
        if parts[0] == "entropy_ddp":
            room = parts[1] if len(parts) > 1 else "__init__"
            yield room if room in ROOMS else "__init__", line


def is_within(name: str, prefix: str) -> bool:
    """Whether a module is the named one or lies below it."""
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_nothing_above_it(path: Path) -> None:
    """Dependencies point down; imports inside functions and for types count too."""
    room = room_of(path)
    assert room in ROOMS, f"{room} has no place in the order of the rooms"
    above = [
        f"{path}:{line}: {room} imports {other}"
        for other, line in rooms_imported(path)
        if ROOMS.index(other) > ROOMS.index(room)
    ]
    assert not above


@pytest.mark.parametrize("prefix", RESERVED)
def test_a_reserved_library_is_imported_in_its_rooms_only(prefix: str) -> None:
    """The process group, the command line and the tables each have one owner."""
    elsewhere = [
        f"{path}:{line}"
        for path in FILES
        if RESERVED[prefix].isdisjoint(places_of(path))
        for name, line in all_imported(path)
        if is_within(name, prefix)
    ]
    assert not elsewhere


def test_the_process_group_is_reached_by_import_only() -> None:
    """No file goes around the rule by writing torch.distributed.all_reduce."""
    reached = [
        f"{path}:{node.lineno}"
        for path in FILES
        if room_of(path) != "distributed"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert not reached


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_needs_no_model_imports_no_heavy_library(path: Path) -> None:
    """Nor does anything that is imported with it; inside functions they may."""
    room = room_of(path)
    loaded = {name.partition(".")[0] for name in imported_with(module_of(path))}
    if room in LIGHT_ROOMS or str(path.relative_to(PACKAGE)) in LIGHT_FILES:
        assert not loaded & HEAVY
    if room == "report":
        # Its figures are drawn from arrays.
        assert not loaded & (HEAVY - {"numpy"})


def test_a_wrong_configuration_is_told_without_a_heavy_library() -> None:
    """Taken over from the trainer's settings or not: `cli.ranks` imports these two."""
    for module in ("config", "checkpoint.trainer_settings"):
        loaded = imported_with(f"entropy_ddp.{module}")
        assert not {name.partition(".")[0] for name in loaded} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_base_install_imports_no_extra(path: Path) -> None:
    """Nor does anything that is imported with it, but for the figures of pages."""
    loaded = {name.partition(".")[0] for name in imported_with(module_of(path))}
    allowed = {"matplotlib"} if room_of(path) == "report" else set()
    assert loaded & EXTRAS <= allowed


@pytest.mark.parametrize("module", ["page", "subjects", "token_text", "writing"])
def test_pages_are_refused_before_an_extra_is_imported(module: str) -> None:
    """What is missing is said in one line, by what needs none of it."""
    assert not imported_with(f"entropy_ddp.report.{module}") & EXTRAS


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported_by(module: str) -> frozenset[str]:
    """What importing a module of the package imports by itself, packages included."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    files = (place.with_suffix(".py"), place / "__init__.py")
    path = next((path for path in files if path.is_file()), None)
    if path is None or not path.is_relative_to(PACKAGE):
        return frozenset()
    tree = ast.parse(path.read_text())
    top = ast.Module([n for n in tree.body if not is_for_types(n)], type_ignores=[])
    for node in ast.walk(top):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = []
    names = {name for name, _ in imported_modules(top)} | {module}
    parents = {
        ".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 1)
    }
    return frozenset(names | parents)


def imported_with(module: str) -> set[str]:
    """Everything that importing a module imports, however far down."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        found |= waiting
        waiting = {n for m in waiting for n in imported_by(m)} - found
    return found


def is_for_types(node: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_no_files_import_each_other() -> None:
    """Nor in a longer circle; imports inside functions and for types count too."""
    files = {module_of(path): path for path in FILES}
    imports = {
        module: {name for name, _ in all_imported(path)} & (files.keys() - {module})
        for module, path in files.items()
    }
    # `from a.b import c` names the folder a too, of which only the __init__ is a file.
    for module, names in imports.items():
        packages = {name for name in names if files[name].name == "__init__.py"}
        names -= {name for name in packages if module.startswith(f"{name}.")}
    TopologicalSorter(imports).prepare()
