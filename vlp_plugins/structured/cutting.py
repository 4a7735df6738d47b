"""Cuts heads and units out of a model, by index selection alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Attention, Block, Part
from vlp_plugins.models.saving import REBUILT
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.runtime.sharding import is_sharded
from vlp_plugins.structured.attributes import scales_at_run_time, set_heads
from vlp_plugins.structured.indices import fitting, rows_kept, size_of
from vlp_plugins.structured.record import Kept


@takes_model
def prepare(model: nn.Module, adapter: Adapter) -> None:
    """Gives every projection a layer of its own, in place, as cutting needs it.

    What the model computes stays the same. Optimizers made before do not know the new layers. Save
    a model whose layers were split with `save_structured`: `from_pretrained` would look for the
    fused ones, not find them, and draw them at random.
    """
    before = sum(1 for _ in model.modules())
    adapter.split_fused(model)
    if sum(1 for _ in model.modules()) != before:
        setattr(model, REBUILT, True)


@takes_model
def cut(model: nn.Module, adapter: Adapter, record: Mapping[str, Kept]) -> None:
    """Removes all that a record does not keep, in place.

    Parameters stay the objects that they are, with fewer elements: ties survive. Gradients are
    dropped; an optimizer made before holds averages of the old shapes, so make it anew. Networks
    that follow others are cut alike. The factor of attention scores stays that of the uncut heads:
    where a module computes it from their size, its query is rescaled instead.

    Args:
        model: prepared; see `prepare`.
        adapter: of the model.
        record: in coordinates of the model as it is now.

    Raises:
        StructureError: if the record does not fit; the model is untouched then.
        UnsupportedError: if the model is sharded.
    """
    if is_sharded(model.parameters()):
        raise UnsupportedError(
            "the model is sharded; cut it before it is wrapped by fully_shard, and wrap it then"
        )
    for block, kept in fitting(model, adapter, record):
        shrink(model, block, kept)


@torch.no_grad()
def shrink(model: nn.Module, block: Block, kept: Kept, *, rescale: bool = True) -> None:
    """Cuts one block, and its copies in networks that follow.

    Args:
        model: that has the block.
        block: as it is now.
        kept: of it.
        rescale: whether to rescale queries; False for layers whose values come from a cut model.
    """
    rows = rows_kept(block, kept)
    if len(rows) == block.width:
        return
    _keep_rows([linears_of(model, part) for part in block.inner], rows)
    _keep_columns(linears_of(model, block.output), rows)
    setattr(model, REBUILT, True)
    if isinstance(block, Attention):
        heads, size = size_of(block, kept)
        holders = (*block.modules, *block.followers)
        if rescale and size != block.head_dim:
            queries = (*block.query.paths, *block.query.followers)
            rescale_queries(model, holders, queries, block.head_dim, size)
        for path in holders:
            set_heads(model.get_submodule(path), heads, size)


@torch.no_grad()
def shrink_followers(model: nn.Module, blocks: Iterable[Block], record: Mapping[str, Kept]) -> None:
    """Cuts only the copies in networks that follow; `patch` sets their heads.

    Args:
        model: whose own layers somebody else cuts (Torch-Pruning, which traces no followers).
        blocks: as they were before.
        record: in their coordinates.
    """
    for block in blocks:
        if block.name in record:
            rows = rows_kept(block, record[block.name])
            _keep_rows([_followers_of(model, part) for part in block.inner], rows)
            _keep_columns(_followers_of(model, block.output), rows)


@torch.no_grad()
def rescale_queries(
    model: nn.Module, holders: Iterable[str], queries: Iterable[str], old: int, new: int
) -> None:
    """Undoes what another size of heads does to scores that are divided by its root at run time.

    `q k / sqrt(old)` is `(q sqrt(new / old)) k / sqrt(new)`. Modules that keep their factor need
    nothing.

    Args:
        model: that has the modules.
        holders: paths of the attention modules.
        queries: path of the query layer of each.
        old: size of a head before.
        new: size of a head now.
    """
    linears = [
        _linear(model, query)
        for holder, query in zip(holders, queries, strict=True)
        if scales_at_run_time(model.get_submodule(holder))
    ]
    for parameter in _distinct(linears):
        parameter.mul_(math.sqrt(new / old))


def linears_of(model: nn.Module, part: Part) -> list[nn.Linear]:
    """The layers at all paths of a part, those of followers included."""
    return [*(_linear(model, path) for path in part.paths), *_followers_of(model, part)]


def _followers_of(model: nn.Module, part: Part) -> list[nn.Linear]:
    return [_linear(model, path) for path in part.followers]


def _keep_rows(parts: Iterable[Sequence[nn.Linear]], rows: torch.Tensor) -> None:
    for linears in parts:
        for parameter in _distinct(linears):
            _take(parameter, 0, rows)
        for linear in linears:
            linear.out_features = len(rows)


def _keep_columns(linears: Sequence[nn.Linear], rows: torch.Tensor) -> None:
    for parameter in {id(linear.weight): linear.weight for linear in linears}.values():
        _take(parameter, 1, rows)
    for linear in linears:
        linear.in_features = len(rows)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(f"{path} is a {type(module).__name__} and no Linear layer any more")
    return module


def _distinct(linears: Iterable[nn.Linear]) -> list[torch.Tensor]:
    """Weights and biases, each once however many layers share it."""
    found: list[torch.Tensor | None] = []
    for linear in linears:
        found += [linear.weight, linear.bias]
    return list({id(p): p for p in found if p is not None}.values())


def _take(parameter: torch.Tensor, dim: int, rows: torch.Tensor) -> None:
    # Through `.data` the Parameter stays the same object, so whatever else holds it is cut too.
    taken = parameter.data.index_select(dim, rows.to(parameter.device))
    parameter.grad = None
    # An earlier loss that is still around keeps the old shape for gradients to come; torch drops it
    # when the type changes, so that changes for a moment.
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = taken
