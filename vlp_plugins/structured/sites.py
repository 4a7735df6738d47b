"""Attention and feed-forward modules of a model that can be cut, and their attributes.

They are found by the names of transformers 5; classes do not matter, so families without an adapter
are found too. A module without a factor for its scores computes it from the size of the heads
whenever it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from vlp_plugins.models.parts import Kind

_COUNTS = ("num_attention_heads", "num_heads", "num_key_value_heads")
_SIZES = ("attention_head_size", "head_dim")
_WIDTH = "all_head_size"
_SCALES = ("scaling", "scale")
_ROTARY = ("position_embeddings", "rotary_pos_emb", "freqs_cis")


def heads_of(module: nn.Module, width: int) -> tuple[int, int] | None:
    """Number and size of the heads, as the module's attributes say; None if they do not.

    Where only the size is an attribute, the width of its layers gives the number.
    """
    count, size = _first(module, _COUNTS), _first(module, _SIZES)
    if size is None or size < 1:
        return None
    if count is None:
        return None if width % size else (width // size, size)
    return count, size


def set_heads(module: nn.Module, count: int, size: int) -> None:
    """Changes these attributes; factors of the scores stay as they were."""
    for names, value in ((_COUNTS, count), (_SIZES, size), ((_WIDTH,), count * size)):
        for name in names:
            if hasattr(module, name):
                setattr(module, name, value)


def scales_at_run_time(module: nn.Module) -> bool:
    """True if the scores are divided by the root of the current size of the heads."""
    return not any(hasattr(module, name) for name in _SCALES)


def is_rotary(module: nn.Module) -> bool:
    """True if the module takes angles that turn its queries and keys."""
    return any(name in inspect.signature(module.forward).parameters for name in _ROTARY)


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


_PATTERNS: tuple[tuple[Kind, tuple[str, ...], str, str], ...] = (
    ("attention", ("q_proj", "k_proj", "v_proj"), "out_proj", ""),
    ("attention", ("q_proj", "k_proj", "v_proj"), "o_proj", ""),
    ("attention", ("q_proj", "k_proj", "v_proj"), "projection", ""),
    ("attention", ("self.query", "self.key", "self.value"), "output.dense", "self"),
    (
        "attention",
        ("attention.query", "attention.key", "attention.value"),
        "output.dense",
        "attention",
    ),
    ("ffn", ("fc1",), "fc2", ""),
    ("ffn", ("gate_proj", "up_proj"), "down_proj", ""),
    ("ffn", ("up_proj",), "down_proj", ""),
    ("ffn", ("intermediate.dense",), "output.dense", "intermediate"),
)
"""What a block is, and the paths in it of its inner layers, its output and `Site.holder`; of a kind
the first that is there counts."""
_FUSED = ("qkv", "in_proj", "c_attn", "query_key_value", "weights_in", "gate_up_proj")


@dataclass(frozen=True, slots=True)
class Site:
    """A block at one place; tied blocks are at several.

    Attributes:
        path: of the module that holds it.
        inner: paths of the layers whose rows are cut.
        output: path of the layer whose columns are cut.
        holder: path of the module with number and size of the heads, or that of the layers of a
            feed-forward block.
    """

    kind: Kind
    path: str
    inner: tuple[str, ...]
    output: str
    holder: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all layers, the output last."""
        return (*self.inner, self.output)

    def moved(self, old: str, new: str) -> Site:
        """The same place in another network: paths begin with `new` in place of `old`."""
        path, output, holder, *inner = (
            new + each.removeprefix(old)
            for each in (self.path, self.output, self.holder, *self.inner)
        )
        return Site(self.kind, path, tuple(inner), output, holder)


def find_sites(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Every block in the order of its layers, and path -> reason of what cannot be cut.

    A block that is reached by several paths is found at each.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: list[Site] = []
    obstacles: dict[str, str] = {}
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            obstacles[path] = "nn.MultiheadAttention keeps query, key and value in one bare tensor"
            continue
        fused = next((name for name in _FUSED if isinstance(_child(module, name), nn.Linear)), None)
        if fused is not None:
            obstacles[path] = (
                f"{fused} holds several projections in one layer; prepare(model, adapter) splits "
                "those that the adapter knows"
            )
        for site in _sites(path, module):
            if reason := _obstacle(site, modules):
                obstacles[path] = reason
            else:
                sites.append(site)
    order = {path: index for index, path in enumerate(modules)}
    return sorted(sites, key=lambda site: order[site.inner[0]]), obstacles


def _sites(path: str, module: nn.Module) -> Iterator[Site]:
    """The blocks that a module holds, of each kind one at most."""
    found: set[Kind] = set()
    for kind, inner, output, holder in _PATTERNS:
        if kind not in found and all(_child(module, name) is not None for name in (*inner, output)):
            found.add(kind)
            layers = tuple(_join(path, name) for name in inner)
            yield Site(kind, path, layers, _join(path, output), _join(path, holder))


def _obstacle(site: Site, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a block cannot be cut, as far as its own modules show; None if it can."""
    linears: list[nn.Linear] = []
    for path in site.linears:
        linear = modules[path]
        if not isinstance(linear, nn.Linear) or "weight" not in linear._parameters:
            return (
                f"{path} is a {type(linear).__name__} and no plain Linear layer; merge or remove "
                "what wraps it"
            )
        linears.append(linear)
    holder = modules[site.holder]
    own = {id(parameter) for linear in linears for parameter in linear.parameters()}
    if others := [name for name, p in holder.named_parameters() if id(p) not in own]:
        return f"it has {others[0]}, which may depend on the number of heads or units"
    widths = [*(linear.out_features for linear in linears[:-1]), linears[-1].in_features]
    if len(set(widths)) > 1:
        layers = ", ".join(path.rpartition(".")[2] for path in site.linears)
        what = "grouped queries" if site.kind == "attention" else "units of several layers"
        return f"{layers} are {widths} wide ({what}); only blocks of one width are cut"
    if site.kind == "attention" and heads_of(holder, widths[0]) is None:
        return "no attribute of a known name says how many heads it has and how large they are"
    return None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
