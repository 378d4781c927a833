"""What an iteration learns from its experience: advantages to packed rows to optimizer steps to figures."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from dgpo_jax import activity
from dgpo_jax.build import Parts
from dgpo_jax.config import Config
from dgpo_jax.rl.advantages import group_advantages
from dgpo_jax.rl.aggregation import token_weights
from dgpo_jax.rl.experience import by_group, group_count, group_size, lengths
from dgpo_jax.rl.figures import gap_metrics, policy_metrics
from dgpo_jax.rl.optimizer import learning_rate
from dgpo_jax.rl.packing import (
    Example,
    Layout,
    Shape,
    fill,
    lay_out,
    packing_metrics,
    split_groups,
    to_examples,
    unpack,
)
from dgpo_jax.rl.suspects import suspect_rows
from dgpo_jax.rl.update import Programs, StepFigures, Totals, keep_pace, take_marked_update
from dgpo_jax.sharding import rows_here, to_device, to_host
from dgpo_jax.stopping import Stop
from dgpo_jax.types import Experience, TrainBatch, TrainState


class StoppedAmid(Stop):
    """The run ends between two updates; with all that `learn` needs to go on there.

    Args:
        experience: with the old log-probabilities that the updates which are left will be compared with.
        results: (Totals, StepFigures) of each update of the iteration so far, on the host.
        skipped: updates skipped in a row.
    """

    def __init__(
        self, state: TrainState, experience: Experience, results: Sequence[tuple[Totals, StepFigures]], skipped: int, code: int
    ):
        super().__init__(code)
        self.state, self.experience, self.results, self.skipped = state, experience, results, skipped


def learn(
    config: Config, parts: Parts, programs: Programs, state: TrainState, experience: Experience, advantages, iteration,
    reference=None, skipped: int = 0, results: Sequence[tuple[Totals, StepFigures]] = (),
    report: Callable[[list[dict]], None] = lambda rows: None, between: Callable[[], object] = lambda: None,
):  # fmt: skip
    """All updates of one iteration, or those that a stop amid them has left.

    Args:
        experience: of rollout.prompts groups.
        advantages: f32[Q, G].
        iteration: counts from 1.
        reference: params of the weights that the run started from; read only by a KL in the loss.
        skipped: updates skipped in a row just before.
        results: of the updates that are in `state` already, as of StoppedAmid.
        report: is given the sequences to look at (`skipped_rows`) if an update was skipped, and not called otherwise.
        between: called before each microbatch that is scored or learned from; may raise Stop.
    Returns:
        (TrainState, metrics).
    Raises:
        StoppedAmid: where `between` says so. `state` is gone, as it is afterwards.
    """
    plans = plan_minibatches(config, parts, experience, advantages, iteration)
    try:
        minibatches, gaps = complete_minibatches(config, parts, programs, state.params, reference, plans, between)
    except Stop as stop:
        raise StoppedAmid(state, experience, results, skipped, stop.code) from stop
    rate = to_device(np.float32(learning_rate(config.optimizer, iteration - 1)), parts.shardings.scalar)
    before = len(results)
    state, made, marks, stop = make_updates(programs, state, islice(minibatches, before, None), rate, between)
    results = [*results, *made]
    # Weights that overflow in the sampler give responses that are all alike: then there is no token to see it by in an update.
    unsound = not np.isfinite(experience.rollout.logprobs[experience.rollout.response_mask]).all()
    for _, figures in made:
        skipped = skipped + 1 if figures.skipped or unsound else 0
    scored = minibatches if config.update.old_logprobs == "trainer" else None
    left_out = {before + number: marked for number, (marked, (_, figures)) in enumerate(zip(marks, made, strict=True)) if figures.skipped}
    if left_out:
        report(skipped_rows(parts, experience, plans, left_out, scored))
    if stop is not None:
        if results and scored:  # before the first update the weights that sampled are still there
            experience = with_old_logprobs(experience, plans, scored)
        raise StoppedAmid(state, experience, results, skipped, stop.code) from stop
    gaps, rate = to_host((gaps, rate))
    layouts = [plan.layout for plan in plans]
    fresh = bool((experience.iteration == iteration).all())
    terms = {"kl_ref": config.kl.in_loss, "supervised": config.loss.supervised > 0}
    metrics = policy_metrics(results, fresh, [name for name, used in terms.items() if used])
    metrics |= gap_metrics(gaps) | packing_metrics(layouts) | {
        "optim/skipped_in_a_row": skipped,
        "optim/learning_rate": float(rate),
        "update/microbatches": sum(layout.batches for layout in layouts),
    }
    return state, metrics


def make_updates(programs: Programs, state: TrainState, minibatches: Iterable, rate, between: Callable[[], object]):
    """One update after the other.

    Returns:
        (TrainState, their (Totals, StepFigures) on the host, their Marks on the device, the Stop that ended them or None).
    """
    results, marks, stop = [], [], None
    try:
        for batches in minibatches:
            state, totals, figures, marked = take_marked_update(programs, state, batches, rate, between)
            results.append((totals, figures))
            marks.append(marked)
    except Stop as asked:
        stop = asked
    return state, to_host(results), marks, stop


def skipped_rows(parts: Parts, experience: Experience, plans: Sequence["Plan"], skipped: Mapping[int, list], scored=None) -> list[dict]:
    """What to look at of the updates that were skipped, a dict for each sequence; see `suspects.suspect_rows`.

    Args:
        skipped: {number of an update, from 0: Marks of its microbatches, on the device}.
        scored: per update the TrainBatches with the old log-probabilities that the host lacks; None = it lacks none.
    """
    found = []
    for number, marks in skipped.items():
        old_logprobs = None if scored is None else to_host([batch.old_logprobs for batch in scored[number]])
        rows = suspect_rows(experience, *plans[number], to_host(marks), parts.tokenizer.decode, old_logprobs)
        found += [{"update": number + 1} | row for row in rows]
    return found


def with_old_logprobs(experience: Experience, plans: Sequence["Plan"], minibatches: Sequence[list[TrainBatch]]) -> Experience:
    """With those that the minibatches have, of the weights before the first update; NaN stays where nothing is learned from."""
    logprobs = experience.old_logprobs.copy()
    for plan, batches in zip(plans, minibatches, strict=True):
        scored = unpack(to_host([batch.old_logprobs for batch in batches]), plan.examples, plan.layout)
        for row, values in zip(plan.rows, scored, strict=True):
            logprobs[row, : len(values)] = values
    return experience._replace(old_logprobs=logprobs)


def compute_advantages(config: Config, experience: Experience) -> np.ndarray:
    """f32[Q, G], by loss.advantage."""
    rewards, mask = by_group(experience, experience.rewards), in_baseline(config, experience)
    return group_advantages(rewards, mask, estimator=config.loss.advantage, std_floor=config.loss.std_floor)


def in_baseline(config: Config, experience: Experience) -> np.ndarray:
    """bool[Q, G]: responses that others are compared with; not those cut off, under reward.truncated='drop'."""
    dropped = experience.rollout.truncated & (config.reward.truncated == "drop")
    return by_group(experience, ~dropped)


def in_loss(config: Config, experience: Experience) -> np.ndarray:
    """bool[B]: responses whose tokens count; not those cut off, if so set."""
    return ~(experience.rollout.truncated & (config.reward.truncated != "keep"))


def to_compute(config: Config, experience: Experience, advantages: np.ndarray) -> np.ndarray:
    """bool[B]: responses that change the gradient.

    A response without advantage does so only through a term that does not ask for one.
    """
    wanted = advantages.reshape(-1) != 0
    if config.loss.entropy or config.kl.in_loss:
        wanted = np.ones_like(wanted)
    if config.loss.supervised:
        wanted = wanted | (experience.scores == 1)
    return wanted & in_loss(config, experience)


class Plan(NamedTuple):
    """The sequences of one update and where they go."""

    rows: np.ndarray  # i64[n], which of the B responses
    examples: list[Example]  # one for each of them
    layout: Layout


def plan_minibatches(config: Config, parts: Parts, experience: Experience, advantages, iteration) -> list[Plan]:
    """What each update learns from.

    A response that is not computed for want of an advantage still counts in what the loss is divided by: leaving it
    out would make an update the larger the fewer groups it learns from.
    """
    length, counted = lengths(experience), in_loss(config, experience)
    right, computed = counted & (experience.scores == 1), to_compute(config, experience, advantages)
    plans = []
    for groups in split_groups(group_count(experience), config.update.updates, config.seed, iteration):
        members = np.zeros((group_count(experience), group_size(experience)), bool)
        members[groups] = True
        members = members.reshape(-1)
        weights = token_weights(length, counted & members, config.loss.aggregation, config.loss.aggregation_scale)
        supervised = config.loss.supervised * token_weights(length, right & members, "token-mean", 1)
        rows = np.flatnonzero(computed & members)
        examples = to_examples(experience, rows, advantages.reshape(-1), weights, supervised)
        plans.append(Plan(rows, examples, lay_out(examples, packing_shape(config, parts))))
    return plans


def microbatches(parts: Parts, plan: Plan) -> Iterator[TrainBatch]:
    """The packed microbatches of an update, on the host, each made when it is asked for; of several processes each fills its own rows."""
    shape = plan.layout.shape
    rows = rows_here(parts.shardings.batch.tokens, (shape.rows, shape.tokens_per_row))
    return fill(plan.examples, plan.layout, pad_id=parts.tokenizer.pad_id, rows=rows)


def unscored_batches(plan: Plan) -> set[int]:
    """Microbatches with a response whose old_logprobs are missing; the same on every process, whatever rows it fills."""
    return {place.batch for place, example in zip(plan.layout.places, plan.examples, strict=True) if np.isnan(example.old_logprobs).any()}


def row_shape(config: Config, parts: Parts) -> dict[str, int]:
    """Rows of a microbatch over all devices, and tokens of a row, as `pack` takes them."""
    rows = config.update.rows_per_replica(parts.mesh.shape["context"]) * parts.replicas
    return {"rows": rows, "tokens_per_row": config.update.tokens_per_row}


def packing_shape(config: Config, parts: Parts) -> Shape:
    """The same, with what the replicas are to share evenly."""
    model = parts.model.config
    # In multiplications: two for a query and a key, once for its logit and once for its value, and half of the pairs.
    attention = model.layers * model.heads * model.head_width / (model.width * model.vocab_size)
    return Shape(**row_shape(config, parts), devices=parts.replicas, attention=attention)


def complete_minibatches(
    config: Config, parts: Parts, programs: Programs, params, reference, plans: Sequence[Plan], between: Callable[[], object] = lambda: None
):
    """Brings the microbatches to the device, with all log-probabilities that the loss needs.

    While the device scores one microbatch, the next is packed.

    Args:
        params: that sampled those responses whose old_logprobs are missing.
        reference, between: as in `learn`.
    Returns:
        (per update a list of TrainBatches on the device, list of Totals of the gap to the sampler's). Under
        update.old_logprobs='sampler' nothing has to be scored before the first update: then the first is an iterator,
        which packs for an update when it is asked for, and the second stays empty.
    """
    gaps = []

    def complete(batch: TrainBatch, unscored: bool) -> TrainBatch:
        keep_pace(gaps)
        between()
        batch = to_device(batch, parts.shardings.batch)
        if config.kl.in_loss:
            batch = batch._replace(ref_logprobs=programs.score(reference, batch))
        if config.update.old_logprobs == "sampler":
            return batch
        # In the very batch that the update will see: its first ratio is then exactly 1.
        logprobs = programs.score(params, batch) if unscored else batch.old_logprobs
        batch, gap = programs.complete(batch, logprobs)
        gaps.append(gap)
        return batch

    def complete_all(plan: Plan) -> list[TrainBatch]:
        unscored = unscored_batches(plan)
        return [complete(batch, number in unscored) for number, batch in enumerate(microbatches(parts, plan))]

    completed = (complete_all(plan) for plan in plans)
    return completed if config.update.old_logprobs == "sampler" else list(completed), gaps


def score_waiting(config: Config, parts: Parts, programs: Programs, params, waiting: Experience) -> Experience:
    """Gives groups that will be learned from later the log-probabilities of the weights that sampled them.

    One that is not finite becomes -inf, which is no NaN and so "scored": it makes the update that will meet it a skipped one.

    Args:
        params: those weights, of the groups that have none yet.
    """
    if config.update.old_logprobs == "sampler" or not group_count(waiting):
        return waiting
    needed = to_compute(config, waiting, compute_advantages(config, waiting))
    rows = np.flatnonzero(needed & np.isnan(waiting.old_logprobs[:, 0]))
    if not len(rows):
        return waiting
    logprobs = score_responses(config, parts, programs, params, waiting, rows)
    scored = np.isin(np.arange(len(logprobs)), rows)[:, None] & waiting.rollout.response_mask
    logprobs = np.where(np.isfinite(logprobs), logprobs, -np.inf)
    return waiting._replace(old_logprobs=np.where(scored, logprobs, waiting.old_logprobs))


def score_responses(config: Config, parts: Parts, programs: Programs, params, experience: Experience, rows) -> np.ndarray:
    """f32[B, R]: log-probabilities of the responses `rows`, to the host; NaN elsewhere."""
    nothing = np.zeros(len(experience.rewards))
    examples = to_examples(experience, rows, nothing, nothing, nothing)
    plan = Plan(rows, examples, lay_out(examples, packing_shape(config, parts)))
    on_device = []
    for batch in microbatches(parts, plan):
        keep_pace(on_device)
        activity.beat()
        on_device.append(programs.score(params, to_device(batch, parts.shardings.batch)))
    logprobs = np.full_like(experience.old_logprobs, np.nan)
    scored = unpack(to_host(on_device), plan.examples, plan.layout)
    for row, values in zip(rows, scored, strict=True):
        logprobs[row, : len(values)] = values
    return logprobs


def sampled_gap(config: Config, parts: Parts, programs: Programs, params, experience: Experience) -> dict[str, float]:
    """The gap to the sampler on one microbatch of responses, where nothing else scores them.

    Args:
        params: the weights that sampled.
    """
    nothing = np.zeros(len(experience.rewards))
    unscored = experience._replace(old_logprobs=np.full_like(experience.old_logprobs, np.nan))
    rows = np.arange(len(nothing))
    examples = to_examples(unscored, rows, nothing, nothing, nothing)
    plan = Plan(rows, examples, lay_out(examples, packing_shape(config, parts)))
    batch = next(microbatches(parts, plan))  # the one that costs most; the others are not even packed
    batch = to_device(batch, parts.shardings.batch)
    return gap_metrics(to_host([programs.complete(batch, programs.score(params, batch))[1]]))
