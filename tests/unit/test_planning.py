"""Is E sized as a pilot run says, and is a pilot that does not say it refused?"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from run_directories import write_run

from entropy_ddp.cli import main
from entropy_ddp.config import Config
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.power import Precision
from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.probe.planning import (
    Wanted,
    described_plan,
    plan_evaluation,
    with_planned_evaluation,
)

SE, CHANGE, ENTROPY = 4e-4, 2e-3, 0.25
# 40 prompts, two responses to each.
PILOT: dict[str, Any] = {
    "truth.se_jackknife": SE,
    "truth.noise_floor": 0.0,
    "truth.delta_h_true": -CHANGE,
    "truth.H_orig": ENTROPY,
    "truth.interval": [-CHANGE - two_sided(39) * SE, -CHANGE + two_sided(39) * SE],
    "truth.effective_degrees_of_freedom": 30.0,
    "E": {
        "num_groups": 40, "num_sequences": 80, "num_tokens": 400,
        "responses_per_prompt": 2,
    },
    "power": {
        "resolved": True, "smallest_change": 2.9 * SE, "change": CHANGE,
        "between_prompts": 0.5, "between_prompts_se": 0.1,
    },
    "run.seconds": {"sample E": 1.0, "truth: E after the step": 2.0, "step": 9.0},
}  # fmt: skip
SINGLE = PILOT | {
    "E": {
        "num_groups": 40, "num_sequences": 40, "num_tokens": 200,
        "responses_per_prompt": 1,
    },
    "power": {"resolved": True, "smallest_change": 2.9 * SE, "change": CHANGE},
}  # fmt: skip


def config(folder: Path, prompts: int, **sample: Any) -> Config:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(prompts)))
    given = {"prompts": str(path), "num_prompts": 1, "max_new_tokens": 4} | sample
    return Config.model_validate(
        {
            "checkpoint": {"path": "out"},
            "batches": {"E": {"sample": given}, "U": {"file": "U.jsonl"}},
        }
    )


def pilot_of(folder: Path, changes: dict[str, Any]) -> Path:
    return write_run(folder / "pilot", changes)


def test_the_planned_e_is_as_precise_as_asked_for(tmp_path: Path) -> None:
    """With replacement, prompts are independent: by the formula at hand."""
    pilot = pilot_of(tmp_path, PILOT)
    wanted = Wanted(share=0.2, pilot=pilot)
    run = config(tmp_path, 5, with_replacement=True, responses_per_prompt=2)
    plan = plan_evaluation(run, wanted)
    fewest = next(
        m
        for m in range(2, 10_000)
        if two_sided(m - 1) * SE * (40 / m) ** 0.5 <= 0.2 * CHANGE
    )
    assert plan.groups == fewest
    assert plan.half_width == pytest.approx(0.2 * CHANGE)
    assert plan.sequences_ratio == pytest.approx(fewest / 40)
    # The variance is known to sqrt(2 / 30), the square of the change to 2 SE / change.
    spread = (2 / 30 + (2 * SE / CHANGE) ** 2) ** 0.5
    assert plan.groups_error == pytest.approx(spread * fewest)
    shown = described_plan(plan)
    assert shown["seconds on E, as on the pilot's"] == pytest.approx(
        3.0 * fewest / 40, rel=0.05
    )
    planned = with_planned_evaluation(run, wanted).batches.E.sample
    assert planned is not None and planned.num_prompts == fewest
    assert planned.model_copy(update={"num_prompts": 1}) == run.batches.E.sample
    assert with_planned_evaluation(run, None) == run


def test_a_known_set_needs_fewer_and_more_responses_fewer_still(tmp_path: Path) -> None:
    pilot = pilot_of(tmp_path, PILOT)
    wanted = Wanted(share=0.2, pilot=pilot)
    found = [
        plan_evaluation(config(tmp_path, 500, **sample), wanted).groups
        for sample in (
            {"responses_per_prompt": 2, "with_replacement": True},
            {"responses_per_prompt": 2},
            {"responses_per_prompt": 8},
        )
    ]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3
    known = Precision(se=SE, num_units=40, responses=2.0, between=0.5)
    widths = [
        known.of(m, responses=8.0, set_size=500).half_width
        for m in (found[2] - 1, found[2])
    ]
    assert widths[1] <= 0.2 * CHANGE < widths[0]


def test_a_named_change_needs_no_resolved_one(tmp_path: Path) -> None:
    changes = PILOT | {"truth.delta_h_true": 1e-5, "truth.interval": [-8e-4, 8e-4]}
    changes["power"] = PILOT["power"] | {"resolved": False}
    pilot = pilot_of(tmp_path, changes)
    run = config(tmp_path, 5, with_replacement=True, responses_per_prompt=2)
    message = (
        f"--pilot {pilot}: expected a measured change to plan for, found one that is not "
        "resolved (95 % interval -0.0008 to 0.0008); name a change by --resolve 0.01"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        plan_evaluation(run, Wanted(share=0.2, pilot=pilot))
    plan = plan_evaluation(run, Wanted(share=0.2, pilot=pilot, resolve=0.01))
    assert plan.change == pytest.approx(0.01 * ENTROPY)


@pytest.mark.parametrize(
    ("pilot", "sample", "prompts", "message"),
    [
        (
            PILOT,
            {"responses_per_prompt": 2},
            60,
            (
                "--for 20%: expected more prompts in .*prompts.jsonl, found 60; set "
                "responses_per_prompt: [0-9]+ with all of them, or set with_replacement"
            ),
        ),
        (
            SINGLE,
            {},
            60,
            (
                "--for 20%: expected about 15[0-9] prompts in .*prompts.jsonl, found 60; set "
                "with_replacement: true, or give more prompts; a pilot with "
                "responses_per_prompt: 2 takes the error between prompts out"
            ),
        ),
        (
            SINGLE,
            {"responses_per_prompt": 4},
            60,
            (
                "expected a pilot with two responses or more to each prompt, as "
                "batches.E.sample.responses_per_prompt is 4, found 1, which tells nothing"
            ),
        ),
        (
            PILOT | {"power": None},
            {"responses_per_prompt": 2},
            60,
            "expected results with `power`, which this version writes, found none",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tmp_path: Path,
    pilot: dict[str, Any],
    sample: dict[str, Any],
    prompts: int,
    message: str,
) -> None:
    folder = pilot_of(tmp_path, pilot)
    with pytest.raises(InputError, match=message):
        plan_evaluation(
            config(tmp_path, prompts, **sample), Wanted(share=0.2, pilot=folder)
        )


def test_responses_that_are_advised_are_enough(tmp_path: Path) -> None:
    """As many as the message says, with all prompts, and not one less."""
    wanted = Wanted(share=0.2, pilot=pilot_of(tmp_path, PILOT))
    with pytest.raises(InputError) as error:
        plan_evaluation(config(tmp_path, 60, responses_per_prompt=2), wanted)
    advised = int(re.findall(r"responses_per_prompt: (\d+)", str(error.value))[0])
    run = config(tmp_path, 60, responses_per_prompt=advised)
    assert plan_evaluation(run, wanted).groups <= 60
    with pytest.raises(InputError, match="responses_per_prompt"):
        plan_evaluation(config(tmp_path, 60, responses_per_prompt=advised - 1), wanted)


def test_another_entropy_is_refused(tmp_path: Path) -> None:
    pilot = write_run(
        tmp_path / "pilot", PILOT, {"objective": {"normalize": "per_sequence"}}
    )
    with pytest.raises(InputError, match="objective.normalize per_token.*per_sequence"):
        plan_evaluation(config(tmp_path, 9), Wanted(share=0.2, pilot=pilot))


def test_an_e_that_is_a_file_cannot_be_sampled(tmp_path: Path) -> None:
    """But `check` says how large it would have to be, as the pilot's were drawn."""
    document = config(tmp_path, 5).model_dump()
    document["batches"]["E"] = {"file": "E.jsonl"}
    run = Config.model_validate(document)
    wanted = Wanted(share=0.2, pilot=pilot_of(tmp_path, SINGLE))
    with pytest.raises(InputError, match="expected a `sample` section in batches.E"):
        with_planned_evaluation(run, wanted)
    assert plan_evaluation(run, wanted).groups > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "0.2", "--pilot", "x"], "expected a percentage below 100%, found"),
        (["--for", "120%", "--pilot", "x"], "expected a percentage below 100%, found"),
        (["--for", "20%"], "expected --for and --pilot together"),
        (["--pilot", "x"], "expected --for and --pilot together"),
        (["--resolve", "0.01"], "expected --for and --pilot together"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "check"])
def test_options_that_say_too_little_are_refused(
    command: str, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(main, [command, *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_pilot_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="expected schema_version"):
        plan_evaluation(config(tmp_path, 5), Wanted(share=0.2, pilot=tmp_path))
