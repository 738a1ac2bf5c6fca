"""Is the page one valid, safe, small file that shows the run's own numbers?"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_directories import (
    CURVATURE,
    DOCUMENT,
    GRADIENT_DOT,
    sequence_rows,
    sweep_part,
    write_run,
)

from entropy_ddp.report.figures.canvas import LARGEST_SCATTER, PALETTE
from entropy_ddp.report.figures.change import against
from entropy_ddp.report.page import Page, render_page
from entropy_ddp.report.run_page import run_page
from entropy_ddp.report.subjects import group_runs
from entropy_ddp.report.writing import write_report
from entropy_ddp.results.reading import read_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'{{ 7*7 }}"
VOID = {"meta", "link", "br", "img", "hr", "input"}
SHOWN = {"truth.delta_h_true": -0.0021436587, "linear.delta_h1": -0.0017239856}


class Outline(HTMLParser):
    """What a document consists of; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice: {names}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def values(self, attribute: str) -> list[str]:
        """All values of an attribute."""
        return [found[attribute] for _, found in self.tags if attribute in found]


def page_of(folder: Path) -> Page:
    """The page of a run directory."""
    return run_page(group_runs([read_run(folder)])[0])


def everything(folder: Path, texts: list[list[str]], prompt: str = "2+2=") -> Path:
    """A run directory with every part."""
    parts = {"curvature": CURVATURE, "gradient_dot": GRADIENT_DOT, **sweep_part()}
    return write_run(folder, {**parts, **SHOWN}, texts=texts, prompt=prompt)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run with every part and texts that try to break out."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    texts = [["1", HOSTILE, "\n", " ", " a"], [], ["3", "<eos>"]]
    return render_page(page_of(everything(folder, texts, HOSTILE)))


@pytest.fixture(scope="module")
def outline(html: str) -> Outline:
    """The same, parsed."""
    return Outline(html)


def test_the_page_is_well_formed(outline: Outline) -> None:
    """Tags match, ids are unique and lead somewhere, headings are nested."""
    ids = outline.values("id")
    assert len(ids) == len(set(ids)) > 10
    referred = " ".join(outline.values("aria-labelledby")).split()
    links = [*outline.values("href"), *outline.values("xlink:href")]
    referred += [link[1:] for link in links if link.startswith("#")]
    referred += re.findall(r"url\(#([^)]+)\)", " ".join(outline.values("clip-path")))
    assert set(referred) <= set(ids)
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    steps = zip(outline.headings, outline.headings[1:])
    assert all(after <= before + 1 for before, after in steps)
    (document,) = (found for tag, found in outline.tags if tag == "html")
    assert document["lang"] == "en"
    assert any(found.get("name") == "viewport" for _, found in outline.tags)


def test_every_figure_says_what_it_shows(outline: Outline) -> None:
    """A title, a caption, and both named for those who do not see the figure."""
    figures = [found for tag, found in outline.tags if tag == "svg"]
    assert len(figures) == 16
    for found in figures:
        assert found["role"] == "img"
        title, caption = found["aria-labelledby"].split()
        assert title.endswith("-title") and caption.endswith("-caption")


def test_the_page_needs_nothing_else(outline: Outline, html: str) -> None:
    """No address is fetched, and the policy in its head forbids it."""
    for attribute in ("src", "srcset", "action", "data", "poster"):
        assert outline.values(attribute) == []
    links = {*outline.values("href"), *outline.values("xlink:href")}
    assert all(link.startswith(("#", "data:")) for link in links)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "@import" not in style[1] and "url(" not in style[1]
    assert "default-src 'none'" in outline.values("content")[2]


def test_text_from_files_stays_text(outline: Outline, html: str) -> None:
    """Tokens, prompts and contexts that look like markup are shown, not run."""
    assert sum(tag == "script" for tag, _ in outline.tags) == 1
    assert not any(tag == "img" for tag, _ in outline.tags)
    assert not any(name.startswith("on") for _, f in outline.tags for name in f)
    # Two prompts, folded and on the line that stands for them, and a token; then the
    # context of the strongest one in two lengths.
    assert outline.text.count(HOSTILE) == 5
    for most in (24, 60):
        assert f"…{HOSTILE[-most:]}" in outline.text
        assert f"{HOSTILE[:most]}…" in outline.text
    assert "alert(1)" not in re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]


def test_numbers_are_those_of_the_files(outline: Outline) -> None:
    """Rounded in view, whole on hover."""
    titles = outline.values("title")
    assert "-0.0021436587" in titles and "-0.0017239856" in titles
    assert "−0.00214" in outline.text and "−0.00172" in outline.text
    assert "-0.00" not in outline.text


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    """Pages and plots alike."""
    run = write_run(tmp_path / "run", texts=[["1", "2"], ["3"]])
    made = []
    for name in ("a", "b"):
        written = write_report([run], tmp_path / f"{name}.html")
        files = sorted(written.plots.iterdir())
        made.append([written.page.read_bytes(), *(path.read_bytes() for path in files)])
    assert made[0] == made[1]
    assert len(made[0]) == 1 + 2 * 12


def test_white_space_tokens_are_seen(outline: Outline) -> None:
    """A line feed and a space as tokens of their own; a word keeps its space."""
    places = [
        number for number, (_, found) in enumerate(outline.tags) if "data-n" in found
    ]
    assert len(places) == 7
    assert "↵" in outline.text and "· a" in outline.text


def test_an_untrusted_run_says_so_first(tmp_path: Path) -> None:
    """Before the answer, with the failed check open."""
    failed = {
        "name": "ESS / N", "value": 0.05, "expected": ">= 0.1", "verdict": "fail",
        "hint": "sample more of E",
    }  # fmt: skip
    warned = {**failed, "name": "what warns", "verdict": "warn"}
    audit = [*DOCUMENT["audit"], warned, failed]
    run = write_run(tmp_path / "run", {"status": "untrusted", "audit": audit})
    text = Outline(render_page(page_of(run))).text
    order = [
        "This run is untrusted: do not use its numbers. Failed: ESS / N.",
        "One Dr. GRPO step",
        "1 failed and 1 warned of 4 checks",
        "ESS / N is 0.05, expected ≥ 0.1. Sample more of E",
        "what warns",
        "Prediction against truth",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_long_responses_fold(tmp_path: Path) -> None:
    """What surrounds the strongest token is open, more can be opened, the rest named."""
    texts = [["ab "] * 900, ["3"]]
    run = write_run(tmp_path / "run", texts=texts, prompt="p" * 5000 + "end")
    html = render_page(page_of(run))
    assert "…" + "p" * 2997 + "end" in html and "p" * 2998 not in html
    assert html.count("data-n=") == 300 + 400 + 1
    assert "400 tokens after, and 200 more that are not on this page" in html


def test_long_prompts_are_folded(tmp_path: Path) -> None:
    """On a line, what tells them from others; short ones stand before the response."""
    chat = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<bot>\n"
    questions = ["How many eggs are left?", "Does James run?"]
    prompts = [chat.format(question) for question in questions]
    texts = [["1", "2"], ["3"], ["4"], ["5"]]
    folder = write_run(tmp_path / "run", texts=texts, prompt=[*prompts, *prompts])
    html = render_page(page_of(folder))
    for question in questions:
        assert html.count(f'<summary class="line">Prompt: …{question}…</summary>') == 2
    folded = re.findall(r"<details class=.more.>.*?</details>", html, re.DOTALL)
    assert sum("Be kind." in part for part in folded) == html.count("Be kind.") == 4
    short = render_page(page_of(write_run(tmp_path / "short", texts=texts)))
    assert (
        short.count('<span class="prompt">2+2=</span>') == 4 and "Prompt:" not in short
    )


def test_many_sequences_stay_small(tmp_path: Path) -> None:
    """A hundred thousand responses are counted in bins: the page is under a megabyte."""
    count = 100_000
    draw = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        "num_tokens": draw.integers(1, 1000, count).tolist(),
        "contribution_true": draw.normal(size=count).tolist(),
    }
    figure = against(columns, "per_token", "num_tokens")
    assert figure.caption.startswith("100,000 responses of E, counted in hexagons")
    assert len(figure.inline_svg()) < 600_000
    few = {key: values[:LARGEST_SCATTER] for key, values in columns.items()}
    dots = against(few, "per_token", "num_tokens")
    assert dots.caption.startswith("Each dot is a response of E.")
    assert dots.inline_svg().count("<use") > LARGEST_SCATTER


def test_colours_of_figures_are_those_of_the_page() -> None:
    """Each becomes the variable of its name; the plots have its light value."""
    style = Path(render_page.__code__.co_filename).with_name("templates") / "style.css"
    light = style.read_text().partition("@media")[0]
    for name, value in vars(PALETTE).items():
        assert re.search(rf"--{name}: {value};", light)
    assert len(set(vars(PALETTE).values())) == len(vars(PALETTE))


def test_contributions_shown_are_all_of_them(tmp_path: Path) -> None:
    """The share of responses that lower the entropy is counted from the file."""
    run = write_run(tmp_path / "run")
    rows = sequence_rows(json.loads((run / "results.json").read_text()))
    falls = sum(row["contribution_true"] < 0 for row in rows)
    titles = [figure.title for figure in page_of(run).figures]
    shown = f"{100 * falls / len(rows):.0f}\N{NO-BREAK SPACE}%"
    assert f"{shown} of the responses lower the entropy" in titles


UNUSUAL: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a given change": (
        {"update.delta": "delta.safetensors", "update.loss": None, "U": None},
        {"batches": {"E": {"file": "E.jsonl"}}, "update.delta": "delta.safetensors"},
        "The given change of the parameters lowers the entropy",
    ),
    "no change": (
        {
            **{f"truth.{key}": 0.0 for key in ("delta_h_true", "se")},
            **{f"linear.{key}": 0.0 for key in ("delta_h1", "se", "difference_se")},
        },
        {},
        "leaves the entropy as it is",
    ),
    "no entropy": ({"truth.H_orig": 0.0, "truth.H_upd": 1e-9}, {}, "lowers"),
    "a sweep that finds nothing": (
        {
            "sweep": [
                {
                    "eta": 1e-3, "delta_h_true": 0.0, "se": 0.0, "ess_fraction": 1.0,
                    "delta_h1": 0.0, "delta_h1_se": 0.0, "difference_se": 0.0,
                }
            ],
            "sweep_summary": {"noise_floor": 0.0},
        },
        {},
        "stands out of its error",
    ),
    "all in all": (
        {"truth.normalize": "sum", "linear.normalize": "sum"}, {}, "nats in all",
    ),
    "one response": ({"E.num_sequences": 1, "E.num_groups": 1}, {}, "1 prompt draw"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_runs_have_pages(tmp_path: Path, name: str) -> None:
    """Nothing divides by what may be zero, or needs a part that may be absent."""
    changes, config, said = UNUSUAL[name]
    run = write_run(tmp_path / "run", changes, config)
    document = json.loads((run / "results.json").read_text())
    for place in (document, document["update"]):
        for key in [key for key, value in place.items() if value is None]:
            del place[key]
    (run / "results.json").write_text(json.dumps(document))
    assert said in Outline(render_page(page_of(run))).text
