"""Problems, prompts and tokenizers: host code that never imports jax, flax or tensorflow."""
