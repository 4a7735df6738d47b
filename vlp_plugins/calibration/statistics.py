"""Statistics of one data pass: kept in a few megabytes, saved, and used again without data."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from vlp_plugins.calibration.moments import LOSS_STREAM, Key, Site, Statistic, sums_of
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.artifacts import Format, made_before, read_artifact, write_artifact
from vlp_plugins.runtime.errors import StatisticsError, first_line
from vlp_plugins.runtime.numbers import count
from vlp_plugins.runtime.untrusted import read_as

logger = logging.getLogger(__name__)

_SOUND = (0, 2, 0)
_REMEDY = "repeat the data pass, or give a file that Statistics.save wrote"
_FORM = Format("statistics", "vlp_statistics", 1, StatisticsError, _REMEDY)


def pack_sums(sums: dict[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Accumulators by the text of their key."""
    return {f"{statistic}|{site}": tensor for (statistic, site), tensor in sums.items()}


def unpack_sums(tensors: dict[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Inverse of `pack_sums`, in sorted order.

    Raises:
        ValueError: if a name or tensor is not one that `pack_sums` gives.
    """
    sums = {}
    for name in sorted(tensors):
        statistic, site = name.split("|", 1)
        tensor = tensors[name]
        key = statistic, Site.parse(site)
        rows = (1, 2) if key[1].stream == LOSS_STREAM else (2,)
        if tensor.dtype != torch.float64 or tensor.ndim != 2 or len(tensor) not in rows:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
        sums[key] = tensor
    return sums


def check_sizes(
    sums: Mapping[Key, torch.Tensor], needs: Iterable[Statistic], weights: WeightMap
) -> None:
    """Checks that sums have the sizes that their statistics have of the weights, if of these.

    Raises:
        ValueError: at the first that has not.
    """
    known = {statistic.name: statistic for statistic in needs}
    for (name, site), total in sums.items():
        if name not in known or site.weight not in weights:
            continue
        size = known[name].size(weights[site.weight])
        if total.shape[1] != size:
            raise ValueError(
                f"{name} of {site.weight!r} has {total.shape[1]} values, the model's has {size}"
            )


@dataclass(repr=False)
class Statistics:
    """Sums over the samples of a data pass, for every statistic and site.

    The even and the odd batches are summed apart: whether the masks of both halves agree shows
    whether the data was enough.

    Example:
        vlp.gather(model, data).save("statistics.safetensors")
        statistics = vlp.Statistics.load("statistics.safetensors")
        masks = vlp.prune(model, statistics=statistics, sparsity=0.8)

    Attributes:
        sums: by statistic name and site float64 `[2, size]` on CPU; row 0 holds the batches with
            an even index, row 1 those with an odd one. Of the loss also `[1, size]`, of all.
        samples: number of samples in the two halves.
        batches: number of batches that were read.
        fingerprint: hash of the batches in their order.
        structure: `WeightMap.structure` of the model.
        adapter: name of the adapter; empty if it was not recorded.
        published: whether the activation probe followed the published code.
        shapes: shape of every weight by canonical name, in the adapter's order.
        weights_hash: `WeightMap.content_hash` of the model; empty if it was not recorded.
        counted: number of batches in the two halves, without those that were skipped because they
            hold NaN or infinity; None: all.
    """

    sums: dict[Key, torch.Tensor]
    samples: tuple[int, int]
    batches: int
    fingerprint: str
    structure: str
    adapter: str
    published: bool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights_hash: str = ""
    counted: tuple[int, int] | None = None
    _warned: bool = field(default=False, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        weights = len({site.weight for _, site in self.sums})
        names = " and ".join(sorted(self.names())) or "nothing"
        return (
            f"Statistics({names} of {weights} weights, {count(sum(self.samples))} samples in "
            f"{count(self.batches)} batches, adapter {self.adapter or 'unknown'})"
        )

    def mean(
        self,
        statistic: str,
        weight: str,
        *,
        owners: Literal["all", "first"] = "all",
        half: int | None = None,
    ) -> torch.Tensor:
        """A statistic of one weight, summed over its sites.

        Statistics of activations are divided by the samples, those of the loss by the batches.

        Args:
            statistic: its name.
            weight: canonical name.
            owners: sites of `all` modules that use the weight, or of the `first`.
            half: 0 or 1 for the even or the odd batches; None for all.

        Returns:
            `[size]`, float64; float32 of statistics of the loss, which are as large as the model.

        Raises:
            StatisticsError: if nothing was measured for it.
        """
        at = sums_of(self.sums, statistic, weight, owners)
        found = list(at.values())
        if not found:
            by = "its first owner" if owners == "first" else "any module that uses it"
            raise StatisticsError(
                f"the statistics hold no {statistic!r} of weight {weight!r} at {by} (they hold "
                f"{', '.join(sorted(self.names())) or 'nothing'}); repeat the data pass"
            )
        of_loss = next(iter(at)).stream == LOSS_STREAM
        counts = self._counted() if of_loss else self.samples
        count = sum(counts) if half is None else counts[half]
        if not count:
            raise StatisticsError(
                f"the statistics come from {self.batches} batch(es), so half {half} is empty; "
                "use at least 2 batches"
            )
        # One loss statistic has one site: nothing to stack.
        total = found[0] if len(found) == 1 else torch.stack(found).sum(0)
        if half is not None and len(total) == 1:
            raise StatisticsError(
                f"the statistics hold {statistic!r} of all batches together, which takes half the "
                "memory; `gather` keeps either half of them"
            )
        if half is not None or len(total) == 1:
            mean = total[half or 0] / count
        else:
            mean = (total[0] + total[1]).div_(count)
        return mean.float() if of_loss else mean

    def _counted(self) -> tuple[int, int]:
        return self.counted or ((self.batches + 1) // 2, self.batches // 2)

    @property
    def has_halves(self) -> bool:
        """Whether the even and the odd batches are apart, in all of the sums."""
        return all(len(total) == 2 for total in self.sums.values())

    def names(self) -> set[str]:
        """Names of the statistics that were gathered."""
        return {name for name, _ in self.sums}

    def check(
        self,
        weights: WeightMap,
        *,
        published: bool | None = None,
        needs: Iterable[Statistic] = (),
    ) -> None:
        """Checks that the statistics are of a model, and of the variant that is asked for.

        Other weights of the same structure give a warning, once: statistics of a pre-trained model
        are right for the fine-tuned one, and wrong for any other checkpoint.

        Args:
            weights: of the model.
            published: the variant; None does not check it.
            needs: what will be read; its sums must have the sizes of the weights.

        Raises:
            StatisticsError: if they are of another adapter, structure or variant.
        """
        self._check_structure(weights)
        try:
            check_sizes(self.sums, needs, weights)
        except ValueError as error:
            raise StatisticsError(f"the statistics are damaged: {error}; {_REMEDY}") from error
        if published is not None and published != self.published:
            asked, mine = (
                "published" if is_published else "default"
                for is_published in (published, self.published)
            )
            raise StatisticsError(
                f"the statistics were gathered with variant={mine!r}, but variant={asked!r} is "
                f"asked for; use variant={mine!r}, or repeat the data pass with variant={asked!r}"
            )
        if self._warned or not self.weights_hash:
            return
        if (found := weights.content_hash()) != self.weights_hash:
            self._warned = True
            logger.warning(
                "the statistics were gathered with other weights (%s, the model has %s): right "
                "for a model before and after fine-tuning, wrong for any other checkpoint",
                self.weights_hash,
                found,
            )

    def _check_structure(self, weights: WeightMap) -> None:
        if self.adapter in ("", weights.adapter_name) and self.structure == weights.structure:
            return
        mine = self.shapes or {site.weight: () for _, site in self.sums}
        theirs = {name: weight.shape for name, weight in weights.items()}
        different = "the names mean other weights"
        if self.structure != weights.structure:
            different = _first_difference(mine, theirs)
        raise StatisticsError(
            f"the statistics are of another model (adapter {self.adapter!r}, structure "
            f"{self.structure}; the model has adapter {weights.adapter_name!r}, structure "
            f"{weights.structure}): {different}; repeat the data pass"
        )

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes one safetensors file, whole or not at all.

        Args:
            path: the file; missing folders above it are made.
            overwrite: replace a file that is there.

        Raises:
            OutputError: if the file exists and is not to be overwritten, or cannot be written.
        """
        header = {
            "samples": list(self.samples),
            "batches": self.batches,
            "fingerprint": self.fingerprint,
            "structure": self.structure,
            "adapter": self.adapter,
            "published": self.published,
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "weights": self.weights_hash,
            "counted": self._counted(),
        }
        write_artifact(path, _FORM, pack_sums(self.sums), header, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what `save` wrote.

        Raises:
            StatisticsError: if the file is missing, damaged, truncated, foreign or too new.
        """
        tensors, header = read_artifact(path, _FORM)
        if header.get("adapter") == "module" and made_before(header.get("made_by"), _SOUND):
            logger.warning(
                "%s was made by %s, where labels of (inputs, labels) batches went into optional "
                "parameters of forward; if the model has some and the batches were such, repeat "
                "the data pass",
                path,
                header["made_by"],
            )
        try:
            return cls(
                sums=unpack_sums(tensors),
                samples=pair(header["samples"]),
                batches=read_as(int, header["batches"], "batches"),
                fingerprint=read_as(str, header["fingerprint"], "fingerprint"),
                structure=read_as(str, header["structure"], "structure"),
                adapter=read_as(str, header.get("adapter", ""), "adapter"),
                published=read_as(bool, header["published"], "published"),
                shapes=dict(read_as(_Shapes, header["shapes"], "shapes")),
                weights_hash=read_as(str, header.get("weights", ""), "weights"),
                counted=pair(header["counted"]) if "counted" in header else None,
            )
        except (KeyError, ValueError) as error:
            raise StatisticsError(
                f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {_REMEDY}"
            ) from error


_Shapes = list[tuple[str, tuple[int, ...]]]


def pair(values: object) -> tuple[int, int]:
    """Counts of even and odd batches, from a file.

    Raises:
        ValueError: if they are something else.
    """
    even, odd = read_as(tuple[int, int], values, "a count of even and odd batches")
    if min(even, odd) < 0:
        raise ValueError(f"{even} even and {odd} odd batches or samples")
    return even, odd


def _first_difference(mine: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> str:
    for name, shape in theirs.items():
        if name not in mine:
            return f"the model has {name!r}, the statistics do not"
        if mine[name] and mine[name] != shape:
            return f"{name!r} is {list(shape)} in the model, {list(mine[name])} in the statistics"
    for name in mine:
        if name not in theirs:
            return f"the statistics have {name!r}, the model does not"
    return "the weights come in another order"
