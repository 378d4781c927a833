"""What a method's name sets: as published, unless the config says otherwise."""

from dataclasses import replace

import pytest

from dgpo_jax.config import Config, KlConfig, LossConfig, RewardConfig, RolloutConfig, UpdateConfig, flatten
from dgpo_jax.plan import recipe_line, warnings
from dgpo_jax.recipe import ignored, method_settings, published, resolve
from dgpo_jax.rl.losses import METHODS

MAX_RESPONSE = 40


def config_for(method, rollout=None, reward=None, **loss):
    return Config(
        rollout=RolloutConfig(max_response=MAX_RESPONSE, **rollout or {}), reward=RewardConfig(**reward or {}),
        loss=LossConfig(method=method, **loss), update=UpdateConfig(),
    )  # fmt: skip


TOKENS, RESPONSES = "token-mean", "seq-mean-token-mean"
# Written out and not read from METHODS, so that a slip there shows: (settings, aggregation).
PUBLISHED = {
    "dgpo": ({"clip_low": 0.2, "clip_high": 0.28, "n": 1, "m": 2}, TOKENS),
    "gppo": ({"clip_low": 0.2, "clip_high": 0.28}, TOKENS),
    "ce_gppo": ({"clip_low": 0.2, "clip_high": 0.2, "beta1": 0.75, "beta2": 1}, TOKENS),
    "cispo": ({"clip_low": 0.2, "clip_high": 0.28}, TOKENS),
    "cispo_one_sided": ({"clip_low": 1, "clip_high": 0.2}, TOKENS),
    "aspo": ({"clip_low": 0.2, "clip_high": 0.2, "soft_clip": 3}, TOKENS),
    "grpo": ({"clip_low": 0.2, "clip_high": 0.2}, TOKENS),
    "dr_grpo": ({"clip_low": 0.2, "clip_high": 0.2}, "seq-mean-token-sum-norm"),
    "dapo": ({"clip_low": 0.2, "clip_high": 0.28}, TOKENS),
    "gspo": ({"clip_low": 3e-4, "clip_high": 4e-4}, RESPONSES),
    "sapo": ({"tau_pos": 1, "tau_neg": 1.05}, RESPONSES),
    "gmpo": ({"clip_low": 0.4, "clip_high": 0.4}, RESPONSES),
    "reinforce": ({}, TOKENS),
}
OF_METHODS = ("clip_low", "clip_high", "n", "m", "beta1", "beta2", "tau_pos", "tau_neg", "soft_clip", "dual_clip")


def test_every_method_is_here():
    assert PUBLISHED.keys() == METHODS.keys()


@pytest.mark.parametrize("method", PUBLISHED)
def test_what_is_left_open_becomes_what_was_published_and_nothing_else_changes(method):
    settings, aggregation = PUBLISHED[method]
    config = config_for(method)
    resolved = resolve(config)
    expected = dict.fromkeys(OF_METHODS) | settings  # what a method does not read stays open
    assert {name: getattr(resolved.loss, name) for name in OF_METHODS} == expected
    assert resolved.loss.aggregation == aggregation
    assert resolved.loss.aggregation_scale == (MAX_RESPONSE if method == "dr_grpo" else None)  # where nothing reads it
    assert resolved.loss.advantage == ("dr_grpo" if method == "dr_grpo" else "grpo")
    assert resolved.rollout.dynamic_sampling is (method == "dapo")
    assert resolved.reward.overlong_buffer == (8 if method == "dapo" else 0)  # a fifth of 40
    assert resolved.reward.incorrect == (-1 if method == "dapo" else 0)
    before, after = flatten(config), flatten(resolved)
    assert {name: after[name] for name in after if before[name] is not None} == {
        name: value for name, value in before.items() if value is not None
    }


@pytest.mark.parametrize("method", PUBLISHED)
def test_resolving_twice_changes_nothing(method):
    resolved = resolve(config_for(method))
    assert resolve(resolved) == resolved
    assert published(resolved) == {}


@pytest.mark.parametrize("method", PUBLISHED)
def test_what_is_printed_is_exactly_what_was_left_open(method):
    settings, aggregation = PUBLISHED[method]
    assert published(config_for(method)) == {f"loss.{name}": value for name, value in settings.items()} | {
        "loss.aggregation": aggregation,
        "loss.advantage": "dr_grpo" if method == "dr_grpo" else "grpo",
        "rollout.dynamic_sampling": method == "dapo",
        "reward.overlong_buffer": 8 if method == "dapo" else 0,
        "reward.incorrect": -1 if method == "dapo" else 0,
    } | ({"loss.aggregation_scale": MAX_RESPONSE} if method == "dr_grpo" else {})


GIVEN = {
    "clip_low": 0.1, "clip_high": 0.5, "n": 3.0, "m": 5.0, "beta1": 0.1, "beta2": 0.2, "tau_pos": 2.0, "tau_neg": 3.0,
    "soft_clip": 7.0, "dual_clip": 9.0, "aggregation": "seq-mean-token-sum", "aggregation_scale": 17, "advantage": "rloo",
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLISHED)
def test_what_is_given_wins(method):
    # The opposite of what each method would set, zeros and False included.
    reward = {"overlong_buffer": 0, "incorrect": 0.0} if method == "dapo" else {"overlong_buffer": 3, "incorrect": -1.0}
    config = config_for(method, {"dynamic_sampling": method != "dapo"}, reward, **GIVEN)
    assert resolve(config) == config
    assert published(config) == {}


def test_a_given_zero_is_not_taken_for_left_open():
    config = config_for("ce_gppo", clip_low=0.0, clip_high=0.0, beta1=0.0)
    resolved = resolve(config)
    assert (resolved.loss.clip_low, resolved.loss.clip_high, resolved.loss.beta1) == (0, 0, 0)
    assert resolved.loss.beta2 == 1  # this one was open
    dapo = resolve(config_for("dapo", {"dynamic_sampling": False}, {"overlong_buffer": 0, "incorrect": 0.0}))
    assert dapo.rollout.dynamic_sampling is False and (dapo.reward.overlong_buffer, dapo.reward.incorrect) == (0, 0)


@pytest.mark.parametrize("max_response, buffer", [
    (20480, 4096),  # DAPO's own lengths
    (40, 8),
    (12, 2),  # 2.4, in whole tokens
    (4, 0),  # too short for a penalty
])  # fmt: skip
def test_dapos_penalty_begins_at_four_fifths_of_the_longest_response(max_response, buffer):
    config = Config(
        rollout=RolloutConfig(max_response=max_response), loss=LossConfig(method="dapo"),
        update=UpdateConfig(tokens_per_row=32768, tokens_per_device=32768),
    )  # fmt: skip
    resolved = resolve(config)
    assert resolved.reward.overlong_buffer == buffer and type(resolved.reward.overlong_buffer) is int


@pytest.mark.parametrize("method, aggregation, given, expected", [
    ("dr_grpo", None, None, MAX_RESPONSE),  # the longest response there can be
    ("dr_grpo", None, 17, 17),
    ("dgpo", "seq-mean-token-sum-norm", None, MAX_RESPONSE),  # by the aggregation, whoever asked for it
    ("dr_grpo", "token-mean", None, None),
    ("dgpo", None, None, None),
    ("gspo", None, None, None),  # seq-mean-token-mean
    ("dgpo", None, 17, 17),  # given, though nothing reads it: what was given is kept
])  # fmt: skip
def test_the_scale_of_the_aggregation_is_the_response_slots_where_it_is_read(method, aggregation, given, expected):
    resolved = resolve(config_for(method, aggregation=aggregation, aggregation_scale=given))
    assert resolved.loss.aggregation_scale == expected


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_rule_is_given_what_it_reads_and_nothing_else(method):
    assert method_settings(resolve(config_for(method, **GIVEN))) == {name: GIVEN[name] for name in METHODS[method].settings}


@pytest.mark.parametrize("rollout, reward, loss, expected", [
    ({}, {}, {"method": "grpo"}, "grpo advantages, token-mean"),  # nothing that is off is named
    ({}, {}, {"method": "dr_grpo"}, "dr_grpo advantages, seq-mean-token-sum-norm"),
    ({"max_draws": 7}, {}, {"method": "dapo"},
     "grpo advantages, token-mean, dynamic sampling, at most 7 draws, overlong penalty over the last 8 tokens"),
    ({"staleness": 2}, {"truncated": "mask"}, {"method": "grpo", "supervised": 0.1},
     "grpo advantages, token-mean, 2 iterations stale, truncated responses: mask, supervised 0.1"),
])  # fmt: skip
def test_the_table_at_the_start_names_what_surrounds_the_rule(rollout, reward, loss, expected):
    assert recipe_line(resolve(config_for(rollout=rollout, reward=reward, **loss))) == expected


@pytest.mark.parametrize("method, given, expected", [
    ("grpo", {}, []),
    ("grpo", {"clip_low": 0.1, "aggregation": "token-mean", "entropy": 0.1}, []),  # what all methods have is read by all
    ("grpo", {"m": 3.0, "n": 2.0, "clip_low": 0.1}, ["loss.m", "loss.n"]),
    ("dgpo", {"m": 3.0, "n": 2.0}, []),
    ("reinforce", {"clip_low": 0.0}, ["loss.clip_low"]),  # a zero is given too
    ("cispo", {"dual_clip": 3.0, "soft_clip": 2.0}, ["loss.dual_clip", "loss.soft_clip"]),
])  # fmt: skip
def test_settings_of_other_methods_are_found(method, given, expected):
    config = config_for(method, **given)
    assert ignored(config) == ignored(resolve(config)) == expected


SPREAD = (
    "dividing by a group's spread makes a small KL the whole advantage of a group that answers alike;"
    " consider loss.advantage=dr_grpo, or kl.place=loss"
)


@pytest.mark.parametrize("method, loss, reward, kl, expected", [
    ("grpo", {}, {}, {}, []),
    ("dapo", {}, {}, {}, [
        ("preset", "dapo is more than its loss; it sets rollout.dynamic_sampling, reward.overlong_buffer, reward.incorrect"),
    ]),
    ("dapo", {}, {"incorrect": 0.0, "overlong_buffer": 0}, {}, [("preset", "dapo is more than its loss; it sets rollout.dynamic_sampling")]),
    ("dr_grpo", {"advantage": "rloo"}, {}, {}, [
        ("preset", "dr_grpo is more than its loss; it sets loss.aggregation, loss.aggregation_scale"),
    ]),
    ("dr_grpo", {"advantage": "rloo", "aggregation": "token-mean"}, {}, {}, [
        ("preset", "dr_grpo is more than its loss; it sets nothing that the config does not say"),
    ]),
    ("grpo", {"aggregation_scale": 7}, {}, {}, [("ignored", "loss.aggregation_scale, which grpo does not read")]),
    ("grpo", {"m": 3.0, "n": 2.0}, {}, {}, [("ignored", "loss.m, loss.n, which grpo does not read")]),
    ("grpo", {}, {}, {"coefficient": 0.1, "place": "reward"}, [("warning", SPREAD)]),
    ("grpo", {"advantage": "dr_grpo"}, {}, {"coefficient": 0.1, "place": "reward"}, []),
    ("grpo", {}, {}, {"coefficient": 0.1}, []),  # in the loss it is no part of an advantage
    ("dr_grpo", {"tau_pos": 1.0}, {}, {"coefficient": 0.1, "place": "reward"}, [
        ("preset", "dr_grpo is more than its loss; it sets loss.advantage, loss.aggregation, loss.aggregation_scale"),
        ("ignored", "loss.tau_pos, which dr_grpo does not read"),
    ]),
])  # fmt: skip
def test_the_plan_says_what_nobody_may_expect(method, loss, reward, kl, expected):
    config = replace(config_for(method, reward=reward, **loss), kl=KlConfig(**kl))
    rows = warnings(resolve(config), published(config))
    # The settings of a preset come in the order of the config.
    assert [(name, sorted(value.replace(",", " ").split())) for name, value in rows] == [
        (name, sorted(value.replace(",", " ").split())) for name, value in expected
    ]


def test_a_right_answer_worth_no_more_than_the_published_wrong_one_is_refused():
    # The config alone could not know: a wrong answer is worth 0, and -1 with DAPO.
    with pytest.raises(ValueError, match=r"reward\.incorrect is 0\.0, .* reward\.correct is 0\.0"):
        resolve(config_for("grpo", reward={"correct": 0.0}))
    assert resolve(config_for("dapo", reward={"correct": 0.0})).reward.incorrect == -1


def test_a_dual_clip_inside_the_published_region_is_refused():
    # The config alone could not know: DGPO's region ends at 1.28, GRPO's at 1.2.
    with pytest.raises(ValueError, match=r"loss\.dual_clip is 1\.25"):
        resolve(config_for("dgpo", dual_clip=1.25))
    assert resolve(config_for("grpo", dual_clip=1.25)).loss.dual_clip == 1.25


def test_a_method_that_is_none_is_refused_with_those_there_are():
    loss = LossConfig()
    object.__setattr__(loss, "method", "ppo")  # neither the command line nor LossConfig would let it pass
    config = replace(Config(), loss=loss)
    with pytest.raises(ValueError, match=r"loss\.method is 'ppo', .* choose one of dgpo, gppo"):
        resolve(config)
