"""Do the tables of docs/scale.md follow from their formulas, and these from the code?"""

from pathlib import Path

import pytest

from benchmarks.models import ALL_SEVEN, Shape, make_base, make_passes, with_adapter
from benchmarks.scaling import MODELS, TABLES, Model, Run, measured, runs
from entropy_ddp.model.parameters import trainable_parameters
from entropy_ddp.model.selfcheck import check_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "scale.md"
SMALL = Model(
    name="small",
    shape=Shape(
        hidden=256, intermediate=1024, layers=4, heads=8, kv_heads=2, vocabulary=512
    ),
    tied=True,
)  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_page_is_what_the_script_prints(name: str) -> None:
    assert TABLES[name]() in PAGE.read_text(), "python -m benchmarks.scaling"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_matrices_are_counted_as_transformers_makes_them(model: Model) -> None:
    made = make_base("llama", model.shape, device="meta")
    matrices = sum(p.numel() for p in made.parameters() if p.dim() > 1)
    # The one that is made has one matrix for embedding and output.
    outer = model.shape.vocabulary * model.shape.hidden
    assert matrices == model.elements - model.outer + outer


@pytest.mark.parametrize("trained", ["LoRA", "full"])
def test_the_backward_pass_keeps_what_the_formula_says(trained: str) -> None:
    base = make_base("llama", SMALL.shape)
    adapted = with_adapter(base, ALL_SEVEN) if trained == "LoRA" else base
    passes = make_passes(adapted, tokens_per_microbatch=4096)
    check_model(passes, SMALL.shape.vocabulary)
    run = Run(model=SMALL, trained=trained, shard="none")
    assert run.saved_bytes() == pytest.approx(passes.saved_per_position, rel=5e-3)
    trainable = trainable_parameters(adapted).values()
    matrices = sum(p.numel() for p in trainable if p.dim() > 1)
    assert run.parameters == matrices


def test_what_the_page_says_of_70_billion() -> None:
    """LoRA in eight parts: 52 GB a GPU; 7B whole: 122 GB."""
    run = next(r for r in runs(sharded=True) if r.model.name == "70B")
    assert run.device_bytes(8) == pytest.approx(52e9, rel=0.01)
    whole = next(
        r for r in runs(sharded=False) if (r.model.name, r.trained) == ("7B", "full")
    )
    assert whole.device_bytes(1) == pytest.approx(122e9, rel=0.01)
    assert measured("order 1, qwen2") == pytest.approx(2, abs=0.5)
