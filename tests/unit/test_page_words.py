"""Do the words of the page say what the numbers do, and do numbers read well?"""

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_directories import (
    CURVATURE,
    DOCUMENT,
    INTERVALS,
    sweep_part,
    with_intervals,
)

from entropy_ddp.answers import headline, tables
from entropy_ddp.answers.words import (
    differing,
    interval,
    number,
    percent,
    percent_with_error,
    supported,
    typeset,
    visible,
    with_error,
)

NUMBERS = {
    0.0: "0",
    1.0: "1",
    -0.001: "−0.001",
    0.2765183153: "0.2765",
    -3.3382204993: "−3.338",
    18531: "18,531",
    -9.857539576e-05: "−9.858 × 10⁻⁵",
    1e-12: "1 × 10⁻¹²",
    1234567.8: "1.235 × 10⁶",
}
PAIRS = {
    (-0.001964374587, 0.000127371): "−0.00196 ± 0.00013",
    (1.2e-5, 3e-6): "(+1.20 ± 0.30) × 10⁻⁵",
    (-1.9e-8, 2e-6): "(−0.0 ± 2.0) × 10⁻⁶",
    (123.4, 5.6): "+123.4 ± 5.6",
    (5678.4, 123.4): "+5,680 ± 120",
    (1.2345, 0.996): "+1.2 ± 1.0",
    (0.0, 0.0): "0 ± 0",
}


def plain(text: str) -> str:
    """The text with ordinary spaces."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(("value", "shown"), NUMBERS.items())
def test_numbers_are_rounded_to_sensible_digits(value: float, shown: str) -> None:
    """A true minus, no digits that say nothing, and only 0 reads as 0."""
    assert plain(number(value)) == shown


@pytest.mark.parametrize(("pair", "shown"), PAIRS.items())
def test_errors_keep_two_digits(pair: tuple[float, float], shown: str) -> None:
    """And their values end at the same place."""
    assert plain(with_error(*pair)) == shown


def test_shares_are_percentages() -> None:
    """Small ones too; an error is in the same units."""
    assert plain(percent(-0.00712)) == "−0.71 %"
    assert plain(percent(0.8575)) == "86 %"
    assert plain(percent_with_error(0.0071, 0.00046, signed=False)) == "0.710 ± 0.046 %"


def test_signs_are_typeset() -> None:
    """Comparisons and negative numbers, but not hyphens in words."""
    assert typeset("<= 1e-04, -5 to 5, top-1") == "≤ 1e−04, −5 to 5, top-1"


def test_white_space_is_visible() -> None:
    """As tokens of white space matter as much as others."""
    assert visible("  ") == "··"
    assert visible(" a\n\t\r") == " a↵→␍"
    assert visible("") == "∅"
    assert visible("\x1b") == "\\x1b"


def document(**truth: Any) -> dict[str, Any]:
    """A document whose truth has these values."""
    changed = copy.deepcopy(DOCUMENT)
    changed["truth"] |= truth
    return changed


SENTENCES = {
    -0.002: "One Dr. GRPO step lowers the entropy by 0.00200 ± 0.00010 nats per token.",
    0.002: "One Dr. GRPO step raises the entropy by 0.00200 ± 0.00010 nats per token.",
    -0.00015: (
        "One Dr. GRPO step changes the entropy by (−1.5 ± 1.0) × 10⁻⁴ nats per token: "
        "too little to tell from zero."
    ),
}


@pytest.mark.parametrize(("change", "sentence"), SENTENCES.items())
def test_the_answer_is_a_sentence(change: float, sentence: str) -> None:
    """A fall, a rise, or neither when it drowns in its error."""
    said = headline.headline(document(delta_h_true=change))
    assert plain("".join(said)) == sentence


def test_no_change_is_no_change() -> None:
    """An update without signal and momentum."""
    said = "".join(headline.headline(document(delta_h_true=0.0, se=0.0)))
    assert said == "One Dr. GRPO step leaves the entropy as it is."


def test_the_answer_is_also_a_share_of_the_entropy() -> None:
    """With its error, and with what was predicted."""
    assert plain(headline.lead(document())) == (
        "It falls by 0.800 ± 0.044 % of itself, 0.2500 ± 0.0060 before. First order "
        "predicts −0.00210 ± 0.00012."
    )
    old = document()
    for key in ("H_orig_se", "H_upd_se", "noise_floor"):
        del old["truth"][key]
    assert plain(headline.lead(old)) == (
        "It falls by 0.800 ± 0.040 % of itself. First order predicts −0.00210 ± 0.00012."
    )


def test_rounding_is_in_the_error_that_is_shown() -> None:
    """Where it is as large as the sampling error, and a fall is none any more."""
    said = "".join(headline.headline(document(noise_floor=0.0001)))
    assert "lowers the entropy by 0.00200 ± 0.00014" in plain(said)
    said = "".join(headline.headline(document(noise_floor=0.002)))
    assert "changes the entropy by −0.0020 ± 0.0020" in plain(said)
    assert headline.sign(document(noise_floor=0.002)) == ""


SECOND_ORDER = {
    (-0.00199, 4e-7, 2e-8): "it misses the truth by (−1.000 ± 0.040) × 10⁻⁵.",
    (-0.0020000001, 4e-7, 2e-8): (
        "it misses nothing beyond the error of the difference, 4.0 × 10⁻⁷."
    ),
    # What is below the rounding is not told.
    (-0.002000013, 1e-9, 1.7e-6): (
        "it misses nothing beyond the error of the difference, 1.7 × 10⁻⁶."
    ),
}


@pytest.mark.parametrize(("case", "said"), SECOND_ORDER.items())
def test_what_the_second_order_misses(
    case: tuple[float, float, float], said: str
) -> None:
    """Only what stands out of its paired error and of the rounding is a number."""
    second, paired, noise = case
    found = document(noise_floor=noise)
    found["curvature"] = CURVATURE | {"delta_h2": second, "difference_se": paired}
    assert plain(headline.second_order(found)).endswith(said)
    assert headline.second_order(document()) == ""


def swept(**changes: Any) -> dict[str, Any]:
    """A document with a sweep, all of whose points have these values too."""
    found = document() | sweep_part(-1)
    found["sweep"] = [point | changes for point in found["sweep"]]
    return found


def test_what_a_sweep_says() -> None:
    """Of trusted points that stand out of their errors, with the error that is left."""
    said = plain(" ".join(headline.sweep_sentences(swept())))
    assert said.startswith(
        "First order is within the truth's own 95 % interval from 1 × 10⁻⁴ to 0.001, "
        "where that is ±10 % of it. The measured change grows as the "
        "learning rate to the power 0.9900 ± 0.0040; 1 is what first order says."
    )
    assert "η*" not in said
    said = " ".join(headline.sweep_sentences(swept() | {"curvature": CURVATURE}))
    assert "η* = 0.090 ± 0.034" in plain(said)
    known = CURVATURE | {"se": 40.0}
    said = " ".join(headline.sweep_sentences(swept() | {"curvature": known}))
    assert "η*, is not resolved" in said and "0.09" not in said


REACH = {
    (0.0039, 0.0027, 0.0059): "up to η = 0.0039 (0.0027 to 0.0059)",
    (0.0091, 0.0052, None): "up to at least η = 0.0052",
    (None, 0.01, None): "up to at least η = 0.01",
    (None, None, 1e-4): "below η = 1 × 10⁻⁴ at most",
}


@pytest.mark.parametrize(("found", "said"), REACH.items())
def test_how_far_first_order_reaches(
    found: tuple[float | None, ...], said: str
) -> None:
    """A step size with its interval, or the bound that is known, or that none is."""
    document = swept()
    eta, *ends = found
    row = {"off_by": 0.05, "eta": eta, "interval": ends}
    document["sweep_summary"] |= {"reach": [row]}
    told = plain(" ".join(headline.sweep_sentences(document)))
    assert f"First order is off by less than 5 % {said}. Brackets" in told
    row["interval"] = [None, None]
    told = plain(" ".join(headline.sweep_sentences(document)))
    assert "is off by less than 5 % is not resolved with this E." in told
    assert "Brackets" not in told


def test_a_sweep_is_judged_by_student_s_t_where_intervals_are_known() -> None:
    """Of 16 groups 2.1 standard errors are no change that is told from zero."""
    found = swept()
    for point in found["sweep"]:
        point["se"] = abs(point["delta_h_true"]) / 2.1
    assert "stands out" not in headline.reach(found)[0]
    found = with_intervals(found)
    found["E"] = found["E"] | {"num_groups": 16}
    assert headline.reach(found)[0].endswith("stands out of its error")


# eta* of a policy whose curvature is known, and of one whose curvature may be nothing.
EDGES = {
    (0.09, 0.053, 0.41): "η* = 0.09, the edge of the linear regime (95 % interval 0.05 to 0.41).",
    (2.9e-3, 1.67e-5, None): "η*, where the second order equals the first, is at least 1.7 × 10⁻⁵: ",
    (2.9e-3, 0.0, None): "η*, is not resolved: the curvature is not.",
}  # fmt: skip


@pytest.mark.parametrize(("found", "said"), EDGES.items())
def test_the_edge_of_linearity_has_no_digit_that_is_not_known(
    found: tuple[float, float, float | None], said: str
) -> None:
    """H'' = 5.9e2 with an error of 5.3e4 gives a least step size, and no number."""
    eta_star, *ends = found
    curvature = INTERVALS["curvature"] | {
        "eta_star": eta_star, "eta_star_interval": ends,
    }  # fmt: skip
    assert said in plain(headline.edge(curvature))
    if ends[1] is None:
        assert "0.0029" not in headline.edge(curvature)


def test_what_is_resolved_is_judged_by_the_interval() -> None:
    """Not by two standard errors where an interval is known."""
    found = with_intervals(document(), interval=[-0.0041, 0.0001])
    assert not headline.stands_out(found["truth"])
    assert "too little to tell from zero" in "".join(headline.headline(found))
    assert headline.sign(found) == ""
    assert headline.sign(with_intervals(document())) == "cold"


def test_the_interval_stands_beside_the_change() -> None:
    """In the lead of the page, among its answers, and in one sentence for Python."""
    found = with_intervals(document())
    said = "95 % interval: −0.00222 to −0.00178 nats per token."
    assert said in plain(headline.lead(found))
    assert plain(headline.answer(found)) == (
        f"One Dr. GRPO step lowers the entropy by 0.00200 ± 0.00011 nats per token. {said}"
    )
    assert headline.answer(document()).endswith("nats per token.")
    sure = headline.glances(found)[1]
    assert "95 % interval: −0.00222 to −0.00178." in plain(sure.detail)


def test_the_error_of_the_entropy_is_doubted_where_few_responses_make_it() -> None:
    """Below 256 groups, when one response or few groups carry the error."""
    found = with_intervals(document())
    assert headline.doubt_of_entropy(found) == ""
    assert headline.doubt_of_entropy(document()) == ""
    for few in ({"effective_degrees_of_freedom": 9.9}, {"largest_share": 0.21}):
        doubted = with_intervals(document(), **few)
        said = headline.doubt_of_entropy(doubted)
        assert said.startswith(
            "The error of H itself is likely too small: E has 40 groups"
        )
        assert headline.glances(doubted)[0].detail.endswith(said)
        assert said in tables.answer(doubted).caption
        doubted["E"] = doubted["E"] | {"num_groups": 256}
        assert headline.doubt_of_entropy(doubted) == ""


def test_the_answer_has_intervals_below_its_errors() -> None:
    """None of a run that recorded none."""
    (values, below) = tables.answer(with_intervals(document())).rows
    assert [cell.error for cell in values[:4]] == pytest.approx(
        [0.0062, 0.00011, 0.000121, 9e-6], rel=1e-3
    )
    assert below[1].value == (-0.0022225, -0.0017775)
    low, high = below[0].value
    assert (high - low) / 2 == pytest.approx(2.0226909 * 0.0062, rel=1e-6)
    assert len(tables.answer(document()).rows) == 1


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ((-0.0022225, -0.0017775), "−0.00222 to −0.00178"),
        ((-0.00041, 0.0101), "−0.0004 to +0.0101"),
        ((8.18e-5, 1.182e-4), "(+0.82 to +1.18) × 10⁻⁴"),
        ((-1e-9, 1.0), "−0.000000001 to +1.00"),
        ((0.0, 0.0), "0 to 0"),
        ((1234.0, 5678.0), "+1,200 to +5,700"),
    ],
)
def test_an_interval_ends_at_the_second_digit_of_half_of_it(
    ends: tuple[float, float], shown: str
) -> None:
    """And an end that is not zero never reads as zero: its sign is the verdict."""
    assert plain(interval(*ends)) == shown


def test_a_sweep_says_nothing_of_what_is_not_trusted_or_not_seen() -> None:
    """Few effective responses, or changes within their errors."""
    told = headline.sweep_sentences(swept(trusted=False))
    assert told[0] == (
        "No step size of the sweep has enough effective responses to be trusted."
    )
    assert "3 step sizes" in told[1] and "outside every statement" in told[1]
    assert headline.sweep_sentences(swept(se=1.0))[0] == (
        "No measured change of the sweep stands out of its error."
    )
    # A range of agreement of another version that reached into such points.
    found = swept()
    found["sweep"][1] |= {"trusted": False}
    assert headline.reach(found)[1].endswith(
        "up to 1\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10⁻⁴"
    )


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.27651, 0.0061, "0.277"),
        (0.27651, 0.61, "0.3"),
        (-1.234e-4, 2e-5, "−1.2 × 10⁻⁴"),
        (2e-9, 1e-4, "2 × 10⁻⁹"),
        (1234.5, 96.0, "1,230"),
        (0.0, 0.1, "0"),
    ],
)
def test_a_number_by_itself_ends_where_its_error_begins(
    value: float, error: float, shown: str
) -> None:
    """Its last digit is the first of the error; one digit is always left."""
    assert plain(supported(value, error)) == shown


@given(
    change=st.floats(-5, 5),
    size=st.floats(-7, 1),
    relative=st.floats(-4, 2),
    spread=st.floats(-4, -1),
    missed=st.floats(-3, 3),
)
def test_no_sentence_has_a_digit_that_its_error_does_not_support(
    change: float, size: float, relative: float, spread: float, missed: float
) -> None:
    """Headline, lead, second order: every number is a pair, rounded to two digits of
    the error; those of the glances end where theirs begins."""
    se = 10.0**size
    value = change * se * 10**-relative
    found = document(
        delta_h_true=value,
        se=se,
        H_orig=0.3,
        H_orig_se=10.0**spread,
        noise_floor=se / 7,
    )
    found["linear"] |= {"delta_h1": value + missed * se / 9, "difference_se": se / 9}
    found["curvature"] = CURVATURE | {
        "delta_h2": value + missed * se / 30, "delta_h2_se": se, "difference_se": se / 30,
    }  # fmt: skip
    for said in ("".join(headline.headline(found)), headline.lead(found)):
        rest = PAIR.sub("", plain(said))
        assert not re.search(r"\d", rest), said
    second = plain(headline.second_order(found))
    rest = PAIR.sub("", re.sub(r"difference, [^,]*\.$", "", second))
    assert not re.search(r"\d", rest), second
    for pair in PAIR.finditer(plain(headline.lead(found)) + second):
        value_text, error_text = pair["value"], pair["error"]
        assert _places(value_text) == _places(error_text), pair[0]
        digits = error_text.replace(".", "").replace(",", "").lstrip("0")
        assert len(digits.rstrip("0")) <= 2, pair[0]
        assert len(digits) <= 2 or "." not in error_text, pair[0]


# A value and its error, with a power of ten or a percent sign behind both.
PAIR = re.compile(
    r"\(?(?P<value>[+−]?[\d,]+(?:\.\d+)?) ± (?P<error>[\d,]+(?:\.\d+)?)\)?"
    r"(?: × 10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?(?:\)? %)?"
)


def _places(number: str) -> int:
    return len(number.partition(".")[2])


def test_other_normalisations_have_their_units() -> None:
    """Nats per sequence, or in all."""
    assert (
        "nats per sequence" in headline.headline(document(normalize="per_sequence"))[2]
    )
    assert "nats in all" in headline.headline(document(normalize="sum"))[2]


def test_a_given_change_is_no_step() -> None:
    """A change that was loaded has no loss to name."""
    update = {**DOCUMENT["update"], "delta": "delta.safetensors"}
    del update["loss"]
    assert headline.subject_of(update) == "The given change of the parameters"


TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_texts_show_what_differs() -> None:
    """Cut between words; short texts, equal ones and a single one stay whole."""
    questions = ["Janet has 3 eggs and 2 hens.", "James runs 3 sprints."]
    assert differing([TEMPLATE.format(q) for q in questions]) == [
        f"…{question}…" for question in questions
    ]
    for whole in (["1+2=", "1+3="], [TEMPLATE], [TEMPLATE] * 3, []):
        assert differing(whole) == whole
    # Nothing would be left of the first.
    nothing = [TEMPLATE.format(""), TEMPLATE.format("What?")]
    assert differing(nothing) == [nothing[0], "…What?…"]
