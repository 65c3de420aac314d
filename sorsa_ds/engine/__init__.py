"""One optimizer step on DeepSpeed: the regulariser and the re-orthonormalisation on masters that ZeRO has partitioned.

This room knows DeepSpeed's inner layout on every ZeRO stage, so that no other room has to; it knows no data, no file of
a run and no baseline. Start reading with `engine` (the order of a step), then `masters` (where the trained numbers are)
and `grams` (what is communicated).
"""
