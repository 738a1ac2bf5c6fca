"""Does the comparison say which tokens moved the entropy, from the files' own numbers?"""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from run_directories import write_run

from entropy_ddp.answers.cells import Table
from entropy_ddp.answers.shares import KINDS, SharesByKind, sentence, together
from entropy_ddp.report.comparison import comparison_page
from entropy_ddp.report.page import Page, PageSection, hover, render_page
from entropy_ddp.report.run_page import run_page
from entropy_ddp.report.subjects import group_runs
from entropy_ddp.results.reading import StoredRun, read_run

TEXTS = [["1"] * 9, ["3"] * 2, ["4"] * 7, ["5"] * 6]
FIXED = "\N{NO-BREAK SPACE}"
RULES = ("largest entropy loss, 5 % of the tokens", "A < 0 and p < 0.5", "all")


def make_run(folder: Path, step: int, changes: dict[str, Any] | None = None) -> Path:
    """A run of the checkpoint of a step, with an attribution of its own."""
    what_if = [
        {
            "rule": rule, "num_tokens": place + step, "delta_h1": 1e-5 * step - 1e-3 * place,
            "delta_h_true": 2e-5 * step - 1e-3 * place, "se": 1e-5,
        }
        for place, rule in enumerate(RULES)
    ]  # fmt: skip
    token = {
        "index": 0, "k": 1, "share": -1e-6 * step, "logp": -3.25, "entropy": 0.875,
        "advantage": 0.5, "context": ["a", f"T{step}", "b"],
    }  # fmt: skip
    own = {
        "attribution.momentum": -1e-4 * step,
        "attribution.weight_decay": 0.0,
        "attribution.gradient": -2e-4,
        "attribution.what_if": what_if,
        "attribution.top_tokens": [token],
    }
    config = {"checkpoint.path": f"out/checkpoint-{step}"}
    length = 1 + step // 10
    texts = [tokens[:length] for tokens in TEXTS]
    return write_run(folder / f"run{step}", own | (changes or {}), config, texts)


def compare(*folders: Path) -> Page:
    """The comparison of these run directories."""
    return comparison_page(group_runs([read_run(folder) for folder in folders]))


def section(page: Page, name: str) -> PageSection:
    """A section of a page."""
    return next(section for section in page.sections if section.id == name)


def table(page: Page, title: str) -> Table:
    """A table of a page."""
    tables = [table for section in page.sections for table in section.tables]
    return next(table for table in tables if table.title == title)


def sums_of(folders: list[Path]) -> dict[tuple[bool, bool], list[float]]:
    """Shares by (A < 0, p < 0.5), straight from the files."""
    found: dict[tuple[bool, bool], list[float]] = {}
    for folder in folders:
        with gzip.open(folder / "tokens.jsonl.gz", "rt") as stream:
            for line in stream:
                row = json.loads(line)
                key = (row["advantage"] < 0, math.exp(row["logp"]) < 0.5)
                found.setdefault(key, []).append(row["share"])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder, step) for step in (60, 10, 20)]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Page:
    """Their comparison."""
    return compare(*runs)


def test_shares_are_summed_by_sign_and_probability(
    page: Page, runs: list[Path]
) -> None:
    """In the table, and in the sentence at the top of the section."""
    expected = sums_of(runs)
    count = sum(map(len, expected.values()))
    total = sum(map(sum, expected.values()))
    rows = table(page, "Shares by sign of the advantage and by probability").rows
    shown = {row[0].value.replace(FIXED, " "): row for row in rows}
    assert len(shown) == 5 and shown["all"][1].value == count
    for (fails, improbable), shares in expected.items():
        kind = f"A {'<' if fails else '>'} 0, p {'<' if improbable else '≥'} 0.5"
        assert shown[kind][1].value == len(shares)
        assert shown[kind][3].value == pytest.approx(sum(shares))
        assert shown[kind][4].value == pytest.approx(sum(shares) / total)
    leading = max(expected, key=lambda key: sum(expected[key]) / total)
    assert leading == (True, True)
    said = section(page, "attribution").lead.replace(FIXED, " ")
    of_all = 100 * len(expected[leading]) / count
    start = f"Tokens with A < 0 and p < 0.5 are {of_all:.0f} % of U's tokens and "
    assert said.startswith(start)
    assert "All sums are over the 3 probed steps, not over the whole run." in said
    (glance,) = (g for g in page.glances if g.question.startswith("What in"))
    assert glance.answer.replace(FIXED, " ") == "Tokens with A < 0 and p < 0.5"


def test_parts_stand_at_every_checkpoint(page: Page) -> None:
    """In order of the steps; what is 0 everywhere is not drawn."""
    rows = table(page, "Parts and shares, at each checkpoint").rows
    assert [row[0].value for row in rows] == [f"step{FIXED}{n}" for n in (10, 20, 60)]
    momentum = [row[1].value for row in rows]
    assert momentum == pytest.approx([-1e-3, -2e-3, -6e-3])
    lead = section(page, "attribution").lead
    assert "momentum −0.009 and gradient of U −6 × 10⁻⁴" in lead.replace(FIXED, " ")
    svg = section(page, "attribution").figures[0].inline_svg()
    assert "momentum" in svg and "weight decay" not in svg


def test_the_strongest_tokens_of_all_runs_are_named(page: Page) -> None:
    """The largest share first, with the run that it is of."""
    rows = table(page, "The tokens that matter most, of all runs").rows
    assert [row[-1].value for row in rows] == [
        ("a", f"T{step}", "b") for step in (60, 20, 10)
    ]
    assert [row[-2].value for row in rows] == [f"step{FIXED}{n}" for n in (60, 20, 10)]


def test_rules_are_summed_and_the_best_is_shown(page: Page) -> None:
    """Of those that need no shares: here the second leaves -0.0021 of first order."""
    rows = table(page, "All rules as numbers").rows
    shown = {row[0].value: [cell.value for cell in row[1:]] for row in rows}
    assert shown["nothing left out"] == pytest.approx([0, -0.0063, -0.006])
    assert shown[RULES[0]] == pytest.approx([90, 0.0009, 0.0018])
    assert shown[RULES[1]] == pytest.approx([93, -0.0021, -0.0012])
    assert shown[RULES[2]] == pytest.approx([96, -0.0051, -0.0042])
    figures = section(page, "what-if").figures
    assert figures[0].title == f"Without {RULES[1]} it is higher at 3 of 3"
    assert "really taken and measured" in figures[0].caption
    said = section(page, "what-if").lead.replace(FIXED, " ")
    assert "the change is −0.00600 ± 0.00017 nats per token, and without" in said
    assert "it is −0.001200 ± 0.000017." in said
    by_step = table(page, "What if, at each checkpoint")
    assert by_step.columns[1:] == [f"step{FIXED}{n}" for n in (10, 20, 60)]
    assert hover(by_step.rows[2][3]) == f"{2e-5 * 60 - 1e-3!r} ± 1e-05"


@pytest.mark.parametrize(
    ("reliability", "told"),
    [
        (0.2, "not reliable with this E: 160 prompts would do"),
        (0.03, "not reliable with this E: 1,300 prompts would do"),
        (0.0, "not reliable with this E: its two halves do not agree on them at all"),
        (0.5, None),
        (None, None),
    ],
)
def test_the_largest_shares_are_not_shown_as_known_where_they_are_not(
    tmp_path: Path, reliability: float | None, told: str | None
) -> None:
    """40 prompts with a reliability of R have .5 with 40 (1 - R) / R; old runs have none."""
    found = {} if reliability is None else {"attribution.reliability": reliability}
    runs = [make_run(tmp_path, step, found if step == 20 else {}) for step in (20, 30)]
    page = run_page(group_runs([read_run(runs[0])])[0])
    shown = section(page, "attribution")
    (table,) = (
        t for t in shown.tables if "shares of tokens" in t.title or "matter" in t.title
    )
    assert shown.token_texts is not None
    (glance,) = (g for g in page.glances if g.question == "What did it?")
    together = section(compare(*runs), "attribution").tables[1].title
    headed = (table.title, shown.token_texts.caption, glance.detail)
    if told is None:
        assert not any("reliable with" in text for text in headed)
        assert "The strongest token" in glance.detail
        assert together == "The tokens that matter most, of all runs"
    else:
        assert all(told in text for text in headed)
        assert "The strongest token" not in glance.detail
        assert together.endswith(f"not reliable with the E of step{FIXED}20")
    (parts,) = (t for t in shown.tables if t.title.startswith("ΔH first order by part"))
    for text in (parts.caption, shown.lead):
        assert ("have a reliability of" in text) == (reliability is not None)
        assert reliability is None or f"reliability of {reliability:g}" in text


def test_what_some_runs_lack_is_said(tmp_path: Path) -> None:
    """Steps that were not taken, rules that one run has not, runs that did not ask."""
    rows = [{"rule": RULES[1], "num_tokens": 3, "delta_h1": -1e-3}]
    one = make_run(tmp_path, 10)
    two = make_run(tmp_path, 20, {"attribution.what_if": rows})
    probe = write_run(tmp_path / "probe", None, {"checkpoint.path": "out/step-30"})
    page = compare(one, two, probe)
    assert "over the 2 probed steps with an attribution (of 3)" in " ".join(
        section.lead for section in page.sections
    )
    shown = table(page, "All rules as numbers")
    assert [row[0].value for row in shown.rows] == ["nothing left out", RULES[1]]
    assert list(shown.columns) == ["left out", "tokens", "first order"]
    caption = section(page, "what-if").figures[0].caption
    assert "both predicted by first order" in caption
    page = compare(two, make_run(tmp_path, 30, {"attribution.what_if": []}))
    assert [s.id for s in page.sections] == ["progress", "attribution", "runs"]
    assert [s.id for s in compare(one_probe(tmp_path), probe).sections] == [
        "progress", "runs",
    ]  # fmt: skip


def one_probe(folder: Path) -> Path:
    """A run without an attribution."""
    return write_run(folder / "first", None, {"checkpoint.path": "out/step-1"})


def test_every_file_of_tokens_is_read_once(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the largest file of a run."""
    read: list[Path] = []
    tokens = StoredRun.tokens

    def counted(run: StoredRun) -> Any:
        read.append(run.folder)
        return tokens(run)

    monkeypatch.setattr(StoredRun, "tokens", counted)
    compare(*runs)
    assert sorted(read) == sorted(runs)


def test_headline_and_figure_count_the_same(tmp_path: Path) -> None:
    """Changes beyond their error; what sign alone would say is told apart."""
    changes = {10: -0.002, 20: -0.0001, 30: 0.003, 40: -0.004}
    runs = [
        make_run(tmp_path, step, {"truth.delta_h_true": value})
        for step, value in changes.items()
    ]
    page = compare(*runs)
    assert page.headline[1] == "2 of 4 checkpoints"
    assert page.lead.endswith("2 fall, 1 rises, 1 is too small to tell.")
    figure = section(page, "progress").figures[1]
    title = "One step lowers the entropy at 2 of 4 checkpoints, raises it at 1"
    assert figure.title == title
    assert figure.caption.endswith("by sign alone, 3 lower it.")


def test_one_run_has_the_same_table(runs: list[Path]) -> None:
    """Of its own tokens."""
    page = run_page(group_runs([read_run(runs[0])])[0])
    rows = table(page, "Shares by sign of the advantage and by probability").rows
    expected = sums_of(runs[:1])
    assert rows[0][3].value == pytest.approx(sum(expected[True, True]))
    assert "are" in section(page, "attribution").lead
    said = re.sub(FIXED, " ", section(page, "attribution").lead)
    assert "Tokens with A < 0 and p < 0.5 are" in said


def test_the_page_is_drawn(page: Page) -> None:
    """Six figures; a zero of kinds or of parts breaks none."""
    html = render_page(page)
    assert html.count("<svg ") == len(page.figures) == 6


def kinds_of(*rows: tuple[float, float, float]) -> SharesByKind:
    """Sums of tokens of this advantage, probability and share."""
    found = SharesByKind()
    for advantage, p, share in rows:
        found.add({"advantage": advantage, "logp": math.log(p), "share": share})
    return found


def test_every_token_is_of_one_kind() -> None:
    """A probability of one half is not below it; no advantage has no sign."""
    found = kinds_of(
        (-1, 0.49, 1), (-1, 0.5, 2), (1, 0.1, 4), (1, 0.9, 8), (0, 0.1, 0), (0, 0.9, 0)
    )
    assert [found.shares[kind] for kind in KINDS] == [1, 2, 4, 8, 0]
    assert [found.counts[kind] for kind in KINDS] == [1, 1, 1, 1, 2]
    twice = together([found, found])
    assert (twice.num_tokens, twice.share) == (12, 30)


def test_a_share_of_more_than_all_is_no_percentage() -> None:
    """Others take it back; and nothing is a share of nothing."""
    found = kinds_of((-1, 0.1, -3), (1, 0.9, 2))
    said = sentence(found, "nats", 0.1).replace(FIXED, " ")
    assert said == (
        "Tokens with A < 0 and p < 0.5 are 50 % of U's tokens and would alone move the "
        "entropy by −3 nats; the others take 2 of it back."
    )
    assert sentence(kinds_of((-1, 0.1, -3)), "nats", 0.1).endswith(
        f"100{FIXED}% of the gradient's part."
    )
    assert sentence(kinds_of((0, 0.1, 0)), "nats", 0.1) == (
        "The shares of U's tokens add up to nothing."
    )


# Runs whose parts and what-ifs have errors of their own


def with_errors(step: int) -> dict[str, Any]:
    """What a run of today adds to `make_run`."""
    what_if = [
        {
            "rule": rule, "num_tokens": place + step, "delta_h1": 1e-5 * step - 1e-3 * place,
            "delta_h1_cross_fitted": -1e-3 * (place + 1), "se": 3e-4,
            "delta_h_true": -2e-3 * (place + 1), "delta_h_true_se": 4e-4,
        }
        for place, rule in enumerate(RULES)
    ]  # fmt: skip
    summaries = {
        "advantage": [{"label": "A < 0", "share": 1e-4, "num_tokens": 3, "se": 2e-5}],
        "advantage and probability": [
            {"label": kind, "share": 1e-4, "num_tokens": 3, "se": 3e-5}
            for kind in KINDS
        ],
    }
    return {
        "attribution.momentum_se": 3e-5,
        "attribution.weight_decay_se": 0.0,
        "attribution.gradient_se": 4e-5,
        "attribution.momentum_interval": [-2.1e-3, -1.9e-3],
        "attribution.weight_decay_interval": [0.0, 0.0],
        "attribution.gradient_interval": [-3e-4, -1e-4],
        "attribution.num_blocks": 8,
        "attribution.summaries": summaries,
        "attribution.what_if": what_if,
    }


def cells(table: Table, name: str) -> list[tuple[Any, str, float]]:
    """Value, kind and error of the cells of a row, but for its first."""
    (row,) = (r for r in table.rows if len(r) > 1 and r[0].value == name)
    return [(cell.value, cell.kind, cell.error) for cell in row[1:]]


def titled(page: Page, begin: str) -> Table:
    """The table of a page whose title begins so."""
    (found,) = (
        table
        for shown in page.sections
        for table in shown.tables
        if table.title.startswith(begin)
    )
    return found


def test_a_page_shows_errors_of_parts_kinds_and_what_ifs(tmp_path: Path) -> None:
    run = make_run(tmp_path, 20, with_errors(20))
    page = run_page(group_runs([read_run(run)])[0])
    parts = titled(page, "ΔH first order by part")
    assert cells(parts, "momentum (earlier batches)")[0] == (-2e-3, "change", 3e-5)
    assert cells(parts, "gradient of U")[0] == (-2e-4, "change", 4e-5)
    assert "no error of their own" not in parts.caption
    kinds = titled(page, "Shares summed by kind")
    assert cells(kinds, "A < 0")[0] == (1e-4, "change", 2e-5)
    assert "8 blocks of E, with 7 degrees of freedom" in kinds.caption
    by_kind = titled(page, "Shares by sign of the advantage")
    shown = {row[0].value: row[3] for row in by_kind.rows}
    assert {shown[name].error for name in list(shown)[:-1]} == {3e-5}
    what_if = titled(page, "What if these tokens")
    floor = read_run(run).document["truth"]["noise_floor"]
    assert cells(what_if, RULES[1])[1:] == [
        (-2e-3, "change", 3e-4),
        (-4e-3, "change", math.hypot(4e-4, floor)),
    ]
    assert "chosen on one half of E and evaluated on the other" in what_if.caption


def test_a_comparison_adds_up_the_values_of_the_other_half(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, step, with_errors(step)) for step in (20, 30)]
    page = compare(*runs)
    rules = titled(page, "All rules as numbers")
    value, _, error = cells(rules, RULES[1])[1]
    assert (value, error) == (pytest.approx(-4e-3), pytest.approx(3e-4 * math.sqrt(2)))
    value, _, error = cells(rules, RULES[1])[2]
    assert (value, error) == (pytest.approx(-8e-3), pytest.approx(4e-4 * math.sqrt(2)))
    by_step = titled(page, "Parts and shares, at each checkpoint")
    assert cells(by_step, f"step{FIXED}20")[0] == (-2e-3, "change", 3e-5)
    lead = section(page, "attribution").lead.replace(FIXED, " ")
    assert "momentum −0.005000 ± 0.000042" in lead
    assert "no error of their own" not in lead


def test_a_part_within_its_error_is_not_the_cause(tmp_path: Path) -> None:
    """On a model of 135 million parameters momentum was −.0160 and +.0048 by two E."""
    wide = with_errors(20) | {
        "attribution.momentum_se": 5e-3,
        "attribution.momentum_interval": [-1.2e-2, 8e-3],
    }
    page = run_page(group_runs([read_run(make_run(tmp_path, 20, wide))])[0])
    (glance,) = (g for g in page.glances if g.question == "What did it?")
    assert glance.answer == "Too few responses in E to tell"
    assert "−0.0020 ± 0.0050" in glance.detail.replace(FIXED, " ")
    narrow = with_errors(30) | {
        "attribution.gradient_se": 5e-4,
        "attribution.gradient_interval": [-1.2e-3, 8e-4],
    }
    page = run_page(group_runs([read_run(make_run(tmp_path, 30, narrow))])[0])
    (glance,) = (g for g in page.glances if g.question == "What did it?")
    assert glance.answer.startswith("Momentum of earlier batches")
    assert "too little to tell from zero" in glance.detail
