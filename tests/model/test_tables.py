"""Do the tables show every number whole, in any terminal and in a pipe?

What is shown in 80, 100 and 120 columns is compared with what a terminal without an
edge shows.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import reference as ref
from jobs import run_attribution, run_probe, run_sweep
from rich.cells import cell_len
from rich.console import Console
from tiny_runs import make_run

from entropy_ddp.answers.words import relative_error
from entropy_ddp.cli.options import Options, table_console
from entropy_ddp.distributed import World
from entropy_ddp.results import AuditRow, Results
from entropy_ddp.terminal import commands
from entropy_ddp.terminal.commands import (
    print_attribution,
    print_import,
    print_inspection,
    print_samples,
)
from entropy_ddp.terminal.tables import in_context, supported

WIDTHS = (60, 80, 100, 120)
WITHOUT_AN_EDGE = 1000
ESCAPE = "\x1b"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)(?:;\d+)*m")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?%?")

Printer = Callable[[Console, Results, str | None], None]
PRINTERS: dict[str, Printer] = {
    "probe": commands.print_results,
    "audit": commands.print_diagnosis,
    "sweep": commands.print_sweep,
    "attribution": print_attribution,
}


def shown(printer: Printer, results: Results, width: int = 100) -> str:
    """What a file receives at this width."""
    console = Console(file=io.StringIO(), width=width)
    printer(console, results, "runs/probe-20260101-000000")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


NATS = {
    "H_orig", "H_upd", "delta_h_true", "se", "delta_h_true_adjusted", "se_adjusted",
    "slope", "delta_h1", "se_jackknife", "terms", "difference_se", "delta_h1_se",
    "second_derivative", "delta_h2", "noise_floor", "odd", "delta_h", "bars_dot",
    "u_cross", "deltaH1", "V_X", "V_Y", "se_deltaH1", "se_paired", "momentum",
    "weight_decay", "gradient", "total", "share", "H_orig_se", "H_upd_se", "delta_h2_se",
    "interval", "difference_interval", "matched_difference", "difference_se_jackknife",
    "delta_h1_se_jackknife", "delta_h2_se_jackknife", "H_orig_se_jackknife",
    "H_upd_se_jackknife", "se_jackknife_adjusted", "smallest_change", "change",
}  # fmt: skip


def in_units(value: Any, factor: float, inside: bool = False) -> Any:
    """Results whose entropies, changes and errors are this many times as large."""
    if isinstance(value, float):
        return factor * value if inside else value
    if isinstance(value, list):
        return [in_units(item, factor, inside) for item in value]
    if isinstance(value, dict):
        kept = value.items()
    elif is_dataclass(value) and not isinstance(value, type):
        kept = ((f.name, getattr(value, f.name)) for f in fields(value))
    else:
        return value
    made = {
        name: in_units(item, factor, name in NATS or (inside and name != "eta"))
        for name, item in kept
    }
    return made if isinstance(value, dict) else replace(value, **made)


def with_complaints(results: Results) -> Results:
    """Every second check complains, with a hint of two lines."""
    hint = "the likely cause of this, in so many words; " * 2 + "the next thing to try"
    rows = [
        replace(row, verdict=("warn", "fail")[number % 4 // 2], hint=hint)
        if number % 2
        else row
        for number, row in enumerate(results.audit)
    ]
    return replace(results, audit=rows, status="untrusted")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A symmetric sweep with the parts that other commands add to it."""
    run = make_run(tmp_path_factory.mktemp("run"), "qwen2")
    groups_of_two = ref.random_rows(7, groups=5, responses=2, vocabulary=17)
    config = replace(run, E=groups_of_two).config(
        compute={"device": "cpu", "tokens_per_microbatch": 10_000},
        sweep={"etas": [0.001, 0.01], "symmetric": True},
        attribution={"top": 5, "verify": True},
        precision={"model": "float32"},  # for a noise floor that is not 0
    )
    out = tmp_path_factory.mktemp("out")
    probed, swept, attributed = (
        job(config, World(), out / job.args[0], lambda *progress: None).results
        for job in (run_probe, run_sweep, run_attribution)
    )
    assert probed.gradient_dot is not None and attributed.attribution is not None
    return replace(
        swept,
        gradient_dot=probed.gradient_dot,
        attribution=attributed.attribution,
    )


VARIANTS: dict[str, Callable[[Results], Results]] = {
    "as measured": lambda results: results,
    "tiny": lambda results: in_units(results, 1e-15),
    "large": lambda results: in_units(results, 1e6),
    "complaints": with_complaints,
    "no curvature": lambda results: replace(
        results,
        curvature=None,
        sweep=[replace(point, delta_h2=None) for point in results.sweep or []],
    ),
}


@dataclass(frozen=True)
class Shown:
    """One variant of the results, and a printer."""

    printer: Printer
    results: Results

    def at(self, width: int) -> str:
        return shown(self.printer, self.results, width)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, measured: Results) -> Results:
    return VARIANTS[request.param](measured)


@pytest.fixture(params=PRINTERS)
def case(request: pytest.FixtureRequest, variant: Results) -> Shown:
    return Shown(PRINTERS[request.param], variant)


def number_counts(text: str) -> Counter[str]:
    """How often each number stands in a text."""
    return Counter(NUMBER.findall(text))


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_are_whole(case: Shown, width: int) -> None:
    """None is broken over two lines, cut off or left out; no line is too long."""
    text, free = case.at(width), case.at(WITHOUT_AN_EDGE)
    assert number_counts(text) == number_counts(free)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_no_name_is_cut_off(measured: Results, width: int) -> None:
    """Parameters that differ at their ends can be told apart."""
    for printer in PRINTERS.values():
        assert "…" not in shown(printer, measured, width)


def test_words_are_whole_in_100_columns(case: Shown) -> None:
    """The width of a pipe: names and hints are broken between words only."""
    words = {*re.findall(r"[\w*.-]+", case.at(100))}
    free = {*re.findall(r"[\w*.-]+", case.at(WITHOUT_AN_EDGE))}
    assert words == free


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_prediction_truth_and_difference_share_a_row(
    measured: Results, width: int
) -> None:
    """With their errors, of which the difference has its own."""
    truth, linear = measured.truth, measured.linear
    rate = measured.update.learning_rate_used
    # Of few groups, so that the difference is told by the matched pair.
    matched = linear.matched_difference
    assert matched is not None
    paired = math.hypot(matched["se_jackknife"], truth.noise_floor or 0.0)
    pairs = (
        (truth.delta_h_true, truth.error),
        (linear.delta_h1, rate * linear.se_jackknife),
        (matched["value"], paired),
    )
    for printer in (
        commands.print_results,
        commands.print_diagnosis,
        print_attribution,
    ):
        lines = shown(printer, measured, width).splitlines()
        (place,) = (
            number
            for number, line in enumerate(lines)
            if all(f"{value:+.4e} ±" in line for value, _ in pairs)
        )
        row = "".join(lines[place : place + 2])
        assert all(f"{error:.1e}" in row for _, error in pairs)


def test_parts_have_no_digit_that_the_error_of_the_change_does_not_carry(
    measured: Results,
) -> None:
    """Eleven digits of a change that is known to two; a share of nothing is none.

    Of runs whose parts have no errors of their own.
    """
    found = measured.attribution
    assert found is not None
    bare = replace(found, momentum_se=0.0, weight_decay_se=0.0, gradient_se=0.0)
    measured = replace(measured, attribution=bare)
    scale = abs(measured.linear.delta_h1)
    rate = abs(measured.update.learning_rate_used)
    for relative in (0.003, 0.07, 3.0):
        error = relative * scale
        linear = replace(measured.linear, se_jackknife=error / rate)
        text = shown(print_attribution, replace(measured, linear=linear), 120)
        begin = text.index("ΔH first order by part")
        parts = text[begin : text.index("│ total", begin)]
        assert_carried(parts, error)
        told = re.search(r"\d\s%", parts)
        assert (told is not None) == (relative < 0.5)


def test_parts_and_kinds_have_errors_of_their_own(measured: Results) -> None:
    """Parts over the prompts of E, sums of shares over its blocks."""
    found = measured.attribution
    assert found is not None
    text = shown(print_attribution, measured, 120)
    for part in ("momentum", "weight_decay", "gradient"):
        value, error = getattr(found, part), getattr(found, f"{part}_se")
        assert f"{value:+.4e} ± {error:.1e}" in text
    (row,) = (r for r in found.summaries["advantage"] if r["label"] == "A < 0")
    assert f"{row['share']:+.4e} ± {row['se']:.1e}" in text
    told = f"the spread of {found.num_blocks} blocks of E, with {found.num_blocks - 1} degrees"
    assert told in " ".join(text.split())
    for row in found.what_if:
        value, error = row["delta_h1_cross_fitted"], row["se"]
        assert f"{value:+.4e} ± {error:.1e}" in text


def assert_carried(text: str, error: float) -> None:
    """No signed number has a digit behind the first of the error; each has one."""
    for number in re.findall(r"[-+]\d\.?\d*e[-+]\d+", text):
        mantissa, exponent = number.split("e")
        last = int(exponent) - len(mantissa.partition(".")[2])
        single = "." not in mantissa
        assert single or 10.0**last >= 10 ** math.floor(math.log10(error)) * 0.99


def test_terms_and_slope_of_the_step_have_their_error(measured: Results) -> None:
    """Terms have that of their sum; slope, H'' and what follows from them their own."""
    linear, curvature = measured.linear, measured.curvature
    assert curvature is not None
    text = shown(commands.print_results, measured, 120)
    begin = text.index("The step and the terms of")
    table = text[begin : text.index("moved most", begin)]
    terms = re.findall(rf"  (?:{'|'.join(linear.terms)}) +│ +(\S+)", table)
    assert len(terms) == len(linear.terms)
    rate = abs(measured.update.learning_rate_used)
    assert_carried(" ".join(terms), rate * linear.se_jackknife)
    for value, error in (
        (linear.slope, linear.se_jackknife),
        (curvature.second_derivative, curvature.se_jackknife),
        (curvature.delta_h2, curvature.delta_h2_se_jackknife),
    ):
        assert f"{value:+.4e} ± {error:.1e}" in table
    assert curvature.eta_star_interval is not None
    low, high = curvature.eta_star_interval
    edge = re.search(r"eta\*, edge of linearity +│ +(\S.*?) +│", table)
    assert edge is not None
    if high is None:
        assert edge[1] == (f">= {low:.1e}" if low else "–")
    else:
        assert edge[1].startswith("[")


def test_no_value_that_is_not_a_number(case: Shown) -> None:
    text = case.at(120)
    assert not re.search(r"\b(nan|inf|NaN|None)\b", text)


def test_no_infinity_where_the_error_is_zero(measured: Results) -> None:
    """Truth and prediction of which no group says anything else have no error."""
    linear = replace(measured.linear, difference_se=0.0)
    text = shown(commands.print_results, replace(measured, linear=linear))
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_curvature_below_its_error_may_be_left_out(measured: Results) -> None:
    """What costs half of the passes and says nothing is offered to be turned off."""
    assert measured.curvature is not None
    second = abs(measured.curvature.second_derivative)
    for error, is_offered in ((0.99 * second, False), (1.01 * second, True)):
        curvature = replace(measured.curvature, se=error)
        text = shown(commands.print_results, replace(measured, curvature=curvature))
        assert ("--set curvature.enabled=false" in text) is is_offered
    without = VARIANTS["no curvature"](measured)
    assert "curvature.enabled" not in shown(commands.print_results, without)


@pytest.mark.parametrize("printer", PRINTERS.values(), ids=PRINTERS)
def test_failures_come_first_then_warnings_then_tables(
    measured: Results, printer: Printer
) -> None:
    results = with_complaints(measured)
    lines = shown(printer, results).splitlines()
    kinds = [
        kind
        for line in lines
        for kind in ("FAILED: ", "warning: ", "┏")
        if line.startswith(kind)
    ]
    order = list(dict.fromkeys(kinds))
    assert order == ["FAILED: ", "warning: ", "┏"]
    assert kinds == sorted(kinds, key=order.index)
    verdicts = [row.verdict for row in results.audit]
    assert kinds.count("FAILED: ") == verdicts.count("fail")
    assert kinds.count("warning: ") == verdicts.count("warn")


DISTRUST = "NOT TO BE TRUSTED: failed the check"


@pytest.mark.parametrize("printer", PRINTERS.values(), ids=PRINTERS)
def test_an_untrusted_result_says_so_in_its_first_line(
    measured: Results, printer: Printer
) -> None:
    """In red, with what failed; the next line is what to do. A sound result has none."""
    trusted = with_complaints(measured)
    trusted.audit[:] = [row for row in trusted.audit if row.verdict != "fail"]
    assert DISTRUST not in shown(printer, trusted)
    hint = "sample more of E"
    failed = AuditRow(
        name="ESS / N", value=0.01, expected=">= 0.1", verdict="fail", hint=hint
    )
    for rows in ([failed], [failed, replace(failed, name="restore")]):
        results = replace(trusted, audit=[*trusted.audit, *rows])
        first, second, *_ = shown(printer, results).splitlines()
        names = ", ".join(row.name for row in rows)
        several = "s" if len(rows) > 1 else ""
        assert first == f"{DISTRUST}{several} {names}; what to do:"
        assert second == f"FAILED: ESS / N is 0.01, expected >= 0.1; {hint}"
        console = Console(file=io.StringIO(), width=100, force_terminal=True)
        printer(console, results, None)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().startswith(f"{ESCAPE}[1;31m{DISTRUST}")


# Nothing rounds to 0


def zeros(text: str) -> list[str]:
    """The numbers with decimals, an exponent or a percent sign that read as 0."""
    return [
        number
        for number in NUMBER.findall(text)
        if any(mark in number for mark in ".e%")
        and float(number.rstrip("%").replace(",", "")) == 0
    ]


@pytest.mark.parametrize("printer", PRINTERS.values(), ids=PRINTERS)
def test_changes_and_errors_never_read_as_zero(
    measured: Results, printer: Printer
) -> None:
    """However small the estimates, terms and points of the sweep are."""
    tiny = in_units(measured, 1e-30)
    before = measured.truth
    shown_entropy = replace(
        tiny.truth, H_orig=before.H_orig, H_orig_se=before.H_orig_se
    )
    linear = replace(tiny.linear, difference_se=1e-3 * tiny.linear.difference_se)
    results = replace(tiny, truth=shown_entropy, linear=linear, audit=[])
    found = zeros(shown(printer, results))
    assert [zero for zero in found if "%" not in zero] == []  # no share of anything


def collapsed(results: Results) -> Results:
    """A policy that is all but deterministic."""
    error = 2e-10
    truth = replace(
        results.truth, H_orig=3e-9, H_orig_se=error, H_orig_se_jackknife=error
    )
    return replace(results, truth=truth)


def in_agreement(results: Results) -> Results:
    """Truth and prediction apart by a hundredth of a standard error."""
    difference = abs(results.truth.delta_h_true - results.linear.delta_h1)
    error = 100 * difference
    linear = replace(results.linear, difference_se=error, difference_se_jackknife=error)
    return replace(results, linear=linear)


def degenerate(results: Results) -> Results:
    """One sequence of 50,000 has all of the weight."""
    rows = [row | {"ess_fraction": 2e-5} for row in results.truth_all]
    return replace(results, truth_all=rows)


def efficient(results: Results) -> Results:
    """An estimator whose error is a thirtieth of the first one's."""
    first, *others = results.linear_all
    small = {name: first[name] / 30 for name in ("se", "se_jackknife")}
    rows = [row | small for row in others]
    return replace(results, linear_all=[first, *rows])


@pytest.mark.parametrize("change", [collapsed, in_agreement, degenerate, efficient])
def test_no_small_number_reads_as_zero(
    measured: Results, change: Callable[[Results], Results]
) -> None:
    results = replace(change(measured), audit=[])
    assert zeros(shown(commands.print_results, results)) == []


# Colours


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A terminal with colours that nothing turned on or off."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


def in_terminal(results: Results) -> str:
    terminal = Terminal()
    PRINTERS["audit"](Console(file=terminal, width=100), results, "runs/x")
    return terminal.getvalue()


def test_no_color_turns_colours_off(
    measured: Results, plain_environment: pytest.MonkeyPatch
) -> None:
    """The convention of no-color.org, and a terminal that understands nothing."""
    results = with_complaints(measured)
    assert COLOUR.search(in_terminal(results))
    plain_environment.setenv("NO_COLOR", "1")
    assert not COLOUR.search(in_terminal(results))
    plain_environment.setenv("TERM", "dumb")
    assert ESCAPE not in in_terminal(results)


@pytest.mark.parametrize("printer", PRINTERS.values(), ids=PRINTERS)
def test_a_pipe_gets_plain_text_of_100_columns(
    measured: Results,
    printer: Printer,
    plain_environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The console of the command line, whose standard output is no terminal here."""
    results = with_complaints(measured)
    options = Options(
        config=None,
        assignments=(),
        out=None,
        overwrite=False,
        quiet=False,
        as_json=False,
    )
    console = table_console(World(), options)
    assert console is not None
    printer(console, results, "runs/x")
    text = capsys.readouterr().out
    assert ESCAPE not in text
    assert text == shown(printer, results).replace(
        "runs/probe-20260101-000000", "runs/x"
    )


# Text of rollouts

CHAT = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
# What surrounds a token, and how the token is shown.
CONTEXTS: dict[str, tuple[str, str, str]] = {
    "[ so]": ("she eats three for breakfast every morning", " so", " she has\n\nleft"),
    "[<|im_end|>]": (CHAT, "<|im_end|>", ""),
    "[↵↵]": ("", "\n\n", "\n\n\tThe answer is"),
    "[漢字]": ("これは日本語の文章です。トークンの前" * 3, "漢字", "の後にも文章が続きます" * 9),
    "[😀]": ("👩\u200d👩\u200d👧 café " * 9, "😀", "🎉" * 90),
    "[\\x1b[Am]": ("\x1b[Bm\x07\x00" * 9, "\x1b[Am", "\u200b[bold]no markup[/bold]"),
    "[" + "·" * 40 + "]": ("x" * 200, " " * 40, "y" * 200),
    "[" + "supercalifragilistic" * 6 + "]": ("a", "supercalifragilistic" * 6, "z"),
    "[∅]": ("a", "", "b"),
}  # fmt: skip
FRAME = re.compile("[\\s│┃]")


def with_contexts(results: Results) -> Results:
    assert results.attribution is not None
    rows = results.attribution.top_tokens
    numbers = {"index": 1023, "k": 511, "logp": -12.345}
    found = [
        rows[place % len(rows)] | numbers | {"context": list(context)}
        for place, context in enumerate(CONTEXTS.values())
    ]
    return replace(results, attribution=replace(results.attribution, top_tokens=found))


@pytest.mark.parametrize("width", WIDTHS)
def test_context_gives_way_to_numbers(measured: Results, width: int) -> None:
    """Every number and every token whole, in as many cells as the terminal has."""
    results = with_contexts(measured)
    assert results.attribution is not None
    text = shown(print_attribution, results, width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    # Few prompts: they are not said to be those that matter.
    begin = next(n for n, line in enumerate(lines) if "largest shares of tok" in line)
    end = next(n for n, line in enumerate(lines) if "Shares summed" in line)
    table = "\n".join(lines[begin + 1 : end])
    assert all(c.isprintable() for c in table.replace("\n", ""))
    rows = results.attribution.top_tokens
    relative = relative_error(results.to_dict())
    for row in rows:
        shown_share = supported(row["share"], relative * abs(row["share"]))
        assert shown_share in table
    for number in ("-12.345", "1024", "511"):
        assert len(re.findall(rf"(?<!\d){number}(?!\d)", table)) == len(rows)
    together = FRAME.sub("", table)
    for marked in CONTEXTS:
        assert FRAME.sub("", marked) in together
    # What is not cut off stands on the token's line.
    assert "[ so] she" in table and "[↵↵]↵↵→The" in table and "…" in table


def test_context_is_as_long_as_it_can_be() -> None:
    """Of both sides, as much as fits; what one side does not need goes to the other."""
    before, after = "left " * 20, " right" * 20
    for cells in range(8, 240):
        for context in ((before, "so", after), ("", "so", after), (before, "so", "")):
            text = in_context(*context, cells).plain
            whole = f"{context[0]}[so]{context[2]}"
            assert cell_len(text) == min(cells, cell_len(whole))
            head, tail = text.split("[so]")
            assert context[0].endswith(head.removeprefix("…"))
            assert context[2].startswith(tail.removesuffix("…"))


@pytest.mark.parametrize("width", WIDTHS)
def test_tenths_of_tokens_are_not_probabilities(measured: Results, width: int) -> None:
    """The tokens are cut into ten parts of equal size, not at p = 10 %, 20 %, ..."""
    text = shown(print_attribution, measured, width)
    words = " ".join(re.sub("[│┃]", " ", text).split())
    assert "by probability, in tenths of the tokens" in words
    assert "least probable tenth" in text and "most probable tenth" in text
    assert "0-10 %" not in text and "90-100 %" not in text


def test_brackets_in_a_path_are_no_markup(measured: Results) -> None:
    console = Console(file=io.StringIO(), width=100)
    update = replace(measured.update, delta="runs/[red]/step.safetensors")
    print_attribution(console, replace(measured, update=update), "runs/[red]")
    print_samples(console, [{"split": "E", "groups": 3}], "runs/[red]")
    print_import(
        console, {"source": "runs/[red]/x.parquet", "notes": []}, "[red].jsonl"
    )
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("[red]") == 5


# The other tables


@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_path_is_broken_and_leaves_a_table(width: int) -> None:
    path = "/home/somebody/" + "a-very-long-name/" * 9 + "checkpoint-1000"
    console = Console(file=io.StringIO(), width=width)
    print_inspection(console, {"checkpoint": {"path": path, "elements": 1234}})
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("found") == 1 and path in FRAME.sub("", text)


def test_values_of_an_audit_of_every_kind(measured: Results) -> None:
    """Large integers, tiny and negative numbers, mappings and truth values."""
    values: dict[str, Any] = {
        "elements": 123_456_789_012,
        "tiny": -1.2345678901e-38,
        "by name": {"base_model.model.a.lora_A.default.weight": 6.02214076e-23},
        "equal": True,
        "digest": "0123456789abcdef",
    }
    rows = [
        AuditRow(name=name, value=value, expected="1e-3 to 10", verdict="ok")
        for name, value in values.items()
    ]
    for width in WIDTHS:
        text = shown(commands.print_diagnosis, replace(measured, audit=rows), width)
        for number in ("123,456,789,012", "-1.2345678901e-38", "6.02214076e-23"):
            assert number in text
        assert "  a.lora_A " in text
        assert " true " in text and "0123456789abcdef" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_samples_and_checks_keep_their_numbers(width: int) -> None:
    """What `sample` and `check` found."""
    summaries = [
        {
            "split": split,
            "groups": 1024,
            "sequences": 8192,
            "tokens": 12_345_678,
            "truncated": 0.123456789,
            "mean reward": -1.2345e-7,
        }
        for split in ("E", "U")
    ]
    found = {
        "checkpoint": {"elements": 1_234_567, "group": [{"lr": 1e-6, "eps": 1e-8}]},
        "batch E": {"mean response length": 123.456},
    }
    texts = []
    for columns in (width, WITHOUT_AN_EDGE):
        console = Console(file=io.StringIO(), width=columns)
        print_samples(console, summaries, "runs/sample-20260101-000000")
        print_inspection(console, found)
        assert isinstance(console.file, io.StringIO)
        texts.append(console.file.getvalue())
    assert number_counts(texts[0]) == number_counts(texts[1])
    assert "…" not in texts[0]
    assert zeros(texts[0]) == []
