"""Recipes through the whole program: every method by its word, runs that were interrupted, the reference's life.

Runs of a few updates from one warm start, on one device.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import change

from dgpo_jax import build, train
from dgpo_jax.build import abstract_state, build_parts, build_state
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import flatten, load
from dgpo_jax.metrics import read_metrics
from dgpo_jax.recipe import resolve
from dgpo_jax.restart import without_prefix
from dgpo_jax.rewards.checkers import Checkers, CodeSettings, MathSettings
from dgpo_jax.rl.experience import by_group, from_arrays, group_count
from dgpo_jax.rl.losses import METHODS
from dgpo_jax.sharding import make_mesh, to_host
from dgpo_jax.types import Experience

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'tests/tiny_config.py'}"
SMALL = [
    "--config.model.layers=1", "--config.data.held-out=", "--config.iterations=2", "--config.checkpoint.every=1",
    "--config.checkpoint.keep=9",
]  # fmt: skip
RUN_DEADLINE_S = 600


class Run(NamedTuple):
    """A run of `train` and what was seen of it from outside."""

    workdir: Path
    rows: list[dict]  # metrics of iterations 1..
    learned: dict[int, tuple[Experience, np.ndarray]]  # what each iteration of this start learned from
    reference: object  # what find_reference gave, as it is after the run


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """One device, and one checker for all runs: starting one takes longer than a run. No curves are drawn."""
    with pytest.MonkeyPatch.context() as patch, Checkers(MathSettings(extract="last", workers=1), CodeSettings(), {"math"}) as checkers:
        patch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        patch.setattr(train, "build_checkers", lambda config, problems: contextlib.nullcontext(checkers))
        patch.setattr(train, "plot_curves", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def warm(surroundings, tmp_path_factory):
    """A workdir in which only the warm start is done; some answers are right."""
    workdir = tmp_path_factory.mktemp("warm")
    train.train(change(load([TINY, *SMALL]), {"iterations": 0}), workdir)
    return workdir


@pytest.fixture
def run(warm, tmp_path, monkeypatch):
    """The function (arguments, workdir=new) -> Run."""

    def run(arguments, workdir=None):
        return run_from(warm, arguments, workdir or tmp_path / "run", monkeypatch)

    return run


def run_from(warm, arguments, workdir, monkeypatch):
    """Trains in `workdir`, from the warm start if it is new."""
    config, learned, references = load([TINY, *SMALL, *arguments]), {}, []
    learn, find_reference = train.learn, train.find_reference

    def noting_learn(config, parts, programs, state, experience, advantages, iteration, *rest, **more):
        learned[iteration] = experience, advantages
        return learn(config, parts, programs, state, experience, advantages, iteration, *rest, **more)

    def noting_reference(*arguments):
        references.append(find_reference(*arguments))
        return references[-1]

    if not workdir.exists():
        shutil.copytree(warm / "sft", workdir / "sft")
    with monkeypatch.context() as patch:
        patch.setattr(train, "learn", noting_learn)
        patch.setattr(train, "find_reference", noting_reference)
        train.train(config, workdir)
    return Run(workdir, read_metrics(workdir / "metrics.jsonl")[1:], learned, to_host(references[-1]))


@functools.cache
def parts_of(*arguments):
    """Parts, once the mesh is of one device."""
    return build_parts(resolve(load([TINY, *SMALL, *arguments])))


def state_at(workdir, iteration, tmp_path):
    """The state that a checkpoint holds, by itself."""
    name = f"iteration_{iteration:06d}"
    folder = tmp_path / f"{workdir.name} alone {name}"
    shutil.copytree(workdir / "checkpoints" / name, folder / name)
    with Checkpoints(folder) as checkpoints:
        return to_host(checkpoints.restore(abstract_state(parts_of())).state)


def recorded(workdir):
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key.split("/")[0] not in ("time", "speed", "memory")}
        for line in lines
    ]


# --- every method by its word ---

# As published, by hand; what a method does not name is as in PLAIN.
PLAIN = dict.fromkeys(["clip_low", "clip_high", "n", "m", "beta1", "beta2", "tau_pos", "tau_neg", "soft_clip", "dual_clip"]) | {
    "aggregation": "token-mean", "aggregation_scale": None, "advantage": "grpo", "dynamic_sampling": False, "overlong_buffer": 0,
    "incorrect": 0.0,
}  # fmt: skip
PUBLISHED = {
    "dgpo": {"clip_low": 0.2, "clip_high": 0.28, "n": 1.0, "m": 2.0},
    "gppo": {"clip_low": 0.2, "clip_high": 0.28},
    "ce_gppo": {"clip_low": 0.2, "clip_high": 0.2, "beta1": 0.75, "beta2": 1.0},
    "cispo": {"clip_low": 0.2, "clip_high": 0.28},
    "cispo_one_sided": {"clip_low": 1.0, "clip_high": 0.2},
    "aspo": {"clip_low": 0.2, "clip_high": 0.2, "soft_clip": 3.0},
    "grpo": {"clip_low": 0.2, "clip_high": 0.2},
    "dr_grpo": {
        "clip_low": 0.2, "clip_high": 0.2, "aggregation": "seq-mean-token-sum-norm", "aggregation_scale": 12,
        "advantage": "dr_grpo",
    },
    "dapo": {
        "clip_low": 0.2, "clip_high": 0.28, "dynamic_sampling": True, "overlong_buffer": 2, "incorrect": -1.0,
    },  # the buffer of 12 tokens
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean"},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05, "aggregation": "seq-mean-token-mean"},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4, "aggregation": "seq-mean-token-mean"},
    "reinforce": {},
}


@pytest.fixture(scope="module")
def run_of(warm, tmp_path_factory):
    """The function method -> Run of two iterations, one for all tests of a method."""

    @functools.cache
    def run_of(method):
        with pytest.MonkeyPatch.context() as monkeypatch:
            workdir = tmp_path_factory.mktemp("methods") / method
            return run_from(warm, [f"--config.loss.method={method}"], workdir, monkeypatch)

    return run_of


@functools.cache
def final_params(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return to_host(checkpoints.restore(abstract_state(parts_of())).state.params)


def test_the_table_of_published_settings_has_every_method():
    assert PUBLISHED.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_by_its_word_alone(method, run_of, tmp_path):
    run = run_of(method)
    assert [row["iteration"] for row in run.rows] == [1, 2]
    for row in run.rows:
        assert all(np.isfinite(value).all() for value in row.values())
        assert row["policy/tokens"] > 0 and row["optim/grad_norm"] > 0 and row["optim/skipped"] == 0
        # It is of fresh groups only: dapo's second iteration begins with one that waited.
        assert row.get("policy/first_ratio_error", 0.0 if method == "dapo" else None) < 1e-6
    changed = jax.tree.map(np.array_equal, final_params(run.workdir), state_at(run.workdir, 0, tmp_path).params)
    assert not any(jax.tree.leaves(changed))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_methods_word_stands_for_is_in_config_json(method, run_of):
    settings = flatten(json.loads((run_of(method).workdir / "config.json").read_text()))
    found = {name: next(value for key, value in settings.items() if key.endswith(f".{name}") and "optimizer" not in key) for name in PLAIN}
    assert found == PLAIN | PUBLISHED[method]


def test_no_two_methods_end_at_the_same_weights(run_of):
    ends = {method: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(final_params(run_of(method).workdir))]) for method in METHODS}
    same = [(one, other) for one in ends for other in ends if one < other and (ends[one] == ends[other]).all()]
    assert same == []


def test_dapo_draws_until_every_group_has_right_and_wrong_answers(run_of):
    run = run_of("dapo")
    for row in run.rows:
        experience, advantages = run.learned[row["iteration"]]
        correct = by_group(experience, experience.scores == 1)
        assert group_count(experience) == 8 and row["rollout/groups_filled_up"] == 0
        assert (correct.any(axis=1) & ~correct.all(axis=1)).all() and advantages.any(axis=1).all()
        assert row["rollout/responses"] == 32 * row["rollout/draws"]
    assert run.rows[0]["rollout/draws"] > 1 and run.rows[0]["reward/groups_all_wrong"] > 0
    # Another method learns from what comes.
    assert [row["rollout/draws"] for row in run_of("dgpo").rows] == [1, 1]
    experience, _ = run_of("dgpo").learned[1]
    assert not by_group(experience, experience.scores == 1).any(axis=1).all()


def test_dapo_penalises_responses_that_come_close_to_the_longest(run_of):
    paths = sorted((run_of("dapo").workdir / "rollouts").iterdir())
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    penalties = [min(10 - row["tokens"], 0) / 2 for row in rows]  # over the last 2 of 12 tokens
    answers = [1 if row["verdict"] == "correct" else -1 for row in rows]
    assert [row["reward"] for row in rows] == [answer + less for answer, less in zip(answers, penalties, strict=True)]
    assert min(penalties) < 0  # there was such a response


@pytest.mark.parametrize("method, divided", [("dr_grpo", False), ("grpo", True)])
def test_dr_grpo_does_not_divide_by_the_groups_deviation(method, divided, run_of):
    experience, advantages = run_of(method).learned[1]
    rewards = by_group(experience, experience.rewards).astype(np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    deviation = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6
    np.testing.assert_allclose(advantages, centred / deviation if divided else centred, rtol=1e-5, atol=1e-7)


# --- interrupted runs ---

RECIPES = {
    "dynamic sampling, stale, supervised, KL in the loss": [
        "--config.loss.method=dapo", "--config.rollout.staleness=1", "--config.loss.supervised=0.1",
        "--config.kl.coefficient=0.05",
    ],
    "two iterations stale, cut off dropped, KL in the reward, entropy": [
        "--config.rollout.staleness=2", "--config.rollout.max-response=9", "--config.reward.truncated=drop",
        "--config.kl.coefficient=0.05", "--config.kl.place=reward", "--config.kl.estimator=k1", "--config.loss.entropy=0.01",
    ],
}  # fmt: skip
DYNAMIC, STALE = RECIPES
FOUR = "--config.iterations=4"


@pytest.fixture(scope="module")
def whole_run_of(warm, tmp_path_factory):
    """The function recipe -> Run of four iterations that nothing happened to."""

    @functools.cache
    def whole_run_of(recipe):
        with pytest.MonkeyPatch.context() as monkeypatch:
            return run_from(warm, [*RECIPES[recipe], FOUR], tmp_path_factory.mktemp("whole") / "run", monkeypatch)

    return whole_run_of


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture
def whole(recipe, whole_run_of):
    return whole_run_of(recipe)


def waiting_at(workdir, iteration):
    """The groups that the checkpoint of this iteration keeps for later."""
    with np.load(workdir / f"checkpoints/iteration_{iteration:06d}/host.npz") as arrays:
        return from_arrays(without_prefix("waiting", arrays))


def test_the_recipes_reach_what_they_are_tested_for(whole_run_of):
    dynamic, stale = whole_run_of(DYNAMIC).rows, whole_run_of(STALE).rows
    assert sum(row["rollout/draws"] for row in dynamic) > 5 and any(row["reward/groups_all_wrong"] for row in dynamic)
    assert all(row["policy/supervised"] > 0 for row in dynamic) and dynamic[-1]["policy/kl_ref"] > dynamic[0]["policy/kl_ref"] > 0
    assert [row["rollout/draws"] for row in stale] == [3, 1, 1, 1]
    assert [row["rollout/staleness"] for row in stale] == [0, 1, 2, 2]
    cut_off = [experience.rollout.truncated for experience, _ in whole_run_of(STALE).learned.values()]
    assert 0 < np.mean(cut_off) < 1
    charged = [experience.rewards[experience.iteration.repeat(4) > 1] for experience, _ in whole_run_of(STALE).learned.values()]
    assert len(np.unique(np.concatenate(charged))) > 2  # more than right and wrong


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(recipe, whole, run):
    cut = run(RECIPES[recipe])  # two iterations, and then four: the same run goes on
    waiting = waiting_at(cut.workdir, 2)
    assert group_count(waiting) == cut.rows[-1]["rollout/groups_waiting"] > 0
    resumed = run([*RECIPES[recipe], FOUR], cut.workdir)
    assert resumed.learned.keys() == {3, 4}
    assert_same_end(resumed, whole)
    # The third iteration learned from what had waited in the checkpoint first.
    experience, _ = resumed.learned[3]
    groups = min(8, group_count(waiting))
    np.testing.assert_array_equal(experience.prompts.tokens[:groups], waiting.prompts.tokens[:groups])
    np.testing.assert_array_equal(experience.iteration[:groups], waiting.iteration[:groups])
    for iteration in (3, 4):
        np.testing.assert_equal(resumed.learned[iteration], whole.learned[iteration])


def assert_same_end(run, whole):
    """Metrics, responses, groups still waiting and the state, to the bit."""
    assert recorded(run.workdir) == recorded(whole.workdir)
    assert [row["iteration"] for row in run.rows] == [1, 2, 3, 4]
    for path in sorted((whole.workdir / "rollouts").iterdir()):
        assert (run.workdir / "rollouts" / path.name).read_bytes() == path.read_bytes()
    np.testing.assert_equal(waiting_at(run.workdir, 4), waiting_at(whole.workdir, 4))
    states = []
    for workdir in (run.workdir, whole.workdir):
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            restored = checkpoints.restore(abstract_state(parts_of()))
        assert restored.iteration == 4
        states.append(to_host(restored.state))
    np.testing.assert_equal(states[0], states[1])


def test_a_run_killed_while_groups_wait_ends_as_if_it_had_not_been(whole_run_of, run, warm, tmp_path):
    workdir = tmp_path / "killed"
    shutil.copytree(warm / "sft", workdir / "sft")
    environment = os.environ | {"XLA_FLAGS": ""}  # one device
    # All of iteration 3 but its checkpoint: its responses and metrics are behind the weights and groups of iteration 2.
    die_at = [str(ROOT / "tests/die_at.py"), "*/checkpoints/iteration_000003/details.json"]
    arguments = [sys.executable, *die_at, "dgpo_jax.train", TINY, *SMALL, *RECIPES[DYNAMIC], FOUR, f"--workdir={workdir}"]
    process = subprocess.run(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_DEADLINE_S
    )
    assert process.returncode == -signal.SIGKILL, process.stdout
    assert len(read_metrics(workdir / "metrics.jsonl")) == 1 + 3
    assert group_count(waiting_at(workdir, 2)) > 0
    resumed = run([*RECIPES[DYNAMIC], FOUR], workdir)
    assert resumed.learned.keys() == {3, 4}
    assert_same_end(resumed, whole_run_of(DYNAMIC))


# --- log-probabilities of groups that wait ---


def score_by_hand(params, experience):
    """f32[B, R]: each response behind its prompt in a row of its own, all logits at once."""
    model, size = parts_of().model, len(experience.rewards) // group_count(experience)
    prompts, masks = (np.repeat(array, size, axis=0) for array in experience.prompts)
    tokens = np.concatenate([prompts, experience.rollout.response], axis=1)
    mask = np.concatenate([masks, experience.rollout.response_mask], axis=1)
    position = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

    @jax.jit
    def logprobs(params, tokens, segment, position):
        hidden = model.hidden(params, tokens, segment, position)
        return jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, model.unembedding(params)), axis=-1)

    all_tokens = np.asarray(logprobs(params, tokens, mask.astype(np.int32), position))
    first = prompts.shape[1]
    return np.take_along_axis(all_tokens[:, first - 1 : -1], tokens[:, first:, None], axis=2)[..., 0]


def test_waiting_groups_have_the_log_probabilities_of_the_weights_that_sampled_them(recipe, whole, tmp_path):
    waiting = waiting_at(whole.workdir, 4)
    size, known = len(waiting.rewards) // group_count(waiting), ~np.isnan(waiting.old_logprobs[:, 0])
    assert known.any()
    mask = waiting.rollout.response_mask
    for sampled in np.unique(waiting.iteration):
        rows = np.repeat(waiting.iteration == sampled, size) & known
        # Checkpoint k - 1 holds the weights that iteration k samples with.
        then, now = (state_at(whole.workdir, iteration, tmp_path / str(sampled)).params for iteration in (sampled - 1, 4))
        counted = rows[:, None] & mask
        np.testing.assert_allclose(waiting.old_logprobs[counted], score_by_hand(then, waiting)[counted], atol=1e-4)
        assert np.abs(waiting.old_logprobs - score_by_hand(now, waiting))[counted].max() > 0.01


def test_what_was_learned_from_late_came_with_its_log_probabilities_and_what_is_fresh_without(whole):
    seen = set()
    for iteration, (experience, advantages) in whole.learned.items():
        computed = (advantages != 0) & ~by_group(experience, experience.rollout.truncated)
        known = ~np.isnan(by_group(experience, experience.old_logprobs[:, 0]))
        stale = experience.iteration < iteration
        assert known[stale][computed[stale]].all() and not known[~stale].any()
        seen |= set(stale.tolist())
    assert seen == {True, False}


def test_a_run_with_the_samplers_log_probabilities_scores_one_microbatch_an_iteration(run, monkeypatch):
    scored = []

    def watched(config, parts):
        programs = build.build_programs(config, parts)

        class Watched:
            lower = programs.score.lower  # it is compiled ahead

            def __call__(self, *arguments):
                scored.append(1)
                return programs.score(*arguments)

        return programs._replace(score=Watched())

    monkeypatch.setattr(train, "build_programs", watched)
    rows = run([*RECIPES[DYNAMIC][:3], "--config.update.old-logprobs=sampler"]).rows
    assert len(rows) == len(scored) == 2
    assert all(row["policy/ratio_max"] > 1 and 0 < row["gap/mean"] <= row["gap/max"] < 1e-4 for row in rows)


# --- the reference ---


def test_without_a_kl_there_is_no_reference(run_of, monkeypatch, tmp_path):
    assert run_of("dgpo").reference is None
    monkeypatch.setattr(train, "build_reference", None)
    config = resolve(load([TINY, *SMALL]))
    assert train.find_reference(config, parts_of(), tmp_path) is None


def test_the_reference_stays_the_weights_that_the_run_started_from(recipe, whole, run, tmp_path):
    start = state_at(whole.workdir, 0, tmp_path).params
    np.testing.assert_equal(whole.reference, start)
    shutil.copytree(whole.workdir, tmp_path / "longer")
    resumed = run([*RECIPES[recipe], "--config.iterations=5"], tmp_path / "longer")
    np.testing.assert_equal(resumed.reference, start)
    moved = jax.tree.map(np.array_equal, state_at(resumed.workdir, 5, tmp_path).params, start)
    assert not any(jax.tree.leaves(moved))


def test_without_a_warm_start_the_reference_is_the_random_weights(tmp_path):
    config = change(resolve(load([TINY, *SMALL])), {"sft.updates": 0, "kl.coefficient": 0.1})
    reference = to_host(train.find_reference(config, parts_of(), tmp_path))
    np.testing.assert_equal(reference, to_host(build_state(config, parts_of()).params))


def test_a_run_whose_warm_start_is_gone_says_so_rather_than_take_another_reference(warm, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(warm / "sft", workdir / "sft", ignore=shutil.ignore_patterns("iteration_*"))
    config = change(resolve(load([TINY, *SMALL])), {"kl.coefficient": 0.1})
    with pytest.raises(ValueError, match="lacks update 60, whose weights"):
        train.find_reference(config, parts_of(), workdir)
