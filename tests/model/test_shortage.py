"""A machine that is too small is not taken for a file that is damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_ddp.checkpoint import change, optimizer, policy, weights
from entropy_ddp.errors import InputError, RunError, raise_if_out_of_memory

SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
]
# What a library is asked, and who asks it.
READERS: dict[str, Callable[[Path], Any]] = {
    "transformers.AutoTokenizer.from_pretrained": lambda f: policy.load_tokenizer(
        str(f)
    ),
    "transformers.AutoModelForCausalLM.from_pretrained": lambda f: policy.load_base(
        str(f), torch.float32, "sdpa"
    ),
    "peft.utils.load_peft_weights": weights.read_adapter,
    "safetensors.torch.load_file": lambda f: change._of_file(f / "d", None),  # type: ignore
    "torch.load": lambda f: optimizer._read_state(f / "optimizer.pt"),
}


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", READERS)
def test_a_shortage_of_memory_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shortage: Exception
) -> None:
    """Memory ran out, the run failed; any other error is about the file."""

    def fail_with(error: Exception) -> None:
        def fail(*given: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(name, fail)

    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    fail_with(shortage)
    with pytest.raises(RunError, match="no memory to read it") as raised:
        READERS[name](tmp_path)
    assert raised.value.__cause__ is shortage
    fail_with(RuntimeError("damaged"))
    with pytest.raises(InputError, match="damaged"):
        READERS[name](tmp_path)


def test_other_errors_pass() -> None:
    """Only a shortage is raised."""
    raise_if_out_of_memory(ValueError("memory"))
    with pytest.raises(MemoryError):
        raise_if_out_of_memory(MemoryError())
