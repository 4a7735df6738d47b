"""The unique prunable weights of one model: canonical name, aliases, modality, ties."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from vlp_plugins.models.adapter import Adapter, Owner, WeightSpec
from vlp_plugins.models.places import Places
from vlp_plugins.runtime.errors import NonFiniteError, TieError, UnsupportedError
from vlp_plugins.runtime.mapped import discard, release, untouched
from vlp_plugins.runtime.offload import Offloaded
from vlp_plugins.runtime.sharding import at_rest, here, is_sharded, whole

_SAMPLE = 4096  # words


@dataclass(frozen=True, slots=True)
class Weight:
    """One prunable weight of a model, however many names it has.

    Attributes:
        name: canonical name.
        modality: the group it belongs to.
        depth: layer index within its tower.
        parameter: the tensor itself, never a copy: a `Parameter`, or a detached view of one, see
            `WeightView`.
        owners: the modules that use it, the published owner first.
        aliases: every parameter path that reaches it, the first owner's first.
        copy_of: canonical name of the weight whose mask it inherits, if any.
        offloaded: where accelerate keeps its values, which `parameter` lacks then (it is on the
            meta device); empty for a weight that is in the model.
    """

    name: str
    modality: str
    depth: int
    parameter: torch.Tensor
    owners: tuple[Owner, ...]
    aliases: tuple[str, ...]
    copy_of: str | None = None
    offloaded: tuple[Offloaded, ...] = ()

    def view_of(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to the weight of a tensor of the whole `Parameter`'s shape; a view."""
        view = self.owners[0].view
        return values if view is None else view.of(values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.parameter.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.parameter.numel()

    @property
    def device(self) -> torch.device:
        """Where it is computed on; an offloaded weight is brought there when it is read."""
        outside = self.parameter.is_meta and self.offloaded
        return self.offloaded[0].device if outside else self.parameter.device

    @property
    def absent(self) -> bool:
        """Whether it has no values anywhere: the model was made on the meta device."""
        return self.parameter.is_meta and not self.offloaded

    @property
    def values(self) -> torch.Tensor:
        """All elements, detached, in the shape of the parameter; for reading only.

        A weight that is sharded over processes is gathered every time (a collective), an offloaded
        one is read every time.
        """
        if self.parameter.is_meta and self.offloaded:
            return self.offloaded[0].read(self.view_of)
        return whole(self.parameter)

    @property
    def matrix(self) -> torch.Tensor:
        """`values` as `[out, in]`; a convolution is flattened to `[out, in*kh*kw]`."""
        return self.values.flatten(1)

    @contextmanager
    def changing(self) -> Iterator[torch.Tensor]:
        """What `runtime.sharding` writes into in place; an offloaded weight is written back."""
        tensor = self.parameter
        if tensor.is_meta and self.offloaded:
            tensor = self.values.clone()
        yield tensor
        part = None if self.owners[0].view is None else self.view_of
        for each in self.offloaded:
            each.write(tensor, part)

    def kept(self) -> Callable[[], None]:
        """Keeps the values of now; what it returns brings them back.

        They are copied to the CPU, those of a sharded weight by each process its own; of a weight
        that is offloaded to disk, or a view of a mapped file, the file is kept.
        """
        if untouched((self.parameter,))[0]:
            return partial(discard, (self.parameter,))
        held = [each.kept() for each in self.offloaded]
        dense = None if self.parameter.is_meta else here(self.parameter).cpu().clone()

        def restore() -> None:
            if dense is not None:
                with torch.no_grad():
                    here(self.parameter).copy_(dense)
            for bring_back in held:
                bring_back()

        return restore

    def gathered(self) -> Weight:
        """The same with all values in this process; a collective if it is sharded."""
        if not is_sharded((self.parameter,)):
            return self
        return replace(self, parameter=whole(self.parameter))

    def within(self, model: nn.Module) -> Weight:
        """The same as it is computed with where `fully_shard` has gathered it (`Gathering`)."""
        if not is_sharded((self.parameter,)):
            return self
        return replace(self, parameter=model.get_parameter(self.aliases[0]))

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """Shape of `matrix`."""
        return self.shape[0], math.prod(self.shape[1:])


class WeightMap(Mapping[str, Weight]):
    """Canonical name -> `Weight`, in the adapter's order. A weight exists once.

    Attributes:
        model_elements: parameters of the whole model, each shared one counted once; None if
            unknown.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        adapter_name: str,
        adapter_settings: Mapping[str, Any] | None = None,
        model_elements: int | None = None,
    ) -> None:
        self._weights = dict(weights)
        self.model_elements = model_elements
        self.adapter_name = adapter_name
        self.adapter_settings = dict(adapter_settings or {})

    @classmethod
    def of(cls, model: nn.Module, adapter: Adapter) -> WeightMap:
        """Resolves what the adapter declares.

        Two declarations that turn out to be one tensor become one weight under the first name. A
        model under `fully_shard` is brought into its sharded state first.

        Raises:
            TieError: if weights overlap in memory without being equal, or if one declaration
                names parameters that are no longer tied.
            UnsupportedError: if nothing is prunable or a path does not exist.
        """
        at_rest(model)
        places = Places(model)
        by_memory: dict[tuple[object, ...], str] = {}
        found: dict[str, Weight] = {}
        for spec in adapter.weights(model):
            key = whole_key = _resolve(model, spec, places)
            stored = places.parameter(whole_key)
            if not stored.numel():
                continue  # a layer without inputs or outputs has nothing to remove
            parameter: torch.Tensor = stored
            if (view := spec.owners[0].view) is not None:
                if is_sharded((stored,)):
                    raise UnsupportedError(
                        f"{spec.owners[0].path} holds several matrices or a transposed one, and is "
                        "sharded over processes, which views of parameters cannot be; exclude it, "
                        "or leave it whole: fully_shard(model, ignored_params=...)"
                    )
                parameter = view.of(stored.detach())
                key = (*whole_key, view.index, view.rows)
            first = by_memory.setdefault(key, spec.name)
            if first in found:
                known = found[first]
                owners = (*known.owners, *(o for o in spec.owners if o not in known.owners))
                found[first] = replace(known, owners=owners)
                continue
            aliases = dict.fromkeys([spec.owners[0].path, *places.paths(whole_key)])
            found[spec.name] = Weight(
                spec.name, spec.modality, spec.depth, parameter, spec.owners,
                tuple(aliases), spec.copy_of, places.offloaded(whole_key),
            )  # fmt: skip
        if not found:
            reasons = [each.reason for each in adapter.exclusions(model) if not each.by_design]
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise UnsupportedError(f"{type(model).__name__} has no prunable weight{why}")
        _reject_overlaps(found)
        elements = sum(parameter.numel() for _, parameter in places.distinct())
        return cls(found, adapter.name, adapter.settings(), elements)

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def numel(self) -> int:
        """Number of prunable elements, each counted once."""
        return sum(weight.numel for weight in self.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the prunable weights, each counted once."""
        return sum(weight.numel * weight.parameter.element_size() for weight in self.values())

    def by_modality(self) -> dict[str, list[Weight]]:
        """The weights of each modality, in order of first appearance."""
        groups: dict[str, list[Weight]] = {}
        for weight in self.values():
            groups.setdefault(weight.modality, []).append(weight)
        return groups

    @property
    def sharded(self) -> bool:
        """Whether a weight is sharded over processes."""
        return is_sharded(weight.parameter for weight in self.values())

    @property
    def structure(self) -> str:
        """Hash of canonical names and shapes: masks fit models of equal structure."""
        return structure_of({name: weight.shape for name, weight in self.items()})

    def content_hash(self) -> str:
        """Hash that tells whether the weights were trained, pruned or replaced.

        It is made for speed, not against intent: SHA-256 over name, dtype, shape and a strided
        sample of about 4096 elements of every weight, so a few milliseconds for any model. A
        change of single elements can go unnoticed.
        """
        digest = hashlib.sha256()
        for weight in self.values():
            digest.update(f"{weight.name}|{weight.parameter.dtype}|{weight.shape}|".encode())
            values = weight.values.reshape(-1)
            sample = values[:: max(1, len(values) // _SAMPLE)].contiguous()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
            release((weight.parameter,))
        return digest.hexdigest()[:16]

    def check_values(self) -> None:
        """Raises `UnsupportedError` for the first weight that has no values to compute with."""
        for weight in self.values():
            parameter = weight.parameter
            what = f"weight {weight.name!r} ({weight.aliases[0]}) is"
            if weight.absent:
                raise UnsupportedError(
                    f"{what} on the meta device, which holds no values: of such a model there are "
                    "`inspect` and `plan` alone; load its weights"
                )
            if parameter.is_floating_point() and parameter.element_size() < 2:
                raise UnsupportedError(
                    f"{what} {str(parameter.dtype).removeprefix('torch.')}, in which nothing can "
                    "be computed; load the model in bfloat16, prune that, and apply the masks here"
                )

    def check_finite(self) -> None:
        """Raises `NonFiniteError` with the name of the first weight that has NaN or infinity.

        Raises:
            UnsupportedError: see `check_values`.
        """
        self.check_values()
        for weight in self.values():
            # NaN or infinity always shows in the sum, which is far cheaper than a look at each
            # element; an overflow shows too, hence the second look.
            finite = torch.isfinite(weight.matrix.sum().float())
            release((weight.parameter,))
            if finite:
                continue
            if bad := int((~torch.isfinite(weight.matrix)).sum()):
                raise NonFiniteError(
                    f"weight {weight.name!r} ({weight.aliases[0]}) has {bad} NaN or infinite "
                    "elements; the checkpoint is damaged or was saved after a diverged training"
                )
            if bad := int((~torch.isfinite(weight.matrix.float())).sum()):
                raise NonFiniteError(
                    f"weight {weight.name!r} ({weight.aliases[0]}) has {bad} elements above "
                    f"{torch.finfo(torch.float32).max:.1e}, which float32 cannot hold, and scores "
                    "are float32; scale the layer, or look at the training that made it"
                )


def uses_of(model: nn.Module, weight: Weight) -> list[nn.Parameter]:
    """Every `Parameter` of a model that is the weight: tied ones may be several of one memory."""
    paths = dict.fromkeys([*weight.aliases, *(owner.path for owner in weight.owners)])
    return list({id(p): p for p in map(model.get_parameter, paths)}.values())


def structure_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """Hash of names and shapes in their order; see `WeightMap.structure`."""
    text = json.dumps([[name, list(shape)] for name, shape in shapes.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def surplus_layer(names: Iterable[str], present: Collection[str]) -> tuple[str, str] | None:
    """The first of `names` that `present` lacks although it has the same of another layer.

    A downstream model may lack a whole kind of weight (the cross-attention of a text encoder by
    itself, a decoder), but a model that has the kind in some layers only is a shallower one.

    Returns:
        That name, and the one of the other layer; None if there is none.
    """
    of_kind = {_kind(name): name for name in present}
    for name in names:
        if name not in present and _kind(name) in of_kind:
            return name, of_kind[_kind(name)]
    return None


def _kind(name: str) -> str:
    """`text.3.cross.query` is `text.#.cross.query`: a canonical name without its layer."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _resolve(model: nn.Module, spec: WeightSpec, places: Places) -> tuple[object, ...]:
    """Where the parameter is that all owners of a declaration share."""
    for owner in spec.owners:
        try:
            model.get_parameter(owner.path)
        except AttributeError as error:
            raise UnsupportedError(
                f"adapter declares {spec.name!r} at {owner.path}, which {type(model).__name__} "
                f"does not have: {error}"
            ) from error
    first = spec.owners[0]
    for owner in spec.owners:
        if not places.same(first.path, owner.path):
            raise TieError(
                f"{spec.name!r} should be one weight, but {first.path} and {owner.path} "
                "are no longer tied; call model.tie_weights() before pruning"
            )
    return places.of(first.path)


def _reject_overlaps(weights: Mapping[str, Weight]) -> None:
    spans = []
    for weight in weights.values():
        tensor = weight.parameter
        if tensor.device.type == "meta" or is_sharded((tensor,)):
            continue
        start = tensor.data_ptr()
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans.append((start, start + extent * tensor.element_size(), weight.name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise TieError(
                f"{name!r} and {other!r} share part of their memory but are not the same tensor; "
                "give each its own storage (parameter.data = parameter.data.clone())"
            )
