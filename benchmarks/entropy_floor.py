"""What holds the entropy, and what it is good for: trainings by TRL, method beside method.

    python -m benchmarks.entropy_floor train --seeds 5
    python -m benchmarks.entropy_floor draw
    python -m benchmarks.entropy_floor cost

The task is to add three digits. The sum alone earns half, with its running total one:

    prompt    3+4+8=
    response  15        reward 1/2        an easy answer, which the policy prefers
              7+8=15    reward 1          garbled half of the time at the start

so that a policy that stops to explore keeps the easy answer. A Qwen2 of 100,000 parameters
that learned from worked examples is trained by TRL's GRPOTrainer. Each batch of 128
responses is stepped on twice, as clipping has nothing to clip on policy.

`train` appends one line of JSON for each training that is not there; `draw` makes the
table and the figure of docs/holding.md from the lines; `cost` times a step with and without
a floor by the length of the responses, for the page's table of costs.
"""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.__main__ import quiet_libraries

RESULTS = Path("benchmarks/entropy_floor.jsonl")
PAGE = Path("docs/holding.md")
FIGURE = Path("docs/images/entropy-floor.png")
BASE = Path("build/entropy-floor-base")

FLOOR = 0.5
STEPS = 200
LEARNING_RATE = 5e-4
PROMPTS_PER_BATCH, RESPONSES_PER_PROMPT = 16, 8
MAX_LENGTH = 9
NUM_TRAINED, NUM_HELD_OUT = 400, 200
EVALUATED = 16
BEST_OF = 8
# The rms of the entropy less the floor is of the steps after the first third.
SETTLED = STEPS // 3
CURVE_EVERY = 5
# Of the worked examples: how many give the sum alone, and how many are wrong.
SUM_ALONE, WRONG_SUMS, WRONG_TOTALS = 0.7, 0.2, 0.35
SUPERVISED_STEPS, SUPERVISED_BATCH = 600, 128


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train.

    Attributes:
        says: what it is, for the table.
        trainer: settings of GRPOConfig.
        floor: settings of `EntropyFloor`; None for none.
        covariance: settings of clip-cov or KL-cov; None for neither.
        easy: what the sum alone earns.
        is_trained: False for the policy that the others begin with.
    """

    says: str
    trainer: Mapping[str, Any] = field(default_factory=dict)
    floor: Mapping[str, Any] | None = None
    covariance: Mapping[str, float] | None = None
    easy: float = 0.5
    is_trained: bool = True


METHODS: dict[str, Method] = {
    "start": Method(says="before training", is_trained=False),
    "plain": Method(says="plain"),
    "coef-low": Method(says="entropy_coef 0.01", trainer={"entropy_coef": 0.01}),
    "coef-middle": Method(says="entropy_coef 0.03", trainer={"entropy_coef": 0.03}),
    "coef-high": Method(says="entropy_coef 0.1", trainer={"entropy_coef": 0.1}),
    "adaptive": Method(
        says="use_adaptive_entropy",
        trainer={"use_adaptive_entropy": True, "entropy_target": FLOOR},
    ),
    "clip-higher": Method(says="clip-higher 0.28", trainer={"epsilon_high": 0.28}),
    "clip-cov": Method(says="clip-cov", covariance={"fraction": 0.02, "penalty": 0.0}),
    "kl-cov": Method(
        says="KL-cov",
        trainer={"epsilon": 1e3},
        covariance={"fraction": 0.02, "penalty": 1.0},
    ),
    "repo-feedback": Method(
        says="REPO-R, feedback", floor={"family": "repo", "mode": "feedback"}
    ),
    "floor-repo": Method(says="EntropyFloor, repo", floor={"family": "repo"}),
    "floor-failures": Method(
        says="EntropyFloor, improbable_failures",
        floor={"family": "improbable_failures"},
    ),
    # Where a floor is not expected to help.
    "easy-start": Method(
        says="the sum alone earns 1: before training", easy=1.0, is_trained=False
    ),
    "easy-plain": Method(says="the sum alone earns 1: plain", easy=1.0),
    "easy-floor": Method(
        says="the sum alone earns 1: EntropyFloor, repo",
        floor={"family": "repo"},
        easy=1.0,
    ),
    "fast-plain": Method(
        says="learning rate 2e-3: plain", trainer={"learning_rate": 2e-3}
    ),
    "fast-floor": Method(
        says="learning rate 2e-3: EntropyFloor, repo",
        trainer={"learning_rate": 2e-3},
        floor={"family": "repo"},
    ),
}


# The task


def prompt_of(terms: Iterable[int]) -> str:
    """The text of a prompt."""
    return "+".join(map(str, terms)) + "="


def reward(terms: Iterable[int], response: str, easy: float) -> float:
    """1 for the right sum after its running total, `easy` for the sum alone, else 0."""
    total, *rest = terms
    if response.rpartition("=")[2] != str(total + sum(rest)):
        return 0.0
    return 1.0 if response.count("=") == len(rest) - 1 else easy


def _trl_rewards(
    completions: list[str], terms: list[list[int]], easy: list[float], **_: object
) -> list[float]:
    rows = zip(terms, completions, easy, strict=True)
    return [reward(*row) for row in rows]


def split_prompts() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The prompts that are trained on, and those that are held out."""
    digits = range(1, 10)
    terms: list[tuple[int, ...]] = [
        (a, b, c) for a in digits for b in digits for c in digits
    ]
    random.Random("prompts").shuffle(terms)
    return terms[:NUM_TRAINED], terms[-NUM_HELD_OUT:]


def _worked_example(stream: random.Random) -> tuple[str, str]:
    terms = [stream.randint(1, 9) for _ in range(3)]
    prompt, total = prompt_of(terms), sum(terms)
    if stream.random() < SUM_ALONE:
        wrong = stream.random() < WRONG_SUMS
        shift = stream.choice([-3, -2, -1, 1, 2, 3]) if wrong else 0
        return prompt, str(max(1, total + shift))
    totals = []
    while len(terms) > 1:
        wrong = stream.random() < WRONG_TOTALS
        shift = stream.choice([-2, -1, 1, 2]) if wrong else 0
        terms = [max(1, terms[0] + terms[1] + shift), *terms[2:]]
        totals.append("+".join(map(str, terms)))
    return prompt, "=".join(totals)


def base_policy(folder: Path) -> Path:
    """The policy that all trainings begin with; made if it is not there."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from entropy_ddp import demo

    if folder.exists():
        return folder
    tokenizer = demo._character_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.05, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / 30, (1 + math.cos(math.pi * step / SUPERVISED_STEPS)) / 2
        ),
    )
    stream = random.Random("worked examples")
    for _ in range(SUPERVISED_STEPS):
        examples = [_worked_example(stream) for _ in range(SUPERVISED_BATCH)]
        texts = [prompt + text + tokenizer.eos_token for prompt, text in examples]
        ids = tokenizer(
            texts, padding=True, padding_side="right", return_tensors="pt"
        ).input_ids
        # One token a character.
        starts = torch.tensor([[len(prompt)] for prompt, _ in examples])
        is_prompt = torch.arange(ids.shape[1]) < starts
        labels = ids.masked_fill(is_prompt | (ids == tokenizer.pad_token_id), -100)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as scratch:
        unfinished = Path(scratch) / folder.name
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.replace(folder)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# One training


def train(method: Method, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """Train once, and say what came of it.

    Returns:
        What `evaluate` gives; of a training the entropy of the batches by step, too,
        and the seconds.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig

    trained, held_out = split_prompts()
    rows = [
        {"prompt": prompt_of(t), "terms": list(t), "easy": method.easy} for t in trained
    ]
    settings: dict[str, Any] = {
        "output_dir": str(folder), "seed": seed, "max_steps": STEPS,
        "per_device_train_batch_size": PROMPTS_PER_BATCH * RESPONSES_PER_PROMPT,
        "steps_per_generation": 1, "num_iterations": 2,
        "num_generations": RESPONSES_PER_PROMPT, "max_completion_length": MAX_LENGTH,
        "loss_type": "dr_grpo", "scale_rewards": "none",
        "learning_rate": LEARNING_RATE, "adam_beta2": 0.99,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "save_strategy": "no", "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not method.is_trained:
        return evaluate(model, tokenizer, held_out, method.easy)
    arguments = {
        "model": model,
        "processing_class": tokenizer,
        "reward_funcs": _trl_rewards,
        "args": GRPOConfig(**settings | dict(method.trainer)),
        "train_dataset": Dataset.from_list(rows),
    }
    trainer = _trainer_class(method.covariance)(**arguments)
    trainer.remove_callback(PrinterCallback)
    if method.floor is not None:
        from entropy_ddp.training import EntropyFloor

        EntropyFloor(FLOOR, **method.floor).attach(trainer)
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    entropy = [entry["entropy"] for entry in logs]
    settled = entropy[SETTLED:]
    return {
        **evaluate(trainer.model, trainer.processing_class, held_out, method.easy),
        "rms": math.sqrt(sum((h - FLOOR) ** 2 for h in settled) / len(settled)),
        "below": math.sqrt(sum(min(h - FLOOR, 0) ** 2 for h in settled) / len(settled)),
        "seconds_per_step": seconds / STEPS,
        "entropy_by_step": [round(h, 3) for h in entropy[::CURVE_EVERY]],
    }


def _trainer_class(covariance: Mapping[str, float] | None) -> type[Any]:
    """TRL's trainer, with clip-cov or KL-cov (arXiv 2505.22617) if asked for.

    The tokens of largest covariance of log p and advantage, a fraction of them, have no
    gradient (clip-cov), or a penalty on |log p - log p_old| beside it (KL-cov).
    """
    from trl import GRPOTrainer

    if covariance is None:
        return GRPOTrainer
    fraction, penalty = covariance["fraction"], covariance["penalty"]

    class CovarianceTrainer(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            self.of_loss = inputs
            self.penalized = 0.0
            return super()._compute_loss(model, inputs) + self.penalized

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **options)
            if not torch.is_grad_enabled():
                return found
            logp, inputs = found[0], self.of_loss
            chosen = _most_covariant(
                logp.detach(), inputs["advantages"], inputs["completion_mask"], fraction
            )
            if penalty:
                moved = (logp - inputs["old_per_token_logps"]).abs() * chosen
                self.penalized = penalty * moved.sum() / (len(logp) * MAX_LENGTH)
            else:
                logp.register_hook(lambda slope: slope * ~chosen)
            return found

    return CovarianceTrainer


def _most_covariant(
    logp: Tensor, advantage: Tensor, mask: Tensor, fraction: float
) -> Tensor:
    """The tokens of largest (log p - mean)(A - mean), as a mask, [B, L]."""
    counted = mask.bool()
    advantages = advantage[:, None].expand_as(logp)
    covariance = (logp - logp[counted].mean()) * (
        advantages - advantages[counted].mean()
    )
    covariance = covariance.masked_fill(~counted, -math.inf)
    number = max(1, round(fraction * int(counted.sum())))
    chosen = torch.zeros_like(counted).flatten()
    chosen[covariance.flatten().topk(number).indices] = True
    return chosen.view_as(counted)


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], easy: float
) -> dict[str, float]:
    """What a policy is worth on prompts: sampled, greedy, best of some; its entropy."""
    model.eval()
    texts = [prompt_of(terms) for terms in prompts]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": MAX_LENGTH, "top_k": 0, "top_p": 1.0}
    start = inputs.input_ids.shape[1]

    def rewards_of(ids: Tensor, each: int) -> Tensor:
        responses = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        repeated = [terms for terms in prompts for _ in range(each)]
        found = [
            reward(t, text, easy) for t, text in zip(repeated, responses, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64).view(-1, each)

    greedy = model.generate(**inputs, max_new_tokens=MAX_LENGTH, do_sample=False)
    torch.manual_seed(1)
    sampled = model.generate(
        **inputs, **options, do_sample=True, num_return_sequences=EVALUATED
    )
    rewards = rewards_of(sampled, EVALUATED)
    chances = torch.tensor(
        [
            math.comb(rank, BEST_OF - 1) / math.comb(EVALUATED, BEST_OF)
            for rank in range(EVALUATED)
        ],
        dtype=torch.float64,
    )
    return {
        "sampled": float(rewards.mean()),
        "greedy": float(rewards_of(greedy, 1).mean()),
        "best": float((rewards.sort(1).values * chances).sum(1).mean()),
        "entropy": _mean_entropy(model, sampled, start, tokenizer),
    }


def _mean_entropy(model: Any, ids: Tensor, start: int, tokenizer: Any) -> float:
    """Nats per response token, the end of the sequence included."""
    attended = ids != tokenizer.pad_token_id
    logits = model(input_ids=ids, attention_mask=attended.long()).logits
    logp = logits[:, start - 1 : -1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    ends = ids[:, start:] == tokenizer.eos_token_id
    # Up to the first end; without one, all.
    counted = ends.cumsum(1) - ends.long() == 0
    return float(entropy[counted].double().mean())


# All trainings


@click.group()
def main() -> None:
    """What holds the entropy, method beside method."""
    torch.set_num_threads(1)
    quiet_libraries()


@main.command("train")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--method", "names", multiple=True, type=click.Choice(list(METHODS)))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--base", type=click.Path(path_type=Path), default=BASE)
def train_all(seeds: int, names: tuple[str, ...], out: Path, base: Path) -> None:
    """Make the trainings that are not in the results yet, seed by seed."""
    base_policy(base)
    for seed in range(seeds):
        for name in names or METHODS:
            key = {"method": name, "seed": seed, "settings": settings_of(name)}
            is_there = any(key.items() <= line.items() for line in read_results(out))
            # Without a training there is nothing that a seed changes.
            if is_there or (seed and not METHODS[name].is_trained):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = train(METHODS[name], seed, base, Path(folder))
            rounded = {
                key: round(value, 5) if isinstance(value, float) else value
                for key, value in found.items()
            }
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(key | rounded) + "\n")
            click.echo(f"{name}, seed {seed}: {rounded}")


def settings_of(name: str) -> dict[str, Any]:
    """What a method is, to tell lines of older settings apart."""
    method = METHODS[name]
    task = {} if method.easy == 0.5 else {"easy": method.easy}
    return task | {
        "trainer": dict(method.trainer),
        "floor": None if method.floor is None else dict(method.floor),
        "covariance": None if method.covariance is None else dict(method.covariance),
    }


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of the results whose settings are those of today."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        line
        for line in lines
        if line["method"] in METHODS and line["settings"] == settings_of(line["method"])
    ]


# The table and the figure

# Heading, key of a line, digits.
COLUMNS = (
    ("sampled", "sampled", 3),
    ("greedy", "greedy", 3),
    ("best of 8", "best", 3),
    ("entropy", "entropy", 3),
    ("rms to floor", "rms", 3),
    ("CPU s / step", "seconds_per_step", 3),
)
# Methods of a task of their own, and what each is compared with.
BESIDE = {
    "easy-start": None,
    "easy-plain": None,
    "easy-floor": "easy-plain",
    "fast-plain": None,
    "fast-floor": "fast-plain",
}
# Of the figure: points of less entropy have their name on the left.
LABELLED_LEFT = 0.3
DRAWN = {
    "plain": "#59636e",
    "adaptive": "#1f6fb4",
    "repo-feedback": "#6b4fb0",
    "floor-repo": "#c2570c",
    "floor-failures": "#1c8a4d",
}


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def draw(out: Path) -> None:
    """Make the table and the figure of the page from the results."""
    lines = read_results(out)
    if not lines:
        raise click.UsageError(f"{out}: no trainings; run `train` first")
    shown = [name for name in METHODS if name not in BESIDE]
    trained = [name for name in shown if METHODS[name].is_trained]
    tables = [table_of(lines, shown, dict.fromkeys(trained, "adaptive"))]
    if any(by_seed(lines, name) for name in BESIDE):
        tables.append(table_of(lines, list(BESIDE), BESIDE))
    write_section("results", "\n\n".join(tables))
    draw_figure(lines, trained, FIGURE)
    click.echo("\n\n".join(tables))


def table_of(
    lines: list[dict[str, Any]],
    names: list[str],
    references: Mapping[str, str | None],
) -> str:
    """One row for each method, in Markdown.

    Args:
        references: with what best of 8 is compared, seed by seed.
    """
    headings = [heading for heading, _, _ in COLUMNS]
    headings.append("best of 8, paired difference")
    rows = [["method", "seeds", *headings], ["---"] * (2 + len(headings))]
    for name in names:
        of_method = by_seed(lines, name)
        if not of_method:
            continue
        cells = [
            mean_and_error(
                [line[key] for line in of_method.values() if key in line], digits
            )
            for _, key, digits in COLUMNS
        ]
        reference = references.get(name)
        others = {} if reference in (None, name) else by_seed(lines, str(reference))
        pairs = [
            line["best"] - others[seed]["best"]
            for seed, line in of_method.items()
            if seed in others
        ]
        cells.append(mean_and_error(pairs, 3, signed=True))
        seeds = str(len(of_method)) if METHODS[name].is_trained else ""
        rows.append([METHODS[name].says, seeds, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def by_seed(lines: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """The trainings of a method."""
    return {line["seed"]: line for line in lines if line["method"] == name}


def mean_and_error(values: list[float], digits: int, *, signed: bool = False) -> str:
    """Mean and standard error over seeds, as text; one value has no error."""
    if not values:
        return ""
    error = standard_error(values)
    if error:
        # An error of 0 would say that the value is exact.
        digits = max(digits, -math.floor(math.log10(error)))
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    mean = mean.replace("-", "−")
    return f"{mean} ± {error:.{digits}f}" if len(values) > 1 else mean


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 of one value."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))


def write_section(name: str, text: str) -> None:
    """Put text between the page's two comments of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def draw_figure(lines: list[dict[str, Any]], names: list[str], file: Path) -> None:
    """Entropy of the batches by step; best of 8 by the entropy at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2)
    for name, colour in DRAWN.items():
        found = [line["entropy_by_step"] for line in by_seed(lines, name).values()]
        if found:
            means = [statistics.fmean(values) for values in zip(*found)]
            steps = [CURVE_EVERY * number + 1 for number in range(len(means))]
            curves.plot(steps, means, color=colour, label=METHODS[name].says)
    curves.axhline(FLOOR, color="#1c2128", linewidth=0.8, linestyle=":")
    curves.set(xlabel="optimizer step", ylabel="entropy of the batch, nats per token")
    if curves.lines[1:]:
        curves.legend(frameon=False, fontsize=8)
    for name in names:
        of_method = list(by_seed(lines, name).values())
        if not of_method or statistics.fmean(x["best"] for x in of_method) < 0.5:
            # An explosion is in the table, and would make the rest a point.
            continue
        points = [[line[key] for line in of_method] for key in ("entropy", "best")]
        means = [statistics.fmean(values) for values in points]
        errors = [standard_error(values) for values in points]
        ends.errorbar(
            *means, xerr=errors[0], yerr=errors[1], fmt="o", markersize=4,
            color=DRAWN.get(name, "#59636e"),
        )  # fmt: skip
        if name in DRAWN and name != "plain":
            # The other panel's colours name it.
            continue
        side = -1 if means[0] < LABELLED_LEFT else 1
        ends.annotate(
            METHODS[name].says.removeprefix("entropy_"),
            means,
            xytext=(5 * side, 4),
            textcoords="offset points",
            fontsize=7,
            horizontalalignment="left" if side > 0 else "right",
        )
    ends.set(xlabel="entropy at the end, nats per token", ylabel="best of 8, held out")
    ends.margins(x=0.45, y=0.1)
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


# What a step costs


@main.command()
@click.option("--steps", type=click.IntRange(min=2), default=12, show_default=True)
@click.option("--base", type=click.Path(path_type=Path), default=BASE)
def cost(steps: int, base: Path) -> None:
    """Time a step with sampling, plain and with floors, by the length of responses."""
    base_policy(base)
    headings = ["tokens of a response", "plain, CPU s / step", *COSTS]
    rows = [headings, ["---"] * len(headings)]
    for length in (9, 64, 256):
        # In turns, the least of three: what else the machine does comes and goes.
        found: dict[str, list[float]] = {}
        for _ in range(3):
            for name, settings in {"": None, **COSTS}.items():
                seconds = _seconds_per_step(length, settings, steps, base)
                found.setdefault(name, []).append(seconds)
        plain = min(found.pop(""))
        ratios = [f"{100 * (min(v) / plain - 1):+.0f} %" for v in found.values()]
        rows.append([str(length), f"{plain:.2f}", *ratios])
        click.echo(f"{rows[-1]}")
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    write_section("cost", table.replace("-0 %", "0 %"))


# Far below and far above any entropy: never active, and always.
COSTS: dict[str, dict[str, Any]] = {
    "inactive": {"floor": 0.0},
    "active, improbable_failures": {"floor": 9.0, "family": "improbable_failures"},
    "active, repo": {"floor": 9.0, "cap": 0.005},
    "feedback": {"floor": 9.0, "mode": "feedback"},
}


def _seconds_per_step(
    length: int, floor: Mapping[str, Any] | None, steps: int, base: Path
) -> float:
    """CPU seconds of a step, sampling included, of responses that do not end early."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from entropy_ddp.training import EntropyFloor

    model = AutoModelForCausalLM.from_pretrained(base, max_position_embeddings=512)
    # The end of a sequence is never sampled.
    model.generation_config.suppress_tokens = [model.config.eos_token_id]
    prompts = [{"prompt": prompt_of(terms)} for terms in split_prompts()[0]]
    clock: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(base),
            reward_funcs=_arbitrary_rewards,
            args=GRPOConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=32,
                num_generations=RESPONSES_PER_PROMPT, max_completion_length=length,
                loss_type="dr_grpo", scale_rewards="none", learning_rate=1e-5,
                bf16=False, use_cpu=True, gradient_checkpointing=False,
                save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(prompts),
            callbacks=[_clock(clock)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if floor is not None:
            EntropyFloor(**floor).attach(trainer)
        trainer.train()
    # The first step warms up.
    return (clock[-1] - clock[0]) / (len(clock) - 1)


def _arbitrary_rewards(completions: list[str], **_: object) -> list[float]:
    return [sum(map(ord, text)) % 5 / 4 for text in completions]


def _clock(times: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

    return Clock()


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.entropy_floor")
