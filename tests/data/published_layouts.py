"""Tiny data sets in the layouts of the published ones. Image i is filled with colour (i, 0, 0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from captioned_files import encoded
from scipy.io import savemat


def put_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))


def put_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def said(number: int, count: int = 5) -> list[str]:
    return [f"image {number} said {n}" for n in range(count)]


COCO = [(0, "train", "train2014"), (1, "restval", "val2014"), (2, "val", "val2014"),
        (3, "test", "val2014"), (4, "test", "val2014")]  # fmt: skip


def coco_name(number: int, folder: str) -> str:
    return f"COCO_{folder}_{number:012}.jpg"


def karpathy_coco(folder: Path) -> Path:
    rows = []
    for number, split, place in COCO:
        put_image(folder / place / coco_name(number, place), number)
        rows.append(
            {
                "filepath": place,
                "filename": coco_name(number, place),
                "split": split,
                "cocoid": number,
                "sentences": [{"raw": text, "tokens": text.split()} for text in said(number)],
            }
        )
    put_json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    return folder


def blip_coco(folder: Path) -> Path:
    for number, _, place in COCO:
        put_image(folder / place / coco_name(number, place), number)
    train = [
        {"caption": text, "image": f"train2014/{coco_name(0, 'train2014')}", "image_id": "coco_0"}
        for text in said(0)
    ]
    put_json(folder / "annotations" / "coco_karpathy_train.json", train)
    test = [{"image": f"val2014/{coco_name(n, 'val2014')}", "caption": said(n)} for n in (3, 4)]
    put_json(folder / "annotations" / "coco_karpathy_test.json", test)
    put_json(
        folder / "annotations" / "coco_karpathy_val.json",
        [{"image": f"val2014/{coco_name(2, 'val2014')}"}],
    )
    references = [{"image_id": 2, "caption": text, "id": n} for n, text in enumerate(said(2))]
    put_json(
        folder / "annotations" / "coco_karpathy_val_gt.json",
        {"annotations": references, "images": [{"id": 2}]},
    )
    return folder


def karpathy_flickr(folder: Path) -> Path:
    rows = []
    for number in range(3):
        put_image(folder / "flickr30k-images" / f"{number}.jpg", number)
        rows.append(
            {
                "filename": f"{number}.jpg",
                "split": "test" if number else "train",
                "sentences": [{"raw": text} for text in said(number)],
            }
        )
    put_json(folder / "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    return folder


def blip_flickr(folder: Path) -> Path:
    for number in range(2):
        put_image(folder / "flickr30k-images" / f"{number}.jpg", number)
    rows = [{"image": f"flickr30k-images/{n}.jpg", "caption": said(n)} for n in range(2)]
    put_json(folder / "flickr30k_test.json", rows)
    return folder


def ten(answer: str, other: str = "no") -> list[str]:
    return [answer] * 8 + [other] * 2


def vqa(folder: Path) -> Path:
    questions, annotations = [], []
    for number in range(3):
        put_image(folder / "val2014" / coco_name(number, "val2014"), number)
        questions.append(
            {"image_id": number, "question": f"what is {number}?", "question_id": 10 + number}
        )
        answers = [{"answer": text, "answer_id": n} for n, text in enumerate(ten(f"a{number}"))]
        annotations.append({"question_id": 10 + number, "image_id": number, "answers": answers})
    put_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": questions, "data_type": "mscoco"},
    )
    put_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    put_image(folder / "test2015" / coco_name(7, "test2015"), 7)
    for subset in ("test2015", "test-dev2015"):
        put_json(
            folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            {"questions": [{"image_id": 7, "question": "why?", "question_id": 70}]},
        )
    return folder


def blip_vqa(folder: Path) -> Path:
    rows = []
    for number in range(2):
        put_image(folder / "images" / "val2014" / coco_name(number, "val2014"), number)
        rows.append(
            {
                "question_id": number,
                "question": f"what is {number}?",
                "answer": ten(f"a{number}"),
                "image": f"val2014/{coco_name(number, 'val2014')}",
                "dataset": "vqa",
            }
        )
    put_json(folder / "annotations" / "vqa_val.json", rows)
    put_json(folder / "annotations" / "answer_list.json", ["a0", "a1", "no"])
    return folder


def nlvr2(folder: Path) -> Path:
    rows = []
    for number in range(2):
        for side in (0, 1):
            put_image(folder / "dev" / f"dev-{number}-0-img{side}.png", 2 * number + side)
        rows.append(
            {
                "sentence": f"statement {number}",
                "identifier": f"dev-{number}-0-0",
                "label": str(bool(number)),
                "left_url": "",
            }
        )
    (folder / "data").mkdir()
    (folder / "data" / "dev.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    train = {"sentence": "s", "identifier": "train-10-0-1", "label": "False", "directory": 44}
    (folder / "data" / "train.json").write_text(json.dumps(train))
    for side in (0, 1):
        put_image(folder / "images" / "train" / "44" / f"train-10-0-img{side}.png", 8 + side)
    listed = {"sentence": "t", "label": "True",
              "images": ["dev/dev-1-0-img0.png", "dev/dev-1-0-img1.png"]}  # fmt: skip
    put_json(folder / "annotations" / "nlvr_test.json", [listed])
    return folder


def cifar_rows(labels: list[list[int]], first: int = 0) -> bytes:
    """Image n is red first + n, green 1, blue 2, but for its first pixel (9, 8, 7)."""
    rows = []
    for number, numbers in enumerate(labels):
        planes = np.empty((3, 32, 32), np.uint8)
        planes[:] = np.array([first + number, 1, 2], np.uint8)[:, None, None]
        planes[:, 0, 0] = (9, 8, 7)
        rows.append(bytes(numbers) + planes.tobytes())
    return b"".join(rows)


def cifar_10(folder: Path) -> Path:
    place = folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    for batch in range(1, 6):
        (place / f"data_batch_{batch}.bin").write_bytes(cifar_rows([[batch], [0]], 10 * batch))
    (place / "test_batch.bin").write_bytes(cifar_rows([[3], [9], [1]]))
    (place / "batches.meta.txt").write_text("\n".join(f"class{n}" for n in range(10)) + "\n\n")
    return folder


def cifar_100(folder: Path) -> Path:
    place = folder / "cifar-100-binary"
    place.mkdir(parents=True)
    (place / "train.bin").write_bytes(cifar_rows([[0, 44]]))
    (place / "test.bin").write_bytes(cifar_rows([[19, 99], [1, 5]]))
    (place / "fine_label_names.txt").write_text("\n".join(f"fine{n}" for n in range(100)))
    return folder


def flowers(folder: Path) -> Path:
    for number in range(1, 7):
        put_image(folder / "jpg" / f"image_{number:05}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 102, 5, 6]], np.uint8)})
    ids = {"trnid": [[1, 2]], "valid": [[3]], "tstid": [[6, 4]]}
    savemat(folder / "setid.mat", {name: np.array(rows, np.uint16) for name, rows in ids.items()})
    return folder


def classes(folder: Path) -> Path:
    """One folder per split, one per class in it."""
    for split, count in (("train", 2), ("test", 1)):
        for number, name in enumerate(("cat", "bird")):
            for copy in range(count):
                put_image(folder / split / name / f"{copy}.png", number)
    return folder
