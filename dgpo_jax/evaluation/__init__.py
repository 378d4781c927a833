"""Scores of a model on sets of problems, for `evaluate`, in training, and for the pass rates of `prepare`.

Where to read what, in the order in which a set passes through: `protocol` says whose weights, which problems, how asked and how
judged; `sampling` answers batch after batch; `judging` turns verdicts into votes and figures by the formulas of `estimators`;
`generations` keeps the responses on disk; `report` and `differences` write what people read. `in_training` is the short way
through, without files.
"""
