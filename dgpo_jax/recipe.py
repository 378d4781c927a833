"""What a method's word sets besides its loss: the settings that a config left at None, as the method was published.

`resolve` is the first thing a story does. From then on every setting has a value, and config.json holds what was run.
"""

from dataclasses import replace

from dgpo_jax.config import Config, flatten
from dgpo_jax.rl.losses import METHODS, SETTINGS, check_method, resolve_settings

# Beyond the loss itself, which METHODS describes. A buffer is a share of rollout.max_response.
PLAIN = {"advantage": "grpo", "dynamic_sampling": False, "overlong_buffer": 0.0, "incorrect": 0.0}
PRESETS = {
    # arXiv:2503.14476: groups that teach something, and a penalty over the last 4096 of 20480 tokens, of 1 to rewards of +-1.
    "dapo": {"dynamic_sampling": True, "overlong_buffer": 0.2, "incorrect": -1.0},
    # arXiv:2503.20783: neither the group's spread nor the response's length divides anything.
    "dr_grpo": {"advantage": "dr_grpo"},
}


def resolve(config: Config) -> Config:
    """The config with every None that means "as published" replaced by the method's value; others are kept.

    Raises:
        ValueError: loss.method is not a method.
    """
    method, loss, rollout, reward = config.loss.method, config.loss, config.rollout, config.reward
    preset = PLAIN | PRESETS.get(check_method(method), {})
    names = METHODS[method].settings
    settings = resolve_settings(method, **{name: getattr(loss, name) for name in names})
    aggregation = _or(loss.aggregation, METHODS[method].aggregation)
    scale = rollout.max_response if aggregation == "seq-mean-token-sum-norm" else None
    return replace(
        config,
        loss=replace(
            loss, **settings, aggregation=aggregation, aggregation_scale=_or(loss.aggregation_scale, scale),
            advantage=_or(loss.advantage, preset["advantage"]),
        ),
        rollout=replace(rollout, dynamic_sampling=_or(rollout.dynamic_sampling, preset["dynamic_sampling"])),
        reward=replace(
            reward, incorrect=_or(reward.incorrect, preset["incorrect"]),
            overlong_buffer=_or(reward.overlong_buffer, int(preset["overlong_buffer"] * rollout.max_response)),
        ),
    )  # fmt: skip


def _or(given, published):
    return published if given is None else given


def method_settings(config: Config) -> dict[str, float | None]:
    """The settings that the rule of a resolved config's method reads."""
    return {name: getattr(config.loss, name) for name in METHODS[config.loss.method].settings}


def ignored(config: Config) -> list[str]:
    """Settings of the loss that were given and that this method, so aggregated, does not read."""
    others = sorted(SETTINGS - METHODS[config.loss.method].settings.keys())
    if config.loss.aggregation != "seq-mean-token-sum-norm":
        others.append("aggregation_scale")
    return [f"loss.{name}" for name in others if getattr(config.loss, name) is not None]


def preset_choices(config: Config, chosen: dict[str, object]) -> list[str]:
    """Of the settings left open, those that the method's word made other than plain, its rule's own apart."""
    plain = PLAIN | {"aggregation": "token-mean", "aggregation_scale": None}
    names = [(name, name.rpartition(".")[2]) for name in chosen if config.loss.method in PRESETS]
    return [name for name, short in names if short in plain and chosen[name] != plain[short]]


def published(config: Config) -> dict[str, object]:
    """The settings that `resolve` would fill in, by dotted name, to be printed at the start."""
    before, after = flatten(config), flatten(resolve(config))
    return {name: after[name] for name in before if before[name] is None and after[name] is not None}
