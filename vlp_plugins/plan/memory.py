"""What will lie in memory at the worst moment."""

from __future__ import annotations

import torch

from vlp_plugins.job.prepared import Prepared
from vlp_plugins.runtime.memory import resident_bytes


def bytes_of_model(job: Prepared) -> int:
    """Bytes of the parameters, each shared one counted once."""
    return sum(p.numel() * p.element_size() for p in job.model.parameters())


def device_of(job: Prepared) -> torch.device:
    """Where the model is."""
    return next(job.model.parameters()).device


def peak_with_writing(job: Prepared, peak: int, mask_file: int) -> int:
    """The peak of the process once the results are written, too.

    Args:
        job: what shall be run.
        peak: bytes at the worst moment before.
        mask_file: bytes of the largest file of masks; its checksum and its copy are made of it.
    """
    if job.recipe.save_model:  # the dense weights are kept while the pruned ones are written
        dense = job.weights.stored_bytes
        peak = max(peak, resident_bytes() + dense)
    return max(peak, resident_bytes() + 2 * mask_file)
