"""What cannot be divided among ranks is refused by name, before anything is divided."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import run_config, save_checkpoint

from entropy_ddp.checkpoint.change import second_parameters
from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.policy import load_policy
from entropy_ddp.checkpoint.shards import shard_policy
from entropy_ddp.config import Checkpoint, Compute, Config, Precision
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import group_size
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.probe import opening


def shard(root: Path, world: World, shard: str = "base", **options: Any) -> None:
    saved = save_checkpoint(root, "llama", **options)
    files = find_checkpoint(Checkpoint.model_validate(saved.section))
    policy = load_policy(files, Precision(), "sdpa", torch.device("cpu"))
    compute = Compute.model_validate({"shard": shard})
    tokens = ResponseTokens(policy.model, ScoringSettings())
    shard_policy(policy, tokens, compute, world)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"full": True},
            "expected an adapter, whose base model is divided, found full",
        ),
        ({"use_dora": True}, "found a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\)"),
    ],
)
def test_what_a_divided_base_cannot_hold(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ranks = World(world_size=2, store=object())
    instead = "full" if "full" in options else "none"
    with pytest.raises(InputError, match=f"{message}.*set compute.shard: {instead}"):
        shard(tmp_path, ranks, **options)


def test_an_adapter_has_no_full_weights(tmp_path: Path) -> None:
    ranks = World(world_size=2, store=object())
    with pytest.raises(InputError, match="found the adapter.*set compute.shard: base"):
        shard(tmp_path, ranks, "full")


def test_a_model_larger_than_a_gpu_is_told_how_to_be_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    saved = save_checkpoint(tmp_path, "llama", full=True)
    monkeypatch.setattr(opening, "load_policy", load)
    document = run_config(saved, tmp_path / "E", tmp_path / "U")
    with pytest.raises(RunError, match="does not fit on cpu.*set compute.shard: full"):
        opening.open_checkpoint(
            Config.model_validate(document), World(), lambda *_: None
        )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"update": {"delta": "x"}, "batches": {"E": {"file": "E"}}}, "update.delta"),
        (
            {"gradient_dot": {"variance_method": "backward"}},
            "variance_method: backward: a gradient for each group",
        ),
        (
            {
                "batches": {
                    "E": {
                        "sample": {
                            "prompts": "p",
                            "num_prompts": 4,
                            "max_new_tokens": 4,
                        }
                    },
                    "U": {"file": "U"},
                }
            },
            "batches.E.sample: sampling",
        ),
    ],
)
def test_what_a_model_in_parts_cannot_do(
    sections: dict[str, Any], message: str
) -> None:
    document = {
        "checkpoint": {"path": "here"},
        "batches": {"E": {"file": "E"}, "U": {"file": "U"}},
        "compute": {"shard": "full"},
    }
    with pytest.raises(ValueError, match=f"{message}.*compute.shard: none"):
        Config.model_validate(document | sections)


def test_a_whole_state_is_no_change_of_a_divided_model() -> None:
    """Parts of a parameter are told by their method `to_local`."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.to_local = None  # type: ignore[attr-defined]
    model = SimpleNamespace(parameters=lambda: iter([parameter]))
    policy: Any = SimpleNamespace(model=model)
    files: Any = SimpleNamespace(weights="state", adapter="adapter")
    with pytest.raises(InputError, match="weights of a whole state.*shard: none"):
        second_parameters(policy, files, Precision(), "sdpa")


def test_one_process_divides_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected several ranks.*torchrun"):
        shard(tmp_path, World())


def test_groups_of_ranks_are_of_equal_size() -> None:
    world = World(world_size=6)
    assert [group_size(asked, world, 3) for asked in ("all", "node", 2)] == [6, 3, 2]
    with pytest.raises(InputError, match="found 6 ranks and groups of 4"):
        group_size(4, world, 3)
