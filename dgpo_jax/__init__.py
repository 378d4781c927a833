"""A JAX-native reinforcement-learning trainer for language models on problems with checkable answers."""
