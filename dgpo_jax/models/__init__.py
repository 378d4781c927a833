"""Language models: the same functions for training, decoding and scoring, on any mesh."""

from dgpo_jax.config import ModelConfig
from dgpo_jax.models.hf import config_from_folder, load_parameters, resolve_folder
from dgpo_jax.models.qwen import Model, build

__all__ = ["Model", "build", "config_from_folder", "load_parameters", "load_pretrained", "resolve_folder"]


def load_pretrained(folder, mesh=None, dtype="float32"):
    """A Hugging Face model for notebooks and tests.

    Args:
        folder: a local folder, or a name on the hub.
        mesh: None = the default device.
        dtype: of the parameters and of the arithmetic.
    Returns:
        model, params: `model.logits(params, tokens i32[B, T])` gives f32[B, T, V].
    Raises:
        ValueError: a model that cannot be found, is not covered, or whose files do not match its config.json.
    """
    folder = resolve_folder(folder)
    config = ModelConfig(**config_from_folder(folder, dtype=dtype))
    return build(config, mesh), load_parameters(folder, config, mesh, dtype)
