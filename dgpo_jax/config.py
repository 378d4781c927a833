"""Every setting of a run: its type, its meaning, its default, and the rules it must obey.

The comment behind a field is its `--help` text. Defaults live here only; `configs/*.py` change some of them and the
command line changes the rest:

    python -m dgpo_jax.train --config=configs/smoke.py --config.loss.method=grpo --config.seed=1

A setting that breaks a rule is refused while the command line is read, before any memory is spent. Rules that need
the devices (does the mesh fit?) or the weights (do the tensors fit?) are checked where these become known, with the
same kind of message: the value, the rule, the fix.
"""

import functools
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dgpo_jax.rules import closest, require, require_in_32_bits, require_kinds, shown

PROBLEMS = "problems"  # what checkpoint.accept_changes calls an edited data set
MODEL_FILES = "model_files"  # and other files in the folder of model.path
ANY_CHANGE = "all"  # and whatever else


@dataclass(frozen=True)
class ModelConfig:
    """The network: Qwen2 and its relatives."""

    path: str = ""  # Hugging Face folder or hub name to start from; '' = random weights of the sizes below. A folder's own config.json wins over these sizes
    vocab_size: int = 256  # V, rows of the embedding table
    layers: int = 4  # L, decoder layers
    width: int = 128  # D, numbers per token in the residual stream
    heads: int = 4  # query heads; a multiple of key_heads
    key_heads: int = 2  # K, key and value heads, each shared by heads / key_heads query heads
    head_width: int = 32  # H, numbers per head
    mlp_width: int = 512  # F, numbers per token inside the feed-forward part
    qkv_bias: bool = True  # Qwen2 has biases on query, key and value; Qwen3 and Llama do not
    qk_norm: bool = False  # Qwen3 normalises queries and keys per head
    tied_embeddings: bool = True  # the output matrix is the embedding table
    rope_theta: float = 10000.0  # base of the rotary embedding's wavelengths
    rope_scaling: Literal["none", "yarn"] = "none"  # how positions beyond the trained length are handled
    rope_factor: float = 1.0  # YaRN: trained length times this is the new length
    rope_original_length: int = 32768  # YaRN: trained length, in tokens
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    initializer_std: float = 0.02  # of random weights
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto = bfloat16 on accelerators, float32 on CPU. Master weights are float32 always
    remat: Literal["none", "dots", "full", "offload"] = "full"  # what the backward pass computes again: nothing, all but matrix products, or everything; offload = everything, and layer inputs wait in the host's memory
    attention: Literal["auto", "plain", "chunked", "splash", "triton"] = "auto"  # splash = TPU kernel, triton = GPU kernel, chunked = a block of query rows at a time, plain = the whole score matrix; auto = the platform's kernel, on CPU plain or chunked by size
    attention_chunk: int = 512  # query rows in a block, for chunked

    def __post_init__(self):
        require_kinds(self, "model")
        for name in ("vocab_size", "layers", "width", "heads", "key_heads", "head_width", "mlp_width", "attention_chunk"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a size is positive", "give at least 1")
        require(
            self.heads % self.key_heads == 0, "model.heads", self.heads,
            f"key heads are shared evenly and there are {self.key_heads}", "make it a multiple of model.key_heads",
        )  # fmt: skip
        for name in ("rope_theta", "rope_factor"):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "wavelengths are positive", "give more than 0")
        for name in ("norm_eps", "initializer_std"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "it is an amount", "give 0 or more")
        require(self.head_width % 2 == 0, "model.head_width", self.head_width, "rotary embedding turns pairs", "make it even")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; one of the axes may be -1 and takes what is left."""

    data: int = -1  # replicas that hold their own copy of the weights
    fsdp: int = 1  # devices that weights, moments and rows are split over
    tensor: int = 1  # devices that heads, feed-forward width and vocabulary are split over; at most key_heads
    context: int = 1  # devices that the tokens of each packed row are split over, for rows too long for one; they decode rows of their own

    def __post_init__(self):
        require_kinds(self, "mesh")
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        require(all(size == -1 or size > 0 for size in sizes), "mesh", sizes, "an axis is positive, or -1 for the rest", "change it")
        require(sizes.count(-1) <= 1, "mesh", sizes, "only one axis can take what is left", "give the others a size")


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how they become prompts."""

    train: str = "generated:arithmetic/train"  # problems to learn from: generated:KIND/SPLIT, tfds:NAME/SPLIT, gym:NAME/SPLIT, builtin:coding/SPLIT, a .jsonl or .parquet file, a Hugging Face folder; several joined by ' + '
    held_out: str = "generated:arithmetic/test"  # problems to evaluate on, never trained on; '' = no evaluation
    size: int = 10_000  # problems in a generated set
    low: int | None = None  # smallest number in a generated problem; None = the kind's own
    high: int | None = None  # largest number in a generated problem; None = the kind's own
    operations: str = ""  # of generated problems, such as 'add,subtract', or kinds of built-in coding problems, such as 'linear,repeat'; '' = all
    slips: float = 0.0  # share of generated worked solutions that use a wrong operation: a careless teacher for the warm start
    unmarked: float = 0.0  # share of generated worked solutions that do not mark their answer
    data_dir: str = ""  # where built TFDS sets are kept; '' = TFDS's own default
    manual_dir: str = ""  # where files for TFDS were put by hand, on machines without a network
    problem_field: str = "problem"  # field of a file with the question; a.b.0 reaches into nested ones
    answer_field: str = "answer"  # field of a file with the answer
    tokenizer: str = ""  # folder or hub name; '' = the model's own; builtin:words = ours, for the generated arithmetic
    template: str = "chat"  # chat = the tokenizer's chat template; r1 = DeepSeek-R1-Distill's; qwen_math = Qwen2.5-Math's; plain = the problem and a newline; or a text with {problem}
    system: str = ""  # system message; '' = the template's own default
    instruction: str = ""  # appended to every problem; '' = the template's own default, which r1 has; such as 'Put your final answer in \\boxed{}.'
    too_long: Literal["error", "drop", "cut"] = "error"  # what to do with a prompt of more than rollout.max_prompt tokens; cut = leave out the beginning of the problem, never of the template

    def __post_init__(self):
        require_kinds(self, "data")


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    prompts: int = 32  # Q, prompts per iteration
    group_size: int = 8  # G, responses per prompt
    max_prompt: int = 64  # P, tokens
    max_response: int = 32  # R, tokens, the stop token included
    temperature: float = 1.0  # logits are divided by it, in sampler and trainer alike
    top_p: float = 1.0  # sample from the smallest set of tokens with this much probability; 1 = off
    top_k: int = 0  # sample from the k likeliest tokens; 0 = off
    slots: int = 0  # responses decoded at once; one that ends gives its slot to the next that waits; 0 = all, or as many as fit an accelerator's memory
    int8_weights: bool = False  # sample with matrices in eight bits: half the memory traffic of bfloat16, and a gap to the trainer, see gap/mean
    int8_cache: bool = False  # keep keys and values in eight bits: twice the slots; the same gap. For both see correction.*
    dynamic_sampling: bool | None = None  # draw prompts until Q groups have right and wrong answers (DAPO); None = as the method was published
    max_draws: int = 10  # dynamic sampling: of Q prompts each, for every Q groups that are missing; then groups without both fill up
    staleness: int = 0  # iterations between sampling and learning, less where dynamic sampling reaches its cap; 0 = learn at once

    def __post_init__(self):
        require_kinds(self, "rollout")
        for name in ("prompts", "max_prompt", "max_response", "max_draws"):
            require(getattr(self, name) > 0, f"rollout.{name}", getattr(self, name), "it counts something", "give at least 1")
        require(
            self.group_size >= 2, "rollout.group_size", self.group_size,
            "an advantage compares a response with others of its group", "give at least 2",
        )  # fmt: skip
        require(self.slots >= 0, "rollout.slots", self.slots, "it counts responses", "give 0 to have it chosen")
        require(self.temperature > 0, "rollout.temperature", self.temperature, "training samples at random", "give more than 0")
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "it is a share of probability", "give more than 0, at most 1")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "it counts tokens", "give 0 for off")
        require(self.staleness >= 0, "rollout.staleness", self.staleness, "it counts iterations", "give 0 to learn at once")


@dataclass(frozen=True)
class RewardConfig:
    """How answers are checked, and what they are worth."""

    functions: str = "answer"  # what a response is worth, a sum such as 'answer + 0.1 * think - 0.2 * my_rewards:length'; see docs/rewards.md
    extract: Literal["boxed", "marked", "last"] = "boxed"  # boxed = last \\boxed{}; marked = also '#### ' and 'answer is'; last = else the last number
    correct: float = 1.0  # what 'answer' gives for a right answer
    incorrect: float | None = None  # what it gives for anything else; a program that passes some of its tests is in between; None = as the method was published: -1 for dapo, else 0
    no_think_end: float | None = None  # reward of a response without </think>, whatever its answer (Klear: -0.5); None = not looked at
    no_think_start: float | None = None  # reward of one without <think>, which the prompt may have opened (Klear: -2); None = not looked at
    overlong_buffer: int | None = None  # tokens before max_response over which the penalty grows; 0 = no penalty; None = as the method was published
    overlong_penalty: float = 1.0  # taken off the reward of a response of max_response tokens (DAPO)
    truncated: Literal["keep", "mask", "drop"] = "keep"  # responses cut off: keep = as any other; mask = out of the loss; drop = out of the group's baseline too (Klear)
    workers: int = 2  # processes that check answers
    deadline_s: float = 5.0  # seconds for one answer, after which its worker is killed
    memory_mb: int = 2048  # memory of one worker

    def __post_init__(self):
        require_kinds(self, "reward")
        require(-math.inf < self.correct < math.inf, "reward.correct", self.correct, "rewards are finite", "give a number")
        for name in ("incorrect", "no_think_end", "no_think_start"):
            value = getattr(self, name)
            require(
                value is None or -math.inf < value < self.correct, f"reward.{name}", value,
                f"a right answer must be worth more, and reward.correct is {self.correct}", "lower it",
            )  # fmt: skip
        require(
            self.overlong_buffer is None or self.overlong_buffer >= 0, "reward.overlong_buffer", self.overlong_buffer,
            "it counts tokens", "give 0 for no penalty",
        )  # fmt: skip
        require(self.overlong_penalty >= 0, "reward.overlong_penalty", self.overlong_penalty, "it is taken off", "give 0 or more")
        require(self.workers > 0, "reward.workers", self.workers, "somebody must check answers", "give at least 1")
        require(self.deadline_s > 0, "reward.deadline_s", self.deadline_s, "it is a time in seconds", "give more than 0")
        require(self.memory_mb >= 256, "reward.memory_mb", self.memory_mb, "SymPy alone needs about 100", "give at least 256")


@dataclass(frozen=True)
class CodeConfig:
    """How programs in responses to coding problems are run."""

    grade: Literal["soft", "hard"] = "soft"  # soft = by the share of tests passed; hard = all of them or nothing
    sandbox: Literal["bubblewrap", "rlimits"] = "bubblewrap"  # rlimits = limits on time and memory only: a program can read, write and delete your files
    workers: int = 2  # programs run at once
    test_s: float = 4.0  # seconds of CPU time for one test
    wall_s: float = 60.0  # seconds on the clock for all tests of a response, after which it is timed out; all its CPU time is at most a third of it
    memory_mb: int = 512  # of each process of a program
    max_tests: int = 0  # tests tried, the first of each problem; 0 = all

    def __post_init__(self):
        require_kinds(self, "code")
        require(self.workers > 0, "code.workers", self.workers, "somebody must run programs", "give at least 1")
        for name in ("test_s", "wall_s"):
            require(getattr(self, name) > 0, f"code.{name}", getattr(self, name), "it is a time in seconds", "give more than 0")
        require(self.wall_s >= 3 * self.test_s, "code.wall_s", self.wall_s, "programs that only compute should not meet it", f"give at least 3 times code.test_s, {3 * self.test_s}")
        require(self.memory_mb >= 64, "code.memory_mb", self.memory_mb, "Python alone needs about 20", "give at least 64")
        require(self.max_tests >= 0, "code.max_tests", self.max_tests, "it counts tests", "give 0 for all")


MethodName = Literal[
    "dgpo", "gppo", "ce_gppo", "cispo", "cispo_one_sided", "aspo", "grpo", "dr_grpo", "dapo", "gspo", "sapo", "gmpo", "reinforce"
]


@dataclass(frozen=True)
class LossConfig:
    """The policy loss. A setting left at None takes the method's published value, printed at the start."""

    method: MethodName = "dgpo"  # see docs/methods.md; dapo also sets sampling and rewards, dr_grpo advantage and aggregation
    clip_low: float | None = None  # the ratio's trust region starts at 1 - clip_low; 1 or more = no lower bound; gmpo: at -clip_low of the log-ratio
    clip_high: float | None = None  # and ends at 1 + clip_high
    n: float | None = None  # dgpo: how fast weights decay below the region
    m: float | None = None  # dgpo: how slowly weights decay above it
    beta1: float | None = None  # ce_gppo: share of the gradient kept below the region
    beta2: float | None = None  # ce_gppo: share of the gradient kept above it
    tau_pos: float | None = None  # sapo: how narrow the gate is for positive advantages
    tau_neg: float | None = None  # sapo: the same for negative ones
    soft_clip: float | None = None  # aspo: the gradient weight never exceeds this
    dual_clip: float | None = None  # with a negative advantage, ratios above this get no gradient; None = off, as in these methods' papers (the codes of GPPO and DAPO: 10)
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] | None = None  # what tokens weigh
    aggregation_scale: int | None = None  # tokens that seq-mean-token-sum-norm divides by; None = rollout.max_response
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus"] | None = None  # dr_grpo = not divided by the group's spread
    max_log_ratio: float = 20.0  # log-ratios are clamped to this, as in verl; the papers have no clamp, and up to 80 nothing overflows
    std_floor: float = 1e-6  # added to a standard deviation of rewards
    supervised: float = 0.0  # alpha: weight of -log p averaged over the tokens of right responses (Klear: 0.1); 0 = off
    entropy: float = 0.0  # weight of the entropy bonus; 0 = off

    def __post_init__(self):
        require_kinds(self, "loss")

        def check(name, fits, rule, fix):
            value = getattr(self, name)
            require(value is None or fits(value), f"loss.{name}", value, rule, fix)

        check("clip_low", lambda x: x >= 0, "the region starts at 1 - clip_low", "give 0 or more; 1 = no lower bound")
        check("clip_high", lambda x: x >= 0, "the region ends at or above 1", "give 0 or more")
        check("m", lambda x: x >= 1, "the exponent 1 / m is at most 1", "give 1 or more")
        check("n", lambda x: x >= -1, "below -1 the weight grows as the ratio vanishes", "give -1 or more")
        for name in ("beta1", "beta2"):
            check(name, lambda x: x >= 0, "it scales a gradient", "give 0 or more")
        for name in ("tau_pos", "tau_neg"):
            check(name, lambda x: x > 0, "it is an inverse width", "give more than 0")
        check("soft_clip", lambda x: x >= 1, "a weight is 1 at ratio 1", "give 1 or more")
        check("dual_clip", lambda x: x > 1 + (self.clip_high or 0), "it lies above the region", "raise it above 1 + clip_high, or None")
        check("aggregation_scale", lambda x: x > 0, "the loss is divided by it", "give at least 1")
        check("max_log_ratio", lambda x: 0 < x <= 80, "exp of it must be a float", "give more than 0, at most 80")
        for name in ("std_floor", "supervised", "entropy"):
            check(name, lambda x: x >= 0, "it is a weight or a floor", "give 0 or more")


@dataclass(frozen=True)
class KlConfig:
    """Distance to the weights that the run started from."""

    coefficient: float = 0.0  # weight of the distance, in nats per token; 0 = off, and no reference weights are held
    estimator: Literal["k1", "k2", "k3"] = "k3"  # with d = log(reference / policy): -d, d^2 / 2, exp(d) - d - 1
    place: Literal["loss", "reward"] = "loss"  # loss = a term per token; reward = a response's sum is taken off its reward

    @property
    def in_loss(self) -> bool:
        """Whether updates need the reference."""
        return self.coefficient > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        """Whether rewards do."""
        return self.coefficient > 0 and self.place == "reward"

    def __post_init__(self):
        require_kinds(self, "kl")
        require(self.coefficient >= 0, "kl.coefficient", self.coefficient, "it keeps the policy near", "give 0 for off")
        require(
            (self.estimator, self.place) != ("k1", "loss"), "kl.estimator", self.estimator,
            "in the loss its gradient is zero on average", "use k2 or k3, or kl.place=reward",
        )  # fmt: skip


@dataclass(frozen=True)
class CorrectionConfig:
    """What is done about the sampler's probabilities not being the trainer's (verl: rollout correction)."""

    weights: Literal["none", "token", "sequence"] = "none"  # importance weights trainer / sampler: of each token, or of the whole response
    cap: float = 2.0  # largest importance weight
    reject: Literal["none", "token", "sequence", "geometric"] = "none"  # leave out tokens, or responses by the product or geometric mean of theirs, whose ratio trainer / sampler is outside low to high
    low: float = 0.5  # smallest ratio that reject lets through
    high: float = 2.0  # largest ratio that reject lets through

    def __post_init__(self):
        require_kinds(self, "correction")
        require(self.cap > 0, "correction.cap", self.cap, "it bounds a ratio", "give more than 0")
        require(0 <= self.low < 1 < self.high, "correction.low, correction.high", (self.low, self.high), "the interval is around 1", "change them")


@dataclass(frozen=True)
class UpdateConfig:
    """How a rollout becomes optimizer steps."""

    updates: int = 4  # optimizer steps per iteration, each on its own share of the groups; with 1 every method is the same
    tokens_per_row: int = 1024  # T, length of a packed row; at least max_prompt + max_response
    tokens_per_device: int = 2048  # in one microbatch, whole rows over the mesh.context devices that share one; more is faster until memory is full
    logprob_chunk: int = 1024  # response tokens of a device whose vocabulary logits are held at once
    old_logprobs: Literal["trainer", "sampler"] = "trainer"  # trainer = one more forward pass, the first ratio is exactly 1; sampler = the rollout's own

    def __post_init__(self):
        require_kinds(self, "update")
        for name in ("updates", "tokens_per_row", "tokens_per_device", "logprob_chunk"):
            require(getattr(self, name) > 0, f"update.{name}", getattr(self, name), "it counts something", "give at least 1")

    def rows_per_replica(self, context: int) -> int:
        """Packed rows of one microbatch, where so many devices share each row.

        Raises:
            ValueError: rows or microbatches that these devices cannot share.
        """
        require(
            context == 1 or self.tokens_per_row % (2 * context) == 0, "update.tokens_per_row", self.tokens_per_row,
            f"a row is cut into two pieces for each of mesh.context = {context} devices", f"make it a multiple of {2 * context}",
        )  # fmt: skip
        tokens = self.tokens_per_device * context
        shared = f" times mesh.context = {context}" if context > 1 else ""
        require(
            tokens % self.tokens_per_row == 0, "update.tokens_per_device", self.tokens_per_device,
            f"a microbatch{shared} is whole rows of {self.tokens_per_row} tokens", "make it a multiple of update.tokens_per_row",
        )  # fmt: skip
        return tokens // self.tokens_per_row


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and gradient clipping."""

    learning_rate: float = 1e-6  # after warm-up
    warmup_iterations: int = 10  # iterations over which the learning rate rises from 0; all updates of one share its rate
    beta1: float = 0.9  # decay of the first moment, per update
    beta2: float = 0.999  # decay of the second moment, per update
    eps: float = 1e-8  # added to the square root of the second moment
    weight_decay: float = 0.1  # per update, times the learning rate
    decay: Literal["matrices", "all"] = "matrices"  # which parameters decay: matrices = not norms and biases
    clip_norm: float = 1.0  # gradients of a larger global norm are scaled down to it
    max_skipped: int = 10  # updates in a row that may be skipped, for a gradient, loss or log-probability that is not finite, before the run stops

    def __post_init__(self):
        require_kinds(self, "optimizer")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "it scales a step", "give more than 0")
        require(self.warmup_iterations >= 0, "optimizer.warmup_iterations", self.warmup_iterations, "it counts iterations", "give 0 for none")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "a decay is in [0, 1)", "change it")
        for name in ("eps", "clip_norm"):
            require(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "it is a positive amount", "give more than 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it shrinks weights", "give 0 for none")
        require(self.max_skipped > 0, "optimizer.max_skipped", self.max_skipped, "it counts updates", "give at least 1")


@dataclass(frozen=True)
class SftConfig:
    """Supervised warm start on worked solutions, before the first iteration."""

    updates: int = 0  # optimizer steps; 0 = no warm start
    data: str = ""  # problems with solutions; '' = data.train
    examples: int = 64  # problems per update
    learning_rate: float = 1e-3  # after warm-up, then falling to a tenth along a cosine
    warmup_updates: int = 10  # updates over which the learning rate rises from 0
    log_every: int = 20  # updates
    checkpoint_every: int = 500  # updates

    def __post_init__(self):
        require_kinds(self, "sft")
        require(self.updates >= 0, "sft.updates", self.updates, "it counts updates", "give 0 for none")
        for name in ("examples", "log_every", "checkpoint_every"):
            require(getattr(self, name) > 0, f"sft.{name}", getattr(self, name), "it counts something", "give at least 1")
        require(self.learning_rate > 0, "sft.learning_rate", self.learning_rate, "it scales a step", "give more than 0")
        require(self.warmup_updates >= 0, "sft.warmup_updates", self.warmup_updates, "it counts updates", "give 0 for none")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: in training before the first iteration, every so many, and after the last; and `dgpo_jax.evaluate`."""

    every: int = 10  # iterations; 0 = only before the first and after the last
    sets: str = ""  # benchmarks besides data.held_out: 'aime24,math500', or NAME=SOURCE with a source as in data.train; all = the eight that there are
    problems: int = 128  # of each set, its first; 0 = all
    samples: int = 8  # n, responses to each problem, for avg@n, pass@k, best@k, maj@k; 0 = none
    greedy: bool = True  # also one response to each problem at temperature 0
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0  # of the samples
    max_response: int = 0  # tokens; 0 = rollout.max_response
    responses: int = 0  # sampled at once; 0 = as many as in a rollout

    def __post_init__(self):
        require_kinds(self, "eval")
        require(self.every >= 0, "eval.every", self.every, "it counts iterations", "give 0 for the first and last only")
        require(self.problems >= 0, "eval.problems", self.problems, "it counts problems", "give 0 for all, or data.held_out='' for no evaluation")
        require(self.samples >= 0, "eval.samples", self.samples, "it counts responses", "give 0 for greedy only")
        require(self.samples > 0 or self.greedy, "eval.greedy", self.greedy, "with eval.samples at 0 nothing would be evaluated", "set one of them")
        require(self.temperature > 0, "eval.temperature", self.temperature, "these are samples; greedy is reported anyway", "give more than 0")
        require(0 < self.top_p <= 1, "eval.top_p", self.top_p, "it is a share of probability", "give more than 0, at most 1")
        for name in ("max_response", "responses"):
            require(getattr(self, name) >= 0, f"eval.{name}", getattr(self, name), "it counts something", "give 0 for that of the rollout")


@dataclass(frozen=True)
class PrepareConfig:
    """What `dgpo_jax.prepare` leaves out of data.train, in this order; it writes a JSONL file and a report."""

    deduplicate: bool = True  # problems whose text, but for case, blanks and punctuation, is that of an earlier one
    against: str = ""  # benchmarks whose problems must not be among them, as in eval.sets; all = the eight that there are
    ngram: int = 9  # words in a row shared with such a problem that give it away; a shorter problem, if it is contained whole
    parsable: bool = True  # only problems whose answer can be checked: it equals itself
    max_solution: int = 0  # tokens of a worked solution; 0 = as long as it likes
    pass_above: float | None = None  # only problems that the model solves in a larger share of eval.samples (Klear, code: 0.5); None = not measured
    pass_below: float | None = None  # and in a smaller share, such as 1: those not solved always

    def __post_init__(self):
        require_kinds(self, "prepare")
        require(self.ngram > 0, "prepare.ngram", self.ngram, "it counts words", "give at least 1; the papers have 9 to 13")
        require(self.max_solution >= 0, "prepare.max_solution", self.max_solution, "it counts tokens", "give 0 for no limit")
        for name in ("pass_above", "pass_below"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"prepare.{name}", value, "it is a share of responses", "give 0 to 1")
        above, below = self.pass_above, self.pass_below
        require(
            (0 if above is None else above) < (1 if below is None else below), "prepare.pass_above, prepare.pass_below", (above, below),
            "a pass rate has to fit between them", "lower the first or raise the second",
        )  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept for a restart."""

    every: int = 10  # iterations; the last one is always saved, and what a signal ends
    keep: int = 2  # newest checkpoints kept
    keep_best: int = 1  # kept besides: those with the best evaluations, saved whenever one is made; 0 = none
    best_by: str = ""  # metric that says which is best, such as eval/greedy; '' = eval/avg@k of the held-out problems, eval/greedy without samples
    accept_changes: str = ""  # settings that may differ from those the run was started with, on purpose: 'optimizer.learning_rate, rollout', or problems (an edited data set), or model_files (other weights, tokenizer or chat template in model.path); all = any

    def __post_init__(self):
        require_kinds(self, "checkpoint")
        require(self.every > 0, "checkpoint.every", self.every, "it counts iterations", "give at least 1")
        require(self.keep > 0, "checkpoint.keep", self.keep, "a restart needs one", "give at least 1")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "it counts checkpoints", "give 0 for none")


@dataclass(frozen=True)
class GuardConfig:
    """What is watched while a run goes on, and when it is ended."""

    silence_minutes: float = 15.0  # without any progress, after which a line says what is waited for; longer than the longest compilation; 0 = never
    stop_when_silent: bool = False  # then also save, if that is possible, and stop, so that whoever started the run can start it again
    max_gap: float | None = None  # warn of a larger mean gap between sampler and trainer, in nats; None = 0.001 in float32, 0.1 in bfloat16 or with int8
    min_entropy: float = 0.01  # warn of a lower entropy, in nats per token
    max_truncated: float = 0.5  # warn of a larger share of responses that are cut off

    def __post_init__(self):
        require_kinds(self, "guard")
        require(self.silence_minutes >= 0, "guard.silence_minutes", self.silence_minutes, "it is a time", "give 0 for never")
        require(
            not self.stop_when_silent or self.silence_minutes > 0, "guard.stop_when_silent", True,
            "nobody listens with guard.silence_minutes at 0", "give a time there",
        )  # fmt: skip
        require(self.max_gap is None or self.max_gap > 0, "guard.max_gap", self.max_gap, "a gap is never exactly 0", "give more than 0, or None")
        require(self.min_entropy >= 0, "guard.min_entropy", self.min_entropy, "an entropy is at least 0", "give 0 for no warning")
        require(0 < self.max_truncated <= 1, "guard.max_truncated", self.max_truncated, "it is a share", "give more than 0; 1 for no warning")


@dataclass(frozen=True)
class HostsConfig:
    """Several processes that train one model: a TPU pod, or GPUs of several machines."""

    cluster: Literal["none", "auto"] = "none"  # auto = one of several processes, as a TPU pod, Slurm, Kubernetes or Open MPI say; python -m dgpo_jax.launch needs no setting
    heartbeat_s: int = 20  # after so long without a sign of life a process counts as dead, and all others end
    start_s: int = 300  # how long processes wait for each other at the start

    def __post_init__(self):
        require_kinds(self, "hosts")
        for name in ("heartbeat_s", "start_s"):
            require(getattr(self, name) >= 5, f"hosts.{name}", getattr(self, name), "a busy machine is silent for seconds", "give at least 5")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"  # of the run; the default workdir is runs/NAME-HASH
    seed: int = 0  # of weights, data order and sampling
    iterations: int = 100  # each is one rollout and the updates made from it
    profile: str = ""  # iterations to trace into workdir/profile, such as '3,5-6'; '' = none
    stop_after_minutes: float = 0.0  # save and end with exit code 75 rather than begin an iteration that would go beyond this; 0 = no limit
    grace_seconds: float = 30.0  # from SIGTERM or Ctrl-C to the kill that follows it: a rollout that cannot be finished in time is dropped
    deterministic: bool = False  # on GPUs: only operations that give the same bits every time; slower. CPU and TPU do so anyway
    peak_tflops: float = 0.0  # of one device, 1e12 FLOP/s, that MFU is a share of; 0 = the chip's own figure, and no MFU where the chip is not in dgpo_jax/hardware.py
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    code: CodeConfig = field(default_factory=CodeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def __post_init__(self):
        require_kinds(self)
        require(self.iterations >= 0, "iterations", self.iterations, "it counts iterations", "give 0 for the warm start only")
        require(0 <= self.seed < 2**31, "seed", self.seed, "random keys take 31 bits", "give 0 to 2147483647")
        settings = flatten(self)
        for name, value in settings.items():
            require_in_32_bits(name, value)
        require_changes(self.checkpoint.accept_changes, settings)
        require(
            parse_iterations(self.profile) is not None, "profile", self.profile, "it names iterations, from 1 on and in order within a range",
            "give numbers and ranges with commas between them, such as '3,5-6', or '' for none",
        )  # fmt: skip
        require(0 <= self.peak_tflops < math.inf, "peak_tflops", self.peak_tflops, "it is a rate in 1e12 FLOP/s", "give 0 for the chip's own")
        require(self.stop_after_minutes >= 0, "stop_after_minutes", self.stop_after_minutes, "it is a time", "give 0 for no limit")
        require(self.grace_seconds >= 0, "grace_seconds", self.grace_seconds, "it is a time", "give 0 to drop what is under way")
        if self.mesh.context > 0:  # else it is known with the devices
            self.update.rows_per_replica(self.mesh.context)
        require(
            self.rollout.prompts % self.update.updates == 0, "update.updates", self.update.updates,
            f"each update takes an equal share of the {self.rollout.prompts} groups", "make it a divisor of rollout.prompts",
        )  # fmt: skip
        require(
            (self.reward.overlong_buffer or 0) <= self.rollout.max_response, "reward.overlong_buffer", self.reward.overlong_buffer,
            f"a response has at most {self.rollout.max_response} tokens", "give at most rollout.max_response",
        )  # fmt: skip
        require(
            self.loss.method not in ("gspo", "gmpo") or "token" not in (self.correction.weights, self.correction.reject),
            "correction", (self.correction.weights, self.correction.reject),
            f"{self.loss.method} takes a sequence as one and its tokens cannot be corrected one by one", "use sequence or geometric",
        )  # fmt: skip
        correcting = (self.correction.weights, self.correction.reject) != ("none", "none")
        require(
            not correcting or self.update.old_logprobs == "trainer", "update.old_logprobs", self.update.old_logprobs,
            "a correction compares the trainer's log-probabilities with the sampler's", "use trainer, or no correction",
        )  # fmt: skip


# Settings that change how a run is carried out, not what it computes: a checkpoint goes on under another value.
MAY_CHANGE = (
    "iterations", "mesh", "checkpoint", "rollout.slots", "update.tokens_per_device", "reward.workers", "reward.deadline_s",
    "reward.memory_mb", "code.workers", "eval.every", "eval.responses", "prepare", "data.data_dir", "data.manual_dir",
    "sft.checkpoint_every", "profile", "peak_tflops", "stop_after_minutes", "grace_seconds", "deterministic", "guard", "hosts",
)  # fmt: skip

# Those of them that results depend on to rounding, so that a run which goes on under another value is no longer the same to the bit.
CHANGES_ROUNDING = ("mesh", "rollout.slots", "update.tokens_per_device", "eval.responses", "deterministic")


def require_changes(accepted: str, settings: Collection[str]) -> None:
    """Raises ValueError if checkpoint.accept_changes names what is neither a setting, nor a group of them, nor one of the others.

    Args:
        settings: the dotted names of all.
    """
    known = {*settings, *(name.split(".")[0] for name in settings), PROBLEMS, MODEL_FILES, ANY_CHANGE}
    for name in filter(None, map(str.strip, accepted.split(","))):
        near = closest(name, known)
        require(
            name in known, "checkpoint.accept_changes", accepted, f"there is no setting {shown(name)}",
            f"did you mean {near}" if near else f"name settings, groups such as optimizer, {PROBLEMS}, {MODEL_FILES}, or {ANY_CHANGE}",
        )  # fmt: skip


def parse_iterations(text: str) -> tuple[range, ...] | None:
    """'3,5-6' -> (range(3, 4), range(5, 7)); '' names none; None if the text is not of that form."""
    ranges = []
    for part in text.replace(" ", "").split(",") if text.strip() else ():
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            return None
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def flatten(config: Config | dict) -> dict:
    """Settings, as a Config or read from config.json, by dotted name: {'loss.clip_low': 0.2, ...}."""
    flat = {}
    for name, value in (config if isinstance(config, dict) else asdict(config)).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in value.items()}
        else:
            flat[name] = value
    return flat


def fixed_settings(config: Config) -> dict:
    """The settings that may not change when a run goes on, by dotted name."""
    return {name: value for name, value in flatten(config).items() if not is_among(name, MAY_CHANGE)}


def changed_settings(config: Config, before: Mapping[str, Any]) -> list[str]:
    """Which of these, by dotted name, a run was started with other values of.

    A setting that did not exist then is no change; its default does what was done before it.
    """
    return [name for name, value in fixed_settings(config).items() if name in before and before[name] != value]


def rounding_settings(config: Config) -> dict:
    """The settings that may change and change results to rounding, by dotted name."""
    return {name: value for name, value in flatten(config).items() if is_among(name, CHANGES_ROUNDING)}


def is_among(name: str, names: Collection[str]) -> bool:
    """Whether a setting, by its dotted name, is one of these or in one of these groups."""
    return name in names or name.split(".")[0] in names


def default_workdir(config: Config) -> Path:
    """runs/NAME-HASH: the same settings find their run again, others start their own."""
    settings = json.dumps(fixed_settings(config), sort_keys=True)
    return Path("runs") / f"{config.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class NoOptions:
    """Of a command that has no flags but --config and --workdir."""


def load(arguments: Sequence[str]) -> Config:
    """Reads `--config=FILE` and the overrides behind it.

    Args:
        arguments: as on the command line, such as ["--config=configs/smoke.py", "--config.seed=1"].
    Raises:
        SystemExit: the file or a setting is wrong; the reason was printed to stderr.
    """
    return parse_command(arguments, program="dgpo_jax.config", description="")[0]


def parse_command(
    arguments: Sequence[str], *, program: str, description: str, options: type = NoOptions
) -> tuple[Config, Path | None, Any]:
    """Reads a whole command line: `--config=FILE [--workdir=DIR] [--config.a.b=value ...]`.

    Args:
        options: a frozen dataclass; its fields are flags of this command alone, their comments the help.
    Returns:
        The config, the workdir (None if none was given), and the options.
    Raises:
        SystemExit: with code 2 after a message for a bad setting, with 0 after `--help`.
    """
    import tyro  # here, so that the workers and the tests that need no command line start faster

    path, rest = _split_config_path(list(arguments))
    if path is None and not {"-h", "--help"} & set(rest):
        _refuse(f"no --config given; try: python -m {program} --config=configs/smoke.py")

    command_type = _command_type(options)
    command = tyro.cli(
        command_type,
        args=rest,
        default=command_type(options(), _run_config_file(path) if path else Config()),
        prog=f"python -m {program} --config=FILE",
        description=description,
    )
    return command.config, Path(command.workdir) if command.workdir else None, command.options


@functools.cache  # tyro reads the comments of a new class from this whole file
def _command_type(options: type) -> type:
    """What a command line with these options is parsed into."""
    import tyro

    all_settings = tyro.conf.FlagConversionOff[Config]  # a bool takes a value: --config.eval.greedy=False
    flags = tyro.conf.OmitArgPrefixes[options]

    @dataclass(frozen=True)
    class Command:
        options: flags
        config: all_settings
        workdir: str = ""  # where everything is written; '' = a folder named after the config and its settings, found again by the same ones

    return Command


def _split_config_path(arguments: list[str]) -> tuple[str | None, list[str]]:
    path, rest = None, []
    while arguments:
        argument = arguments.pop(0)
        if argument == "--config" and arguments:
            path = arguments.pop(0)
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return path, rest


def _run_config_file(path: str) -> Config:
    if not (Path(path).is_file() and path.endswith(".py")):
        near = ", ".join(sorted(str(file) for file in Path("configs").glob("*.py"))) or "none in ./configs"
        _refuse(f"--config is {path!r}, but there is no such Python file; choose one of: {near}")
    spec = importlib.util.spec_from_file_location("dgpo_jax_config_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except SystemExit as stop:
        _refuse(f"{path}: it ends Python (SystemExit: {stop.code}) before there is a config; have get_config() return one")
    except Exception as error:  # it is the user's own Python, so anything can come out of it
        _refuse(f"{path}: {type(error).__name__}: {error}")
    if not isinstance(config, Config):
        _refuse(f"{path}: get_config() returned {type(config).__name__}; return a dgpo_jax.config.Config")
    return config


def _refuse(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def to_json(config: Config) -> str:
    """The resolved config, for workdir/config.json."""
    return json.dumps(asdict(config), indent=2) + "\n"


__all__ = [
    "CheckpointConfig", "CodeConfig", "Config", "CorrectionConfig", "DataConfig", "EvalConfig", "GuardConfig", "HostsConfig", "KlConfig", "LossConfig", "MeshConfig", "ModelConfig", "NoOptions",
    "OptimizerConfig", "PrepareConfig", "RewardConfig", "RolloutConfig", "SftConfig", "UpdateConfig", "changed_settings", "default_workdir",
    "fixed_settings", "flatten", "is_among", "load", "parse_command", "rounding_settings", "to_json",
]  # fmt: skip
