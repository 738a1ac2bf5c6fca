"""Do the folders of tests hold what they promise, so that each is as fast as it can be?

`unit` needs neither a model nor a process, `model` has models in the tests' own process,
and everything else is in `system`: processes, trainers, a browser, and what runs many times
over, as simulated errors, runs that are interrupted after every pass, and damaged files.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
PROCESSES = {"fork_server", "launching", "selenium", "subprocess"}
TRAINERS = {"live_training", "trainers"}
MODELS = {"checkpoints", "families", "planted", "tiny_runs", "trained"}
# Of `launching`: what starts something.
STARTS = {"run", "run_ranks", "start", "start_ranks"}


def imported(tree: ast.AST) -> set[str]:
    """The modules that are imported anywhere, by their first name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def files(folder: str) -> list[Path]:
    return sorted((TESTS / folder).glob("*.py"))


def is_long(function: ast.stmt) -> bool:
    """Whether a test is marked long: it may be beside the tests that it repeats."""
    marks = getattr(function, "decorator_list", [])
    return "pytest.mark.long" in map(ast.unparse, marks)


def starts_a_process(function: ast.stmt) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "launching"
        and node.attr in STARTS
        for node in ast.walk(function)
    )


@pytest.mark.parametrize("path", files("unit"), ids=lambda path: path.stem)
def test_a_unit_needs_neither_a_model_nor_a_process(path: Path) -> None:
    assert not imported(ast.parse(path.read_text())) & (PROCESSES | TRAINERS | MODELS)


@pytest.mark.parametrize("path", files("model"), ids=lambda path: path.stem)
def test_models_are_in_the_tests_own_process(path: Path) -> None:
    """What is marked long is not a part of `make test`."""
    tree = ast.parse(path.read_text())
    assert not imported(tree) & TRAINERS
    started = [
        ast.unparse(statement).partition("\n")[0]
        for statement in tree.body
        if starts_a_process(statement) and not is_long(statement)
    ]
    assert not started
