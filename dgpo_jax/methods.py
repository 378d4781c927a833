"""The methods of a comparison: how they are written on the command line, and how hard each pulls at which ratio."""

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgpo_jax.config import LossConfig
from dgpo_jax.rl.losses import METHODS, check_method, resolve_settings, token_loss

WORD = re.compile(r"(\w+)(?:\((.*)\))?")
SETTING = re.compile(r"(\w+)=([\w.+-]+)")  # no slash or the like: the label becomes the name of a folder
EXAMPLE = "write it as in 'grpo,dgpo(n=2,m=2)'"
OLD_LOGPROB = -7.0  # of the tokens that curves are computed for; small enough that a ratio of 100 is possible


class MethodWord(NamedTuple):
    """A method as somebody wrote it: `dgpo`, or `dgpo(n=2,m=2)` with settings of its own."""

    label: str  # as written, without spaces
    method: str
    settings: dict[str, str]

    def arguments(self) -> list[str]:
        """The same for the command line of a run."""
        settings = {"method": self.method} | self.settings
        return [f"--config.loss.{name}={value}" for name, value in settings.items()]


def parse_methods(text: str) -> list[MethodWord]:
    """Reads `grpo,dgpo,dgpo(n=2,m=2)`: words with commas between them, settings of the loss in parentheses.

    Raises:
        ValueError: not written like that, an unknown method or setting, or the same word twice. Values are not looked at.
    """
    words = [_parse_word(word) for word in re.split(r",(?![^()]*\))", re.sub(r"\s", "", text))]
    labels = [word.label for word in words]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ValueError(f"--methods has {twice!r} twice, but a run of each is enough; leave one out.")
    return words


def _parse_word(label: str) -> MethodWord:
    match = WORD.fullmatch(label)
    if not match:
        raise ValueError(f"--methods has {label!r}, which is not a method's name, with or without settings; {EXAMPLE}.")
    method, inside = match.groups()
    check_method(method)
    settings: dict[str, str] = {}
    for part in [] if inside is None else inside.split(","):
        setting = SETTING.fullmatch(part)
        if not setting:
            raise ValueError(f"--methods has {label!r}, but {part!r} is not of the form name=value; {EXAMPLE}.")
        name, value = setting.groups()
        _check_setting(label, method, name)
        if name in settings:
            raise ValueError(f"--methods has {label!r}, which gives {name} twice; leave one out.")
        settings[name] = value
    return MethodWord(label, method, settings)


def _check_setting(label: str, method: str, name: str) -> None:
    """Refuses what is no setting of the loss, and what this method would ignore."""
    known = [field.name for field in fields(LossConfig) if field.name != "method"]
    read, of_any_rule = resolve_settings(method), {name for method in METHODS for name in resolve_settings(method)}
    usable = [other for other in known if other in read or other not in of_any_rule]
    if name not in usable:
        rule = f"{method} does not read {name}" if name in known else f"{name!r} is not a setting of the loss"
        raise ValueError(f"--methods has {label!r}, but {rule}; {method} has {', '.join(usable)}.")


def gradient_weights(loss: LossConfig, ratios: Sequence[float], advantage: float) -> np.ndarray:
    """g, the factor of A * grad log pi in the gradient that the method makes of a token.

    From the derivative of `token_loss` itself, so that a curve shows what training does. A sequence-level method
    sees sequences of one token.

    Args:
        ratios: new to old probability.
        advantage: only its sign matters.
    Returns:
        f32[len(ratios)], at least 0.
    """
    old = jnp.full((len(ratios), 1), OLD_LOGPROB)
    logprobs = old + jnp.log(jnp.asarray(ratios, jnp.float32))[:, None]
    advantages, segment = jnp.full_like(old, advantage), jnp.ones(old.shape, jnp.int32)
    settings = {name: getattr(loss, name) for name in resolve_settings(loss.method)}

    def total(logprobs):
        return token_loss(loss.method, logprobs, old, advantages, segment=segment, **settings).sum()

    return np.asarray(-jax.grad(total)(logprobs) / advantages)[:, 0]


def trust_region(loss: LossConfig) -> tuple[float, float] | None:
    """The ratios between which the method changes nothing, a sequence's for gspo; None if it has no such region."""
    names = ("clip_low", "clip_high")
    settings = resolve_settings(loss.method, **{name: getattr(loss, name) for name in names})
    low, high = (settings.get(name) for name in names)
    if low is None or high is None:
        return None
    return (math.exp(-low), math.exp(high)) if loss.method == "gmpo" else (1 - low, 1 + high)
