"""Do promised bits hold with every instruction set that this machine's processor has?

torch takes the widest one; ATEN_CPU_CAPABILITY names another. The tests that hang on the
last bits are marked `bits`, and run once more in a process for each of the others.
"""

import os
import re
from pathlib import Path

import launching
import pytest
import torch

OTHERS = {"AVX512": ["avx2", "default"], "DEFAULT": []}
HERE = Path(__file__)
MARK = "mark.bits"
RUN = """
import sys, pytest, torch
print(torch.backends.cpu.get_cpu_capability(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


def other_instruction_sets() -> list[str]:
    """Those below the one in force, by the name that torch's variable takes."""
    if "ATEN_CPU_CAPABILITY" in os.environ:
        return []
    return OTHERS.get(torch.backends.cpu.get_cpu_capability(), ["default"])


@pytest.mark.long
@pytest.mark.parametrize("name", other_instruction_sets())
def test_promised_bits_hold_with_another_instruction_set(name: str) -> None:
    files = sorted(HERE.parent.parent.rglob("test_*.py"))
    marked = [file for file in files if MARK in file.read_text() and file != HERE]
    options = ("-q", "-m", "bits", "-p", "no:cacheprovider")
    command = launching.python("-c", RUN, *options, *marked)
    ended = launching.run(command, {"ATEN_CPU_CAPABILITY": name}, 280)
    assert ended.returncode == 0, ended.stdout
    first, *_, last = ended.stdout.splitlines()
    assert first == name.upper()
    passed = re.match(r"(\d+) passed", last)
    assert passed is not None and int(passed[1]) >= len(marked)
