"""Tiny checkpoints on disk, as the common trainers write them, for end-to-end tests.

A base model, a PEFT adapter (or full weights) and a warm AdamW state in the layout of
the Hugging Face Trainer: a group with weight decay, then one without.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reference
import torch
import yaml
from reference import Row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "gpt2": lambda seed: reference.tiny_gpt2(seed, attention="sdpa"),
    "qwen2": lambda seed: reference.tiny_qwen2(seed, attention="sdpa"),
    "llama": lambda seed: reference.tiny_llama(seed, attention="sdpa"),
}
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "up_proj"],
}
LEARNING_RATE = 1e-3
# Of the tokenizer below: one token a character.
VOCABULARY = ["<eos>", "<unk>", "<pad>", *"0123456789+= ?"]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint on disk and the float64 model it was written from."""

    folder: Path
    base: Path
    model: nn.Module
    optimizer: torch.optim.AdamW

    @property
    def section(self) -> dict[str, Any]:
        """The `checkpoint` section of a configuration."""
        return {"path": str(self.folder), "base": str(self.base)}


def save_checkpoint(
    root: Path,
    family: str,
    *,
    targets: Sequence[str] | None = None,
    full: bool = False,
    weight_decay: float = 0.1,
    model: nn.Module | None = None,
    **options: Any,
) -> Saved:
    """Write base, adapter (or full weights) and a warm optimizer state under `root`.

    `model` is taken in place of the family's own; `options` are PEFT's, of the adapter.
    """
    model = FAMILIES[family](11) if model is None else model
    base, folder = root / "base", root / "checkpoint-3"
    if not full:
        model.save_pretrained(base)
        model = reference.with_lora(model, 12, targets or TARGETS[family], **options)
    parameters = reference.trainable(model)
    optimizer = _warm_optimizer(model, parameters, weight_decay)
    model.save_pretrained(folder)
    if not full:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = str(base)
        path.write_text(json.dumps(config))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return Saved(
        folder=folder,
        base=folder if full else base,
        model=model,
        optimizer=optimizer,
    )


def decays(name: str) -> bool:
    """Whether the Trainer decays a parameter of one of these families."""
    return not any(word in name for word in ("bias", "norm", "ln_"))


def _warm_optimizer(
    model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW after three steps on random gradients; the parameters are put back."""
    groups = [
        {
            "params": [p for n, p in parameters.items() if decays(n)],
            "weight_decay": weight_decay,
        },
        {
            "params": [p for n, p in parameters.items() if not decays(n)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))
    before = {n: p.detach().clone() for n, p in parameters.items()}
    generator = torch.Generator().manual_seed(13)
    for _ in range(3):
        for parameter in parameters.values():
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
            parameter.grad = 0.1 * noise
        optimizer.step()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
            parameter.grad = None
    return optimizer


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write reference rows as a rollout file."""
    lines = []
    for row in rows:
        document = {
            "group": row.group,
            "prompt_ids": row.prompt_ids,
            "response_ids": row.response_ids,
            "reward": row.reward,
            "sampling_logprobs": row.sampling_logprobs,
            "tag": f"row {len(lines)}",
        }
        given = {key: value for key, value in document.items() if value is not None}
        lines.append(json.dumps(given))
    path.write_text("\n".join(lines) + "\n")
    return path


def run_config(
    saved: Saved, evaluation: Path, update: Path, **sections: Any
) -> dict[str, Any]:
    """A float64 configuration of a probe, with these sections replaced or added."""
    return {
        "checkpoint": saved.section,
        "batches": {"E": {"file": str(evaluation)}, "U": {"file": str(update)}},
        "precision": {"model": "float64"},
        "compute": {"device": "cpu", "tokens_per_microbatch": 24},
        "update": {"max_grad_norm": 0.5},
    } | sections


def save_character_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a character, end-of-sequence token 0."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(folder)


def write_sampling_run(folder: str | Path) -> Path:
    """A checkpoint, prompts, and a configuration that samples E and U; its path.

    U is rewarded by a function of a module in the same folder.
    """
    folder = Path(folder)
    saved = save_checkpoint(folder, "qwen2")
    save_character_tokenizer(saved.base)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i}+{i}="}}\n' for i in range(10)))
    source = {"prompts": str(prompts), "max_new_tokens": 6}
    evaluation = source | {"num_prompts": 64, "with_replacement": True}
    update = source | {"num_prompts": 4, "responses_per_prompt": 4}
    batches = {
        "E": {"sample": evaluation},
        "U": {"sample": update | {"reward": "rewards:score"}},
    }
    (folder / "rewards.py").write_text(
        "def score(prompt, response, row):\n    return len(set(response))\n"
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(saved, Path(), Path(), batches=batches)))
    return path
