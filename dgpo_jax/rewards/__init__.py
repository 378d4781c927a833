"""Answer checking: host-side code that treats every response as hostile text and imports neither jax nor flax."""
