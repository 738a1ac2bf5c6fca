"""Do the words of the page say what the numbers do, and do numbers read well?"""

import copy
from typing import Any

import pytest
from run_directories import DOCUMENT

from entropy_ddp.report import answer
from entropy_ddp.report.words import (
    differing,
    number,
    percent,
    percent_with_error,
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
    said = answer.headline(document(delta_h_true=change))
    assert plain("".join(said)) == sentence


def test_no_change_is_no_change() -> None:
    """An update without signal and momentum."""
    said = "".join(answer.headline(document(delta_h_true=0.0, se=0.0)))
    assert said == "One Dr. GRPO step leaves the entropy as it is."


def test_the_answer_is_also_a_share_of_the_entropy() -> None:
    """With its error, and with what was predicted."""
    assert plain(answer.lead(document())) == (
        "It falls by 0.800 ± 0.040 % of itself, from 0.25 to 0.248. First order predicts "
        "−0.00210 ± 0.00012."
    )


def test_other_normalisations_have_their_units() -> None:
    """Nats per sequence, or in all."""
    assert "nats per sequence" in answer.headline(document(normalize="per_sequence"))[2]
    assert "nats in all" in answer.headline(document(normalize="sum"))[2]


def test_a_given_change_is_no_step() -> None:
    """A change that was loaded has no loss to name."""
    update = {**DOCUMENT["update"], "delta": "delta.safetensors"}
    del update["loss"]
    assert answer.subject_of(update) == "The given change of the parameters"


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
