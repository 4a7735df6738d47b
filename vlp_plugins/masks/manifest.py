"""What a set of masks says about itself: what it fits, and how it was made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypedDict

import vlp_plugins
from vlp_plugins.errors import MaskError
from vlp_plugins.weights import WeightMap

SCHEMA = 1
"""Version of the manifest and of the file around it; a change that old code cannot read adds 1."""


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
        structure: hash of names and shapes, equal to `WeightMap.structure` of the model.
        method: name of the method.
        weights: by canonical name, in the adapter's order. `Masks` counts `kept` itself.
        parameters: of the method.
        seed: of the run.
        sparsity: what was asked for, by modality if a mapping; None if unknown.
        calibration: fingerprint, samples, batches and token handling; None without data.
        weights_hash: `WeightMap.content_hash()` of the dense model, for information.
        versions: of the packages that took part.
        created: time in UTC, ISO 8601.
        note: anything else worth knowing, such as "inverted".
        schema: version of this format.
        made_by: program and version that made the masks.
    """

    adapter: str
    structure: str
    method: str
    weights: dict[str, WeightRecord]
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    sparsity: float | dict[str, float] | None = None
    calibration: dict[str, Any] | None = None
    weights_hash: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None
    note: str | None = None
    schema: int = SCHEMA
    made_by: str = f"vlp_plugins {vlp_plugins.__version__}"

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
        """The manifest of masks for the weights of a model, dated now."""
        records: dict[str, WeightRecord] = {
            name: {"shape": list(w.shape), "modality": w.modality, "kept": w.numel}
            for name, w in weights.items()
        }
        return cls(
            adapter=weights.adapter_name,
            structure=weights.structure,
            method=method,
            weights=records,
            parameters=dict(parameters or {}),
            seed=seed,
            sparsity=dict(sparsity) if isinstance(sparsity, Mapping) else sparsity,
            calibration=None if calibration is None else dict(calibration),
            weights_hash=weights_hash,
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            note=note,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self.weights[name]["shape"])

    def numel(self, name: str) -> int:
        """Number of elements of a weight."""
        return math.prod(self.weights[name]["shape"])

    def to_json(self) -> str:
        """As JSON; values that JSON lacks become text."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`.

        Raises:
            MaskError: if the text is damaged, made by a newer version, or contradicts itself.
        """
        try:
            data = json.loads(text)
            schema = data["schema"]
            if isinstance(schema, int) and schema > SCHEMA:
                raise MaskError(
                    f"has format {schema}, newer than the {SCHEMA} that this version reads; "
                    f"it was made by {data.get('made_by')}: upgrade vlp-plugins"
                )
            known = {f.name for f in fields(cls)}
            manifest = cls(**{key: value for key, value in data.items() if key in known})
            _check_types(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MaskError(
                f"has a damaged manifest ({type(error).__name__}: {error}); make or copy it again"
            ) from error
        structure = structure_of({name: manifest.shape(name) for name in manifest.weights})
        if structure != manifest.structure:
            raise MaskError(
                f"was altered: its names and shapes have structure {structure}, its manifest "
                f"says {manifest.structure}; make or copy it again"
            )
        return manifest


def structure_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """The hash that `WeightMap.structure` gives to a model with these weights in this order."""
    text = json.dumps([[name, list(shape)] for name, shape in shapes.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_types(manifest: Manifest) -> None:
    """Raises `ValueError` at the first field that code relies on and that has a wrong type."""
    for key in ("adapter", "structure", "method", "made_by"):
        if not isinstance(getattr(manifest, key), str):
            raise ValueError(f"{key} is not a text")
    if not isinstance(manifest.schema, int) or manifest.schema < 1:
        raise ValueError(f"format {manifest.schema!r}")
    for name, record in manifest.weights.items():
        sizes = [*record["shape"], record["kept"]]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"shape or count of {name!r} is not a number")
        if not isinstance(record["modality"], str):
            raise ValueError(f"modality of {name!r} is not a text")


def _versions() -> dict[str, str]:
    """Versions of the packages that decide the values of masks."""
    found = {}
    for package in ("vlp-plugins", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
