"""A method that runs the model as it goes: magnitude in stages, and what stays is doubled.

It records in its manifest what it was given, and ends in the middle where a test wants it to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vlp_plugins.calibration.batches import batch_size, batches_again
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.method import Context, Cost, Procedure
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.registry import Offer, Registry
from vlp_plugins.runtime.errors import NonFiniteError

NAME = "doubling"
ENDS = {"interrupt": KeyboardInterrupt, "nan": NonFiniteError, "error": RuntimeError}


class Doubling(Procedure):
    """Goes over the data once per stage; writes a file after every stage."""

    name = NAME

    def __init__(
        self, *, lambda_: float = 0.5, stages: int = 3, end: str = "", before: int = 0
    ) -> None:
        self.stages, self.end, self.before = stages, end, before
        self.parameters = {"lambda": lambda_, "stages": stages}

    def run(self, context: Context) -> list[Masks]:
        again = batches_again(context.batches, context.limit)
        assert context.workplace is not None
        file = context.workplace / "stage.json"
        done = json.loads(file.read_text()) if context.resume and file.exists() else []
        here = []
        for stage in range(len(done), self.stages):
            if self.end and stage == self.before:
                raise ENDS[self.end]("that is enough")
            sizes = [batch_size(batch) for batch in again()]
            here.append(stage)
            done.append(sizes)
            file.write_text(json.dumps(done))
            if context.progress is not None:
                context.progress(len(done), self.stages)
            logging.getLogger("vlp_plugins.methods").info("stage %d of %d", stage, self.stages)
        return [self._masks(context, target, done[-1], here) for target in context.targets]

    def cost(self, context: Context) -> Cost:
        assert context.limit is not None
        return Cost(
            ram_bytes=10**9,
            disk_bytes=3 * 10**9,
            passes=self.stages,
            gradient_batches=self.stages * context.limit,
            seconds=120,
            notes=("keeps nothing", f"{self.stages} stages"),
        )

    def _masks(self, context: Context, target: Any, sizes: list[int], here: list[int]) -> Masks:
        weights = {name: weight.parameter.detach() for name, weight in context.weights.items()}
        flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[flat.argsort(stable=True)[: int(target * len(flat))]] = False
        parts = kept.split([weight.numel() for weight in weights.values()])
        masks = {
            name: part.view_as(weight)
            for (name, weight), part in zip(weights.items(), parts, strict=True)
        }
        manifest = Manifest.for_weights(
            context.weights,
            method=NAME,
            parameters={
                **self.parameters,
                "stages run": here,
                "curve": [[0.1, 2.0], [1.0, 0.25]],
                "budget": context.memory_budget,
                "autocast": str(context.autocast),
                "skip": context.skip_nonfinite,
                "floor": context.floor,
                "variant": "published" if context.published else "default",
                "limit": context.limit,
            },
            seed=context.seed,
            sparsity=target,
            calibration={"fingerprint": "abc", "batches": len(sizes), "samples": sum(sizes)},
        )
        return Masks.from_dense(
            masks, manifest, {name: 2 * weight for name, weight in weights.items()}
        )


@contextmanager
def registered() -> Iterator[None]:
    """The method is there, as an outsider's is."""
    known = registry()
    offers = [item for kind in known._offers.values() for item in kind.items()]
    offer = Offer("methods", NAME, Doubling, "tests", "tests", builtin=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vlp_plugins.models.discovery._registry",
            Registry([*offers, (NAME, offer)], known.plugins()),
        )
        yield
