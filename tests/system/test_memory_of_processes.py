"""The memory of whole processes: a real shortage, one of two ranks, measured peaks."""

import json
from pathlib import Path

import launching
import pytest
import yaml
from shortages import NUMBERS, SECTIONS, close
from tiny_runs import make_run

REAL = """
import resource
import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import reference as ref
from entropy_ddp.model.scoring import Passes
from tiny_runs import as_batch, make_passes

# As on a GPU: as many rows together as the configured budget holds.
Passes.fill = 1 << 20
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(
    vocab_size=50, hidden_size=32, intermediate_size=4096, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
)).eval()
rows = ref.random_rows(1, groups=16, responses=1, vocabulary=50, max_response=800)
shard = as_batch(rows, 50).shard(0, 1)
passes = make_passes(model, tokens_per_microbatch=1 << 20)
weights = torch.linspace(-1, 1, shard.ragged.num_tokens)
before = passes.score(shard)
plain, _ = passes.gradient(shard, lambda t, *_: (weights[t], weights[t]), torch.float32)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (150 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found, _ = passes.gradient(shard, lambda t, *_: (weights[t], weights[t]), torch.float32)
after = passes.score(shard)
print(passes.allowance.num_retries, float((found - plain).norm() / plain.norm()),
      float((after.logp - before.logp).abs().max()))
"""


@pytest.mark.long
def test_a_real_shortage_of_the_host(tmp_path: Path) -> None:
    """An address space that ends: torch's allocator, whatever it says, is understood."""
    path = tmp_path / "real.py"
    path.write_text(REAL)
    done = launching.run(launching.python(path), launching.HELPERS, fresh=True)
    retries, gradient_error, logp_error = done.require_success().stdout.split()
    assert int(retries) > 0
    assert float(gradient_error) < 1e-5
    assert float(logp_error) < 1e-5


RANKS = """
import json
import sys
from pathlib import Path

from shortages import Shortage, first_block

from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.config import load_config
from entropy_ddp.probe import opening
from jobs import run_probe

def body(world):
    verify = opening.verify_model
    def verify_and_plant(opened):
        verify(opened)
        if world.rank == 1:
            for shortage in (Shortage(14, "backward"), Shortage(10)):
                hook = shortage.after_block
                first_block(opened.policy.model).register_forward_hook(hook)
    opening.verify_model = verify_and_plant
    config = load_config(Path(sys.argv[1]), ())
    results = run_probe(config, world, None, lambda *progress: None).results
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results.to_dict()))
    return 0

sys.exit(run_ranks(body))
"""


def test_one_of_two_ranks_runs_short(tmp_path: Path) -> None:
    """Inside DistributedDataParallel, in forward and backward: the results of one."""
    run = make_run(tmp_path, "qwen2", full=True)
    expected = run.probe(**SECTIONS).results.to_dict()
    script, config = tmp_path / "ranks.py", tmp_path / "config.yaml"
    script.write_text(RANKS)
    config.write_text(yaml.safe_dump(run.config(**SECTIONS).model_dump()))
    command = launching.torchrun(2, script, config, tmp_path / "results.json")
    launching.run(command, launching.HELPERS).require_success()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["run"]["out_of_memory_retries"] > 0
    assert found["run"]["tokens_per_microbatch"] <= 10
    for section in NUMBERS:
        close(found[section], expected[section], section)
    failed = {row["name"] for row in found["audit"] if row["verdict"] == "fail"}
    assert not failed


MEASURED = """
import json
import os
import sys

import reference as ref
import torch
import yaml
from checkpoints import run_config, save_checkpoint, write_rows
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from jobs import run_probe

# Weights that are large beside their activations, and the other way round.
MODELS = {"full weights": (20_000, 2), "adapter": (5_000, 8)}
JOBS = {"probe": {}, "gradient-dot form": {"gradient_dot": {"enabled": True}}}

def make(root, kind):
    torch.manual_seed(0)
    vocabulary, layers = MODELS[kind]
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1024,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False,
    ))
    saved = save_checkpoint(
        root, "qwen2", full=kind == "full weights", model=model,
        targets=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    )
    files = [
        write_rows(root / f"{split}.jsonl", ref.random_rows(
            seed, groups=8, responses=2, vocabulary=vocabulary, max_prompt=40,
            max_response=120))
        for seed, split in enumerate("EU")
    ]
    sections = {
        "precision": {"model": "float32"}, "curvature": {"enabled": False},
        "compute": {"device": "cpu"}, "gradient_dot": {"enabled": False},
        "truth": {"ess_abort": 0.0},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(saved, *files) | sections))

def measure(root, job):
    document = yaml.safe_load((root / "config.yaml").read_text()) | JOBS[job]
    config = Config.model_validate(document)
    memory = run_probe(config, World(), None, lambda *_: None).results.run.memory
    print(json.dumps([root.name, job, memory]), flush=True)

def alone(function, *arguments):
    # In a process whose memory nobody else has used.
    pid = os.fork()
    if not pid:
        try:
            function(*arguments)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    assert os.waitpid(pid, 0)[1] == 0, arguments

for kind, jobs in (
    ("full weights", ("probe", "gradient-dot form")),
    ("adapter", ("probe",)),
):
    root = Path(sys.argv[1], kind)
    root.mkdir()
    alone(make, root, kind)
    for job in jobs:
        alone(measure, root, job)
"""
# What a library makes on its first use, and the heap's holes, are not foreseen.
NEAR = 1.15


@pytest.mark.long
def test_the_estimate_is_near_the_measured_peak(tmp_path: Path) -> None:
    """Of each kind of run, alone in its process."""
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    command = launching.python(script, tmp_path)
    done = launching.run(command, launching.HELPERS, fresh=True, timeout_seconds=300)
    lines = [json.loads(line) for line in done.require_success().stdout.splitlines()]
    ratios = {
        (kind, job): found["estimated_bytes"] / found["peak_bytes"]
        for kind, job, found in lines
    }
    assert len(ratios) == 3
    assert all(1 / NEAR < ratio < NEAR for ratio in ratios.values()), ratios


READING = """
import json
import sys
from pathlib import Path

from entropy_ddp.data.files import read_batch
from entropy_ddp.data.rows import TokenLimits
from entropy_ddp.distributed import process_group
from entropy_ddp.memory import peak_host_bytes

limits = TokenLimits(vocabulary_size=100_000, max_positions=None)
with process_group() as world:
    # What the group itself and a first exchange take.
    world.gather_objects(None)
    before = peak_host_bytes()
    batch = read_batch(Path(sys.argv[1]), "E", limits, None, world)
    taken = peak_host_bytes() - before
    Path(sys.argv[2], f"{world.rank}.json").write_text(json.dumps([len(batch), taken]))
"""


@pytest.mark.long
def test_a_rank_of_many_needs_less_to_read_a_large_file(tmp_path: Path) -> None:
    """Nine million token ids: 72 MB on one rank; at the peak some 3/R of it on R."""
    path = tmp_path / "E.jsonl"
    with path.open("w") as stream:
        for group in range(3000):
            ids = list(range(group, group + 3000))
            row = {"group": group, "prompt_ids": [group], "response_ids": ids}
            stream.write(json.dumps(row) + "\n")
    taken = {}
    for count in (1, 6):
        command = launching.python("-c", READING, path, tmp_path)
        for finished in launching.run_ranks(count, command):
            finished.require_success()
        ranks = [
            json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)
        ]
        assert [length for length, _ in ranks] == [3000] * count
        taken[count] = max(size for _, size in ranks)
    assert taken[1] > 72e6
    assert taken[6] < 0.65 * taken[1]
