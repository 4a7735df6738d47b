"""Attributes after somebody else has cut the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structured_examples import prepared
from torch import nn

from vlp_plugins.models.parts import Attention
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.structured.check import check_equal, example_batch, outputs
from vlp_plugins.structured.cuts import masked, patch
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of

MODELS = ["clip", "siglip", "vit", "dino 2", "xvlm", "blip retrieval", "blip captioning"]


def narrow(linear: Any, dim: int, rows: list[int]) -> None:
    """As a host does it: new parameters in the same layer."""
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, torch.tensor(rows)))
    if dim == 0:
        linear.bias = nn.Parameter(linear.bias.detach()[rows])
        linear.out_features = len(rows)
    else:
        linear.in_features = len(rows)


def cut_layers(model: nn.Module, block: Attention, rows: list[int]) -> None:
    for part in block.inner:
        narrow(model.get_submodule(part.path), 0, rows)
    narrow(model.get_submodule(block.output.path), 1, rows)


@pytest.mark.parametrize("what", ["heads", "dims"])
@pytest.mark.parametrize("name", MODELS)
def test_patching_makes_a_cut_model_right(name: str, what: str) -> None:
    model, adapter = prepared(name)
    batch = example_batch(model, adapter)
    blocks = [block for block in blocks_of(model, adapter) if isinstance(block, Attention)]
    kept, heads = {}, {}
    for block in blocks:
        dims = tuple(range(block.head_dim - 1))
        is_whole = what == "heads"
        kept[block.name] = Kept(heads=(0, 2)) if is_whole else Kept(dims=(dims,) * block.heads)
        heads[block.name] = 2 if is_whole else block.heads
    with masked(model, adapter, Record(kept)):
        expected = outputs(model, adapter, batch)
    for block in blocks:
        size = block.head_dim
        rows = [
            head * size + dim
            for head in kept[block.name].heads or range(block.heads)
            for dim in range(size if what == "heads" else size - 1)
        ]
        cut_layers(model, block, rows)
    with pytest.raises(StructureError, match="call patch"):
        blocks_of(model, adapter)

    patch(model, adapter, heads)

    check_equal(expected, outputs(model, adapter, batch))
    after = {name: parameter.clone() for name, parameter in model.named_parameters()}
    patch(model, adapter)
    assert all(torch.equal(after[n], p) for n, p in model.named_parameters())


def test_what_the_width_tells_needs_no_number_of_heads() -> None:
    model, adapter = prepared("vit")
    first, second = (b for b in blocks_of(model, adapter) if isinstance(b, Attention))
    cut_layers(model, first, [0, 1, 2, 3, *range(8, 16)])  # three of four heads of four: 12
    with pytest.raises(StructureError, match="both fit"):
        patch(model, adapter)
    patch(model, adapter, {first.name: 3})
    cut_layers(model, second, [0, 1, 2, 3])
    with pytest.raises(StructureError, match=r"4 heads of 4 and is 4 wide now.*both fit"):
        patch(model, adapter)
    with pytest.raises(StructureError, match="is 4 wide now, which is not 3 heads"):
        patch(model, adapter, {second.name: 3})
    patch(model, adapter, {second.name: 1})
    sizes = [(b.heads, b.head_dim) for b in blocks_of(model, adapter) if isinstance(b, Attention)]
    assert sizes == [(3, 4), (1, 4)]


def test_a_width_that_fits_nothing_is_refused() -> None:
    model, adapter = prepared("vit")
    block = next(b for b in blocks_of(model, adapter) if isinstance(b, Attention))
    cut_layers(model, block, list(range(7)))
    with pytest.raises(StructureError, match="neither fits"):
        patch(model, adapter)
