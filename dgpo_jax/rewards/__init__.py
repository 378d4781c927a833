"""Answer checking: host-side code that treats every response as hostile text and imports neither jax nor flax.

Where to read what, in the order in which an answer passes through:

A trainer hands (reference answer, response) to `pool`. `extract` finds the answer inside the response, `normalise` spells it
in one way, and `exact` reads plain numbers as fractions: `math.quick_status` makes a verdict of these three for most answers,
within the trainer's process. The others go to a `worker` process, which can be killed, and there to `math.slow_status`:
`tokens` cuts the text, `parser` (sums, products, lists) and `primaries` (what a factor can be) build a tree of tuples,
described in `nodes`. `equivalence` decides whether two trees mean the same: it compares values computed by `arithmetic`,
sets of numbers by `real_sets`, and asks `symbolic` for a proof of what values cannot tell, for which `expressions`
translates the trees to SymPy. `math.check` is the whole path for one answer, without a process.
"""
