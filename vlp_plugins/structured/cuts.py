"""Cuts heads and units out of a model by index selection, or zeros them in the uncut model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Attention, Block, Part
from vlp_plugins.models.saving import REBUILT
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import StructureError, UnsupportedError, suggest
from vlp_plugins.runtime.model_state import bare, takes_model
from vlp_plugins.runtime.offload import check_resident
from vlp_plugins.runtime.sharding import is_sharded
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.sites import Site, heads_of, scales_at_run_time, set_heads
from vlp_plugins.structured.survey import Group, blocks_of, survey, uncut


def fitting(
    model: torch.nn.Module, adapter: Adapter, record: Mapping[str, Kept]
) -> list[tuple[Block, Kept]]:
    """The blocks that a record names, in the order of the model, each with what is kept of it.

    Raises:
        StructureError: if the record names a block that the model does not have or that is smaller,
            or is of another adapter.
    """
    if isinstance(record, Record):
        record.check_adapter(adapter.name)
    blocks = {block.name: block for block in blocks_of(model, adapter)}
    for name, kept in record.items():
        if name not in blocks:
            left_out = uncut(model, adapter)
            why = f": {left_out[name]}" if name in left_out else suggest(name, list(blocks))
            if name not in left_out and left_out:
                path, reason = next(iter(left_out.items()))
                why += f"; left out are {len(left_out)}, first {path}: {reason}"
            raise StructureError(f"{type(model).__name__} has no block {name!r} to cut{why}")
        check_fits(blocks[name], kept)
    return [(block, record[name]) for name, block in blocks.items() if name in record]


def check_fits(block: Block, kept: Kept) -> None:
    """Raises `StructureError` if `kept` is not of a block like this."""
    if not isinstance(block, Attention):
        if kept.heads is not None or kept.dims is not None:
            raise StructureError(f"{block.name!r} is a feed-forward block and has no heads")
        _check_range(block, "unit", kept.units, block.width)
        return
    if kept.units is not None:
        raise StructureError(f"{block.name!r} is an attention block; give heads and dims")
    _check_range(block, "head", kept.heads, block.heads)
    if kept.dims is None:
        return
    if block.rotary:
        raise StructureError(
            f"positions turn the dimensions of {block.name!r} in pairs, so only whole heads can go"
        )
    count = block.heads if kept.heads is None else len(kept.heads)
    if len(kept.dims) != count:
        raise StructureError(
            f"{block.name!r} keeps {count} heads, but has dims of {len(kept.dims)}"
        )
    for dims in kept.dims:
        _check_range(block, "dimension", dims, block.head_dim)


def size_of(block: Block, kept: Kept) -> tuple[int, int]:
    """Number and size of the heads that are kept of a block; of a feed-forward block (units, 1)."""
    if not isinstance(block, Attention):
        return (block.width if kept.units is None else len(kept.units)), 1
    heads = block.heads if kept.heads is None else len(kept.heads)
    return heads, block.head_dim if kept.dims is None else len(kept.dims[0])


def rows_kept(block: Block, kept: Kept) -> torch.Tensor:
    """The rows of the inner layers (columns of the output) that are kept, int64, ascending.

    Row `h * head_dim + d` is dimension `d` of head `h`.
    """
    if not isinstance(block, Attention):
        units = range(block.width) if kept.units is None else kept.units
        return torch.tensor(units, device="cpu")
    heads = range(block.heads) if kept.heads is None else kept.heads
    dims = [range(block.head_dim)] * len(heads) if kept.dims is None else kept.dims
    return torch.tensor(
        [
            head * block.head_dim + dim
            for head, each in zip(heads, dims, strict=True)
            for dim in each
        ],
        device="cpu",
    )


def _check_range(block: Block, what: str, indices: tuple[int, ...] | None, count: int) -> None:
    if indices is not None and indices[-1] >= count:
        raise StructureError(
            f"{block.name!r} has no {what} {indices[-1]}, only {count}; is the record in "
            "coordinates of this model, and not of one that was larger?"
        )


@takes_model
def prepare(model: nn.Module, adapter: Adapter) -> None:
    """Gives every projection a layer of its own, in place, as cutting needs it.

    What the model computes stays the same. Optimizers made before do not know the new layers. Save
    a model whose layers were split with `save_structured`: `from_pretrained` would look for the
    fused ones, not find them, and draw them at random.
    """
    check_resident(model, "cutting")
    before = sum(1 for _ in model.modules())
    adapter.split_fused(model)
    if sum(1 for _ in model.modules()) != before:
        setattr(model, REBUILT, True)


@takes_model
def cut(model: nn.Module, adapter: Adapter, record: Mapping[str, Kept]) -> None:
    """Removes all that a record does not keep, in place.

    The record is in coordinates of the model as it is now, which must be prepared (see `prepare`).
    Parameters stay the objects that they are, with fewer elements: ties survive. Gradients are
    dropped; an optimizer made before holds averages of the old shapes: make a new one. Networks
    that follow others are cut alike. The factor of attention scores stays that of the uncut heads:
    where a module computes it from their size, its query is rescaled instead.

    Raises:
        StructureError: if the record does not fit; the model is untouched then.
        UnsupportedError: if the model is sharded or offloaded.
    """
    check_resident(model, "cutting")
    if is_sharded(model.parameters()):
        raise UnsupportedError(
            "the model is sharded; cut it before it is wrapped by fully_shard, and wrap it then"
        )
    for block, kept in fitting(model, adapter, record):
        shrink(model, block, kept)


@torch.no_grad()
def shrink(model: nn.Module, block: Block, kept: Kept, *, rescale: bool = True) -> None:
    """Cuts one block, as it is now, and its copies in networks that follow.

    `rescale=False` leaves queries alone: the layers' values come from a cut model.
    """
    rows = rows_kept(block, kept)
    if len(rows) == block.width:
        return
    _keep(block, rows, lambda part: linears_of(model, part))
    setattr(model, REBUILT, True)
    if isinstance(block, Attention):
        holders = (*block.modules, *block.followers)
        queries = (*block.query.paths, *block.query.followers)
        heads, size = size_of(block, kept)
        if rescale:
            _rescale_queries(model, holders, queries, block.head_dim, size)
        for path in holders:
            set_heads(model.get_submodule(path), heads, size)


@torch.no_grad()
def shrink_followers(model: nn.Module, blocks: Iterable[Block], record: Mapping[str, Kept]) -> None:
    """Cuts only the copies of blocks in networks that follow; `patch` sets their heads.

    For models whose own layers are cut by other means: Torch-Pruning traces no followers. Blocks
    and record are those of the model before.
    """
    for block in blocks:
        if block.name in record:
            rows = rows_kept(block, record[block.name])
            _keep(block, rows, lambda part: [_linear(model, path) for path in part.followers])


@torch.no_grad()
def _rescale_queries(
    model: nn.Module, holders: Iterable[str], queries: Iterable[str], old: int, new: int
) -> None:
    """Undoes what another size of heads does to scores that are divided by its root at run time.

    `q k / sqrt(old)` is `(q sqrt(new / old)) k / sqrt(new)`.
    """
    if old == new:
        return
    linears = [
        _linear(model, query)
        for holder, query in zip(holders, queries, strict=True)
        if scales_at_run_time(model.get_submodule(holder))
    ]
    for parameter in _distinct(linears):
        parameter.mul_(math.sqrt(new / old))


def linears_of(model: nn.Module, part: Part) -> list[nn.Linear]:
    """The layers at all paths of a part, those of followers included."""
    return [_linear(model, path) for path in (*part.paths, *part.followers)]


def _keep(block: Block, rows: torch.Tensor, linears: Callable[[Part], list[nn.Linear]]) -> None:
    """Keeps these rows of the inner layers and columns of the output; `linears` says of which."""
    for part in block.inner:
        layers = linears(part)
        for parameter in _distinct(layers):
            _take(parameter, 0, rows)
        for linear in layers:
            linear.out_features = len(rows)
    layers = linears(block.output)
    for weight in {id(linear.weight): linear.weight for linear in layers}.values():
        _take(weight, 1, rows)
    for linear in layers:
        linear.in_features = len(rows)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise StructureError(f"{path} is a {type(module).__name__} and no Linear layer any more")
    return module


def _distinct(linears: Iterable[nn.Linear]) -> list[torch.Tensor]:
    """Weights and biases, each once however many layers share it."""
    found: list[torch.Tensor | None] = []
    for linear in linears:
        found += [linear.weight, linear.bias]
    return list({id(p): p for p in found if p is not None}.values())


def _take(parameter: torch.Tensor, dim: int, rows: torch.Tensor) -> None:
    # Through `.data` the Parameter stays the same object, so everything that holds it is cut too.
    taken = parameter.data.index_select(dim, rows.to(parameter.device))
    parameter.grad = None
    # An earlier loss that is still around keeps the old shape for gradients to come; torch drops it
    # when the type changes, so that changes for a moment.
    other = torch.float32 if parameter.dtype == torch.float16 else torch.float16
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = taken


@takes_model
def patch(model: nn.Module, adapter: Adapter, heads: Mapping[str, int] | None = None) -> None:
    """Makes number and size of heads agree with the layers as they are now.

    Where a module computes the factor of its scores from the size of its heads, its query is
    rescaled, so that the factor stays that of the uncut heads. What agrees already is left alone.
    `heads` is their number by block name, as it is now. Without it, as many dimensions per head as
    before or as many heads as before are assumed; if both fit, it must be given.

    Raises:
        StructureError: if the layers' sizes cannot be explained; nothing was changed then.
    """
    groups = [g for g in survey(model, adapter)[0] if g.sites[0].kind == "attention"]
    known = heads or {}
    for change in [_change(model, group, known.get(group.name)) for group in groups]:
        if change is None:
            continue
        sites, count, old, new = change
        holders = [site.holder for site in sites]
        _rescale_queries(model, holders, [site.inner[0] for site in sites], old, new)
        setattr(model, REBUILT, True)
        for holder in holders:
            set_heads(model.get_submodule(holder), count, new)


def _change(
    model: nn.Module, group: Group, given: int | None
) -> tuple[list[Site], int, int, int] | None:
    """Where heads must be set, how many, and their size before and now; None if all agree."""
    sites = (*group.sites, *group.followers)
    width = _linear(model, sites[0].output).in_features
    before = heads_of(model.get_submodule(sites[0].holder), width)
    if before is None or (before[0] * before[1] == width and given in (None, before[0])):
        return None
    count, size = before
    heads = given or _guessed(group.name, count, size, width)
    if width % heads:
        raise StructureError(f"{group.name!r} is {width} wide now, which is not {heads} heads")
    changed = [site for site in sites if _linear(model, site.output).in_features == width]
    return changed, heads, size, width // heads


def _guessed(name: str, count: int, size: int, width: int) -> int:
    """The number of heads, if the new width shows whether heads or dimensions went."""
    whole, narrower = width % size == 0, width % count == 0
    if whole == narrower:
        why = "both fit" if whole else "neither fits"
        raise StructureError(
            f"{name!r} had {count} heads of {size} and is {width} wide now: fewer heads, or fewer "
            f"dimensions of each? {why}; give patch(..., heads={{{name!r}: number of heads now}})"
        )
    return width // size if whole else count


@contextmanager
def masked(model: nn.Module, adapter: Adapter, record: Mapping[str, Kept]) -> Iterator[None]:
    """Zeros in the uncut model what a record removes; values return when the block ends.

    The model is prepared, and the record in its coordinates. Zero columns of the output layer
    silence a unit, a head, or the value dimensions of one. Of a dimension of a head that stays, the
    query's row and bias are zero too, as the product with any key adds nothing to a score then. So
    nothing else needs to be zero: rows of keys, values and units change nothing any more.

    Raises:
        StructureError: if the record does not fit.
    """
    model = bare(model)
    saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    try:
        with torch.no_grad():
            for block, kept in fitting(model, adapter, record):
                removed = torch.ones(block.width, dtype=torch.bool, device="cpu")
                removed[rows_kept(block, kept)] = False
                for parameter, dim in _silencing(model, block):
                    if id(parameter) not in saved:
                        saved[id(parameter)] = (parameter, parameter.detach().clone())
                        rows = removed.nonzero().flatten().to(parameter.device)
                        parameter.index_fill_(dim, rows, 0)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved.values():
                parameter.copy_(values)


def _silencing(model: nn.Module, block: Block) -> Iterator[tuple[torch.Tensor, int]]:
    """The parameters whose zeros silence parts of a block, and the dimension to index."""
    for linear in linears_of(model, block.output):
        yield linear.weight, 1
    if isinstance(block, Attention):
        for parameter in _distinct(linears_of(model, block.query)):
            yield parameter, 0


@takes_model
def transferred(model: nn.Module, adapter: Adapter, record: Mapping[str, Kept]) -> Record:
    """The part of a record of a pre-training model that is about blocks of another of the family.

    Both models are uncut, and this one is prepared. Blocks that it lacks are left out. A block
    whose weights are copies of those of a block of the record (a decoder that began as the encoder)
    keeps what that one keeps.

    Raises:
        StructureError: if nothing of the record is about this model, its blocks are smaller, or the
            record is of another adapter.
    """
    if isinstance(record, Record):
        record.check_adapter(adapter.name)
    origins = {weight.name: weight.copy_of for weight in WeightMap.of(model, adapter).values()}
    blocks = blocks_of(model, adapter)
    found = {}
    for block in blocks:
        name = block.name if block.name in record else _origin(block, origins)
        if name in record:
            check_fits(block, record[name])
            found[block.name] = record[name]
    if record and not found:
        raise StructureError(
            f"no block of the record ({', '.join(list(record)[:3])}, ...) is in "
            f"{type(model).__name__}, whose blocks are {', '.join(b.name for b in blocks[:3])}, ..."
        )
    return Record(found, adapter.name)


def _origin(block: Block, origins: Mapping[str, str | None]) -> str:
    """The name of the block that this one began as a copy of; its own if it began as none."""
    for part in block.parts:
        origin = origins.get(part.weight) if part.weight else None
        if part.weight and origin and part.weight.startswith(f"{block.name}."):
            return origin.removesuffix(part.weight.removeprefix(block.name))
    return block.name
