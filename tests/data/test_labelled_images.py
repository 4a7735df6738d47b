"""Images with classes: CIFAR, Flowers-102, folders, parquet."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import published_layouts as layouts
import pytest
from captioned_files import encoded, picture, read
from torch import nn

from vlp_plugins.data.labelled import LabelSource, open_labelled
from vlp_plugins.data.records import Samples
from vlp_plugins.runtime.errors import DataError


def shown(found: Samples) -> list[tuple[int, int]]:
    """Red of the last pixel, and the class, of every image."""
    images = [(item.image().convert("RGB"), item.label) for item in found.items]
    return [(image.getpixel((image.width - 1, image.height - 1))[0], n) for image, n in images]


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_10(tmp_path: Path, inside: str) -> None:
    folder = layouts.cifar_10(tmp_path) / inside
    found = open_labelled(str(folder), "test")
    assert shown(found) == [(0, 3), (1, 9), (2, 1)]
    assert found.classes[9] == "class9"
    assert len(found.classes) == 10
    train = open_labelled(str(folder))
    assert shown(train)[:3] == [(10, 1), (11, 0), (20, 2)]
    assert len(list(train.items)) == 10


def test_planes_and_rows_of_cifar_are_in_place(tmp_path: Path) -> None:
    item = next(iter(open_labelled(str(layouts.cifar_10(tmp_path)), "test").items))
    image = item.image()
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert image.getpixel((0, 0)) == (9, 8, 7)
    assert image.getpixel((1, 0)) == image.getpixel((0, 1)) == (0, 1, 2)
    assert item.place == "test_batch.bin, image 0"


def test_cifar_100_has_the_fine_classes(tmp_path: Path) -> None:
    found = open_labelled(str(layouts.cifar_100(tmp_path)), "test")
    assert shown(found) == [(0, 99), (1, 5)]
    assert found.classes[99] == "fine99"


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps(Trap()))
    for place in (folder, tmp_path):
        with pytest.raises(DataError, match=r"can run code.* binary version \(cifar-10-"):
            open_labelled(str(place), "test")
    assert not (tmp_path / "ran").exists()


def test_cifar_that_is_cut_off_or_not_whole(tmp_path: Path) -> None:
    place = layouts.cifar_10(tmp_path) / "cifar-10-batches-bin"
    path = place / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="9,218 bytes, which is not a multiple of the 3,073"):
        open_labelled(str(tmp_path), "test")
    path.unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin is missing"):
        open_labelled(str(tmp_path), "test")
    with pytest.raises(DataError, match="has no split 'val'"):
        open_labelled(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("split", "expected"), [("train", [(1, 0), (2, 1)]), ("val", [(3, 2)]),
                            ("test", [(6, 5), (4, 101)])]
)  # fmt: skip
def test_flowers(tmp_path: Path, split: str, expected: list[tuple[int, int]]) -> None:
    assert shown(open_labelled(str(layouts.flowers(tmp_path)), split)) == expected


def test_flowers_that_are_not_whole(tmp_path: Path) -> None:
    layouts.flowers(tmp_path)
    (tmp_path / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(DataError, match=r"image_00003\.jpg, which is in none of"):
        open_labelled(str(tmp_path), "val")
    (tmp_path / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DataError, match=r"setid\.mat (is damaged or no MATLAB|has no .valid.)"):
        open_labelled(str(tmp_path), "val")
    (tmp_path / "setid.mat").unlink()
    with pytest.raises(DataError, match=r"lacks setid\.mat: Flowers-102 is"):
        open_labelled(str(tmp_path), "val")


def test_a_folder_per_class_below_a_folder_per_split(tmp_path: Path) -> None:
    layouts.classes(tmp_path)
    found = open_labelled(str(tmp_path), "test")
    assert found.classes == ("bird", "cat")
    assert shown(found) == [(1, 0), (0, 1)]
    assert shown(open_labelled(str(tmp_path))) == [(1, 0), (1, 0), (0, 1), (0, 1)]
    assert shown(open_labelled(str(tmp_path / "test"))) == shown(found)


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [([3, 0], [3, 0], ()), (["3", "0"], [3, 0], ()), (["cat", "ant"], [1, 0], ("ant", "cat"))],
)
def test_a_folder_with_metadata(tmp_path, labels, numbers, names) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    rows = [{"file_name": f"{n}.png", "label": label} for n, label in enumerate(labels)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_labelled(str(tmp_path))
    assert shown(found) == list(enumerate(numbers))
    assert found.classes == names


def test_parquet_with_a_column_of_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"img": [picture(4), picture(5)], "fine_label": [1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "test.parquet"))
    for source in (tmp_path / "test.parquet", tmp_path):
        found = open_labelled(str(source))
        assert shown(found) == shown(found) == [(4, 1), (5, 0)]
        assert found.classes == ("a", "b")


def test_what_has_no_classes_says_so(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match=r"expected the binary version of CIFAR.*found 0\.png"):
        open_labelled(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    with pytest.raises(DataError, match=r"needs the columns file_name and label .*text"):
        open_labelled(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "label": -1.5}')
    with pytest.raises(DataError, match="label -1.5 is neither a name nor a number"):
        open_labelled(str(tmp_path))


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        layouts.put_image(tmp_path / split / "0.png", 0)
    with pytest.raises(DataError, match="holds no images with classes"):
        open_labelled(str(tmp_path))


def test_labels_for_a_model_have_its_numbers(tmp_path: Path) -> None:
    layouts.classes(tmp_path)
    images = open_labelled(str(tmp_path))
    model = nn.Module()
    model.config = SimpleNamespace(id2label={0: "ant", 1: "bird", 2: "cat"}, num_labels=3)
    assert read(LabelSource(images, model)) == [(1, "1"), (1, "1"), (0, "2"), (0, "2")]
    assert sorted(read(LabelSource(images, model), 5)) == sorted(read(LabelSource(images, model)))
    model.config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"}, num_labels=2)
    assert read(LabelSource(images, model)) == [(1, "0"), (1, "0"), (0, "1"), (0, "1")]
    for names in ({0: "ant", 1: "bird"}, {0: "LABEL_0"}):
        model.config = SimpleNamespace(id2label=names, num_labels=len(names))
        with pytest.raises(DataError, match="the model has no class"):
            LabelSource(images, model)


def test_one_metadata_file_for_several_splits(tmp_path: Path) -> None:
    rows = []
    for number, split in enumerate(("train", "test", "test")):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / split / f"{number}.png").write_bytes(encoded(number))
        rows.append(json.dumps({"file_name": f"{split}/{number}.png", "label": f"class{number}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert shown(open_labelled(str(tmp_path))) == [(0, 0)]
    assert open_labelled(str(tmp_path)).description.endswith(" (train)")
    assert shown(open_labelled(str(tmp_path), "test")) == [(1, 1), (2, 2)]


def test_a_folder_of_parquet_files_has_splits(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for label, split in enumerate(("train", "test")):
        rows = {"image": [picture(label + 4)], "label": [label]}
        file = tmp_path / f"{split}.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(str(file))
    assert shown(open_labelled(str(tmp_path), "test")) == [(5, 1)]
    assert shown(open_labelled(str(tmp_path))) == [(4, 0)]
