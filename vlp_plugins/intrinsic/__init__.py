"""Intrinsic dimensions of representations: estimated, gathered from a model, kept as a profile.

`twonn` estimates the dimension of points from the distances to their nearest `neighbours`.

`measuring` goes over the batches in as many passes (`passing`) as the memory budget asks for
(`room`, `packing`), lets a `gatherer` keep what layers give out (`outputs`, `real_tokens`,
`points`), computes dimensions after each pass (`computing`) and keeps them in a file (`state`);
`plan` says so beforehand. The result is a `profile`, which gives pruning methods their `factors`.
"""
