"""The demo's policy with every response that is not negligible, and its exact entropy.

A state is a prompt with the first tokens of a response. The model itself is run on each,
in forward mode along the step that a probe of the demo takes: at the parameters, at the
middle of the step and at its end. What follows a prefix of probability below
`negligible` is left out, and such a response ends there.

Shape legend: S states, V vocabulary, P prompts, b prefixes of one length.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from state_policies import IMPOSSIBLE, NOWHERE, Place, StatePolicy
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from entropy_ddp.demo import MAX_COMPLETION_LENGTH
from entropy_ddp.model.response_tokens import NUM_EMBEDDINGS, NUM_PROJECTIONS

ETA = 1e-3  # the learning rate of the step
PLACES = (0.0, ETA / 2, ETA)
UNLIKELY = 1e-5  # tokens less probable than that never follow
ADAPTER = "base_model.model."


class Tree:
    """The states of some prompts, level by level.

    Args:
        folder: what `train_demo` made.
        delta: change of the adapter's parameters by name, eta v.
        negligible: probability of a prefix, given its prompt, that is not followed.
    """

    def __init__(
        self, folder: Path, delta: dict[str, Tensor], negligible: float
    ) -> None:
        (checkpoint,) = folder.glob("checkpoint-*")
        settings = json.loads((checkpoint / "adapter_config.json").read_text())
        self._scale = settings["lora_alpha"] / settings["r"]
        self._adapter = load_file(checkpoint / "adapter_model.safetensors")
        self._delta = {n.replace(".default", ""): v for n, v in delta.items()}
        # The fused attention has no forward mode.
        self._model = AutoModelForCausalLM.from_pretrained(
            folder / "base", attn_implementation="eager"
        ).eval()
        self.output_layer = self._model.get_output_embeddings().weight.detach()
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        lines = (folder / "prompts.jsonl").read_text().splitlines()
        texts = [json.loads(line)["prompt"] for line in lines]
        self._prompts = tokenizer(texts, add_special_tokens=False).input_ids
        self._end = tokenizer.eos_token_id
        self._negligible = negligible

    def policy(self) -> StatePolicy:
        """The policy along the line from theta to the end of the step."""
        start = torch.empty(len(self._prompts), dtype=torch.long)
        rows: list[Tensor] = []
        successors: list[Tensor] = []
        for length in sorted({len(ids) for ids in self._prompts}):
            chosen = [i for i, ids in enumerate(self._prompts) if len(ids) == length]
            first = sum(len(block) for block in successors)
            start[chosen] = first + torch.arange(len(chosen))
            ids = torch.tensor([self._prompts[i] for i in chosen])
            self._grow(ids, first, rows, successors)
        values = torch.cat(rows)
        hidden, *logits = values.split(
            [self.output_layer.shape[1], *[len(self.output_layer)] * 2 * len(PLACES)],
            dim=1,
        )
        width = hidden.shape[1]
        # The directions that the package projects on.
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(width, NUM_PROJECTIONS, generator=generator)
        return StatePolicy(
            places={
                eta: Place(logits=z, tangent=tangent)
                for eta, z, tangent in zip(PLACES, logits[::2], logits[1::2])
            },
            successor=torch.cat(successors),
            start=start,
            longest=MAX_COMPLETION_LENGTH,
            hidden=hidden @ (directions / width**0.5).double(),
            embedding=self._embedding(),
        )

    def _embedding(self) -> Tensor:
        """The numbers of every token that the package uses, [V, 8]."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.output_layer.shape[1], NUM_EMBEDDINGS)
        directions = torch.randn(shape, generator=generator, dtype=torch.float64)
        table = self.output_layer.double() @ directions
        table = table - table.mean(0)
        return table / table.square().mean(0).sqrt()

    def _grow(
        self, ids: Tensor, first: int, rows: list[Tensor], successors: list[Tensor]
    ) -> None:
        """Append all states of some prompts of one length, [b, length].

        Args:
            first: number of the first of them.
        """
        log_reached = torch.zeros(len(ids), dtype=torch.float64)
        caches = [DynamicCache() for _ in PLACES]
        with torch.no_grad(), forward_ad.dual_level():
            weights = [self._merged(eta) for eta in PLACES]
            for step in range(1, MAX_COMPLETION_LENGTH + 1):
                found = [self._run(*pair, ids) for pair in zip(weights, caches)]
                logits = [x for _, *pair in found for x in pair]
                log_pi = torch.log_softmax(logits[0], dim=-1)
                never = log_pi.exp() < UNLIKELY
                for z in logits[::2]:
                    z[never] = IMPOSSIBLE
                rows.append(torch.cat([found[0][0], *logits], dim=1))
                log_reached = log_reached[:, None] + log_pi
                followed = (log_reached.exp() >= self._negligible) & ~never
                followed[:, self._end] = False
                if step == MAX_COMPLETION_LENGTH:
                    followed[:] = False
                prefix, token = followed.nonzero().T
                first += len(ids)
                successor = torch.full(log_pi.shape, NOWHERE)
                successor[prefix, token] = first + torch.arange(len(prefix))
                successors.append(successor)
                if not len(prefix):
                    return
                log_reached, ids = log_reached[prefix, token], token[:, None]
                for cache in caches:
                    cache.batch_select_indices(prefix)

    def _merged(self, eta: float) -> dict[str, Tensor]:
        """Weights of the base model with the adapter in them at theta + eta v, dual."""
        merged = dict(self._model.named_parameters())
        for name, a in self._adapter.items():
            if "lora_A" not in name:
                continue
            b_name = name.replace("lora_A", "lora_B")
            va, vb = self._delta[name] / ETA, self._delta[b_name] / ETA
            a, b = a + eta * va, self._adapter[b_name] + eta * vb
            base = name.removeprefix(ADAPTER).replace(".lora_A", "")
            merged[base] = forward_ad.make_dual(
                merged[base] + self._scale * (b @ a), self._scale * (vb @ a + b @ va)
            )
        return merged

    def _run(
        self, weights: dict[str, Tensor], cache: DynamicCache, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden state, logits and their tangent after the last of these tokens."""
        output = functional_call(
            self._model.model,
            {name.removeprefix("model."): w for name, w in weights.items()},
            (),
            {"input_ids": ids, "past_key_values": cache, "use_cache": True},
        )
        hidden = output.last_hidden_state[:, -1]
        logits = forward_ad.unpack_dual(hidden @ self.output_layer.T)
        return (
            forward_ad.unpack_dual(hidden).primal.double(),
            logits.primal.double(),
            logits.tangent.double(),
        )
