"""The schema of a run's configuration: every key, its type, its default, its range."""

import math
import re
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# What a signed 32-bit integer holds: no count, length or seed needs more, and libraries
# that take a larger one fail late.
MAX_INTEGER = 2**31 - 1


class Section(BaseModel):
    """A mapping of the file: unknown keys and numbers given as strings are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Prompts(Section):
    """Where prompts come from and how a row becomes one. A string alone is a `file`.

    Attributes:
        file: .jsonl, .jsonl.gz or .parquet.
        dataset: hub id, or folder, of a data set that the `datasets` library loads.
        name: configuration of the data set.
        split: split of the data set; a slice such as `train[:1000]` too.
        revision: commit or tag of the data set.
        field: key of the prompt: text, or a list of messages.
        template: the prompt's text, with {key} for the row's values, instead of `field`.
        chat: the text is a user's turn, which the chat template renders.
        system: system turn before it.
        chat_template_kwargs: further arguments of the chat template.
        keep: keys that are carried to the rollout file; all if not given.
    """

    file: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    field: str | None = None
    template: str | None = None
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    keep: list[str] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Prompts":
        if (self.file is None) == (self.dataset is None):
            raise ValueError("give exactly one of `file` and `dataset`")
        if self.dataset is not None and self.split is None:
            raise ValueError("`dataset` needs a `split`")
        for key in ("name", "split", "revision"):
            if self.file is not None and getattr(self, key) is not None:
                raise ValueError(f"`{key}` belongs to a `dataset`, not to a `file`")
        return self

    @model_validator(mode="after")
    def _one_text(self) -> "Prompts":
        if self.field is not None and self.template is not None:
            raise ValueError("give `field` or `template`, not both")
        if self.system is not None and not self.chat:
            raise ValueError("`system` needs `chat: true`")
        if self.template is not None:
            check_template(self.template)
        return self


def check_template(template: str) -> None:
    """Refuse a template that is not text with {key} placeholders.

    Raises:
        ValueError: a brace stands alone, or a placeholder is more than a key.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"`template`: {error}; write {{{{ and }}}} for braces of the text"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise ValueError(
                f"`template`: expected placeholders like {{question}}, found "
                f"{{{name}{'!' + conversion if conversion else ''}"
                f"{':' + form if form else ''}}}; write {{{{ and }}}} for braces of "
                "the text"
            )


class Reward(Section):
    """A reward, or one term of a sum. A string alone is a `function`.

    Exactly one of the first four keys says what is scored; `math`, `exact` and `regex`
    give 1 or 0.

    Attributes:
        function: `module:function` that scores (prompt, response, row).
        math: key of the gold answer; equal as mathematics (math-verify).
        exact: key of the gold answer; equal as text, surrounding space left out.
        regex: pattern that is searched in the response; `.` is a newline too.
        gold_after: the gold answer is what follows the last of these marks (`####`).
        answer_pattern: the answer is the group of this pattern's last match in the
            response; without a match it is wrong. If not given, the whole response.
        weight: factor of this term in the sum.
        name: what the term is called in the rollout file.
    """

    function: str | None = None
    math: str | None = None
    exact: str | None = None
    regex: str | None = None
    gold_after: str | None = Field(default=None, min_length=1)
    answer_pattern: str | None = None
    weight: float = Field(default=1.0, allow_inf_nan=False)
    name: str | None = None

    @property
    def gold(self) -> str | None:
        """Key of the gold answer, if this reward has one."""
        return self.math if self.math is not None else self.exact

    @property
    def label(self) -> str:
        """What the term is called."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        return "math" if self.math else "exact" if self.exact else "regex"

    @model_validator(mode="after")
    def _one_kind(self) -> "Reward":
        kinds = (self.function, self.math, self.exact, self.regex)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of `function`, `math`, `exact`, `regex`")
        for key in ("gold_after", "answer_pattern"):
            if self.gold is None and getattr(self, key) is not None:
                raise ValueError(f"`{key}` belongs to `math` or `exact`")
        return self

    @model_validator(mode="after")
    def _patterns_compile(self) -> "Reward":
        for key in ("regex", "answer_pattern"):
            pattern = getattr(self, key)
            if pattern is None:
                continue
            try:
                groups = re.compile(pattern, re.DOTALL).groups
            except re.error as error:
                raise ValueError(f"`{key}`: {error} in {pattern!r}") from error
            if key == "answer_pattern" and groups != 1:
                raise ValueError(f"`{key}`: expected one group (...), found {groups}")
        return self


def _as_prompts(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


def _as_rewards(value: Any) -> Any:
    terms = value if isinstance(value, list) else [value]
    terms = [{"function": term} if isinstance(term, str) else term for term in terms]
    return None if value is None else terms


class Sample(Section):
    """How to roll a batch out of the checkpoint.

    Attributes:
        prompts: a file's name, or the keys of `Prompts`.
        num_prompts: number of prompt draws (groups).
        responses_per_prompt: responses G of each group.
        with_replacement: whether a prompt can be drawn more than once.
        max_new_tokens: responses are cut off at this many tokens.
        reward: `module:function`, the keys of `Reward`, or a list of such terms, of
            which the weighted sum is taken.
        redraw_zero_advantage: how often a group whose rewards are all equal is sampled
            again, for the same prompt.
        sequences_per_call: responses generated together.
    """

    prompts: Annotated[Prompts, BeforeValidator(_as_prompts)]
    num_prompts: int = Field(gt=0, le=MAX_INTEGER)
    responses_per_prompt: int = Field(default=1, gt=0, le=MAX_INTEGER)
    with_replacement: bool = False
    max_new_tokens: int = Field(gt=0, le=MAX_INTEGER)
    reward: Annotated[
        list[Reward] | None, Field(min_length=1), BeforeValidator(_as_rewards)
    ] = None
    redraw_zero_advantage: int = Field(default=0, ge=0, le=MAX_INTEGER)
    sequences_per_call: int = Field(default=64, gt=0, le=MAX_INTEGER)

    @model_validator(mode="after")
    def _distinct_terms(self) -> "Sample":
        labels = [term.label for term in self.reward or []]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(
                f"`reward`: two terms are called {twice[0]!r}; give them a `name` each"
            )
        return self

    @model_validator(mode="after")
    def _redraws_need_rewards(self) -> "Sample":
        comparable = self.reward is not None and self.responses_per_prompt >= 2
        if self.redraw_zero_advantage and not comparable:
            raise ValueError(
                "`redraw_zero_advantage`: expected a reward and responses_per_prompt of "
                f"at least 2, found {len(self.reward or [])} rewards and "
                f"{self.responses_per_prompt}; set them, or redraw_zero_advantage: 0"
            )
        return self


Normalize = Literal["per_token", "per_sequence", "per_sequence_token_mean", "sum"]
Integrand = Literal["rb", "surprisal"]
ImportanceMode = Literal["snis", "per_decision", "clip"]
SlopeScore = Literal["full", "to_go"]
SlopeBaseline = Literal["none", "hk", "loo", "ridge", "action_value"]
CurvatureMethod = Literal["midpoint", "taylor"]
Loss = Literal["dr_grpo", "grpo", "dapo", "nll"]


class Checkpoint(Section):
    """Where the policy and its optimizer state are.

    Attributes:
        path: a checkpoint folder (of the Trainer, accelerate's save_state, DeepSpeed,
            verl or torch.distributed.checkpoint); the rest is found in it.
        base: base model of an adapter, or a full-weight model: a folder or a hub id; by
            default what adapter_config.json names.
        adapter: adapter folder, or the name of one of several adapters in `path`.
        weights: weights by name that take the place of those of base and adapter: a
            folder of DCP, of DeepSpeed (with `latest` or `zero`), of a file for each
            rank (verl), or of model.safetensors; or the file pytorch_model_fsdp.bin.
        optimizer: optimizer.pt or optimizer.bin, or a folder as for `weights`.
        trust_remote_code: run Python code that comes with the model or its tokenizer.
            Given on the command line only: no file may grant itself this.
    """

    path: str | None = None
    base: str | None = None
    adapter: str | None = None
    weights: str | None = None
    optimizer: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _some_model(self) -> "Checkpoint":
        if self.path is None and self.base is None and self.adapter is None:
            raise ValueError("give `path`, or `base` and `adapter`")
        return self


class BatchSource(Section):
    """A batch: read from a file, or sampled from the checkpoint.

    Attributes:
        file: rollout file.
        sample: how to sample it.
        reweight: `sampler` weighs what is read of E by the ratios of the checkpoint's
            probabilities to those that the rows recorded (`sampling_logprobs`): E of a
            nearby policy, such as an earlier checkpoint. Without it E is taken for a
            sample of the checkpoint's own policy.
    """

    file: str | None = None
    sample: Sample | None = None
    reweight: Literal["sampler"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "BatchSource":
        if (self.file is None) == (self.sample is None):
            raise ValueError("give exactly one of `file` and `sample`")
        if self.reweight is not None and self.file is None:
            raise ValueError(
                "`reweight`: a batch that is sampled here is of this policy; it is for "
                "a `file`"
            )
        return self


class Batches(Section):
    """The evaluation batch E and the update batch U.

    Attributes:
        E: where entropy is measured.
        U: what the optimizer steps on; none with `update.delta`.
        advantage: how rewards become advantages.
    """

    E: BatchSource
    U: BatchSource | None = None
    advantage: Literal["centered", "standardized"] = "centered"

    @property
    def sources(self) -> dict[str, BatchSource]:
        """The batches that there are, by split."""
        given = {"E": self.E, "U": self.U}
        return {split: source for split, source in given.items() if source is not None}

    @property
    def samples(self) -> dict[str, Sample]:
        """How the batches that are sampled are to be sampled, by split."""
        return {s: b.sample for s, b in self.sources.items() if b.sample is not None}


class Objective(Section):
    """Which entropy is measured.

    Attributes:
        integrand: `rb` (entropy of every step's distribution) or `surprisal`
            (minus the log-probability of the response).
        normalize: what the sum over sequences is divided by.
        temperature: sampling temperature of the policy.
    """

    integrand: Integrand = "rb"
    normalize: Normalize = "per_token"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class Update(Section):
    """The optimizer step.

    Attributes:
        loss: reduction of the policy-gradient loss.
        length_norm: the divisor L_b of `dr_grpo`: longest response of the group, or a
            constant (the maximum completion length).
        average_over: what `dr_grpo` is a mean over: `groups`, of the means over their
            responses, or `responses`, all alike. The same for groups of one size.
        ratio: `on_policy` (A log p) or `clipped` (the PPO surrogate).
        epsilon_low, epsilon_high: clipping range of the ratio.
        kl_coefficient: weight of the divergence from the reference policy, which is the
            model without its adapter; 0 for none.
        kl_estimator: `k3`, or `k3_weighted` by the ratio (TRL's bias correction).
        max_grad_norm: the gradient's global norm is clipped to this; 0 turns it off.
        lr_override: learning rate in place of the saved one.
        from_checkpoint: take loss, length norm, what it averages over, clipping, KL
            term, gradient norm, advantage and temperature from the checkpoint's training_args.bin where not
            given here.
        save_delta: write the parameter change to delta_theta.safetensors.
        delta: a change of the parameters that is probed in place of a step: a
            safetensors file by parameter name, as `save_delta` writes it, or a second
            checkpoint (its weights minus this one's). Then there is no U, no loss and no
            optimizer; eta is `lr_override`, or else 1, so that v is the change itself and
            slopes are per unit of it.
    """

    loss: Loss = "dr_grpo"
    length_norm: Literal["group_max"] | int = "group_max"
    average_over: Literal["groups", "responses"] = "groups"
    ratio: Literal["on_policy", "clipped"] = "on_policy"
    epsilon_low: float = Field(default=0.2, ge=0, lt=1)
    epsilon_high: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    kl_coefficient: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    kl_estimator: Literal["k3", "k3_weighted"] = "k3"
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    lr_override: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    from_checkpoint: bool = False
    save_delta: bool = False
    delta: str | None = None

    @model_validator(mode="after")
    def _ratio_needs_advantages(self) -> "Update":
        if self.loss == "nll" and self.ratio == "clipped":
            raise ValueError("`ratio: clipped` needs advantages; `nll` has none")
        return self

    @model_validator(mode="after")
    def _positive_length(self) -> "Update":
        length = self.length_norm
        if isinstance(length, int) and not 1 <= length <= MAX_INTEGER:
            raise ValueError(
                "`length_norm` must be `group_max` or a positive integer of at most "
                f"{MAX_INTEGER}"
            )
        return self


class Truth(Section):
    """The importance-sampled change.

    Attributes:
        is_mode: weights of the headline value; `auto` is `per_decision`, or `snis` where
            that is not defined.
        control_variates: remove from it the first-order noise that the best slope shows;
            `auto` does where `is_mode` is `auto`.
        clip_c: upper limit of a weight in mode `clip`.
        ess_warn: effective sample size over N below which a warning is given.
        ess_abort: the same, below which results are marked untrusted.
        ess_least: effective sample size in responses, whatever N is, below which a
            warning is given: errors and intervals are told by so few.
        resolve: where the measured change is not resolved, the one for which a size of E
            is given: a share of the entropy before the step.
    """

    is_mode: ImportanceMode | Literal["auto"] = "auto"
    control_variates: bool | Literal["auto"] = "auto"
    clip_c: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    ess_warn: float = Field(default=0.5, ge=0, le=1)
    ess_abort: float = Field(default=0.1, ge=0, le=1)
    resolve: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    ess_least: float = Field(default=32.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _clip_has_no_partner(self) -> "Truth":
        if self.is_mode == "clip" and self.control_variates is True:
            raise ValueError(
                "`control_variates`: `clip` is the derivative of no slope; use "
                "`per_decision` or `snis`, or set it to false"
            )
        return self


class Linear(Section):
    """The first-order prediction.

    Attributes:
        score: `full` responses or entropy `to_go` as weight of each log p'; `auto` is
            `to_go` where that is defined, but for a baseline of `none`.
        baseline: what is subtracted from the entropy to go; `auto` is `action_value`
            where the score is `auto`, or else `none`.
        control_variates: remove quantities of mean zero by cross-fitted regression.
    """

    score: SlopeScore | Literal["auto"] = "auto"
    baseline: SlopeBaseline | Literal["auto"] = "auto"
    control_variates: bool = False

    @model_validator(mode="after")
    def _baseline_needs_to_go(self) -> "Linear":
        if self.score == "full" and self.baseline not in ("none", "auto"):
            raise ValueError("a baseline needs `score: to_go`")
        return self


class GradientDot(Section):
    """The prediction as an inner product of two mean gradients, with its variance.

    Attributes:
        enabled: `auto` computes it when every group of E has two responses or more.
        direction: the other factor is the `step`, or the `preconditioned` gradient of
            the reward.
        weighting: what the log-probability of a response is divided by.
        variance_method: one forward-mode pass for all groups, or a backward pass each.
    """

    enabled: Literal["auto", True, False] = "auto"
    direction: Literal["step", "preconditioned"] = "step"
    weighting: Literal["dr_grpo", "per_token_avg"] = "dr_grpo"
    variance_method: Literal["jvp", "backward"] = "jvp"


class Curvature(Section):
    """The second order along the step.

    Attributes:
        enabled: compute it.
        method: `midpoint`, from the slope in the middle of the step, one more pass over
            E; or `taylor`, from second derivatives at theta, two.
    """

    enabled: bool = True
    method: CurvatureMethod = "midpoint"


class Sweep(Section):
    """The grid of learning rates of the `sweep` command.

    Attributes:
        etas: learning rates; chosen from ESS and noise floor if not given.
        num_points: size of a grid that is chosen.
        symmetric: measure at -eta too, which separates even from odd orders.
    """

    etas: list[float] | None = None
    num_points: int = Field(default=8, ge=2, le=1000)
    symmetric: bool = False

    @model_validator(mode="after")
    def _positive_and_distinct(self) -> "Sweep":
        etas = self.etas
        if etas is not None and (
            not etas
            or any(not 0 < eta < math.inf for eta in etas)
            or len(set(etas)) < len(etas)
        ):
            raise ValueError("`etas` must be positive numbers, each once")
        return self


class Attribution(Section):
    """Attribution to the sequences and tokens of U.

    Attributes:
        enabled: attribute in a `probe` too; the `attribute` command always does.
        top: number of tokens shown.
        fraction: share of U's tokens that the what-if rules choose which rank tokens.
        verify: take every masked step for real: a pass over U and one over E for each
            rule; and the steps that would have held the entropy.
        blocks: into how many disjoint blocks E is divided, whose spread gives the errors
            of shares; at most one for each group. With 2 there are halves and no errors.
        hold: the entropy change for which it is said what would have left it, in nats
            per token.
    """

    enabled: bool = False
    top: int = Field(default=20, gt=0, le=MAX_INTEGER)
    fraction: float = Field(default=0.05, gt=0, lt=1)
    verify: bool = False
    blocks: int = Field(default=8, ge=2, le=16)
    hold: float = Field(default=0.0, allow_inf_nan=False)


class Precision(Section):
    """Floating-point types.

    Attributes:
        model: weights and activations.
        entropy: sums over the vocabulary.
        buffers: parameter buffers on the CPU; float64 if the model is.
    """

    model: Literal["float32", "float64", "bfloat16"] = "float32"
    entropy: Literal["float32", "float64"] = "float64"
    buffers: Literal["float32", "float16", "float64"] | None = None

    @property
    def buffer_dtype_name(self) -> str:
        """The buffers' dtype, with the default resolved."""
        return self.buffers or ("float64" if self.model == "float64" else "float32")


class Compute(Section):
    """Where and how the passes run; nothing here changes a result beyond rounding.

    Attributes:
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        tokens_per_microbatch: budget of padded tokens for one forward pass; on a CPU
            rows are put together up to what its caches hold, if that is less.
        share_prompts: compute a prompt once for several responses to it, where that is
            cheaper.
        count_operations: count floating-point operations of the passes in `run.passes`.
        snapshot_device: where the copy of the parameters is kept during the step.
        attention: Hugging Face attention implementation.
        rank_timeout_seconds: a rank that gives no sign of life for so long ends the run.
        shard: `none`: every rank holds the whole model; `base`: with an adapter, the
            ranks divide the frozen matrices of the layers among them; `full`: of full
            weights, every rank has a part of every parameter and of the step.
        shard_group: which ranks divide the model among them: `all`, those of a `node`,
            or groups of so many.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokens_per_microbatch: int = Field(default=8192, gt=0, le=MAX_INTEGER)
    share_prompts: bool = True
    count_operations: bool = False
    snapshot_device: Literal["cpu", "device"] = "cpu"
    attention: Literal["sdpa", "eager"] = "sdpa"
    rank_timeout_seconds: float = Field(default=300.0, gt=0)
    shard: Literal["none", "base", "full"] = "none"
    shard_group: Literal["all", "node"] | Annotated[int, Field(gt=0)] = "all"


class Config(Section):
    """One run, complete."""

    checkpoint: Checkpoint
    batches: Batches
    objective: Objective = Objective()
    update: Update = Update()
    truth: Truth = Truth()
    linear: Linear = Linear()
    curvature: Curvature = Curvature()
    gradient_dot: GradientDot = GradientDot()
    sweep: Sweep = Sweep()
    attribution: Attribution = Attribution()
    precision: Precision = Precision()
    compute: Compute = Compute()
    seed: int = Field(default=0, ge=0, le=MAX_INTEGER)
    out: str | None = None

    @model_validator(mode="after")
    def _step_or_delta(self) -> "Config":
        if self.update.delta is None:
            if self.batches.U is None:
                raise ValueError("batches.U: missing; give U, or update.delta")
            return self
        unused = {
            "batches.U": self.batches.U is not None,
            "update.from_checkpoint": self.update.from_checkpoint,
            "attribution.enabled": self.attribution.enabled,
            "gradient_dot.enabled": self.gradient_dot.enabled is True,
        }
        for key, given in unused.items():
            if given:
                raise ValueError(
                    f"{key}: update.delta gives the change of the parameters; there is "
                    f"no step on U that this could be about; leave {key} out"
                )
        return self

    @model_validator(mode="after")
    def _parts_suffice(self) -> "Config":
        if self.compute.shard != "full":
            return self
        impossible = {
            "update.delta: a given change": self.update.delta is not None,
            "gradient_dot.variance_method: backward: a gradient for each group (jvp "
            "needs none)": self.gradient_dot.enabled is not False
            and self.gradient_dot.variance_method == "backward",
            **{
                f"batches.{split}.sample: sampling (give a file, sampled before with "
                "`sample` and compute.shard: none, or by an inference engine)": True
                for split in self.batches.samples
            },
        }
        for what, is_asked in impossible.items():
            if is_asked:
                raise ValueError(
                    f"{what}: is not for a model in parts (compute.shard: full); change "
                    "it, or set compute.shard: none"
                )
        return self

    @model_validator(mode="after")
    def _samples_suffice(self) -> "Config":
        samples = self.batches.samples
        evaluation, update = samples.get("E"), samples.get("U")
        if evaluation is not None and evaluation.redraw_zero_advantage:
            raise ValueError(
                "batches.E.sample.redraw_zero_advantage: E must be a plain sample of "
                "the policy; redraw in U only"
            )
        if update is not None and self.update.loss != "nll":
            if update.reward is None:
                raise ValueError(
                    f"batches.U.sample.reward: the loss `{self.update.loss}` needs one, "
                    "as module:function or as math, exact or regex"
                )
            single = update.responses_per_prompt == 1
            if single and self.batches.advantage == "standardized":
                raise ValueError(
                    "batches.U.sample.responses_per_prompt: `standardized` advantages "
                    "need at least 2"
                )
        return self

    def _require_reweightable(self) -> None:
        """Check that a reweighted E is asked for what it has: weights of prefixes."""
        score, baseline = self.slope_estimator
        refused = {
            "objective.integrand": self.objective.integrand != "rb",
            "objective.normalize": self.objective.normalize
            == "per_sequence_token_mean",
            "truth.is_mode": self.truth.is_mode in ("snis", "clip"),
            "linear.score": score == "full" or baseline == "none",
            "linear.control_variates": self.linear.control_variates,
            "curvature.method": self.curvature.enabled
            and self.curvature.method == "taylor",
            "gradient_dot.enabled": self.gradient_dot.enabled is True,
        }
        for key, given in refused.items():
            if given:
                raise ValueError(
                    f"{key}: batches.E.reweight weighs the prefixes of E, for which this "
                    "setting has no form; leave it out"
                )

    @property
    def truth_estimator(self) -> tuple[ImportanceMode, bool]:
        """Weights of the headline truth, and whether first-order noise is removed."""
        whole = self.objective.normalize == "per_sequence_token_mean"
        mode = self.truth.is_mode
        removed = self.truth.control_variates
        if removed == "auto":
            removed = mode == "auto" and not whole
        if mode == "auto":
            defined = self.objective.integrand == "rb" and not whole
            mode = "per_decision" if defined else "snis"
        return mode, removed

    @property
    def slope_estimator(self) -> tuple[SlopeScore, SlopeBaseline]:
        """Score and baseline of the headline slope."""
        score, baseline = self.linear.score, self.linear.baseline
        if self.objective.normalize == "per_sequence_token_mean":
            return "full", "none"
        if baseline == "auto":
            baseline = "action_value" if score == "auto" else "none"
        if score == "auto":
            score = "full" if baseline == "none" else "to_go"
        return score, baseline

    @model_validator(mode="after")
    def _estimators_exist(self) -> "Config":
        normalize, linear = self.objective.normalize, self.linear
        to_go = linear.score == "to_go" or linear.baseline not in ("none", "auto")
        if normalize == "per_sequence_token_mean" and to_go:
            raise ValueError(
                "linear.score: `per_sequence_token_mean` has no to-go form; use `full`"
            )
        if (
            normalize == "per_sequence_token_mean"
            and self.truth.control_variates is True
        ):
            raise ValueError(
                "truth.control_variates: `per_sequence_token_mean` has no to-go form, "
                "whose slope would show the noise; set it to false"
            )
        if self.batches.U is not None and self.batches.U.reweight is not None:
            raise ValueError(
                "batches.U.reweight: the loss weighs U (update.ratio); it is for E only"
            )
        if self.batches.E.reweight is not None:
            self._require_reweightable()
        if self.truth.is_mode == "per_decision":
            if self.objective.integrand != "rb":
                raise ValueError("truth.is_mode: `per_decision` needs integrand `rb`")
            if normalize == "per_sequence_token_mean":
                raise ValueError(
                    "truth.is_mode: `per_decision` has no `per_sequence_token_mean` form"
                )
        return self
