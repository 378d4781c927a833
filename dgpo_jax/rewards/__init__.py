"""Judging responses and pricing them: host-side code that treats every response as hostile text and imports neither jax nor flax.

Where to read what. `checkers` hands a response to the pool that its problem asks for. `workers` are the processes behind
the pools, which can be killed. `functions` and `shaping` say what a judged response is worth.

Mathematics, in the order in which an answer passes through: `pool` takes (reference answer, response). `extract` finds the
answer inside the response, `normalise` spells it in one way, and `exact` reads plain numbers as fractions: `math.quick_status`
makes a verdict of these three for most answers, within the trainer's process. The others go to a `worker`, and there to
`math.slow_status`: `tokens` cuts the text (`units` knows words that carry no value), `parser` (sums, products, lists),
`primaries` and `constructs` (what a factor can be) build a tree of tuples, described in `nodes`. `equivalence` decides whether
two trees mean the same: it compares values computed by `arithmetic` at `points`, equations by `relations`, sets of numbers by
`real_sets`, and asks `symbolic` for a proof of what values cannot tell, for which `expressions` translates the trees to SymPy.
`math.check` is the whole path for one answer, without a process. `golds` looks at reference answers alone; `math_verify` is
another project's grader, to compare with.

Programs: `code` finds them and runs each in a `sandbox` (`code_runner` inside it, behind the `syscall_filter`); `code_tests` reads
test cases and compares outputs. Puzzles: `gym` and its `gym_worker`.
"""
