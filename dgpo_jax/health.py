"""What in the metrics of an iteration says that a run goes wrong, in words: the likely cause and the setting to look at.

Each sign is a function of the iteration's metrics and of what was remembered of earlier ones. It is said once when it begins
and again only after it went away. Nothing but metrics is read, so that a run that was killed and fed its own earlier lines
(`Health.replay`) goes on to say what it would have said. Never imports JAX.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from dgpo_jax.config import Config

FIRST = ("rollout/entropy", "rollout/response_length")  # remembered from the first iteration that has them
ENTROPY_SHARE = 0.1  # of the first iteration's
SOLVED = 0.9  # mean score
GROWTH = 2.0  # of the mean length, since the first iteration
IN_A_ROW = 3  # iterations
ROUNDING = {"float32": 1e-3, "bfloat16": 0.2}  # largest error of the first ratio
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.1}  # nats; with int8 the second
FAILED = 0.1  # share of answers at which the checker timed out or fell over
UNPARSABLE = 0.5  # share of answers that it could not read
NORMS, FEWEST_NORMS, NORM_GROWTH = 20, 5, 100.0  # iterations remembered, needed; times their median
CLIPPED = 0.5  # share of tokens


class Health:
    """Signs of trouble, one iteration after the other.

    Args:
        config: resolved.
        dtype: of the arithmetic, "float32" or "bfloat16", where model.dtype may be auto.
    """

    def __init__(self, config: Config, dtype: str):
        self.config = config
        self.dtype = dtype
        self._begun: set[str] = set()  # signs that are there, and were said
        self._first: dict[str, float] = {}
        self._all_zero = self._all_alike = 0  # iterations in a row
        self._norms: deque[float] = deque(maxlen=NORMS)

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes in lines of metrics.jsonl, as `metrics.read_metrics` gives them, and says nothing."""
        for row in rows:
            self.warnings(row["iteration"], row)

    def warnings(self, iteration: int, metrics: Mapping[str, Any]) -> list[str]:
        """A sentence for each sign that begins with this iteration.

        Args:
            iteration: 0 is not trained: nothing is looked at.
            metrics: of the whole line; what it lacks is not looked at.
        """
        if iteration < 1:
            return []
        # What is infinite reads back from metrics.jsonl as NaN: a replayed line has to look like a fresh one.
        numbers = {
            key: float(value) if math.isfinite(value) else math.nan for key, value in metrics.items() if isinstance(value, Real)
        }
        self._count(numbers)
        found = {name: message for name, sign in SIGNS.items() if (message := sign(self, numbers))}
        begun = [f"iteration {iteration}: {message}" for name, message in found.items() if name not in self._begun]
        self._begun = set(found)
        self._remember(numbers)
        return begun

    def _count(self, numbers: dict[str, float]) -> None:
        """Iterations in a row in which nothing could be learned."""
        for key in FIRST:
            if math.isfinite(numbers.get(key, math.nan)):
                self._first.setdefault(key, numbers[key])
        self._all_zero = self._all_zero + 1 if numbers.get("reward/score") == 0 else 0
        self._all_alike = self._all_alike + 1 if numbers.get("reward/groups_alike") == 1 else 0

    def _remember(self, numbers: dict[str, float]) -> None:
        """Behind the signs: a norm is compared with those before it."""
        norm = numbers.get("optim/grad_norm_max", 0.0)
        if math.isfinite(norm) and norm > 0:
            self._norms.append(norm)

    def entropy_collapse(self, numbers):
        """Nothing is explored any more."""
        entropy, first = numbers.get("rollout/entropy", math.nan), self._first.get("rollout/entropy", 0.0)
        lowest = max(self.config.guard.min_entropy, ENTROPY_SHARE * first)
        if entropy < lowest and numbers.get("reward/score", 0.0) < SOLVED:  # who is right nearly always has nothing to find
            return (
                f"entropy collapse: rollout/entropy is {entropy:.3g} nats per token, below {lowest:.3g} (guard.min_entropy ="
                f" {self.config.guard.min_entropy}; the first iteration had {first:.3g}). Likely the policy always answers the same and"
                " finds nothing new: lower optimizer.learning_rate or update.updates, or raise loss.clip_high, loss.entropy or kl.coefficient."
            )

    def length_explosion(self, numbers):
        """Responses that grow until they are cut off."""
        if self._cut_off(numbers) and self._has_grown(numbers):
            return (
                f"exploding length: responses have {numbers['rollout/response_length']:.0f} tokens on average, the first iteration's had"
                f" {self._first['rollout/response_length']:.0f}, and {numbers['rollout/truncated']:.0%} are cut off"
                f" (guard.max_truncated = {self.config.guard.max_truncated}). Likely nothing speaks against rambling: look at rollouts/,"
                " raise reward.overlong_buffer or rollout.max_response, or lower optimizer.learning_rate."
            )

    def cut_off(self, numbers):
        """Responses that never had the room."""
        if self._cut_off(numbers) and not self._has_grown(numbers):
            return (
                f"{numbers['rollout/truncated']:.0%} of responses are cut off (guard.max_truncated = {self.config.guard.max_truncated})."
                " Likely rollout.max_response is too small for this model, or it never writes its stop token: raise it, or look at"
                " data.template and a warm start (sft.updates)."
            )

    def _cut_off(self, numbers) -> bool:
        return numbers.get("rollout/truncated", 0.0) > self.config.guard.max_truncated

    def _has_grown(self, numbers) -> bool:
        length = numbers.get("rollout/response_length", math.nan)
        return length >= GROWTH * self._first.get("rollout/response_length", math.inf)

    def nothing_right(self, numbers):
        """No answer was right for some iterations."""
        if self._all_zero >= IN_A_ROW:
            return (
                f"no answer scored above 0 in {self._all_zero} iterations in a row ({numbers.get('verdict/no_answer', 0.0):.0%} had no answer"
                " in the form asked for). Likely the problems are too hard, or the right answers are not recognised: look at rollouts/, at"
                " reward.extract and data.template, and at rollout.max_response; easier problems, or a warm start (sft.updates)."
            )

    def groups_alike(self, numbers):
        """Rewards that never differ, so that there is no advantage."""
        if self._all_alike >= IN_A_ROW and self._all_zero < IN_A_ROW:
            return (
                f"all rewards within every group were the same in {self._all_alike} iterations in a row: there is nothing to learn from"
                f" ({numbers.get('reward/groups_all_right', 0.0):.0%} of groups are all right). Likely the problems are too easy or too hard,"
                " or reward.functions give the same to all: choose others, or raise rollout.group_size or rollout.temperature."
            )

    def sampler_gap(self, numbers):
        """A sampler that is not the trainer's model."""
        settings, gap = self.config, numbers.get("gap/mean", math.nan)
        int8 = settings.rollout.int8_weights or settings.rollout.int8_cache
        bound = settings.guard.max_gap or MAX_GAP["bfloat16" if int8 else self.dtype]
        if gap > bound:
            return (
                f"sampler and trainer disagree: gap/mean is {gap:.3g} nats, above {bound:.3g} (guard.max_gap). Likely rounding of a low"
                " precision, so that updates are off-policy from the start: set correction.weights=token, model.dtype=float32, or"
                " rollout.int8_weights and int8_cache=False; if none of these is in use, it is a fault of the sampler: please report it."
            )

    def first_ratio(self, numbers):
        """A trainer that does not agree with itself."""
        error, bound = numbers.get("policy/first_ratio_error", math.nan), ROUNDING[self.dtype]
        if self.config.update.old_logprobs == "trainer" and error > bound:
            return (
                f"policy/first_ratio_error is {error:.3g}: before any update the ratio should be 1 to rounding ({bound:g} in"
                f" {self.dtype}). Likely a fault of the trainer, not of a setting: please report it with config.json;"
                " until then compare with model.remat=none and model.dtype=float32."
            )

    def skipped_updates(self, numbers):
        """Something was not finite."""
        if numbers.get("optim/skipped", 0.0) > 0:
            tokens = numbers.get("optim/tokens_not_finite", 0.0)
            what = f"the log-probability or loss of {tokens:.0f} tokens" if tokens else "the gradient"
            return (
                f"{numbers['optim/skipped']:.0f} updates were skipped: {what} was not finite. Likely weights or activations grow too"
                " large: lower optimizer.learning_rate or set model.dtype=float32; the sequences are in nonfinite/. After"
                f" {self.config.optimizer.max_skipped} in a row (optimizer.max_skipped) the run stops."
            )

    def sampler_overflows(self, numbers):
        """Responses drawn from numbers that are none."""
        if math.isnan(numbers.get("rollout/entropy", 0.0)):
            return (
                "log-probabilities of the sampler are not finite (rollout/entropy): what it drew means nothing. Likely the weights have"
                " become so large that the forward pass overflows: go back to an older checkpoint (move newer folders out of"
                " checkpoints/) and lower optimizer.learning_rate. After optimizer.max_skipped updates the run stops."
            )

    def checker_fails(self, numbers):
        """Answers that were not judged."""
        failed = numbers.get("verdict/timed_out", 0.0) + numbers.get("verdict/crashed", 0.0)
        if failed > FAILED:
            return (
                f"the checker failed on {failed:.0%} of answers, which count as wrong (verdict/timed_out"
                f" {numbers.get('verdict/timed_out', 0.0):.0%}, verdict/crashed {numbers.get('verdict/crashed', 0.0):.0%}). Likely a busy"
                " machine or a limit that is too tight: raise reward.deadline_s or reward.memory_mb (of programs code.wall_s and so on), or lower reward.workers."
            )

    def answers_unparsable(self, numbers):
        """Answers that were not understood."""
        share = numbers.get("verdict/unparsable", 0.0)
        if share > UNPARSABLE:
            return (
                f"{share:.0%} of answers cannot be read (verdict/unparsable). Likely reward.extract cuts out the wrong part of the response,"
                " or the model does not write answers of the kind that the problems ask for: look at 'extracted' in rollouts/."
            )

    def gradient_explosion(self, numbers):
        """A norm far beyond the usual."""
        norm = numbers.get("optim/grad_norm_max", math.nan)
        if len(self._norms) >= FEWEST_NORMS and norm > NORM_GROWTH * (usual := statistics.median(self._norms)):
            return (
                f"optim/grad_norm_max is {norm:.3g}, the median of the last {len(self._norms)} iterations is {usual:.3g}. The step is clipped to"
                f" optimizer.clip_norm = {self.config.optimizer.clip_norm}. Likely a few tokens with a large ratio decide where it goes: look at"
                " policy/high_reverse_weight_max, set loss.dual_clip, or lower optimizer.learning_rate or update.updates."
            )

    def mostly_clipped(self, numbers):
        """Weights that are far from those that sampled."""
        share = numbers.get("policy/clipped", 0.0)
        if share > CLIPPED:
            return (
                f"{share:.0%} of tokens are outside the clip region (policy/clipped) and teach little. Likely the updates of one iteration go"
                " too far: lower update.updates, optimizer.learning_rate or rollout.staleness, or widen loss.clip_low and loss.clip_high."
            )


# In the order in which they are said; the names are those of docs/metrics.md.
SIGNS: dict[str, Callable[[Health, dict[str, float]], str | None]] = {
    name: getattr(Health, name)
    for name in (
        "skipped_updates", "sampler_overflows", "nothing_right", "groups_alike", "checker_fails", "answers_unparsable", "entropy_collapse",
        "length_explosion", "cut_off", "sampler_gap", "first_ratio", "gradient_explosion", "mostly_clipped",
    )
}  # fmt: skip
