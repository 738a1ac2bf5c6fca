"""A model that has passed its self-check is not checked again by the same tests.

The check is a part of every probe, and of tiny models a third of its time. It is the
same model if its class and configuration, the settings of the passes, and the bits of
its weights and logits are the same; what the check left in a session is put there again.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from entropy_ddp.probe import check, opening
from entropy_ddp.probe.session import Session


@contextmanager
def models_checked_once() -> Iterator[None]:
    """As long as the context lasts."""
    verify = remembering(opening.verify_model)
    with pytest.MonkeyPatch.context() as patch:
        for module in (opening, check):
            patch.setattr(module, "verify_model", verify)
        yield


def remembering(verify: Callable[[Session], None]) -> Callable[[Session], None]:
    """The check, once for each model."""
    found: dict[str, list[dict[str, Any]]] = {}

    def verify_once(opened: Session) -> None:
        key = identity(opened)
        objects = (opened, opened.passes, opened.passes.tokens)
        if key not in found:
            before = [dict(vars(each)) for each in objects]
            verify(opened)
            found[key] = [
                {
                    name: value
                    for name, value in vars(each).items()
                    if value is not old.get(name)
                }
                for each, old in zip(objects, before, strict=True)
            ]
            return
        with opened.phase("self-check"):
            for each, left in zip(objects, found[key], strict=True):
                for name, value in left.items():
                    setattr(each, name, value)

    return verify_once


def identity(opened: Session) -> str:
    """A hash of everything that a self-check depends on."""
    model, passes = opened.policy.model, opened.passes
    known = hashlib.sha256()
    for given in (
        type(model), model.config, passes.tokens.settings, passes.dtype, passes.device,
        passes.runs_hooks, opened.config.compute, opened.world.world_size,
    ):  # fmt: skip
        known.update(repr(given).encode())
    ids = torch.arange(6).reshape(2, 3) % opened.policy.vocabulary_size
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for tensor in (logits, *model.state_dict().values()):
        known.update(repr(tensor.shape).encode())
        known.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return known.hexdigest()
