"""What a set of masks says about itself: what it fits, how it was made, what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypedDict

from vlp_plugins.models.weights import WeightMap, structure_of
from vlp_plugins.runtime.artifacts import made_before, made_by, versions
from vlp_plugins.runtime.errors import MaskError, first_line, shown
from vlp_plugins.runtime.model_state import arithmetic_of
from vlp_plugins.runtime.untrusted import read_as

SCHEMA = 1
"""Version of the manifest and of the file around it; a change that old code cannot read adds 1."""

SCHEMA_WITH_VALUES = 2
"""Version of masks that bring new values of the kept elements, which old code must not ignore."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What was wrong in older versions than `before`.

    `concerns` says whether masks with such a manifest, of an NNI trial or not, may suffer from it,
    and `says` under which circumstances they do, and what is wrong with them then.
    """

    before: tuple[int, int, int]
    concerns: Callable[[Manifest, bool], bool]
    says: str


class WeightRecord(TypedDict):
    """What the manifest says of one weight; `kept` is the number of elements that stay."""

    shape: list[int]
    modality: str
    kept: int


@dataclass(frozen=True)
class Manifest:
    """The provenance of masks, saved with them.

    Attributes:
        adapter: name of the adapter whose canonical names are used.
        adapter_settings: keywords that make that adapter; see `Adapter.settings`.
        structure: hash of names and shapes, equal to `WeightMap.structure` of the model.
        method: name of the method.
        weights: by canonical name, in the adapter's order. `Masks` counts `kept` itself.
        parameters: of the method.
        seed: of the run.
        sparsity: what was asked for, by modality if a mapping; None if unknown.
        calibration: fingerprint, samples, batches and token handling; None without data.
        weights_hash: `WeightMap.content_hash()` of the dense model, for information; None for a
            model without values.
        model_elements: parameters of the whole model; None if unknown.
        versions: of the packages that took part.
        arithmetic: device and precision that they were made in; see `arithmetic_of`.
        created: time in UTC, ISO 8601.
        note: anything else worth knowing, such as "inverted".
        schema: version of this format.
        made_by: program and version that made the masks.
    """

    adapter: str
    structure: str
    method: str
    weights: dict[str, WeightRecord]
    adapter_settings: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    sparsity: float | dict[str, float] | None = None
    calibration: dict[str, Any] | None = None
    weights_hash: str | None = None
    model_elements: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    arithmetic: dict[str, Any] = field(default_factory=dict)
    created: str | None = None
    note: str | None = None
    schema: int = SCHEMA
    made_by: str = field(default_factory=made_by)

    @classmethod
    def for_weights(
        cls,
        weights: WeightMap,
        *,
        method: str,
        parameters: Mapping[str, Any] | None = None,
        seed: int = 0,
        sparsity: float | Mapping[str, float] | None = None,
        calibration: Mapping[str, Any] | None = None,
        weights_hash: str | None = None,
        note: str | None = None,
    ) -> Manifest:
        """The manifest of masks for the weights of a model, dated now; hashes their values."""
        records: dict[str, WeightRecord] = {
            name: {"shape": list(w.shape), "modality": w.modality, "kept": w.numel}
            for name, w in weights.items()
        }
        no_values = any(weight.absent for weight in weights.values())
        first = next(iter(weights.values()), None)
        return cls(
            adapter=weights.adapter_name,
            adapter_settings=weights.adapter_settings,
            structure=weights.structure,
            method=method,
            weights=records,
            parameters=dict(parameters or {}),
            seed=seed,
            sparsity=dict(sparsity) if isinstance(sparsity, Mapping) else sparsity,
            calibration=None if calibration is None else dict(calibration),
            weights_hash=weights_hash or (None if no_values else weights.content_hash()),
            model_elements=weights.model_elements,
            versions=versions(),
            arithmetic={} if first is None or no_values else arithmetic_of(first.parameter.device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            note=note,
        )

    def doubts(self, *, of_trial: bool = False) -> list[str]:
        """What may be wrong with the masks because of the version that made them, in sentences.

        `of_trial` says whether they were chosen by an NNI experiment.
        """
        return [
            f"{self.made_by} made these masks, and may have made wrong ones: {fault.says}"
            for fault in FAULTS
            if made_before(self.made_by, fault.before) and fault.concerns(self, of_trial)
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self.weights[name]["shape"])

    def numel(self, name: str) -> int:
        """Number of elements of a weight."""
        return math.prod(self.weights[name]["shape"])

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Manifest:
        """Inverse of `dataclasses.asdict`, for what was read from a file of unknown origin.

        Raises:
            MaskError: if a field is missing or of a wrong type, or names and shapes contradict
                the structure; the message continues a sentence about the file.
        """
        try:
            manifest: Manifest = read_as(cls, header, "the manifest")
            if manifest.schema < 1 or manifest.model_elements == 0:
                raise ValueError(
                    f"format {manifest.schema} of a model of {manifest.model_elements} parameters"
                )
            for name, record in manifest.weights.items():
                if min(*record["shape"], record["kept"], 0) < 0:
                    raise ValueError(f"shape or count of {shown(name)} is negative")
        except ValueError as error:
            raise MaskError(f"has a damaged manifest ({first_line(error)})") from error
        structure = structure_of({name: manifest.shape(name) for name in manifest.weights})
        if structure != manifest.structure:
            raise MaskError(
                f"was altered: its names and shapes have structure {structure}, its manifest "
                f"says {manifest.structure}"
            )
        return manifest


_MODULE = "module"
_SEVERAL_PASSES = ("itersnip", "tamt", "lamp-tamt", "taylor", "platon", "chita", "chita++")
_BY_GRADIENTS = ("taylor", "platon")


FAULTS = (
    Fault(
        (0, 2, 0),
        lambda m, _: "id_factors" in m.parameters,
        "samples that were all but equal made intrinsic dimensions too small; if the data had "
        "such, measure them and prune again",
    ),
    Fault(
        (0, 2, 0),
        lambda _, of_trial: of_trial,
        "tuners without optimize_mode looked for the worst result; if the experiment's had none, "
        "take the best trial by its results, or search again",
    ),
    Fault(
        (0, 2, 0),
        lambda m, _: m.method.removeprefix("id*") in _BY_GRADIENTS and m.calibration is None,
        "GradualPruning read the gradients of the batch before where the optimizer was given a "
        "closure (Lightning gives one); if yours was, train again",
    ),
    Fault(
        (0, 2, 0),
        lambda m, _: (
            m.adapter == _MODULE
            and m.calibration is not None
            and (m.method.removeprefix("id*") in _SEVERAL_PASSES or "id_factors" in m.parameters)
        ),
        "a forward that changes its input in place changed the batches of later passes; if the "
        "model's does, prune again",
    ),
    Fault(
        (0, 2, 0),
        lambda m, _: m.adapter == _MODULE and m.calibration is not None,
        "labels of (inputs, labels) batches went into optional parameters of forward; if the model "
        "has some and the batches were such, prune again",
    ),
)
"""What masks of older versions may suffer from."""


@dataclass(frozen=True, slots=True)
class Count:
    """How many of `total` elements are kept."""

    kept: int
    total: int

    @property
    def removed(self) -> int:
        """How many are not."""
        return self.total - self.kept

    @property
    def sparsity(self) -> float:
        """Fraction removed; 0 of nothing."""
        return self.removed / self.total if self.total else 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.kept + other.kept, self.total + other.total)


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts by canonical name, by modality (both in the adapter's order), and of everything."""

    by_weight: dict[str, Count]
    by_modality: dict[str, Count]
    all: Count

    @classmethod
    def of(cls, manifest: Manifest) -> Counts:
        """The counts that a manifest records."""
        by_weight: dict[str, Count] = {}
        by_modality: dict[str, Count] = {}
        for name, record in manifest.weights.items():
            count = by_weight[name] = Count(record["kept"], manifest.numel(name))
            known = by_modality.get(record["modality"], Count(0, 0))
            by_modality[record["modality"]] = known + count
        return cls(by_weight, by_modality, sum(by_weight.values(), Count(0, 0)))
