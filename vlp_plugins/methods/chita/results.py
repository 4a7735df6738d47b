"""From a solution to masks with new values, and what they say about themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.finding import Found
from vlp_plugins.methods.chita.setup import Setup
from vlp_plugins.models.request import Target


def masks_of(
    setup: Setup,
    found: Found,
    target: Target,
    method: str,
    calibration: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Masks:
    """Masks of the support, with the values of what stays.

    Args:
        setup: of the run.
        found: the last solution.
        target: what was asked for.
        method: its name.
        calibration: what `calibration_record` says.
        more: parameters beside those of the settings.
    """
    context = setup.context
    parameters = {
        **setup.settings.parameters(),
        **(more or {}),
        **found.facts,
        **(setup.factors.record() if setup.factors else {}),
        **setup.allocation.record(),
        "variant": "published" if context.published else "default",
    }
    manifest = Manifest.for_weights(
        context.weights,
        method=method,
        parameters=parameters,
        seed=context.seed,
        sparsity=target,
        calibration=calibration,
    )
    return Masks.from_dense(
        setup.columns.split(found.solution.support),
        manifest,
        setup.columns.split(found.solution.values),
    )


def calibration_record(digests: Sequence[str], sizes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Which batches made rows.

    Args:
        digests: by round, the hash of its batches, hexadecimal.
        sizes: by round, the number of samples of each of its batches.
    """
    together = digests[0]
    if len(digests) > 1:
        together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {
        "fingerprint": together[:16],
        "batches": sum(map(len, sizes)),
        "samples": sum(map(sum, sizes)),
        "tokens": "as the loss reads them",
    }
