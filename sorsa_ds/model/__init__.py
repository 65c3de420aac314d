"""From pre-trained weights to an adapted model, sharded as its ZeRO stage asks.

The room knows the methods only as recipes that they hand in (`fill.Recipe`), and nothing of engines, training or run
folders. Start reading in `load.py`, which is the whole way from disk: `skeleton` builds the model on the meta device,
`selection` says which linears are adapted, `targets` replaces them, `schedule` says which rank makes which layer,
`fill` makes them round by round, and `sharding` hands every rank its part. `adapt_partitioned.py` is the same way for a
model that is in memory already.
"""
