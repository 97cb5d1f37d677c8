"""The class layer of one shard: the exponential sum over the negatives and its gradients, never storing the logits.

`negatives.py` is the seam: it states the two functions every implementation offers and chooses one. `reference.py` is
the specification, `chunked.py` the plain torch implementation for large shards.
"""
