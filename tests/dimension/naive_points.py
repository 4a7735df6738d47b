"""The points of every layer the plain way: everything is stored, then put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlp_plugins.calibration.moments import Site
from vlp_plugins.dimension import measure as computing
from vlp_plugins.dimension.measure import measure
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.dimension.twonn import Estimate
from vlp_plugins.models.adapter import Adapter, Stream
from vlp_plugins.models.weights import WeightMap


def naive_points(
    model: nn.Module, adapter: Adapter, batches: Sequence[Any], *, padding: str = "real"
) -> dict[Site, Tensor]:
    """By site `[samples, tokens * features]`."""
    samples: dict[Site, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    running: list[Stream] = []
    handles = []
    calls: dict[Site, int] = defaultdict(int)
    for name, weight in WeightMap.of(model, adapter).items():
        for index, owner in enumerate(weight.owners):

            def see(module, _, output, name=name, index=index, owner=owner):
                site = Site(name, running[-1].name, index)
                if output.ndim == 4:
                    output = output.flatten(2).transpose(1, 2)
                if output.ndim == 2:
                    output = output.unsqueeze(1)
                real = running[-1].real[owner.tokens] if padding == "real" else None
                for row, tokens in enumerate(output):
                    kept = tokens if real is None or len(tokens) == 1 else tokens[real[row]]
                    samples[site][calls[site]].append(kept.clone())
                calls[site] += 1

            handles.append(model.get_submodule(owner.module).register_forward_hook(see))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            for stream in adapter.streams(model, batch):
                calls.clear()
                running.append(stream)
                stream.run()
    for handle in handles:
        handle.remove()
    return {
        site: torch.cat([pad_sequence(of, batch_first=True).flatten(1) for of in by.values()], 1)
        for site, by in samples.items()
    }


def measured(
    model: nn.Module, adapter: Adapter, batches: Any, **options: Any
) -> tuple[IdProfile, dict[Site, Tensor]]:
    """What `measure` returns, and the points that it estimated the dimensions from."""
    seen: list[Tensor] = []

    def estimate(points: Tensor, *_: Any, **__: Any) -> Estimate:
        seen.append(points.clone())
        return Estimate(float(len(seen)), 0.5, len(points), (1.0,), (0.0,))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "estimate", estimate)
        profile = measure(model, adapter, WeightMap.of(model, adapter), batches, **options)
    points = {
        Site(layer.weight, layer.stream, layer.owner): seen[int(layer.dimension) - 1]
        for layer in profile.layers
    }
    return profile, points
