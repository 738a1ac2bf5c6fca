"""The demo: a checkpoint trained by TRL, and rollouts sampled from it by this package."""

from pathlib import Path
from typing import Any

from entropy_ddp.config import Config
from entropy_ddp.demo import MAX_COMPLETION_LENGTH, DemoCheckpoint, train_demo
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.probe.sample import run_sample
from entropy_ddp.probe.session import Progress

NUM_EVALUATION_PROMPTS = 2048
NUM_UPDATE_PROMPTS, RESPONSES_PER_PROMPT = 16, 8


def make_demo(out: Path, seed: int, world: World, progress: Progress) -> DemoCheckpoint:
    """Train the demo policy into `out`, then write E.jsonl and U.jsonl beside it.

    Args:
        out: folder to make; must not exist, or be empty.
        seed: seed of training and sampling.
        world: one rank.

    Raises:
        InputError: the folder is in use, TRL is missing, or there are several ranks.
    """
    if world.world_size > 1:
        raise InputError(
            f"demo: runs in one process, found {world.world_size}; start it without a "
            "launcher"
        )

    def on_step(phase: str, done: int, total: int) -> None:
        progress(phase, done, total, "steps")

    made = train_demo(out, seed=seed, on_step=on_step)
    sampled = {
        "prompts": str(made.prompts),
        "max_new_tokens": MAX_COMPLETION_LENGTH,
        "reward": "entropy_ddp.demo:running_total_reward",
        "sequences_per_call": 256,
    }
    evaluation: dict[str, Any] = {
        "num_prompts": NUM_EVALUATION_PROMPTS,
        "with_replacement": True,
    }
    update = {
        "num_prompts": NUM_UPDATE_PROMPTS,
        "responses_per_prompt": RESPONSES_PER_PROMPT,
    }
    config = Config.model_validate(
        {
            "checkpoint": {"path": str(made.checkpoint), "base": str(made.base)},
            "batches": {
                "E": {"sample": sampled | evaluation},
                "U": {"sample": sampled | update},
            },
            "seed": seed,
        }
    )
    run_sample(config, world, out, progress)
    return made
