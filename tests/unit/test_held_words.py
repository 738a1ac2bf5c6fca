"""Is what would have held the entropy shown with its errors, on a page and along a run?"""

from pathlib import Path
from typing import Any

import pytest
from run_directories import write_run

from entropy_ddp.answers import holding
from entropy_ddp.answers.cells import Table
from entropy_ddp.report.comparison import comparison_page
from entropy_ddp.report.page import Page, render_page
from entropy_ddp.report.run_page import run_page
from entropy_ddp.report.subjects import group_runs
from entropy_ddp.results.reading import read_run

TEXTS = [["1"] * 9, ["3"] * 2, ["4"] * 7, ["5"] * 6]
FIXED = "\N{NO-BREAK SPACE}"
# zeta at every training step; a negative one stands for a family that is saturated.
ZETA = {20: -1.0, 30: 0.05, 40: 0.08, 50: 0.11}


def family(
    name: str, parameter: float, *, saturated: bool = False, taken: bool = True
) -> dict[str, Any]:
    """A row of an attribution."""
    row: dict[str, Any] = {
        "family": name,
        "parameter": parameter,
        "saturated": saturated,
    }
    if not saturated:
        row["parameter_se"] = 0.01
    row |= {"delta_h1": 0.0, "delta_h1_cross_fitted": 1e-5, "se": 3e-5}
    if taken:
        row |= {
            "parameter_taken": 2 * parameter, "saturated_taken": saturated,
            "gradient_change": 0.5, "cosine": 0.875, "delta_h1_taken": 2e-5,
            "delta_h_true": 4e-5, "delta_h_true_se": 6e-5,
        }  # fmt: skip
    return row


def would_hold(step: int, *, taken: bool = True, target: float = 0.0) -> dict[str, Any]:
    """What an attribution says at a training step."""
    zeta = ZETA[step]
    repo = family("repo", abs(zeta), saturated=zeta < 0, taken=taken)
    rows = [
        repo | {"token_fraction": 0.25},
        family("improbable_failures", 0.0, saturated=True, taken=taken),
        family("entropy_coefficient", 0.25, taken=taken),
        {
            "family": "projection", "parameter": 0.5, "saturated": False, "delta_h1": 0.0,
        },
    ]  # fmt: skip
    return {"target": target, "families": rows}


def made(folder: Path, step: int, **settings: Any) -> Path:
    """A run directory of the checkpoint of a step."""
    changes = {"attribution.would_hold": would_hold(step, **settings)}
    config = {"checkpoint.path": f"out/checkpoint-{step}"}
    texts = [tokens[: 1 + step // 10] for tokens in TEXTS]
    return write_run(folder / f"run{step}", changes, config, texts)


def compared(*folders: Path) -> Page:
    return comparison_page(group_runs([read_run(folder) for folder in folders]))


def cells(table: Table, name: str) -> list[tuple[Any, str, float, str]]:
    """Value, kind, error and mark of the cells of a row, but for its first."""
    (row,) = (r for r in table.rows if r[0].value == name)
    return [(cell.value, cell.kind, cell.error, cell.mark) for cell in row[1:]]


def test_tables_of_one_step(tmp_path: Path) -> None:
    """First what the shares say, then the steps taken, each with its own parameter."""
    document = read_run(made(tmp_path, 40)).document
    from_shares, taken = holding.tables(document)
    assert from_shares.title == "What would have held the entropy"
    assert cells(from_shares, "REPO-R weights, ζ") == [
        (0.08, "level", 0.01, ""),
        (0.25, "share", 0.0, ""),
        (1e-5, "change", 3e-5, ""),
    ]
    assert cells(from_shares, "improbable failures")[0] == (0.0, "number", 0.0, "*")
    assert "saturated" in from_shares.caption
    (parameter, kind, error, mark), *others, truth = cells(taken, "REPO-R weights, ζ")
    assert (parameter, kind, mark) == (0.16, "level", "")
    # As much larger as the parameter is.
    assert error == pytest.approx(0.02)
    assert [value for value, *_ in others] == [0.5, 0.875, 2e-5]
    assert truth[0] == 4e-5 and truth[2] >= 6e-5
    # What was not taken has no row there.
    assert [row[0].value for row in taken.rows] == [
        "REPO-R weights, ζ", "improbable failures", "entropy_coef of TRL",
    ]  # fmt: skip


def test_without_verify_there_is_one_table(tmp_path: Path) -> None:
    document = read_run(made(tmp_path, 40, taken=False, target=-1e-3)).document
    (shown,) = holding.tables(document)
    assert shown.title == "What would have left a change of −0.001 nats per token"


def test_the_pages_show_them(tmp_path: Path) -> None:
    run = made(tmp_path, 40)
    page = run_page(group_runs([read_run(run)])[0])
    titles = [table.title for section in page.sections for table in section.tables]
    assert "What would have held the entropy" in titles
    assert "The same, corrected and taken" in titles


def test_a_run_without_it_has_none(tmp_path: Path) -> None:
    """As runs had before."""
    old = write_run(tmp_path / "old", texts=[tokens[:2] for tokens in TEXTS])
    assert holding.tables(read_run(old).document) == []
    page = run_page(group_runs([read_run(old)])[0])
    assert "would have" not in render_page(page)


def test_along_a_run_it_is_a_curve(tmp_path: Path) -> None:
    """From where on it would have held the entropy, with which values."""
    page = compared(*(made(tmp_path, step) for step in ZETA))
    (section,) = (s for s in page.sections if s.id == "held")
    lead = section.lead.replace(FIXED, " ")
    assert lead == (
        "Would have held the entropy, step by step: REPO-R weights with ζ of about 0.16 "
        "(0.1 to 0.22, each ± 0.02) from step 30 on, a weight for improbable failures "
        "(A < 0, p < 0.5) nowhere and an entropy coefficient (TRL's entropy_coef) of about "
        "0.5 (each ± 0.02) at every one. Each step is corrected alone, on the path that was "
        "trained."
    )
    (table,) = section.tables
    assert table.title == "What would have held the entropy, at each checkpoint"
    assert "saturated" in table.caption
    values = [(value, mark) for value, _, _, mark in cells(table, "REPO-R weights, ζ")]
    assert values == [(2.0, "*"), (0.1, ""), (0.16, ""), (0.22, "")]
    (figure,) = section.figures
    assert figure.name == "held-by-step"
    panels = figure._drawn.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "REPO-R weights, ζ", "improbable failures", "entropy_coef of TRL", "projection",
    ]  # fmt: skip


def test_another_target_is_named_along_a_run(tmp_path: Path) -> None:
    """And no word of what is saturated where nothing is."""
    folders = (made(tmp_path, step, target=-1e-3) for step in (40, 50))
    documents = [(f.name, read_run(f).document) for f in folders]
    found = [c for c in holding.curves(documents) if c.family == "repo"]
    table = holding.table_by_step(found, -1e-3, "nats per token")
    assert table.title == (
        "What would have left a change of −0.001 nats per token, at each checkpoint"
    )
    assert "saturated" not in table.caption


def test_runs_with_other_targets_have_no_curve(tmp_path: Path) -> None:
    other = made(tmp_path, 30, target=-1e-3)
    page = compared(made(tmp_path, 20), other)
    assert "held" not in [section.id for section in page.sections]
