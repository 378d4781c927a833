"""Experience for an iteration: draw prompts, answer them, check the answers, until enough groups can teach something.

Groups wait in a queue, oldest first, and an iteration learns from the first Q. Plainly, one draw of Q prompts is queued and
learned from at once. Dynamic sampling queues only groups with both right and wrong answers and draws until Q are there;
what is left over waits for the next iteration. With a staleness of S the queue is kept S iterations longer than that.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dgpo_jax import hosts
from dgpo_jax.build import Parts, local_actor
from dgpo_jax.config import Config
from dgpo_jax.learning import in_baseline, sampled_gap, score_responses
from dgpo_jax.memory import choose_slots
from dgpo_jax.metrics import MetricsWriter
from dgpo_jax.rewarding import Rewards, count_statuses, reward_metrics, to_samples
from dgpo_jax.rewarding import join as join_rewards
from dgpo_jax.rewards.checkers import Checkers
from dgpo_jax.rl.advantages import alike
from dgpo_jax.rl.drawing import TRAINING, Draw
from dgpo_jax.rl.experience import by_group, group_count, join, newest, no_groups, select
from dgpo_jax.rl.kl import kl_estimate
from dgpo_jax.rl.update import Programs, StepFigures, Totals
from dgpo_jax.rollout import Responses, build_sampling, make_rollout, to_rows
from dgpo_jax.rollout import join as join_responses
from dgpo_jax.session import Stopwatch
from dgpo_jax.speed import rollout_work
from dgpo_jax.stopping import Stopping
from dgpo_jax.types import Experience, Problem, Verdict


class Backlog(NamedTuple):
    """What a restart must know of the data."""

    position: int  # problems of the stream drawn so far
    waiting: Experience  # sampled and not yet learned from, oldest first


class Collected(NamedTuple):
    """What an iteration learns from, and how far it has come with that."""

    experience: Experience  # Q groups
    metrics: dict[str, Any]
    results: Sequence[tuple[Totals, StepFigures]] = ()  # of the updates that are made, on the host


class Checked(NamedTuple):
    """One draw: Q problems, their responses, and what these are worth."""

    responses: Responses
    verdicts: Sequence[Verdict]  # B
    worth: Rewards
    experience: Experience
    mean_kl_charge: float = 0.0  # what a KL in the reward took off, on average

    def rows(self, number: int) -> list[dict]:
        """What is written to disk of it."""
        rows = to_rows(self.responses, self.verdicts, self.experience.rewards)
        if len(self.worth.terms) > 1:
            rows = [row | {"terms": {name: float(values[place]) for name, values in self.worth.terms.items()}} for place, row in enumerate(rows)]
        return [{"draw": number} | row for row in rows]


def nothing_drawn(config: Config) -> Backlog:
    """The backlog before the first iteration."""
    return Backlog(0, no_groups(config.rollout.max_prompt, config.rollout.max_response))


def build_rollout(config: Config, parts: Parts, stopping: Stopping | None = None):
    """`rollout.make_rollout` as the config wants it."""
    settings, actor = config.rollout, local_actor(parts)
    sampling = build_sampling(actor, settings)
    return make_rollout(actor, sampling, settings.max_prompt, choose_slots(config, parts), settings.int8_cache, stopping)


def make_collect(
    config: Config, parts: Parts, programs: Programs, rollout, decode_params, checkers: Checkers, reward, writer: MetricsWriter, reference,
    stopping: Stopping | None = None,
):  # fmt: skip
    """Returns the function (params, Backlog, iteration, Stopwatch) -> (Collected, Backlog).

    It writes the texts of the iteration. How many draws it takes depends on the answers alone, so that a run that is
    killed and goes on takes the same.

    Args:
        rollout: from `build_rollout`.
        decode_params: from `build.make_decode_params`, for the rollout.
        reward: from `rewarding.make_rewards`.
        reference: params of the weights that the run started from; read only by a KL in the reward.
        stopping: asked while answers are checked whether to go on; None = always.
    """
    settings, stopping = config.rollout, stopping or Stopping()
    wanted = settings.prompts * (1 + settings.staleness)

    def draw(params, weights, position: int, key: Draw, stopwatch: Stopwatch) -> Checked:
        tickets = {}

        def submit(row: int, problem: Problem, text: str) -> None:  # judged while other responses are decoded
            tickets[row] = checkers.submit(problem, text)

        with stopwatch("rollout"):
            responses = rollout(weights, parts.stream.take(position, settings.prompts), key, submit)
        with stopwatch("verify"):
            verdicts = checkers.gather([tickets[row] for row in sorted(tickets)], stopping.checking)
            everyone = hosts.gather((responses, verdicts, reward(responses, verdicts)))
        theirs = list(zip(*everyone, strict=True))
        responses, verdicts, worth = join_responses(theirs[0]), [verdict for some in theirs[1] for verdict in some], join_rewards(theirs[2])
        experience = to_experience(config, responses, worth, key.iteration)
        if not config.kl.in_reward:
            return Checked(responses, verdicts, worth, experience)
        with stopwatch("update"):  # forward passes like those before an update
            charge = kl_charge(config, parts, programs, params, reference, experience)
        experience = experience._replace(rewards=experience.rewards - charge)
        return Checked(responses, verdicts, worth, experience, mean_kl_charge=float(charge.mean()))

    def collect(params, backlog: Backlog, iteration: int, stopwatch: Stopwatch):
        position, waiting = backlog
        weights = decode_params(params)
        draws: list[Checked] = []
        unused = nothing_drawn(config).waiting
        cap = -(-(wanted - group_count(waiting)) // settings.prompts) * (settings.max_draws if settings.dynamic_sampling else 1)
        while group_count(waiting) < wanted and len(draws) < cap:
            key = Draw(config.seed, TRAINING, iteration, len(draws) * settings.prompts)
            draws.append(draw(params, weights, position, key, stopwatch))
            position += settings.prompts
            experience = draws[-1].experience
            teaching = np.ones(settings.prompts, bool)
            if settings.dynamic_sampling:
                teaching = ~alike(by_group(experience, experience.scores), in_baseline(config, experience))
            waiting = join(waiting, select(experience, np.flatnonzero(teaching)))
            unused = newest(join(unused, select(experience, np.flatnonzero(~teaching))), settings.prompts)
        del weights  # the copy for decoding would otherwise live through the updates
        gap = {}
        if config.update.old_logprobs == "sampler":  # nothing else will tell how far it is from the trainer
            with stopwatch("update"):
                gap = sampled_gap(config, parts, programs, params, experience)
        writer.write_rollouts(iteration, [row for number, checked in enumerate(draws) for row in checked.rows(number)])

        # Every update has its share of Q groups: at the cap, those without right and wrong answers fill up.
        missing = max(0, settings.prompts - group_count(waiting))
        waiting = join(waiting, newest(unused, missing))
        chosen = select(waiting, range(settings.prompts))
        backlog = Backlog(position, select(waiting, range(settings.prompts, group_count(waiting))))
        work = rollout_work(parts, [checked.experience for checked in draws])
        metrics = draw_metrics(config, draws) | work | gap | {
            "data/position": position,
            "rollout/draws": len(draws),
            "rollout/groups_filled_up": missing,
            "rollout/groups_waiting": group_count(backlog.waiting),
            "rollout/staleness": float(np.mean(iteration - chosen.iteration)),
        }
        return Collected(chosen, metrics), backlog

    return collect


def to_experience(config: Config, responses: Responses, worth: Rewards, iteration: int) -> Experience:
    """What updates need of a draw."""
    prompts, rollout = responses.prompts, responses.rollout
    known = config.update.old_logprobs == "sampler"
    old_logprobs = rollout.logprobs if known else np.full_like(rollout.logprobs, np.nan)
    stamp = np.full(len(prompts.tokens), iteration, np.int32)
    return Experience(prompts, rollout, old_logprobs, worth.scores, worth.rewards, stamp)


def kl_charge(config: Config, parts: Parts, programs: Programs, params, reference, experience: Experience) -> np.ndarray:
    """f32[B]: kl.coefficient times the distance to the reference summed over the response, for every response.

    Raises:
        ValueError: a reward would not be finite.
    """
    rows = np.arange(len(experience.rewards))
    policy = experience.rollout.logprobs
    if config.update.old_logprobs == "trainer":
        policy = score_responses(config, parts, programs, params, experience, rows)
    distance = kl_estimate(
        config.kl.estimator, policy, score_responses(config, parts, programs, reference, experience, rows)
    )
    charge = config.kl.coefficient * np.where(experience.rollout.response_mask, distance, 0).sum(axis=1)
    broken = int((~np.isfinite(charge)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(charge)} responses have a KL that is not finite, and kl.place=reward would take it off their rewards:"
            " weights that are NaN, or so large that the forward pass overflows. Go back to an older checkpoint (move the newest folder"
            " out of checkpoints/) with a lower optimizer.learning_rate; if it is the model folder, try model.dtype=float32."
        )
    return charge


def draw_metrics(config: Config, draws: Sequence[Checked]) -> dict[str, float]:
    """Figures of all that was sampled in an iteration, whether learned from or not."""

    def gives_no_advantage(experience: Experience) -> np.ndarray:
        return alike(by_group(experience, experience.rewards), in_baseline(config, experience))

    experiences = [checked.experience for checked in draws]
    length = np.concatenate([checked.responses.lengths for checked in draws])
    scores = np.concatenate([by_group(experience, experience.scores) for experience in experiences])
    rollouts = [experience.rollout for experience in experiences]
    logprobs = sum(rollout.logprobs[rollout.response_mask].sum(dtype=np.float64) for rollout in rollouts)
    figures = {
        "reward/mean": float(np.mean([experience.rewards for experience in experiences])),
        "reward/score": float(scores.mean()),
        "reward/groups_alike": float(np.mean([gives_no_advantage(experience) for experience in experiences])),
        "reward/groups_all_right": float((scores == 1).all(axis=1).mean()),
        "reward/groups_all_wrong": float((scores == 0).all(axis=1).mean()),
        "rollout/responses": float(len(length)),
        "rollout/response_length": float(length.mean()),
        "rollout/response_length_max": float(length.max()),
        "rollout/prompt_length": float(np.mean([experience.prompts.mask.sum(axis=1) for experience in experiences])),
        "rollout/truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        "rollout/tokens": float(length.sum()),
        "rollout/slots_live": float(length.sum() / sum(checked.responses.row_steps for checked in draws)),
        # Of all responses, in nats per token; policy/entropy is of those learned from.
        "rollout/entropy": float(-logprobs / length.sum()),
    }
    if config.kl.in_reward:
        figures["reward/kl"] = float(np.mean([checked.mean_kl_charge for checked in draws]))
    parts = [checked.worth for checked in draws]
    terms = {name: np.concatenate([worth.terms[name] for worth in parts]) for name in parts[0].terms}
    samples = [sample for checked in draws for sample in to_samples(checked.responses, checked.verdicts)]
    figures |= reward_metrics(config, terms, samples)
    return figures | count_statuses([verdict for checked in draws for verdict in checked.verdicts])
