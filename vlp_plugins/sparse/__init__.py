"""Compact checkpoints of pruned models: bits and values instead of zeros.

    masks.apply(model)
    save_sparse(model, "small")
    model, adapter = load_sparse("small")

A pruned weight takes `(1 - s) + 1/32` of its float32 bytes at sparsity s, 0.281 at 75%. What is
loaded is a plain model; nothing but the file is smaller.
"""

from vlp_plugins.sparse.files import SPARSE_FILE, SparseSize
from vlp_plugins.sparse.loading import is_sparse, load_sparse, sparse_model
from vlp_plugins.sparse.saving import save_sparse

__all__ = ["SPARSE_FILE", "SparseSize", "is_sparse", "load_sparse", "save_sparse", "sparse_model"]
