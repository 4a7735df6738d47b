"""Sets to classify, on disk as CIFAR (binary version) and Flowers-102 are.

CIFAR has no development split: ours lies beside it, as the test of a folder of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from benchmarks.papers.downstream.classes import LabelledImages

_BATCHES = 5  # files of CIFAR-10's training split


def write_cifar_10(folder: Path, train: LabelledImages | None, test: LabelledImages) -> None:
    """`cifar-10-batches-bin/`: a byte of label, then 3,072 bytes of pixels, plane by plane.

    Args:
        folder: where to make it.
        train: up to 256 classes; None writes a test only.
        test: of the same classes.
    """
    place = folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    if train is not None:
        for number, part in enumerate(torch.arange(len(train)).chunk(_BATCHES), 1):
            labels = train.labels[part, None]
            _write_rows(place / f"data_batch_{number}.bin", labels, train.images[part])
    _write_rows(place / "test_batch.bin", test.labels[:, None], test.images)
    _write_names(place / "batches.meta.txt", test.classes)


def write_cifar_100(
    folder: Path, train: LabelledImages | None, test: LabelledImages, coarse: tuple[str, ...]
) -> None:
    """`cifar-100-binary/`: as CIFAR-10, with a coarse label before the fine one.

    Args:
        folder: where to make it.
        train: None writes a test only.
        test: of the same classes.
        coarse: names of equally many successive classes each.
    """
    place = folder / "cifar-100-binary"
    place.mkdir(parents=True)
    size = len(test.classes) // len(coarse)
    for name, part in (("train", train), ("test", test)):
        if part is not None:
            labels = torch.stack([part.labels // size, part.labels], dim=1)
            _write_rows(place / f"{name}.bin", labels, part.images)
    _write_names(place / "fine_label_names.txt", test.classes)
    _write_names(place / "coarse_label_names.txt", coarse)


def write_flowers(
    folder: Path, train: LabelledImages, dev: LabelledImages, test: LabelledImages
) -> None:
    """`jpg/image_00001.jpg`, ..., `imagelabels.mat` (from 1), `setid.mat` (image numbers)."""
    (folder / "jpg").mkdir(parents=True)
    parts = {"trnid": train, "valid": dev, "tstid": test}
    images = torch.cat([part.images for part in parts.values()])
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy(), 1):
        path = folder / "jpg" / f"image_{number:05}.jpg"
        Image.fromarray(image).save(path, quality=98, subsampling=0)
    first, ids = 1, {}
    for name, part in parts.items():
        ids[name] = np.arange(first, first + len(part))
        first += len(part)
    labels = torch.cat([part.labels for part in parts.values()]).numpy() + 1
    savemat(str(folder / "imagelabels.mat"), {"labels": labels})
    savemat(str(folder / "setid.mat"), ids)


def _write_rows(path: Path, labels: torch.Tensor, images: torch.Tensor) -> None:
    rows = torch.cat([labels.to(torch.uint8), images.flatten(1)], dim=1)
    path.write_bytes(rows.numpy().tobytes())


def _write_names(path: Path, names: tuple[str, ...]) -> None:
    # A name is a line without spaces, as in the original.
    text = "".join(name.replace(" ", "_") + "\n" for name in names)
    path.write_text(text, encoding="utf-8")
