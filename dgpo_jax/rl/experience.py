"""Groups of checked responses: choosing, joining, and keeping them on disk. Host numpy."""

from collections.abc import Mapping, Sequence

import numpy as np

from dgpo_jax.types import Experience, Prompts, Rollout


def group_count(experience: Experience) -> int:
    """Q."""
    return len(experience.iteration)


def group_size(experience: Experience) -> int:
    """G; 0 of no groups."""
    return len(experience.rewards) // max(1, group_count(experience))


def lengths(experience: Experience) -> np.ndarray:
    """i64[B], response tokens, the stop token included."""
    return experience.rollout.response_mask.sum(axis=1)


def by_group(experience: Experience, per_response: np.ndarray) -> np.ndarray:
    """[B] as [Q, G]."""
    return per_response.reshape(group_count(experience), -1)


def select(experience: Experience, groups: Sequence[int] | np.ndarray) -> Experience:
    """These groups, in this order."""
    groups = np.asarray(groups, int)
    rows = (groups[:, None] * group_size(experience) + np.arange(group_size(experience))).reshape(-1)
    return Experience(
        prompts=Prompts(*(array[groups] for array in experience.prompts)),
        rollout=Rollout(*(array[rows] for array in experience.rollout)),
        old_logprobs=experience.old_logprobs[rows],
        scores=experience.scores[rows],
        rewards=experience.rewards[rows],
        iteration=experience.iteration[groups],
    )


def newest(experience: Experience, groups: int) -> Experience:
    """The last so many, or all if they are fewer."""
    count = group_count(experience)
    return select(experience, range(max(0, count - groups), count))


def join(first: Experience, second: Experience) -> Experience:
    """The groups of both, one after the other.

    Raises:
        ValueError: they are of different sizes.
    """
    if group_count(first) and group_count(second) and group_size(first) != group_size(second):
        raise ValueError(f"groups of {group_size(first)} and of {group_size(second)} responses cannot be one Experience.")
    return Experience(
        prompts=_join(first.prompts, second.prompts),
        rollout=_join(first.rollout, second.rollout),
        old_logprobs=np.concatenate([first.old_logprobs, second.old_logprobs]),
        scores=np.concatenate([first.scores, second.scores]),
        rewards=np.concatenate([first.rewards, second.rewards]),
        iteration=np.concatenate([first.iteration, second.iteration]),
    )


def _join(first, second):
    return type(first)(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def no_groups(max_prompt: int, max_response: int) -> Experience:
    """Nothing, of the shapes that others can be joined to."""

    def array(dtype, *shape):
        return np.zeros((0, *shape), dtype)

    return Experience(
        prompts=Prompts(array(np.int32, max_prompt), array(bool, max_prompt)),
        rollout=Rollout(
            array(np.int32, max_response), array(bool, max_response), array(np.float32, max_response), array(bool)
        ),
        old_logprobs=array(np.float32, max_response), scores=array(np.float32), rewards=array(np.float32),
        iteration=array(np.int32),
    )  # fmt: skip


def to_arrays(experience: Experience) -> dict[str, np.ndarray]:
    """One flat dict, {"rollout.response": ...}, as a checkpoint keeps it."""
    arrays = experience._asdict()
    nested = {"prompts": arrays.pop("prompts"), "rollout": arrays.pop("rollout")}
    return arrays | {f"{name}.{field}": array for name, part in nested.items() for field, array in part._asdict().items()}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Experience:
    """The other way round; an empty mapping is not an Experience."""
    prompts = Prompts(*(arrays[f"prompts.{field}"] for field in Prompts._fields))
    rollout = Rollout(*(arrays[f"rollout.{field}"] for field in Rollout._fields))
    others = {field: arrays[field] for field in ("old_logprobs", "scores", "rewards", "iteration")}
    return Experience(prompts, rollout, **others)
