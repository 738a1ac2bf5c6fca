"""Does the block on what E can tell say it in words, with no digit too many?"""

from typing import Any

import pytest

from entropy_ddp.answers.power import advice, power
from entropy_ddp.answers.words import quantile_of
from entropy_ddp.estimators.quantiles import two_sided

TRUTH = {
    "normalize": "per_token", "H_orig": 0.25, "delta_h_true": -2e-3,
    "interval": [-2.2e-3, -1.8e-3], "effective_degrees_of_freedom": 200.0,
}  # fmt: skip
POWER = {
    "resolved": True, "smallest_change": 2.81e-4, "change": 2e-3,
    "groups_for_20_percent": 341, "groups_for_20_percent_se": 40.0,
}  # fmt: skip
SHARES = {"between_prompts": 0.52, "between_prompts_se": 0.06}


def document(facts: dict[str, Any], **found: Any) -> dict[str, Any]:
    groups = {"num_groups": 400, "num_sequences": 800, "num_tokens": 4000}
    return {"truth": TRUTH, "power": POWER | found, "E": groups | facts}


def rows(told: dict[str, Any]) -> dict[str, Any]:
    return {row[0].value: row[1].value for row in power(told).rows}


def test_the_block_of_a_resolved_change() -> None:
    told = document({}, **SHARES)
    found = {
        name: str(value).replace("\xa0", " ") for name, value in rows(told).items()
    }
    assert found == {
        "95 % interval of ΔH": "−0.00220 to −0.00180",
        "smallest change seen 4 times in 5": "2.8 × 10⁻⁴ (0.11 % of H)",
        "prompts for ±20 % of this change": "about 340 (E has 400)",
        "variance between prompts, share": "0.52",
    }
    assert power(told).caption.startswith("Resolved: 0 is outside the interval.")


def test_a_change_known_badly_has_one_digit() -> None:
    told = document({})
    told["truth"] = TRUTH | {"effective_degrees_of_freedom": 3.0}
    found = rows(told)["smallest change seen 4 times in 5"].replace("\xa0", " ")
    assert found == "3 × 10⁻⁴ (0.11 % of H)"


def test_a_number_known_badly_has_one_digit() -> None:
    told = rows(document({}, groups_for_20_percent_se=150.0))
    assert told["prompts for ±20 % of this change"] == "about 300 (E has 400)"


def test_a_change_that_is_not_resolved_is_replaced_by_a_named_one() -> None:
    told = document({}, resolved=False, change=2.5e-3)
    found = rows(told)
    assert "prompts for ±20 % of a change of 1.0\xa0% of H" in found
    assert power(told).caption.startswith("Not resolved: 0 is inside the interval.")


SET = {"num_prompts_total": 500, "with_replacement": False}


@pytest.mark.parametrize(
    ("facts", "found", "sentence"),
    [
        (
            {},
            {},
            (
                "Two responses or more to every prompt would tell whether more prompts or more "
                "responses help."
            ),
        ),
        (
            SET | {"responses_per_prompt": 1},
            {},
            (
                "E has one response to each prompt, so its 500 prompts count as drawn from many "
                "more: responses_per_prompt: 2 takes the error between prompts that are in E "
                "out."
            ),
        ),
        (
            {},
            SHARES,
            "More prompts help, and more responses to each: to 72 % of the error at best.",
        ),
        (
            {},
            SHARES | {"between_prompts": 0.9},
            "More prompts help; more responses to each hardly do.",
        ),
        (
            {},
            SHARES | {"best_responses_per_prompt": 3},
            "For a number of tokens, about 3 responses to each prompt are best.",
        ),
        (
            {},
            SHARES | {"between_prompts_se": 0.4},
            "How much lies between prompts is hardly known with this E.",
        ),
        (
            SET,
            SHARES,
            (
                "E has 400 of a known set of 500 prompts: the others, and the responses, are "
                "left to chance."
            ),
        ),
        (
            SET | {"num_prompts_total": 400},
            SHARES,
            (
                "E has all 400 prompts: only their responses are left to chance, and more of "
                "them to each prompt make the error smaller."
            ),
        ),
    ],
)
def test_what_would_help(
    facts: dict[str, Any], found: dict[str, Any], sentence: str
) -> None:
    said = advice(document(facts, **found)).replace("\xa0", " ")
    assert sentence in said


def test_a_prompt_in_several_passes_counts_once() -> None:
    passes = SET | {"num_prompts_total": 200}
    told = document(passes, **SHARES)
    assert rows(told)["prompts for ±20 % of this change"].startswith(
        "about 340 (E has 200), of 200"
    )
    assert advice(told).startswith("E has all 200 prompts")
    assert quantile_of(told) == two_sided(199)
    assert quantile_of(document(SET)) == two_sided(399)


@pytest.mark.parametrize(
    ("facts", "found", "size"),
    [
        (
            SET,
            {"groups_for_20_percent": 1234},
            "about 1,200 (E has 400), of 500 that there are",
        ),
        (
            SET,
            {"responses_for_20_percent": 12},
            "more than all 500, or about 12 responses to each of them",
        ),
        ({}, {}, "no number is enough"),
    ],
)
def test_a_size_that_cannot_be(
    facts: dict[str, Any], found: dict[str, Any], size: str
) -> None:
    told = document(facts)
    told["power"] = {
        name: value for name, value in POWER.items() if not name.startswith("groups")
    } | found
    if "groups_for_20_percent" in found:
        told["power"]["groups_for_20_percent_se"] = 12.0
    assert rows(told)["prompts for ±20 % of this change"] == size
