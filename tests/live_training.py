"""Trainings of a tiny policy with and without the callback, and what they leave.

Run as a script under torchrun, this file trains on several ranks:

    torchrun --nproc_per_node=2 tests/live_training.py JOBS.json

where the file holds a list of arguments of `train`, each a mapping.
"""

import hashlib
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback

PROMPTS = [f"{a}+{b}=" for a in range(1, 5) for b in range(1, 5)]
PROBE = {"every": 1, "num_prompts": 8, "responses_per_prompt": 1}
TIMES = ("runtime", "per_second", "time")


def arbitrary_reward(completions: list[str], **_: object) -> list[float]:
    """A reward with signal at a policy that knows nothing."""
    return [sum(map(ord, text)) % 5 / 4 for text in completions]


class Records(TrainerCallback):
    """What a training was after every step: hashes, and all that it logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, str]] = []
        self.logs: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.floor: Any = None

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Hash everything that a probe might have touched."""
        flags = [(n, m.training) for n, m in model.named_modules()]
        padding = [getattr(m, "padding_idx", None) for m in model.modules()]
        self.steps.append(
            {
                "weights": digest(p for _, p in model.named_parameters()),
                "optimizer": digest(
                    value
                    for moments in optimizer.optimizer.state.values()
                    for _, value in sorted(moments.items())
                ),
                "python": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
                "numpy": hashlib.sha256(
                    repr(numpy.random.get_state()).encode()
                ).hexdigest(),
                "torch": digest([torch.get_rng_state()]),
                "flags": repr(flags) + repr(padding),
                "rate": repr([group["lr"] for group in optimizer.param_groups]),
            }
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Keep what reporters see, and what is the training's own."""
        self.seen.append(dict(logs))
        self.logs.append(
            {
                name: value
                for name, value in logs.items()
                if not name.startswith(("entropy_ddp/", "entropy_floor/"))
                and not any(time in name for time in TIMES)
            }
        )


def digest(tensors: Any) -> str:
    """A hash of the bits of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(torch.as_tensor(tensor).detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def tiny_policy() -> tuple[Any, Any]:
    """A Qwen2 of some thousand random parameters, and the demo's tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from entropy_ddp import demo

    tokenizer = demo._character_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


def make_trainer(
    folder: Path,
    *,
    lora: Mapping[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    base: Path | None = None,
    **settings: Any,
) -> Any:
    """TRL's trainer on the tiny policy.

    Args:
        folder: its output folder.
        lora: settings of a LoRA adapter; None trains all weights.
        callbacks: further callbacks.
        base: a model and its tokenizer in place of the tiny policy.
        settings: further settings of GRPOConfig; the batch size is per rank.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny_policy()
    if base is not None:
        model = AutoModelForCausalLM.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 6, "loss_type": "dr_grpo",
        "scale_rewards": "none", "learning_rate": 1e-3, "weight_decay": 0.1,
        "lr_scheduler_type": "linear", "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    peft = {
        "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=arbitrary_reward,
        args=GRPOConfig(**arguments | settings),
        train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
        peft_config=None if lora is None else LoraConfig(**peft | dict(lora)),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    folder: str | Path,
    *,
    probe: Mapping[str, Any] | None = None,
    floor: Mapping[str, Any] | None = None,
    record: bool = False,
    dump: bool = False,
    **settings: Any,
) -> Records:
    """Train, with the callbacks that have settings, and with the recorder.

    The ledger is in `folder`, the recorded batches in `folder / "trainer/rollouts"`.
    """
    from entropy_ddp.training import (
        EntropyFloor,
        EntropyProbeCallback,
        RolloutRecorder,
    )

    folder, records = Path(folder), Records()
    trainer = make_trainer(folder / "trainer", callbacks=[records], **settings)
    if record:
        RolloutRecorder(out=folder / "trainer" / "rollouts").attach(trainer)
    if probe is not None:
        EntropyProbeCallback(out=folder, **PROBE | dict(probe)).attach(trainer)
    # After the probe: it finds its place before it.
    if floor is not None:
        records.floor = EntropyFloor(**floor)
        records.floor.attach(trainer)
    if dump:
        Dump(folder, trainer, records.floor)
    trainer.train()
    return records


class Dump(TrainerCallback):
    """Every step of a rank as it is about to be taken, in `folder / "dump-RANK.pt"`.

    The batch as it went into the loss, the model and the optimizer's state before the
    step, the gradient that it is taken with, and what the floor says of it.
    """

    def __init__(self, folder: Path, trainer: Any, floor: Any) -> None:
        rank = trainer.accelerator.process_index
        self.file = folder / f"dump-{rank}.pt"
        self.steps: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.model, self.floor = trainer.accelerator.unwrap_model(trainer.model), floor
        original = trainer._compute_loss

        def compute_loss(model: Any, inputs: Any) -> Any:
            self.rows += rows_of(inputs)
            return original(model, inputs)

        trainer._compute_loss = compute_loss
        trainer.add_callback(self)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any
    ) -> None:
        """Keep the step."""
        names = {p: n for n, p in self.model.named_parameters() if p.requires_grad}
        moments = {
            names[p]: {key: torch.as_tensor(x).clone() for key, x in state.items()}
            for p, state in optimizer.optimizer.state.items()
        }
        groups = [
            {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            | {"names": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        step = {
            "rows": self.rows,
            "model": {n: p.clone() for n, p in self.model.state_dict().items()},
            "gradient": {n: p.grad.clone() for p, n in names.items()},
            "moments": moments,
            "groups": groups,
            "floor": None if self.floor is None else vars(self.floor.last),
        }
        self.steps.append(step)
        self.rows = []
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.steps, self.file)


def rows_of(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sequences that TRL's loss is given: ids and advantage."""
    rows = []
    for index, advantage in enumerate(inputs["advantages"].tolist()):
        prompt, response = (
            inputs[f"{part}_ids"][index][inputs[f"{part}_mask"][index].bool()].tolist()
            for part in ("prompt", "completion")
        )
        rows.append(
            {"prompt_ids": prompt, "response_ids": response, "advantage": advantage}
        )
    return rows


def ledger_of(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a ledger."""
    lines = (Path(folder) / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps_of(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of the probed steps."""
    return [line for line in ledger_of(folder) if line["kind"] == "step"]


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        kept = train(**job)
        target = Path(job["folder"]) / f"records-{os.environ['RANK']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"steps": kept.steps, "logs": kept.logs}))
