"""All tests run on one thread and import the helpers beside this file by their name.

pytest puts the folder of a conftest.py on the import path.
"""

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage need not go through it every time."""
    gc.freeze()
