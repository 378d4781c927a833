"""Which groups an iteration learns from and what their responses are worth: scripted answers, numbers by hand."""

import numpy as np
import pytest
from scripted import SAMPLER_LOGPROB, Notebook, R, ScriptedPool, ScriptedRollout, config_for, make_parts, unigram

from dgpo_jax.build import build_programs
from dgpo_jax.collecting import Backlog, make_collect, nothing_drawn
from dgpo_jax.learning import compute_advantages
from dgpo_jax.rewarding import make_rewards
from dgpo_jax.rl.experience import by_group, from_arrays, to_arrays
from dgpo_jax.session import Stopwatch

DYNAMIC = {"rollout.dynamic_sampling": True}


@pytest.fixture
def rollout():
    return ScriptedRollout()


@pytest.fixture
def collect(rollout):
    """The function (scripts, settings, iterations) -> per iteration (Experience, Backlog, metrics).

    Two groups of two an iteration. "r" is a right answer of one token, "w" a wrong one of two, capitals are cut off.
    """

    def collect(scripts, settings, iterations=1, backlog=None, first=1, notebook=None, pool=None):
        config = config_for({"rollout.prompts": 2} | settings)
        once = make_collect(
            config, make_parts(scripts.split()), None, rollout, lambda params: f"decode {params}", pool or ScriptedPool(),
            make_rewards(config), notebook or Notebook(), None,
        )  # fmt: skip
        results, backlog = [], backlog or nothing_drawn(config)
        for iteration in range(first, first + iterations):
            collected, backlog = once(f"weights {iteration}", backlog, iteration, Stopwatch(lambda part: None))
            results.append((collected.experience, backlog, collected.metrics))
        return results

    return collect


def places(experience):
    """Which problems of the stream these groups answer."""
    return experience.prompts.tokens[:, 0].tolist()


def learned(results):
    return [places(experience) for experience, _, _ in results]


def counters(results, *names):
    return [tuple(metrics[name] for name in names) for _, _, metrics in results]


DRAWS = ("rollout/draws", "rollout/groups_filled_up", "rollout/groups_waiting", "data/position", "rollout/responses")


def test_plainly_one_draw_is_learned_from_at_once_whatever_its_answers(collect, rollout):
    results = collect("rr ww rw wr", {}, iterations=2)
    assert learned(results) == [[0, 1], [2, 3]]
    assert counters(results, *DRAWS) == [(1, 0, 0, 2, 4), (1, 0, 0, 4, 4)]
    assert counters(results, "rollout/staleness") == [(0.0,), (0.0,)]
    assert [weights for weights, _, _ in rollout.calls] == ["decode weights 1", "decode weights 2"]


def test_dynamic_sampling_keeps_groups_with_right_and_wrong_answers_and_learns_from_the_oldest_first(collect):
    # Draws of two: [0 1] has one such group, [2 3] none, [4 5] two. The surplus 5 is the first of the next iteration,
    # which needs one draw more, [6 7], and then has 7 left over.
    results = collect("rr wr  ww rr  rw wr  rw wr", DYNAMIC, iterations=2)
    assert learned(results) == [[1, 4], [5, 6]]
    assert [places(backlog.waiting) for _, backlog, _ in results] == [[5], [7]]
    assert counters(results, *DRAWS) == [(3, 0, 1, 6, 12), (1, 0, 1, 8, 4)]
    assert [experience.iteration.tolist() for experience, _, _ in results] == [[1, 1], [1, 2]]
    assert counters(results, "rollout/staleness") == [(0.0,), (0.5,)]


def test_the_advantages_are_those_of_the_groups_kept(collect):
    ((experience, _, _),) = collect("rr wr  ww rr  rw wr", DYNAMIC | {"loss.advantage": "dr_grpo"})
    config = config_for({"rollout.prompts": 2, "loss.advantage": "dr_grpo"})
    np.testing.assert_array_equal(compute_advantages(config, experience), [[-0.5, 0.5], [0.5, -0.5]])  # wr, rw


def test_when_the_draws_run_out_groups_without_advantage_fill_up_behind_those_that_have_one(collect):
    results = collect("rr ww  ww wr  ww rr", DYNAMIC | {"rollout.max_draws": 3})
    ((experience, backlog, _),) = results
    # One group teaches; of the others the newest, which today's weights sampled like all the rest.
    assert learned(results) == [[3, 5]]
    assert counters(results, *DRAWS) == [(3, 1, 0, 6, 12)]
    assert places(backlog.waiting) == []
    advantages = compute_advantages(config_for({"rollout.prompts": 2}), experience)
    assert advantages[0].all() and not advantages[1].any()


def test_when_no_group_teaches_there_are_still_as_many_as_always(collect):
    results = collect("rr ww  ww rr", DYNAMIC | {"rollout.max_draws": 2})
    assert learned(results) == [[2, 3]]
    assert counters(results, *DRAWS) == [(2, 2, 0, 4, 8)]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_iteration_draws_at_least_once_for_fewer_groups_wait_than_are_wanted(collect, staleness):
    random = np.random.default_rng(staleness)
    scripts = " ".join(random.choice(["rr", "ww", "rw"], 60))
    for _, _, metrics in collect(scripts, DYNAMIC | {"rollout.staleness": staleness}, iterations=6):
        assert metrics["rollout/draws"] > 0 and metrics["rollout/groups_filled_up"] == 0
        assert staleness * 2 <= metrics["rollout/groups_waiting"] < (1 + staleness) * 2


def test_with_staleness_2_iteration_k_learns_from_what_iteration_k_minus_2_sampled(collect, rollout):
    results = collect(" ".join(["rr"] * 14), {"rollout.staleness": 2}, iterations=5)
    assert [experience.iteration.tolist() for experience, _, _ in results] == [[1, 1], [1, 1], [1, 1], [2, 2], [3, 3]]
    assert learned(results) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert counters(results, *DRAWS) == [(3, 0, 4, 6, 12), *[(1, 0, 4, 4 + 2 * k, 4) for k in range(2, 6)]]
    assert counters(results, "rollout/staleness") == [(0.0,), (1.0,), (2.0,), (2.0,), (2.0,)]
    # Today's weights sample what a later iteration learns from.
    assert [weights[-1] for weights, _, _ in rollout.calls] == ["1", "1", "1", "2", "3", "4", "5"]


def test_dynamic_sampling_with_staleness_fills_the_queue_with_groups_that_teach(collect):
    # Four are wanted: at first of [0 1] [2 3] [4 5], and beside the two that wait of [6 7] [8 9].
    results = collect("rr wr  rw wr  wr ww  rr rw  wr rr", DYNAMIC | {"rollout.staleness": 1}, iterations=2)
    assert learned(results) == [[1, 2], [3, 4]]
    assert [places(backlog.waiting) for _, backlog, _ in results] == [[3, 4], [7, 8]]
    assert counters(results, *DRAWS) == [(3, 0, 2, 6, 12), (2, 0, 2, 10, 8)]


def test_the_cap_is_on_draws_for_as_many_groups_as_an_iteration_learns_from(collect):
    # Four are wanted and none waits: two draws, each of which might have brought two. The first two bring enough to learn
    # from, and nothing that waits; the next two bring one, and the newest of the others fills up.
    settings = DYNAMIC | {"rollout.staleness": 1, "rollout.max_draws": 1}
    results = collect("rw rr  wr rr  ww rw  rr rr", settings, iterations=2)
    assert learned(results) == [[0, 2], [5, 7]]
    assert counters(results, *DRAWS) == [(2, 0, 0, 4, 8), (2, 1, 0, 8, 8)]


@pytest.mark.parametrize("settings", [{}, DYNAMIC, {"rollout.staleness": 2}], ids=["plain", "dynamic", "stale"])
def test_every_problem_of_the_stream_is_drawn_once_and_in_order(collect, rollout, settings):
    results = collect("rr wr ww rr rw wr rw wr rr ww wr rr rw wr wr rw", settings, iterations=3)
    drawn = [place for _, places, _ in rollout.calls for place in places]
    assert drawn == list(range(results[-1][2]["data/position"]))


def test_no_two_draws_share_their_random_numbers(collect, rollout):
    collect("rr ww  rr ww  rr wr  rw ww  wr rw", DYNAMIC, iterations=2)
    draws = [draw for _, _, draw in rollout.calls]
    assert [(draw.iteration, draw.first_prompt) for draw in draws] == [(1, 0), (1, 2), (1, 4), (1, 6), (2, 0)]
    assert {(draw.seed, draw.stream) for draw in draws} == {(0, 0)}


def test_collecting_goes_on_from_a_backlog_that_was_on_disk(collect, rollout):
    scripts = "rr wr  ww rr  rw wr  rr rr  rw wr  rw ww"
    whole = collect(scripts, DYNAMIC, iterations=3)
    rollout.calls.clear()
    position, waiting = whole[1][1]
    backlog = Backlog(position, from_arrays(to_arrays(waiting)))
    (again,) = collect(scripts, DYNAMIC, backlog=backlog, first=3)
    np.testing.assert_equal(again, whole[2])


def test_under_drop_a_group_teaches_by_what_was_not_cut_off(collect):
    # Wr: the only wrong answer was cut off. wR: the only right one was. Rr, ww: alike whatever is cut off.
    scripts = "Wr wR  Rr ww  wr rw"
    assert learned(collect(scripts, DYNAMIC | {"reward.truncated": "drop"})) == [[4, 5]]
    assert learned(collect(scripts, DYNAMIC | {"reward.truncated": "mask"})) == [[0, 1]]
    assert learned(collect(scripts, DYNAMIC)) == [[0, 1]]


def test_all_that_was_sampled_is_written_and_measured_whether_learned_from_or_not(collect):
    notebook = Notebook()
    ((_, _, metrics),) = collect("rr WW  rw wr", DYNAMIC, notebook=notebook)
    rows = notebook.rows[1]
    assert [row["draw"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["response"] for row in rows] == list("rrWWrwwr")
    assert [row["reward"] for row in rows] == [1, 1, 0, 0, 1, 0, 0, 1]
    expected = {
        "reward/mean": 4 / 8, "reward/groups_all_right": 1 / 4, "reward/groups_all_wrong": 1 / 4, "rollout/responses": 8,
        "rollout/truncated": 2 / 8, "rollout/tokens": 4 * 1 + 2 * 2 + 2 * 4, "rollout/response_length": 2.0,
        "rollout/response_length_max": 4, "rollout/entropy": 9.0, "verdict/correct": 1 / 2, "verdict/wrong": 1 / 2,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == expected
    assert all(np.isfinite(value) for value in metrics.values())


# --- what a response is worth ---


def advantages_of(experience, settings=None):
    """R - mean of the group: what one reward is worth against another, by hand."""
    return compute_advantages(config_for({"rollout.prompts": 2, "loss.advantage": "dr_grpo"} | (settings or {})), experience)


def test_the_overlong_penalty_grows_over_the_buffer_and_separates_answers_that_are_alike(collect):
    # 4 slots, a buffer of 2: 1 and 2 tokens cost nothing, 4 tokens the whole penalty.
    settings = {"reward.overlong_buffer": 2, "reward.overlong_penalty": 0.5}
    notebook = Notebook()
    ((experience, _, metrics),) = collect("rR wW", settings, notebook=notebook)
    np.testing.assert_array_equal(by_group(experience, experience.rewards), [[1.0, 0.5], [0.0, -0.5]])
    np.testing.assert_array_equal(advantages_of(experience), [[0.25, -0.25]] * 2)
    assert [row["reward"] for row in notebook.rows[1]] == [1.0, 0.5, 0.0, -0.5]
    assert metrics["reward/overlong"] == -0.25 and metrics["reward/mean"] == 0.25


def test_what_was_cut_off_is_compared_with_unless_dropped(collect):
    ((experience, _, _),) = collect("rW rw", {})
    for truncated in ("keep", "mask"):
        np.testing.assert_array_equal(advantages_of(experience, {"reward.truncated": truncated}), [[0.5, -0.5]] * 2)
    # r is then alone in its group.
    np.testing.assert_array_equal(advantages_of(experience, {"reward.truncated": "drop"}), [[0, 0], [0.5, -0.5]])


TAGS = {"reward.incorrect": -1.0, "reward.no_think_end": -0.5, "reward.no_think_start": -2.0}


@pytest.mark.parametrize("opening, text, expected", [
    ("", "<think> a </think> r", 1.0),
    ("", "<think> a </think> w", -1.0),
    ("<think>", "a </think> r", 1.0),  # the prompt opened it
    ("<think>", "a </think> w", -1.0),
    ("", "a </think> r", -2.0),  # nobody did, and no right answer makes up for it
    ("<think>", "a r", -0.5),  # nor was it closed
    ("", "a w", -0.5),  # the end is looked at first
])  # fmt: skip
def test_a_response_that_did_not_think_in_tags_gets_the_reward_of_that(collect, rollout, opening, text, expected):
    rollout.opening, rollout.texts = opening, {"r": text, "w": "<think> a </think> w"}
    pool = ScriptedPool()
    ((experience, _, metrics),) = collect("rw wr", TAGS, pool=pool)
    assert pool.asked[0] == opening + text  # the checker needs to see where the thinking began
    np.testing.assert_array_equal(by_group(experience, experience.rewards), [[expected, -1.0], [-1.0, expected]])
    half = (expected + 1) / 2
    np.testing.assert_array_equal(advantages_of(experience), [[half, -half], [-half, half]])
    assert metrics["reward/no_think"] == (0.5 if expected in (-0.5, -2.0) else 0.0)
    # Worth no more than a wrong answer, so none to be learned by heart.
    assert experience.scores.tolist() == [expected == 1, False, False, expected == 1]


def test_a_right_answer_without_its_tags_makes_no_group_that_teaches(collect, rollout):
    rollout.texts = {"r": "a r", "R": "<think> a </think> r", "w": "<think> a </think> w"}
    results = collect("rw wr  wR Rr", DYNAMIC | TAGS)
    assert learned(results) == [[2, 3]]


def test_answers_alone_decide_where_no_form_is_asked_for(collect):
    ((experience, _, metrics),) = collect("rw wr", {"reward.incorrect": -1.0})
    np.testing.assert_array_equal(experience.rewards, [1, -1, -1, 1])
    assert not {"reward/no_think", "reward/overlong"} & metrics.keys()


# Per token of a reference that gives every token 1/4, and of a policy with probabilities 0.1, 0.2, 0.3, 0.4.
RIGHT, WRONG = 0.2, 0.3  # "r" says token 1 once, "w" says token 2 twice
CHARGES = {
    "k1": lambda p: np.log(p / 0.25),
    "k2": lambda p: np.log(p / 0.25) ** 2 / 2,
    "k3": lambda p: 0.25 / p - np.log(0.25 / p) - 1,
}


def collect_charged(settings, scripts="rw wr"):
    """(Experience, metrics, rows written) of an iteration that charges for the distance to the reference."""
    config = config_for({"rollout.prompts": 2, "kl.coefficient": 0.5, "kl.place": "reward", "loss.advantage": "dr_grpo"} | settings)
    parts, notebook, pool = make_parts(scripts.split()), Notebook(), ScriptedPool()
    reference, programs = unigram([0.25] * 4), build_programs(config, parts)
    collect = make_collect(config, parts, programs, ScriptedRollout(), lambda params: params, pool, make_rewards(config), notebook, reference)
    (experience, metrics, _), _ = collect(unigram(), nothing_drawn(config), 1, Stopwatch(lambda part: None))
    return experience, metrics, notebook.rows[1]


@pytest.mark.parametrize("estimator", CHARGES)
def test_a_kl_in_the_reward_takes_a_responses_sum_off_its_reward(rollout, estimator):
    experience, metrics, rows = collect_charged({"kl.estimator": estimator})
    right, wrong = 1 - 0.5 * CHARGES[estimator](RIGHT), 0 - 0.5 * 2 * CHARGES[estimator](WRONG)
    np.testing.assert_allclose(experience.rewards, [right, wrong, wrong, right], rtol=1e-5)
    half = (right - wrong) / 2
    np.testing.assert_allclose(advantages_of(experience), [[half, -half], [-half, half]], rtol=1e-5)
    np.testing.assert_allclose([row["reward"] for row in rows], experience.rewards)
    np.testing.assert_allclose(metrics["reward/mean"], (right + wrong) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/kl"], (1 - right - wrong) / 2, rtol=1e-5)
    assert experience.scores.tolist() == [True, False, False, True]


def test_the_kl_in_the_reward_is_of_the_trainers_policy_or_of_the_samplers_as_old_logprobs_are(rollout):
    # The sampler said e^-9 for every token.
    experience, metrics, _ = collect_charged({"kl.estimator": "k1", "update.old_logprobs": "sampler"})
    assert metrics["gap/max"] == pytest.approx(np.log(WRONG) - SAMPLER_LOGPROB, rel=1e-5)
    gap = SAMPLER_LOGPROB - np.log(0.25)
    right, wrong = 1 - 0.5 * gap, 0 - 0.5 * 2 * gap
    np.testing.assert_allclose(experience.rewards, [right, wrong, wrong, right], rtol=1e-5)


def test_the_kl_in_the_reward_does_not_decide_which_groups_teach(rollout):
    experience, metrics, _ = collect_charged(DYNAMIC, "rr wr ww rw")
    assert places(experience) == [1, 3] and metrics["rollout/draws"] == 2


# --- while others are sampled ---


def test_each_response_goes_to_the_checker_as_it_ends_and_its_verdict_to_its_own_row(collect, rollout):
    # The scripted rollout ends short texts first; a verdict in the order of ending would be another row's.
    rollout.texts = {"r": "a long text that is r", "w": "w"}
    pool = ScriptedPool()
    (experience, _, metrics), *_ = collect("rw wr rr wr", {"rollout.prompts": 4}, pool=pool)
    assert [text[-1] for text in pool.asked] == list("wwwrrrrr")
    np.testing.assert_array_equal(experience.rewards, [1, 0, 0, 1, 1, 1, 0, 1])
    assert metrics["rollout/slots_live"] == metrics["rollout/tokens"] / (2 * 8 * R)
