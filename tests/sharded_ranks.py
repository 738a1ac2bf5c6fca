"""What the ranks of a sharded model do in tests: several checks in one group of processes.

    python sharded_ranks.py CHECK FOLDER

Every check is run on all ranks; a failed assertion ends them all.
"""

import copy
import ctypes
import gc
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference as ref
import torch
from families import plain_model
from jobs import run_attribution, run_audit, run_probe, run_sweep
from tiny_runs import as_batch
from torch import Tensor, nn

from entropy_ddp import distributed
from entropy_ddp.checkpoint import shards
from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.policy import load_policy
from entropy_ddp.cli.ranks import run_ranks
from entropy_ddp.config import Config, load_config
from entropy_ddp.data import batch as batches
from entropy_ddp.data.batch import Shard
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import ShardedLayers, shard_base
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.model.parameters import trainable_parameters
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import check_model

CPU = torch.device("cpu")
JOBS = {
    "probe": run_probe,
    "sweep": run_sweep,
    "attribute": run_attribution,
    "audit": run_audit,
}
VOCABULARY = 23
BUDGET = 40
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Families, and which projections have an adapter. The last two layers' only: there is no
# gradient below them, and no gather for one.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, tied, all": ("qwen2", {"target_modules": ALL}),
    "llama, some": ("llama", {"target_modules": ["v_proj", "up_proj"]}),
    "gemma2, some": ("gemma2", {"target_modules": ["q_proj", "v_proj"]}),
    "qwen3-moe, some": ("qwen3-moe", {"target_modules": ["q_proj", "v_proj"]}),
    "llama, upper layers": (
        "llama",
        {"target_modules": ["v_proj"], "layers_to_transform": [2, 3]},
    ),
    "llama, biases": ("llama", {"target_modules": ["v_proj"], "bias": "all"}),
}
ROWS = ref.random_rows(
    3, groups=5, responses=[4, 1, 3, 1, 2], max_response=9, vocabulary=VOCABULARY,
    with_empty=True,
)  # fmt: skip


def model_of(case: str) -> nn.Module:
    family, options = ADAPTERS[case]
    changes = {"tie_word_embeddings": True} if "tied" in case else {}
    if "layers" in case:
        changes["num_hidden_layers"] = 4
    model = plain_model(family, **changes)
    targets = options["target_modules"]
    rest = {k: v for k, v in options.items() if k != "target_modules"}
    return ref.with_lora(model, 12, targets, **rest).double().eval()


def make(model: nn.Module, **settings: Any) -> Passes:
    tokens = ResponseTokens(
        model, ScoringSettings(tokens_per_microbatch=BUDGET, share_prompts=False)
    )
    return Passes(
        tokens=tokens,
        wrapped=tokens,
        parameters=trainable_parameters(model),
        dtype=torch.float64,
        device=CPU,
        **settings,
    )


def layers_of(model: Any) -> list[nn.Module]:
    held = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(held.model.layers)


def sharded(model: nn.Module, world: World, group: int | None = None) -> Passes:
    size = group or world.world_size
    return make(model, layers=shard_base(layers_of(model), world, CPU, size))


def direction(passes: Passes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in passes.parameters.items()
    }


def tokens_of(shard: Shard) -> Tensor:
    """Places of a shard's tokens in the token arrays of the whole batch."""
    starts = shard.batch.ragged.starts[shard.positions]
    return shard.ragged.spread(starts) + shard.ragged.position


def weights_of(shard: Shard) -> Any:
    whole = torch.linspace(-1, 1, 2 * shard.batch.num_tokens, dtype=torch.float64)
    mine = whole.view(2, -1)[:, tokens_of(shard)]
    return lambda token, *_: (mine[0][token.cpu()], mine[1][token.cpu()])


def uneven(world: World) -> Shard:
    """A shard of another size on every rank: the first has most, the last none."""
    batch = as_batch(ROWS, VOCABULARY)
    place = torch.arange(len(batch))
    of_rank = (place // 4) % max(1, world.world_size - 1)
    of_rank[place % 4 > 0] = 0
    return Shard(batch=batch, positions=(of_rank == world.rank).nonzero()[:, 0])


def everything(
    passes: Passes, shard: Shard, along: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What every kind of pass gives of a shard."""
    along = along or direction(passes)
    scores = passes.score(shard, along, with_features=True)
    found = {n: scores.array(n) for n in ("logp", "entropy", "dlogp", "dentropy")}
    found |= {name: values for name, values in scores.features.items()}
    found["plain logp"] = passes.score(shard).logp
    twice = passes.score_twice(shard, along, 1e-3)
    found["logp twice"], found["entropy twice"] = twice
    found["gradient"], _ = passes.gradient(shard, weights_of(shard), torch.float64)
    return found


OF_SEQUENCES = ("logp twice", "entropy twice")


def at_shard(whole: dict[str, Tensor], shard: Shard) -> dict[str, Tensor]:
    """Of what was found of the whole batch, that of a shard."""
    tokens = tokens_of(shard)
    return {
        name: values[shard.positions if name in OF_SEQUENCES else tokens]
        for name, values in whole.items()
        if name != "gradient"
    }


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def require_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    for name, values in expected.items():
        scale = float(values.abs().max()) if values.numel() else 0.0
        torch.testing.assert_close(
            found[name], values, rtol=0, atol=tolerance * scale, msg=name
        )


def check_base(world: World, folder: Path) -> None:
    """Bits as of the whole model; and shares of any size give what it gives of them."""
    batches.BLOCK_TOKENS = 30
    for case in ADAPTERS:
        model = model_of(case)
        whole = make(copy.deepcopy(model))
        batch = as_batch(ROWS, VOCABULARY)
        expected = everything(whole, batch.shard(0, 1))
        passes = sharded(model, world)
        require_equal(everything(passes, batch.shard(0, 1)), expected)
        held = sum(
            p.to_local().numel() if hasattr(p, "to_local") else 0
            for p in model.parameters()
        )
        cut = sum(p.numel() for p in model.parameters() if hasattr(p, "to_local"))
        assert cut and held <= cut / world.world_size + 100 * 23, case
        shard = uneven(world)
        found = everything(passes, shard)
        gradient = world.sum(found.pop("gradient"), "test")
        require_close(found, at_shard(expected, shard))
        require_close({"": gradient}, {"": expected["gradient"]})


@contextmanager
def memory_runs_out(model: Any, layer: int, when: str, at: int) -> Iterator[list[int]]:
    """Once, at the layer's call of this number; of what was done so far."""
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise MemoryError("planted")

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    attention = layers_of(model)[layer].self_attn.o_proj
    handle = (
        attention.register_forward_hook(watch)
        if when == "backward"
        else attention.register_forward_pre_hook(fail)
    )
    try:
        yield calls
    finally:
        handle.remove()


WHOLE_WEIGHTS = {
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "qwen3-moe": ("qwen3-moe", {}),
}


def divided(model: Any, world: World, group: int | None = None) -> Passes:
    """Passes over a model of which every rank has a part, at any world size."""
    passes = make(model)
    policy: Any = SimpleNamespace(
        device=CPU, dtype=torch.float64, parameters={}, mapped=frozenset(), model=model
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "replace", lambda policy, parameters: parameters)
        parts, layers = shards.divided(
            policy, passes.tokens, list(model.model.layers), world,
            group or world.world_size,
        )  # fmt: skip
    return replace(passes, parameters=parts, layers=layers)


def part_of(passes: Passes, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of vectors by parameter name."""
    layers: Any = passes.layers
    return {name: whole[name][layers.region(name)[1]] for name in passes.parameters}


def all_of(passes: Passes, flat: Tensor) -> dict[str, Tensor]:
    """The whole of a vector of which every rank has a part, by parameter name."""
    views = passes.layout.views(flat)
    return {name: passes.layers.whole(name, view) for name, view in views.items()}


def check_full(world: World, folder: Path) -> None:
    """Scores, derivatives and sums of gradients as of the whole model."""
    batches.BLOCK_TOKENS = 30
    for family, changes in WHOLE_WEIGHTS.values():
        model = plain_model(family, **changes)
        whole = make(copy.deepcopy(model))
        batch = as_batch(ROWS, VOCABULARY)
        along = direction(whole)
        expected = everything(whole, batch.shard(0, 1), along)
        views = whole.layout.views(expected.pop("gradient"))
        passes = divided(model, world)
        own = part_of(passes, along)
        assert passes.num_parameters == whole.num_parameters
        vector = passes.layout.flatten(own, torch.float64)
        norm = whole.norm(whole.layout.flatten(along, torch.float64))
        assert abs(passes.norm(vector) / norm - 1) < 1e-12
        shard = uneven(world)
        found = everything(passes, shard, own)
        require_close(all_of(passes, found.pop("gradient")), views)
        require_close(found, at_shard(expected, shard))


def check_shortage(world: World, folder: Path) -> None:
    """Memory runs out on one rank, in a forward and in a backward pass: all go on."""
    model = model_of("llama, upper layers")
    batch = as_batch(ROWS, VOCABULARY)
    expected = everything(make(copy.deepcopy(model)), batch.shard(0, 1))
    passes = sharded(model, world)
    weights, shard = weights_of(batch.shard(0, 1)), uneven(world)
    # The first passes find out which gathers they make, as the self-check does.
    passes.gradient(batch.shard(0, 1), weights, torch.float64)
    passes.score(batch.shard(0, 1))
    for when, layer, at in (
        ("forward", 0, 1),
        ("forward", 3, 2),
        ("backward", 3, 2),
        ("backward", 2, 1),
    ):
        again = replace(passes, allowance=type(passes.allowance)())
        fails = world.rank == 0
        with memory_runs_out(model, layer, when, at if fails else -1) as calls:
            if when == "forward":
                scores = again.score(shard, direction(passes))
                found = {n: scores.array(n) for n in ("logp", "entropy", "dlogp")}
                require_close(found, {n: at_shard(expected, shard)[n] for n in found})
            flat, _ = again.gradient(shard, weights_of(shard), torch.float64)
        assert (again.allowance.num_retries > 0) == fails, (when, layer, calls)
        gradient = world.sum(flat, "test")
        require_close({"": gradient}, {"": expected["gradient"]})


def check_full_shortage(world: World, folder: Path) -> None:
    """Of a model in parts: forward all go on, backward all end and are told how."""
    model = plain_model("llama")
    batch = as_batch(ROWS, VOCABULARY)
    whole = make(copy.deepcopy(model))
    along = direction(whole)
    expected = everything(whole, batch.shard(0, 1), along)
    passes = divided(model, world)
    own, shard = part_of(passes, along), uneven(world)
    passes.gradient(shard, weights_of(shard), torch.float64)
    fails = world.rank == 0
    for layer in (0, 1):
        again = replace(passes, allowance=type(passes.allowance)())
        with memory_runs_out(model, layer, "forward", 1 if fails else -1):
            scores = again.score(shard, own)
        found = {n: scores.array(n) for n in ("logp", "entropy", "dlogp")}
        require_close(found, {n: at_shard(expected, shard)[n] for n in found})
        assert (again.allowance.num_retries > 0) == fails
    if world.world_size > 1:
        # One rank alone would end the others, which wait for it.
        return
    for when in ("forward", "backward"):
        again = replace(passes, allowance=type(passes.allowance)())
        with (
            memory_runs_out(model, 1, when, 1),
            pytest.raises(
                RunError, match="lower compute.tokens_per_microbatch.*--resu"
            ),
        ):
            again.gradient(shard, weights_of(shard), torch.float64)


def _forgets_outer_tangents(layers: Any) -> None:
    own, last = layers._gathered_one, len(layers._layers) - 1
    layers._gathered_one = lambda number, step: (
        None if number == last else own(number, step)
    )


def _keeps_outer_parameters(layers: Any) -> None:
    layers._root.set_reshard_after_forward(False, recurse=False)
    layers._root.reshard = lambda: None


def _takes_means(layers: Any) -> None:
    for layer in layers._layers:
        layer.set_gradient_divide_factor(2.0)


def _steps_copies(layers: Any) -> None:
    for name, part in layers._parts.items():
        layers._parts[name] = nn.Parameter(part.detach().clone())


# What gives wrong numbers without a word, and who finds it.
PLANTED = {
    "self-check `duality`": [
        _forgets_outer_tangents,
        _takes_means,
        _keeps_outer_parameters,
    ],
    "torch has moved it": [_steps_copies],
}


def check_planted(world: World, folder: Path) -> None:
    """Every silent mistake of a model in parts is found before the first pass."""
    check_model(divided(plain_model("llama"), world), VOCABULARY)
    for message, plants in PLANTED.items():
        for plant in plants:
            passes = divided(plain_model("llama"), world)
            plant(passes.layers)
            with pytest.raises((InputError, RunError), match=message):
                check_model(passes, VOCABULARY)


def check_order(world: World, folder: Path) -> None:
    """A model whose layers run in another order than before is refused by name."""
    model: Any = model_of("llama, upper layers")
    batch = as_batch(ROWS, VOCABULARY)
    passes = sharded(model, world)
    passes.score(batch.shard(0, 1))
    inner = model.get_base_model().model
    inner.layers = nn.ModuleList([inner.layers[i] for i in (1, 0, 2, 3)])
    try:
        passes.score(batch.shard(0, 1))
    except RunError as error:
        assert "layer 1 forward, found layer 2 forward" in str(error), error
    else:
        raise AssertionError("another order of layers was not found")


def check_groups(world: World, folder: Path) -> None:
    """Four ranks in two groups, each of which holds the model in two parts."""
    model = model_of("qwen2, tied, all")
    batch = as_batch(ROWS, VOCABULARY)
    expected = everything(make(copy.deepcopy(model)), batch.shard(0, 1))
    passes = sharded(model, world, group=2)
    require_equal(everything(passes, batch.shard(0, 1)), expected)
    cut = [p for p in model.parameters() if hasattr(p, "to_local")]
    assert sum(p.to_local().numel() for p in cut) * 2 <= sum(
        p.numel() + 2 * p[0].numel() for p in cut
    )
    full = plain_model("llama")
    whole = make(copy.deepcopy(full))
    along = direction(whole)
    expected = everything(whole, batch.shard(0, 1), along)
    views = whole.layout.views(expected.pop("gradient"))
    passes = divided(full, world, group=2)
    own, shard = part_of(passes, along), uneven(world)
    found = everything(passes, shard, own)
    require_close(all_of(passes, found.pop("gradient")), views)
    require_close(found, at_shard(expected, shard))
    flat = whole.layout.flatten(along, torch.float64)
    norm = passes.norm(passes.layout.flatten(own, torch.float64))
    assert abs(norm / whole.norm(flat) - 1) < 1e-12


def check_mapped(world: World, folder: Path) -> None:
    """What is cut from pages of the files is what a whole model has, bit for bit.

    The folder has a configuration for every way in which a checkpoint is stored.
    """
    for path in sorted(folder.glob("*.yaml")):
        config = load_config(path, ())
        files = find_checkpoint(config.checkpoint)
        given = (files, config.precision, config.compute.attention, CPU)
        whole, policy = load_policy(*given), load_policy(*given, True)
        is_read = policy.read_whole is not None
        assert is_read == ("moe" in path.stem or path.stem == "shares False"), path
        in_shares = config.checkpoint.weights is not None
        assert len(policy.unread) == (len(policy.mapped) if in_shares else 0)
        ends = whole.end_ids
        tokens = ResponseTokens(policy.model, ScoringSettings())
        policy, layers = shards.shard_policy(policy, tokens, config.compute, world)
        expected = dict(whole.model.named_parameters())
        found = dict(ShardedLayers.gathered(layers, policy.model.named_parameters()))
        assert list(found) == list(expected), path
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, (path, name)
            assert torch.equal(found[name], tensor), (path, name)
            assert policy.parameters.keys() == whole.parameters.keys()
        buffers = dict(policy.model.named_buffers())
        for name, buffer in whole.model.named_buffers():
            assert buffers[name].dtype == buffer.dtype, (path, name)
            assert torch.equal(buffers[name], buffer), (path, name)
        assert policy.end_ids == ends
        ids = torch.arange(6)[None]
        with torch.no_grad():
            logits = whole.model(input_ids=ids).logits
            again = layers.within(partial(policy.model, input_ids=ids)).logits
        torch.testing.assert_close(again, logits)


def own_bytes() -> int:
    """Memory of this process that is nobody else's: pages of files are not."""
    gc.collect()
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def peak_of_own_bytes() -> Iterator[list[int]]:
    """The most that it has at any time, watched by a thread."""
    most, done = [own_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            text = Path("/proc/self/status").read_text()
            most[0] = max(most[0], 1024 * int(text.split("RssAnon:")[1].split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def check_memory(world: World, folder: Path) -> None:
    """A model is opened and passed over: what a rank has beside what it had before.

    Writes what was found and what the formulas of `bytes_by_shard` say.
    """
    # M_MMAP_THRESHOLD: what is freed is given back to the system.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        config = load_config(path, ())
        shard = config.compute.shard
        files = find_checkpoint(config.checkpoint)
        given = (files, config.precision, config.compute.attention, CPU)
        # What libraries keep from their first use is not counted.
        load_policy(*given, shard != "none")
        before = own_bytes()
        with peak_of_own_bytes() as most:
            policy = load_policy(*given, shard != "none")
            tokens = ResponseTokens(policy.model, ScoringSettings())
            policy, layers = shards.shard_policy(policy, tokens, config.compute, world)
        opened = own_bytes() - before
        passes = Passes(
            tokens=tokens, wrapped=tokens, parameters=policy.parameters,
            dtype=torch.float32, device=CPU, layers=layers,
        )  # fmt: skip
        along = {n: torch.zeros_like(p) for n, p in policy.parameters.items()}
        shard_of_one = as_batch(ROWS[:1], VOCABULARY).shard(0, 1)
        with peak_of_own_bytes() as most_of_pass:
            passes.score(shard_of_one, along)
        size = {name: p.numel() * 4 for name, p in policy.model.named_parameters()}
        of_layers = {name: n for name, n in size.items() if ".layers." in name}
        layer = sum(n for name, n in of_layers.items() if ".layers.0." in name)
        outside = sum(size.values()) - sum(of_layers.values())
        ranks = world.world_size
        expected = {
            "base": sum(of_layers.values()) / ranks + outside + 2 * layer,
            # And the direction's part.
            "full": 2 * sum(size.values()) / ranks + 3 * outside + 2 * layer,
        }[shard]
        found[shard] = {
            "expected": expected,
            "while it was opened": most[0] - before,
            "opened": opened,
            "in a pass": most_of_pass[0] - before,
            "whole": sum(size.values()),
        }
        del policy, tokens, layers, passes, along
    if world.is_main:
        (folder / "memory.json").write_text(json.dumps(found))


def check_fault(world: World, folder: Path) -> None:
    """The second rank meets a fault in the second layer; the others wait in a gather."""
    model = model_of("llama, upper layers")
    passes, shard = sharded(model, world), as_batch(ROWS, VOCABULARY).shard(0, 1)
    passes.score(shard)
    fault = os.environ["FAULT"]

    def meet(*_: Any) -> None:
        if fault == "fails":
            raise RunError("planted: not finite")
        if fault == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)

    if world.rank == 1:
        layers_of(model)[1].self_attn.o_proj.register_forward_pre_hook(meet)
    (folder / f"{world.rank}.pid").write_text(str(os.getpid()))
    passes.score(shard)


def check_jobs(world: World, folder: Path) -> None:
    """Every configuration of the folder, by the job that its name begins with."""
    for path in sorted(folder.glob("*.yaml")):
        config, job = load_config(path, ()), JOBS[path.stem.partition(" ")[0]]
        run_job(world, folder, path.stem, job, config)


def run_job(world: World, folder: Path, name: str, job: Any, config: Config) -> None:
    alone = replace(world, collectives={})
    out = folder / name
    if world.is_main:
        out.mkdir()
    world.gather_objects(None)
    # What passes leave is kept there, for another number of ranks to go on with.
    kept = None if config.out is None else Path(config.out)
    probed = job(config, alone, kept, lambda *progress: None)
    if world.is_main:
        document = json.loads(json.dumps(probed.results.to_dict(), allow_nan=False))
        (out / "results.json").write_text(json.dumps(document))


CHECKS = {
    "base": check_base,
    "full": check_full,
    "shortage": check_shortage,
    "full shortage": check_full_shortage,
    "planted": check_planted,
    "mapped": check_mapped,
    "fault": check_fault,
    "memory": check_memory,
    "order": check_order,
    "groups": check_groups,
    "jobs": check_jobs,
}


def main() -> int:
    names, folder = sys.argv[1].split(","), Path(sys.argv[2])
    if os.environ.get("FAULT") == "hangs":
        distributed.process_group = partial(
            distributed.process_group, timeout_seconds=3
        )

    def body(world: World) -> int:
        for name in names:
            CHECKS[name](world, folder)
        return 0

    return run_ranks(body, 60.0, gathers_layers=True)


if __name__ == "__main__":
    sys.exit(main())
