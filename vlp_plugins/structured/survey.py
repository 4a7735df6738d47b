"""The blocks of a model under canonical names, ties and followers included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from vlp_plugins.models.adapter import Adapter
from vlp_plugins.models.parts import Attention, Block, FeedForward, Part
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import StructureError
from vlp_plugins.runtime.model_state import takes_model
from vlp_plugins.structured.sites import Site, find_sites, heads_of, is_rotary


@takes_model
def blocks_of(model: nn.Module, adapter: Adapter) -> list[Block]:
    """Every block that can be cut, in the order of its layers in the model.

    Tied blocks are one block with several paths. Blocks of which the adapter prunes nothing are
    left out, as are those of `uncut`; fused projections must be split first (`prepare`).

    Raises:
        StructureError: if an attention block's layers are not as wide as its attributes say.
    """
    return [_block(model, group) for group in survey(model, adapter)[0]]


@takes_model
def uncut(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """What looks like a block and is not among `blocks_of`: module path -> reason."""
    return survey(model, adapter)[1]


@dataclass(frozen=True, slots=True)
class Group:
    """The places of one block, under its canonical name.

    Attributes:
        sites: several if it is tied.
        weights: of its layers in the order of `Site.linears`; None where nothing is pruned.
        followers: its sites in networks that follow.
    """

    sites: tuple[Site, ...]
    weights: tuple[Weight | None, ...]
    followers: tuple[Site, ...]
    name: str


@takes_model
def survey(model: nn.Module, adapter: Adapter) -> tuple[list[Group], dict[str, str]]:
    """The places of every block, tied ones joined, and what `uncut` returns."""
    weights = {
        alias: weight
        for weight in WeightMap.of(model, adapter).values()
        for alias in weight.aliases
    }
    # Equal for the paths of one weight: its canonical name, else the parameter itself.
    keys: dict[str, object] = {
        path: weights[path].name if path in weights else id(parameter)
        for path, parameter in model.named_parameters(remove_duplicate=False)
    }
    users: dict[object, set[str]] = {}
    for path, each in keys.items():
        users.setdefault(each, set()).add(path)
    tied: dict[tuple[object, ...], list[Site]] = {}
    found, obstacles = find_sites(model)
    for site in found:
        tied.setdefault(tuple(keys[f"{path}.weight"] for path in site.linears), []).append(site)
    rules = [(re.compile(rule.pattern), rule.reason) for rule in adapter.exclusions(model)]
    following = adapter.followers(model)
    groups = []
    for key, sites in tied.items():
        known = tuple(weights.get(f"{path}.weight") for path in sites[0].linears)
        path = sites[0].path
        if not any(known):
            reason = next((why for rule, why in rules if rule.search(f"{path}.")), None)
            obstacles |= {site.path: reason or "the adapter does not prune it" for site in sites}
        elif outside := _outside(key, sites, users):
            obstacles |= {
                site.path: f"it shares a weight with {outside}, which is not a part of such a block"
                for site in sites
            }
        else:
            name = _name(sites[0], [weight.name for weight in known if weight])
            groups.append(Group(tuple(sites), known, tuple(_followers(sites, following)), name))
    names = [group.name for group in groups]
    groups = [
        group if names.count(group.name) == 1 else replace(group, name=group.sites[0].path)
        for group in groups
    ]
    return groups, obstacles


def _block(model: nn.Module, group: Group) -> Block:
    first = group.sites[0]
    weight = next(weight for weight in group.weights if weight)
    parts = [
        Part(
            tuple(site.linears[index] for site in group.sites),
            known.name if known else None,
            tuple(site.linears[index] for site in group.followers),
        )
        for index, known in enumerate(group.weights)
    ]
    width = model.get_submodule(first.output).in_features
    assert isinstance(width, int)  # find_sites makes sure that it is a Linear layer
    if first.kind == "ffn":
        return FeedForward(
            name=group.name,
            modality=weight.modality,
            depth=weight.depth,
            inner=tuple(parts[:-1]),
            output=parts[-1],
            width=width,
        )
    holder = model.get_submodule(first.holder)
    heads, size = heads_of(holder, width) or (1, width)  # a site without heads is an obstacle
    if heads * size != width:
        raise StructureError(
            f"{first.holder} has layers of {width} rows, but its attributes say {heads} heads of "
            f"{size}; after cutting layers call patch(model, adapter)"
        )
    query, key, value, output = parts
    return Attention(
        name=group.name,
        modality=weight.modality,
        depth=weight.depth,
        query=query,
        key=key,
        value=value,
        output=output,
        heads=heads,
        head_dim=size,
        modules=tuple(site.holder for site in group.sites),
        followers=tuple(site.holder for site in group.followers),
        rotary=is_rotary(holder),
    )


def _outside(
    key: Sequence[object], sites: Sequence[Site], users: Mapping[object, set[str]]
) -> str | None:
    """A parameter outside these places that is one of their weights."""
    for index, each in enumerate(key):
        inside = {f"{site.linears[index]}.weight" for site in sites}
        if others := sorted(users[each] - inside):
            return others[0]
    return None


def _followers(sites: Sequence[Site], following: Mapping[str, str]) -> Iterator[Site]:
    for site in sites:
        for leader, follower in following.items():
            if site.path == leader or site.path.startswith(f"{leader}."):
                yield site.moved(leader, follower)


def _name(site: Site, names: Sequence[str]) -> str:
    """What the canonical names of the layers begin with; the path of the module if nothing."""
    parts = [name.split(".") for name in names]
    common = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    if len(names) == 1:
        common = common[:-1]
    if not common:
        return site.path
    # BERT's two feed-forward layers have nothing in common but the transformer layer.
    return ".".join([*common, site.kind] if common[-1].isdigit() else common)
