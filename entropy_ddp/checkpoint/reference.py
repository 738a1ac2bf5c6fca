"""The reference policy of a loss with a KL term: the base model without its adapter.

As TRL's for an adapter that it made itself. Biases that were trained together with the
adapter (`bias="all"`) stay as they are, there and here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from entropy_ddp.checkpoint.find import Policy
from entropy_ddp.errors import InputError

# The folder, within a checkpoint, of the copy that TRL keeps of an adapter which it goes
# on training: then that copy is the reference.
REFERENCE_ADAPTER = "ref"


def require_reference(policy: Policy) -> None:
    """Check that the base model of the checkpoint is the reference of its KL term.

    Raises:
        InputError: the policy has no adapter, or was trained against another adapter.
    """
    from peft import PeftModel

    files = policy.files
    if not isinstance(policy.model, PeftModel):
        raise InputError(
            f"update.kl_coefficient: expected an adapter in {files.base}, as the "
            "reference policy is the model without it, found full weights; set "
            "update.kl_coefficient: 0 to probe the step without the KL term"
        )
    if files.adapter is None:
        return
    copy = files.adapter / REFERENCE_ADAPTER / "adapter_config.json"
    if copy.is_file():
        raise InputError(
            f"update.kl_coefficient: expected the model without the adapter to be the "
            f"reference policy, found a reference adapter of its own in {copy.parent}; "
            "set update.kl_coefficient: 0 to probe the step without the KL term"
        )


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Within the context, the model is the one that the adapter was put on.

    Args:
        model: a PEFT model.
    """
    assert isinstance(model, nn.Module)
    # PEFT sets these anew when it enables the adapter again.
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
