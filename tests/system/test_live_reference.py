"""The callback's numbers of one step against the brute-force reference, in float64."""

from pathlib import Path
from typing import Any

import pytest
import reference
from live_training import PROBE, Records, make_trainer, steps_of, tiny_policy
from torch import nn

from entropy_ddp.training import EntropyProbeCallback, callback

pytest.importorskip("trl")

OBJECTIVE = reference.Objective(is_mode="per_decision", temperature=0.8)


class Copies:
    """The model before and after the step, and E."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[nn.Module] = []
        self.rows: list[reference.Row] = []
        for name in ("probe_before", "probe_after"):
            monkeypatch.setattr(callback, name, self.around(getattr(callback, name)))

    def around(self, original: Any) -> Any:
        def probed(session: Any, *args: Any, **options: Any) -> Any:
            # Not a copy of the trainer's model, whose `forward` is TRL's.
            model, _ = tiny_policy()
            model.load_state_dict(session.policy.model.state_dict())
            self.models.append(model.double().eval())
            found = original(session, *args, **options)
            self.rows = [
                reference.Row(
                    group=sequence.group,
                    prompt_ids=sequence.prompt_ids.tolist(),
                    response_ids=sequence.response_ids.tolist(),
                )
                for sequence in session.batches["E"].sequences
            ]
            return found

        return probed


def test_a_step_is_what_the_reference_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy, truth, first order at theta and at the middle, with their errors."""
    copies = Copies(monkeypatch)
    trainer = make_trainer(
        tmp_path / "trainer",
        max_steps=1,
        temperature=0.8,
        learning_rate=3e-3,
        callbacks=[Records()],
    )
    EntropyProbeCallback(out=tmp_path, **PROBE).attach(trainer)
    trainer.train()
    (entry,) = steps_of(tmp_path)
    before, after = copies.models
    scores = [
        reference.scores(model, copies.rows, OBJECTIVE.temperature)
        for model in copies.models
    ]
    truth = reference.delta_h_true(copies.rows, *scores, OBJECTIVE)
    assert entry["entropy"]["value"] == pytest.approx(truth.H_orig, rel=1e-5)
    assert entry["truth"]["value"] == pytest.approx(truth.delta_h_true, rel=1e-3)
    assert entry["truth"]["se"] == pytest.approx(truth.se, rel=1e-3)
    moved = dict(after.named_parameters())
    delta = {n: moved[n].detach() - p.detach() for n, p in before.named_parameters()}

    def along(eta: float) -> float:
        with reference.parameters_shifted(before, delta, eta):
            there = reference.scores(before, copies.rows, OBJECTIVE.temperature)
        return reference.entropy_value(copies.rows, scores[0], there, OBJECTIVE)

    for key, place in (("first_order", 0.0), ("second_order", 0.5)):
        expected = reference.slope_by_central_difference(
            lambda eta, place=place: along(place + eta), 1e-2
        )
        assert entry[key]["value"] == pytest.approx(expected, rel=1e-4)
    first, second = entry["first_order"]["value"], entry["second_order"]["value"]
    assert abs(second - first) > 1e-2 * abs(first)
