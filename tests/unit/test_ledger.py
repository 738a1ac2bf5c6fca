"""Do a run's entries add up? From lines typed by hand."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

from entropy_ddp.answers.ledger_tables import headline
from entropy_ddp.cli import main
from entropy_ddp.errors import InputError
from entropy_ddp.ledger.accumulate import Ledger, accumulate
from entropy_ddp.ledger.lines import read_ledger
from entropy_ddp.report.ledger_page import ledger_page
from entropy_ddp.report.page import render_page
from entropy_ddp.terminal.commands import print_ledger


def run_line(first: int = 1, steps: int = 3) -> dict[str, Any]:
    return {"kind": "run", "first_step": first, "steps": steps}


def step_line(step: int, scale: float = 1.0, **changes: Any) -> dict[str, Any]:
    """An entry whose numbers add up."""
    top = {"share": scale * step, "logp": -1.0, "entropy": 1.0, "advantage": 1.0}
    return {
        "kind": "step",
        "step": step,
        "entropy": {"value": 1 - 0.1 * step, "se": 0.3},
        "first_order": {"value": -0.5 * scale, "se": 0.04},
        "second_order": {"value": -0.3 * scale, "se": 0.03},
        "truth": {"value": -0.2 * scale, "se": 0.02, "ess_fraction": 1 - 0.1 * step},
        "truth_minus_first": {"value": 0.3 * scale, "se": 0.003},
        "truth_minus_second": {"value": 0.1 * scale, "se": 0.001},
        "second_minus_first": {"value": 0.2 * scale, "se": 0.002},
        "parts": {"momentum": -0.6 * scale, "decay": 0.0, "gradient": 0.1 * scale},
        "tokens": {"positive": 0.3 * scale, "negative": -0.2 * scale},
        "deciles": [0.01 * scale * d for d in range(10)],
        "top_tokens": [top | {"context": ["a", "<b>", "c"]}],
        "by_token": [
            {"token_id": 7, "text": "x", "share": scale, "num_tokens": 2},
            {"token_id": step, "text": str(step), "share": -0.1, "num_tokens": 1},
        ],
        "by_prompt": [{"prompt": "p", "share": 0.5 * scale, "num_tokens": 3}],
        "checks": {"identity": 1.0, "identity_gap": 1e-7 * step},
    } | changes


def end_line(step: int = 3) -> dict[str, Any]:
    return {"kind": "end", "step": step, "entropy": {"value": 0.5, "se": 0.4}}


def write(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "ledger.jsonl").write_text(text)
    return folder


def ledger(folder: Path, *lines: dict[str, Any]) -> Ledger:
    return accumulate(read_ledger(write(folder, list(lines))))


def test_entries_add_up_to_the_truth(tmp_path: Path) -> None:
    """Sums, errors of independent steps, and parts that make the whole."""
    found = ledger(
        tmp_path, run_line(), step_line(1), step_line(2, 2.0), step_line(3), end_line()
    )
    assert found.complete and found.scaled is None and not found.notes
    assert found.totals["truth"]["value"] == pytest.approx(-0.8)
    assert found.totals["truth"]["se"] == pytest.approx(0.02 * math.sqrt(3))
    assert found.totals["first_order"]["value"] == pytest.approx(-2.0)
    assert found.parts["curvature"] == pytest.approx(0.8)
    assert sum(found.parts.values()) == pytest.approx(found.totals["truth"]["value"])
    assert [row["truth"]["value"] for row in found.cumulative] == pytest.approx(
        [-0.2, -0.6, -0.8]
    )
    assert found.cumulative_parts[-1]["momentum"] == pytest.approx(-2.4)
    assert found.deciles == pytest.approx([0.04 * d for d in range(10)])
    assert found.tokens == pytest.approx({"positive": 1.2, "negative": -0.8})
    # Before each step, and at the end.
    assert [point["step"] for point in found.curve] == [0, 1, 2, 3]
    assert [p["value"] for p in found.curve] == pytest.approx([0.9, 0.8, 0.7, 0.5])
    change = found.totals["curve"]
    assert change == pytest.approx({"value": -0.4, "se": 0.5})


def test_a_floor_is_told_of_in_a_sentence(tmp_path: Path) -> None:
    """How many steps it changed, by how much, and where it could not."""
    inactive = {"floor": 0.5, "wanted": -0.1, "saturated": False}
    active = inactive | {"wanted": 0.01, "change": 0.015}
    lines = [
        step_line(1, floor=inactive),
        step_line(2, floor=active),
        step_line(3, floor=active | {"saturated": True}),
    ]
    (note,) = ledger(tmp_path, run_line(), *lines, end_line()).notes
    assert note == (
        "an entropy floor changed 2 of 3 probed steps, which is +0.03 nats per token in "
        "their gradients' part; its parameter was at its limit at 1 of them"
    )
    by_feedback = {"floor": 0.5, "saturated": False}
    lines = [step_line(step, floor=by_feedback) for step in (1, 2, 3)]
    (note,) = ledger(tmp_path, run_line(), *lines, end_line()).notes
    assert "weighed the tokens of all 3 probed steps by feedback" in note


def with_jackknife(line: dict[str, Any], factor: float, groups: int) -> dict[str, Any]:
    """A line as versions write it that know jackknife errors, of so many groups."""
    known = {
        key: value | {"se_jackknife": factor * value["se"]}
        for key, value in line.items()
        if isinstance(value, dict) and "se" in value
    }
    return line | known | {"E": {"num_groups": groups}}


def test_sums_have_intervals_by_student_s_t(tmp_path: Path) -> None:
    """Of jackknife errors; degrees of freedom add up where errors are alike."""
    lines = [with_jackknife(step_line(step), 1.5, 4) for step in (1, 2, 3)]
    found = ledger(tmp_path, run_line(), *lines, end_line())
    total = found.totals["truth"]
    assert total["se"] == pytest.approx(1.5 * 0.02 * math.sqrt(3))
    half = 2.2621571628 * total["se"]  # Student's t of 3 (4 - 1) degrees
    assert total["interval"] == pytest.approx([-0.6 - half, -0.6 + half])
    assert found.totals["second_order"]["difference_se"] == pytest.approx(
        1.5 * 0.001 * math.sqrt(3)
    )
    old = ledger(tmp_path, run_line(), step_line(1), *lines[1:], end_line())
    assert "interval" not in old.totals["truth"]


def test_a_sum_is_judged_by_its_interval(tmp_path: Path) -> None:
    """Five errors of two groups are no fall: t of one degree is 12.7."""
    line = with_jackknife(step_line(1), 2.0, 2)
    said = "".join(headline(ledger(tmp_path, run_line(steps=1), line)))
    assert "too little to tell from zero" in said
    line = with_jackknife(step_line(1), 2.0, 9)
    assert " lowered the entropy by " in "".join(
        headline(ledger(tmp_path, run_line(steps=1), line))
    )


def test_parts_have_the_errors_that_their_lines_have(tmp_path: Path) -> None:
    """Curvature and rest by the paired errors; a line without has none, nor a claim."""
    lines = [run_line(), step_line(1), step_line(2, 2.0), step_line(3), end_line()]
    found = ledger(tmp_path, *lines)
    root = math.sqrt(3)
    assert found.part_errors == pytest.approx(
        {
            "first_order": 0.04 * root,
            "curvature": 0.002 * root,
            "rest": 0.001 * root,
            "total": 0.02 * root,
        }
    )
    assert found.totals["first_order"]["difference_se"] == pytest.approx(0.003 * root)
    assert found.totals["second_order"]["difference_se"] == pytest.approx(0.001 * root)
    old = [dict(line) for line in lines]
    for line in old:
        for key in ("second_minus_first", "truth_minus_first", "truth_minus_second"):
            line.pop(key, None)
    found = ledger(tmp_path, *old)
    assert found.part_errors.keys() == {"first_order", "total"}
    assert "difference_se" not in found.totals["first_order"]


@pytest.mark.parametrize(
    ("error", "said", "sign"),
    [
        (0.01, "3 steps lowered the entropy by 0.600 ± 0.017 nats per token", "cold"),
        (0.3, "3 steps changed the entropy by −0.60 ± 0.52 nats per token: too", ""),
    ],
)
def test_the_headline_states_a_fall_only_beyond_its_error(
    tmp_path: Path, error: float, said: str, sign: str
) -> None:
    """With that error; otherwise without a verb and without a colour."""
    truth = {"value": -0.2, "se": error, "ess_fraction": 0.9}
    steps = [step_line(n, truth=truth) for n in (1, 2, 3)]
    page = ledger_page(ledger(tmp_path, run_line(), *steps, end_line()), "run")
    told = "".join(page.headline).replace("\N{NO-BREAK SPACE}", " ")
    assert told.startswith(said)
    assert page.sign == sign


def test_influence_is_summed_by_name(tmp_path: Path) -> None:
    """Tokens by id, prompts by text; single tokens keep their step."""
    found = ledger(tmp_path, run_line(), step_line(1), step_line(2, 2.0), end_line(2))
    assert found.by_token[0] == {
        "token_id": 7, "text": "x", "share": 3.0, "num_tokens": 4,
    }  # fmt: skip
    assert found.by_prompt == [{"prompt": "p", "share": 1.5, "num_tokens": 6}]
    assert [row["step"] for row in found.top_tokens] == [2, 1]
    assert found.checks == {"identity_gap": 2e-7, "ess_fraction": 0.8}


def test_steps_that_were_not_probed_are_said_and_scaled(tmp_path: Path) -> None:
    """Every second of six: each stands for two."""
    entries = [step_line(2), step_line(4, 2.0), step_line(6, 3.0)]
    found = ledger(tmp_path, run_line(steps=6), *entries, end_line(6))
    assert not found.complete
    assert found.totals["truth"]["value"] == pytest.approx(-1.2)
    assert found.scaled is not None
    # 6 / 3 * sum; 6 / sqrt(3) times the standard deviation .2 of the three changes.
    assert found.scaled["truth"] == pytest.approx(
        {"value": -2.4, "se": 6 / math.sqrt(3) * 0.2}
    )
    assert any("3 of 6 steps were probed" in note for note in found.notes)


def test_steps_that_are_alike_by_luck_are_no_better_known(tmp_path: Path) -> None:
    """Two of six, of one value: each has its error, and stands for three."""
    found = ledger(tmp_path, run_line(steps=6), step_line(3), step_line(6), end_line(6))
    assert found.scaled is not None
    assert found.totals["truth"]["se"] > 0
    assert found.scaled["truth"]["se"] == pytest.approx(3 * found.totals["truth"]["se"])


def test_a_restart_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Steps 2 and 3 were trained twice; the killed process left half a line."""
    lines = [
        run_line(), step_line(1), step_line(2, 9.0), step_line(3, 9.0), run_line(2),
        step_line(2), step_line(3), end_line(),
    ]  # fmt: skip
    log = read_ledger(write(tmp_path, lines, tail='{"kind": "st'))
    found = accumulate(log)
    assert found.steps["probed"] == 3
    assert found.totals["truth"]["value"] == pytest.approx(-0.6)
    assert any("restarted at step 2: 2 lines" in note for note in found.notes)
    assert any("cut off" in note for note in found.notes)


def test_what_was_not_measured_at_every_step_has_no_sum(tmp_path: Path) -> None:
    """Nor has a training that goes on an end."""
    without = step_line(2)
    del without["truth"]
    found = ledger(tmp_path, run_line(), step_line(1), without)
    assert set(found.totals) == {"first_order", "second_order", "curve"}
    assert "rest" not in found.parts
    assert any("truth was not measured" in note for note in found.notes)
    assert any("has not ended" in note for note in found.notes)


def test_a_truth_that_hangs_on_few_responses_is_not_trusted(tmp_path: Path) -> None:
    """Written all the same, with exit code 3."""
    few = step_line(2) | {"truth": {"value": -0.2, "se": 0.02, "ess_fraction": 0.05}}
    write(tmp_path, [run_line(), step_line(1), few, end_line(2)])
    finished = CliRunner().invoke(main, ["ledger", str(tmp_path)])
    assert finished.exit_code == 3
    assert "at step 2 the truth hangs on less than 10%" in finished.stdout.replace(
        "\n", " "
    )
    assert (tmp_path / "ledger.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one probed step"),
        ("[]\n", r"ledger\.jsonl:1: expected a line of kind"),
        ('{"kind": "step", "step": 1}\n', "found kind 'step' without entropy"),
        ("nonsense\n", r"ledger\.jsonl:1: expected a JSON object, found 'nonsense'"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    """With the line."""
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_ledger(tmp_path)


def test_the_command_prints_and_writes_the_ledger(tmp_path: Path) -> None:
    """A table, JSON, and a page that needs nothing from elsewhere."""
    write(tmp_path, [run_line(), step_line(1), step_line(3, 2.0), end_line()])
    finished = CliRunner().invoke(main, ["ledger", str(tmp_path)])
    assert finished.exit_code == 0, finished.output
    assert "Steps 1 to 3, 2 probed" in finished.stdout
    assert "-6.0000e-01" in finished.stdout
    # 250 % of the truth, of a paired error of .003 sqrt(2) / .6.
    assert "250.00 ± 0.71 %" in finished.stdout.replace("\N{NO-BREAK SPACE}", " ")
    written = json.loads((tmp_path / "ledger.json").read_text())
    assert written["totals"]["truth"]["value"] == pytest.approx(-0.6)
    page = (tmp_path / "ledger.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "−0.6" in page and "2 of 3 steps were probed" in page
    assert "&lt;b&gt;" in page and "<b>c" not in page
    assert "src=" not in page and page.count("<script") == 1
    again = CliRunner().invoke(main, ["ledger", str(tmp_path), "--json", "--quiet"])
    assert json.loads(again.stdout) == written
    missing = CliRunner().invoke(main, ["ledger", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "the callback was given as `out`" in missing.stderr


CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QUESTIONS = (
    "Janet's ducks lay sixteen eggs a day.\nHow many are left? " + "Tell me. " * 60,
    "James runs three sprints three times a week.",
    "これは日本語の質問です。" * 9,
)


def test_prompts_are_told_apart(tmp_path: Path) -> None:
    """Without the template that all share, in a terminal of any width and on the page."""
    share = {"share": -0.25, "num_tokens": 3}
    prompts = [share | {"prompt": CHAT.format(question)} for question in QUESTIONS]
    tokens = [{"token_id": 1, "text": " so", "share": 0.125, "num_tokens": 2}]
    lines = [run_line(), step_line(1, by_prompt=prompts, by_token=tokens), end_line()]
    write(tmp_path, lines)
    for width in (60, 80, 100, 120):
        console = Console(file=io.StringIO(), width=width)
        print_ledger(console, accumulate(read_ledger(tmp_path)), "ledger.json")
        text = console.file.getvalue()
        assert max(map(cell_len, text.splitlines())) <= width
        assert "…Janet's ducks lay" in text and "…James runs three" in text
        assert "…これは日本語" in text and "helpful" not in text
        assert text.count("-2.5e-01") == 3
        # A token with its space.
        assert "[ so]" in text
    page = render_page(ledger_page(accumulate(read_ledger(tmp_path)), "run"))
    assert re.search(r"<mark[^>]*> so</mark>", page)
    shown = re.sub(r'title="[^"]*"', "", page)
    assert "…Janet&#39;s ducks lay sixteen eggs a day. How many" in shown
    assert "helpful" not in shown and "helpful" in page
    assert shown.count("Tell me.") < 20


def test_tenths_are_called_tenths(tmp_path: Path) -> None:
    """Of the tokens: 0-10 % of them are not those with p < 10 %."""
    write(tmp_path, [run_line(), step_line(1), step_line(2), step_line(3), end_line()])
    text = CliRunner().invoke(main, ["ledger", str(tmp_path)]).stdout
    assert "by probability, in tenths of the tokens" in text
    assert "least probable tenth" in text and "0-10" not in text
    page = (tmp_path / "ledger.html").read_text()
    assert "1 is the least probable tenth, 10 the most probable one" in page
