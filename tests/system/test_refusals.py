"""What cannot be probed is refused before the first step, in one sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_training import PROBE, make_trainer
from torch import nn

from entropy_ddp.errors import InputError
from entropy_ddp.training import EntropyProbeCallback
from entropy_ddp.training.live_session import require_probable

pytest.importorskip("trl")


class AdamW8bit(torch.optim.AdamW):
    """Stands for bitsandbytes': a subclass whose moments are something else."""


def trainer_with(**changes: Any) -> Any:
    """What is read of a trainer, all of it in order but for the changes."""
    model = nn.Linear(2, 2)
    args = {
        "torch_compile": False,
        "n_gpu": 1,
        "fp16": False,
        "use_liger_kernel": False,
        "parallelism_config": None,
    }
    found = SimpleNamespace(
        args=SimpleNamespace(**args),
        model=model,
        is_deepspeed_enabled=False,
        is_fsdp_enabled=False,
        processing_class=SimpleNamespace(eos_token_id=1),
        optimizer=SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters())),
    )
    for name, value in changes.items():
        owner = found.args if name in args or name == "packing" else found
        setattr(owner, name, value)
    return found


def test_a_plain_trainer_is_accepted() -> None:
    require_probable(trainer_with())


REFUSED = {
    "DeepSpeed": {"is_deepspeed_enabled": True},
    "FSDP": {"is_fsdp_enabled": True},
    "parallelism_config": {"parallelism_config": object()},
    "torch.compile": {"torch_compile": True},
    "one process per GPU": {"n_gpu": 2},
    "fp16": {"fp16": True},
    "Liger": {"use_liger_kernel": True},
    "packing": {"packing": True},
    "quantized": {"model": SimpleNamespace(is_quantized=True)},
    "prompt learning": {
        "model": SimpleNamespace(
            peft_config={"default": SimpleNamespace(is_prompt_learning=True)}
        )
    },
    "end-of-sequence": {"processing_class": SimpleNamespace()},
    r"test_refusals\.AdamW8bit": {"optimizer": AdamW8bit(nn.Linear(1, 1).parameters())},
    "SGD": {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters())},
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_obstacle_is_named(message: str) -> None:
    """In one sentence."""
    with pytest.raises(InputError, match=message) as refusal:
        require_probable(trainer_with(**REFUSED[message]))
    assert str(refusal.value).endswith("; train without the callback")


def test_a_trainer_is_refused_before_its_first_step(tmp_path: Path) -> None:
    """With another optimizer; nothing was trained or written."""
    trainer = make_trainer(tmp_path / "trainer", lora={}, optim="adafactor")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    EntropyProbeCallback(out=tmp_path / "ledger", **PROBE).attach(trainer)
    with pytest.raises(InputError, match="Adafactor"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert not (tmp_path / "ledger").exists()
