"""The parts of a transformer that can be made smaller: attention heads and feed-forward units.

Nothing here touches the residual stream: what is cut lies inside a block, between the layers that
read the stream and the one that writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "ffn"]
"""What a block is; with its modality, the scope in which sparsity is allocated."""


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer of a block.

    Attributes:
        paths: dotted paths of every `nn.Linear` that has this weight; several if it is tied, the
            published owner's first.
        weight: canonical name of its weight; None if the adapter does not prune it.
        followers: paths of the same layer in networks that copy this one (`Adapter.followers`):
            other values, and the same rows and columns.
    """

    paths: tuple[str, ...]
    weight: str | None = None
    followers: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head attention: whole heads, or the same number of dimensions of every head, can go.

    Attributes:
        name: canonical name (`vision.0.attention`, `text.3.cross`).
        query: `[heads * head_dim, in]`; so are `key` and `value`.
        key: its rows are those of `query`.
        value: its rows are the columns of `output`.
        output: `[out, heads * head_dim]`.
        head_dim: rows of each.
        modules: paths of the modules that hold number and size of the heads as attributes;
            several if their weights are tied. The first is that of the first path of `query`,
            and so on.
        followers: the same modules in networks that copy this one, as the followers of `query`.
        rotary: whether positions turn the dimensions of a head in pairs, so that only whole heads
            can go.
    """

    name: str
    modality: str
    depth: int
    query: Part
    key: Part
    value: Part
    output: Part
    heads: int
    head_dim: int
    modules: tuple[str, ...]
    followers: tuple[str, ...] = ()
    rotary: bool = False

    kind: Kind = "attention"

    @property
    def inner(self) -> tuple[Part, ...]:
        """The layers whose rows are cut."""
        return (self.query, self.key, self.value)

    @property
    def width(self) -> int:
        """Number of rows of each."""
        return self.heads * self.head_dim

    @property
    def parts(self) -> tuple[Part, ...]:
        """All layers of the block."""
        return (*self.inner, self.output)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A feed-forward block: single units can go.

    Attributes:
        name: canonical name (`vision.0.mlp`, `text.3.ffn`).
        inner: the layers whose rows are cut: one, or gate and up.
        output: the layer whose columns are cut.
    """

    name: str
    modality: str
    depth: int
    inner: tuple[Part, ...]
    output: Part
    width: int

    kind: Kind = "ffn"

    @property
    def parts(self) -> tuple[Part, ...]:
        """All layers of the block."""
        return (*self.inner, self.output)


Block = Attention | FeedForward
