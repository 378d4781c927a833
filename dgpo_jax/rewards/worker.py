"""A process that checks mathematical answers: `python -m dgpo_jax.rewards.worker MEMORY_MB PARENT_PID`.

A request is [answer, extracted, tolerance], the reply a status. See `workers` for the rest.
"""

import sys

from dgpo_jax.rewards.math import slow_status
from dgpo_jax.rewards.workers import serve

if __name__ == "__main__":
    serve(slow_status, int(sys.argv[1]), int(sys.argv[2]), warm_up=lambda: slow_status("x", "\\sqrt{x^2 + 1}"))
