"""Sampling and a whole GRPO iteration against torch: `transformers` generate and TRL 1.16, on the same CPU.

    python benchmarks/against_torch.py [--rounds=9] [--cases=fixed,iteration] [--python=.venv-trl/bin/python]

Takes about ten minutes on two cores, and on first use as long as installing torch (its CPU build) and TRL takes, into the
user's cache folder, unless --python names an interpreter that has both. How it measures is said in against_tunix.py; the
weights are the same. Torch's threads wait for each other actively: on a machine with other work to do torch falls behind by far
more than that work explains, so run this on an idle one, or with OMP_WAIT_POLICY=PASSIVE and a look at the processor time.
"""

import sys

from against_tunix import MEAN, read_arguments, run
from turns import Case

CASES = [
    Case("fixed: generate, 32 x 64+64", "sample", 32, 1, 64, 64, target=5),
    Case("fixed-256: generate, 32 x 64+256", "sample", 32, 1, 64, 256, target=5),
    Case("geometric: generate, 32 x 64+256, mean 56", "sample", 32, 1, 64, 256, stop=1 / MEAN, target=5),
    Case("iteration: TRL 4 x 8 at 64+64", "iteration", 4, 8, 64, 64, target=4),
    Case("iteration-geometric: TRL 4 x 8 at 64+256, mean 56", "iteration", 4, 8, 64, 256, stop=1 / MEAN, target=4),
]
PACKAGES = ["--extra-index-url=https://download.pytorch.org/whl/cpu", "torch==2.13.0+cpu", "trl==1.16.0", "transformers", "datasets", "jinja2"]


if __name__ == "__main__":
    run(read_arguments(__doc__, "torch and trl"), CASES, "torch and TRL 1.16", "side_torch.py", PACKAGES, sys.executable)
