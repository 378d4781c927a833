"""AdamW with warm-up and clipping by the global norm, from optax."""

import optax

from dgpo_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, decays) -> optax.GradientTransformation:
    """Everything of AdamW but the learning rate, which `apply` of `update.make_programs` takes as an argument.

    Args:
        decays: tree of bools like the parameters, True where weight decay acts under `decay='matrices'`.
    """
    mask = None if config.decay == "all" else decays
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
    )


def learning_rate(config: OptimizerConfig, iteration: int) -> float:
    """The rate of all updates of an iteration (the first is 0): linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup_iterations))
