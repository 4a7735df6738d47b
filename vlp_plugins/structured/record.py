"""What structured pruning kept, as a value: by block the heads, their dimensions, the units."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

from vlp_plugins.runtime.errors import StructureError, shown

T = TypeVar("T")

_FIELDS = ("heads", "dims", "units")


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one block, in coordinates of the block before it was cut.

    Indices ascend. None keeps all.

    Attributes:
        heads: of an attention block, the heads.
        dims: of an attention block, for every kept head its kept dimensions, counted from 0 within
            that head; of every head as many.
        units: of a feed-forward block, the units.
    """

    heads: tuple[int, ...] | None = None
    dims: tuple[tuple[int, ...], ...] | None = None
    units: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Makes tuples of sequences; checks what can be checked without a block."""
        for name in _FIELDS:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _whole(name, given, nested=name == "dims"))
        if self.units is not None and (self.heads is not None or self.dims is not None):
            raise StructureError(
                "a block has heads or units, not both; give heads and dims, or units"
            )
        for name, indices in self._lists():
            if not indices:
                raise StructureError(f"{name} is empty, but a block keeps at least one")
            if indices[0] < 0 or any(low >= high for low, high in pairwise(indices)):
                raise StructureError(
                    f"{name} should ascend from 0 or more; they are {shown(indices)}"
                )
        if self.dims is None:
            return
        sizes = sorted({len(dims) for dims in self.dims})
        if len(sizes) != 1:
            raise StructureError(f"every head keeps as many dimensions; here they keep {sizes}")
        if self.heads is not None and len(self.heads) != len(self.dims):
            raise StructureError(
                f"dims are of {len(self.dims)} heads, but {len(self.heads)} heads are kept"
            )

    def then(self, later: Kept) -> Kept:
        """What is kept in all, if `later` was cut from the block that this left.

        Raises:
            StructureError: if `later` names what is no longer there.
        """
        heads = later.heads if self.heads is None else _taken(self.heads, later.heads)
        dims = later.dims
        if self.dims is not None:
            dims = _taken(self.dims, later.heads)
            if later.dims is not None:
                if len(later.dims) != len(dims):
                    raise StructureError(
                        f"dims are of {len(later.dims)} heads, but there are {len(dims)}"
                    )
                pairs = zip(dims, later.dims, strict=True)
                dims = tuple(_taken(before, after) for before, after in pairs)
        units = later.units if self.units is None else _taken(self.units, later.units)
        return Kept(heads, dims, units)

    def _lists(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.heads is not None:
            yield "heads", self.heads
        if self.units is not None:
            yield "units", self.units
        if self.dims is not None:
            if not self.dims:
                yield "dims", ()
            for head, dims in enumerate(self.dims):
                yield f"dims of head {head}", dims


class Record(Mapping[str, Kept]):
    """Canonical block name -> `Kept`. A block that is not named is whole.

    Attributes:
        adapter: name of the adapter whose block names these are; None if unknown.
    """

    def __init__(
        self,
        kept: Mapping[str, Kept] | Iterable[tuple[str, Kept]] = (),
        adapter: str | None = None,
    ) -> None:
        self._kept = dict(kept)
        self.adapter = adapter

    def __getitem__(self, name: str) -> Kept:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"Record({self._kept!r})"

    def compose(self, later: Record) -> Record:
        """One record of this step and a later one, in coordinates of the model before both.

        Raises:
            StructureError: if `later` names what is no longer there, or is of another adapter.
        """
        if later.adapter is not None:
            self.check_adapter(later.adapter)
        names = dict.fromkeys([*self, *later])
        whole = Kept()
        return Record(
            ((n, self.get(n, whole).then(later.get(n, whole))) for n in names),
            self.adapter or later.adapter,
        )

    def check_adapter(self, name: str) -> None:
        """Raises `StructureError` if the record is of a model of another adapter than `name`."""
        if self.adapter is not None and self.adapter != name:
            raise StructureError(
                f"the record is of a model of adapter {self.adapter!r}, and this one is of adapter "
                f"{name!r}, whose names mean other blocks; give the record of a model of this "
                "family"
            )

    def heads(self) -> dict[str, int]:
        """The number of heads of every attention block that lost something, for `patch`."""
        return {name: len(kept.heads) for name, kept in self.items() if kept.heads is not None}

    def to_json(self) -> dict[str, Any]:
        """Lists and numbers that JSON can keep."""
        return {
            name: {field: value for field, value in asdict(kept).items() if value is not None}
            for name, kept in self.items()
        }

    @classmethod
    def from_json(cls, data: object) -> Record:
        """The record of which `to_json` made `data`; `StructureError` if it is something else."""
        if not isinstance(data, Mapping):
            raise StructureError(f"a record is a mapping of block names; this is {shown(data)}")
        found = {}
        for name, given in data.items():
            if not isinstance(given, Mapping) or set(given) - set(_FIELDS):
                raise StructureError(
                    f"block {name!r:.80} should have {', '.join(_FIELDS)}; it has {shown(given)}"
                )
            try:
                found[str(name)] = Kept(**given)
            except StructureError as error:
                raise StructureError(f"block {name!r:.80}: {error}") from error
        return cls(found)


def _whole(name: str, given: Any, *, nested: bool) -> tuple[Any, ...]:
    """Indices as tuples of int, which compare, hash and can be written as JSON."""
    try:
        if nested:
            return tuple(_whole(name, each, nested=False) for each in given)
        if any(isinstance(each, bool) for each in given):
            raise TypeError("a mask is no list of indices")
        return tuple(int(operator.index(each)) for each in given)
    except TypeError as error:
        raise StructureError(
            f"{name} should be whole numbers ({error}); they are {shown(given)}"
        ) from error


def _taken(values: tuple[T, ...], indices: tuple[int, ...] | None) -> tuple[T, ...]:
    if indices is None:
        return values
    if indices and indices[-1] >= len(values):
        raise StructureError(f"index {indices[-1]} is out of range: only {len(values)} are left")
    return tuple(values[index] for index in indices)
