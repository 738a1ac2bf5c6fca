"""All tests run on one thread and import the helpers beside this file by their name.

pytest puts the folder of a conftest.py on the import path.
"""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
# A job in the background ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take long: begun last, they would be waited for.
LONGEST = (
    "test_sharding", "test_world_size", "test_demo", "test_trainer_oracle", "test_cli",
    "test_resume", "test_unbiased", "test_entropy_floor", "test_bad_input",
    "test_restore", "test_extras", "test_small_batches", "test_reader_fuzz",
    "test_large_runs", "test_held_steps", "test_attribution", "test_audit",
    "test_blocks",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage need not go through it every time."""
    gc.freeze()


@pytest.fixture(scope="module")
def models_checked_once() -> Iterator[None]:
    """Probes of a model that has passed its self-check do not repeat it."""
    from self_checks import models_checked_once

    with models_checked_once():
        yield
