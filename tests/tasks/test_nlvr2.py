"""NLVR2: statements about two images, judged and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlp_plugins.data.batches import Example, ExampleBatches, open_batches
from vlp_plugins.data.nlvr2 import has_statements
from vlp_plugins.jobs.samples import read_samples
from vlp_plugins.models.adapter import Adapter, StatementAdapter
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.runtime.errors import BatchError, DataError, UnsupportedError
from vlp_plugins.tasks.classification import statement_accuracy
from vlp_plugins.tasks.finetuning.samples import SampleEpochs


class Redder(ModuleAdapter):
    """Judges every statement by how much redder the left image is."""

    def judge(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        left, right = batch["pixel_values"].unbind(1)
        return model((left - right)[:, :1].mean(dim=(1, 2, 3))[:, None])[:, 0]


class Pixels:
    """A processor that scales nothing."""

    def __call__(
        self, images: list[Image.Image], text: list[str], **_: object
    ) -> dict[str, Tensor]:
        values = [torch.tensor(np.array(image)).permute(2, 0, 1).float() for image in images]
        return {"pixel_values": torch.stack(values), "input_ids": torch.ones(len(text), 3)}


def model() -> nn.Module:
    made = nn.Linear(1, 1)
    nn.init.ones_(made.weight)
    nn.init.zeros_(made.bias)
    return made.train()


def red(value: int) -> Callable[[], Image.Image]:
    return lambda: Image.new("RGB", (2, 2), (value, 0, 0))


def batches(adapter: Adapter, *, size: int = 2) -> ExampleBatches:
    reds = [(9, 1, 1), (1, 9, 0), (9, 1, 0), (5, 5, 0), (5, 5, 1)]
    rows = [
        Example(f"row {n}", red(left), "s", label, red(right))
        for n, (left, right, label) in enumerate(reds)
    ]
    return ExampleBatches(rows, Pixels(), adapter, size)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_right_are_true_ones_above_zero_and_false_ones_up_to_it(size: int) -> None:
    judge = model()
    adapter = Redder(judge)
    assert isinstance(adapter, StatementAdapter)
    found = statement_accuracy(judge, adapter, batches(adapter, size=size))
    assert found == (100, 100, 0, 100, 0)
    assert judge.training


def test_nan_is_wrong() -> None:
    judge = model()
    nn.init.constant_(judge.bias, float("nan"))
    assert statement_accuracy(judge, Redder(judge), batches(Redder(judge))) == (0,) * 5


def test_a_batch_has_the_left_image_of_each_row_first() -> None:
    adapter = Redder(model())
    first = next(iter(batches(adapter, size=3)))
    assert first["pixel_values"].shape == (3, 2, 3, 2, 2)
    assert first["pixel_values"][:, :, 0, 0, 0].tolist() == [[9, 1], [1, 9], [9, 1]]
    assert first["labels"].tolist() == [1, 0, 0]
    assert len(first["input_ids"]) == 3


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    judge = model()
    adapter = Redder(judge)
    rows = list(batches(adapter))
    with pytest.raises(UnsupportedError, match="take a model of NLVR2"):
        statement_accuracy(judge, ModuleAdapter(judge), rows)
    with pytest.raises(DataError, match="no batches"):
        statement_accuracy(judge, adapter, [])
    with pytest.raises(BatchError, match="has no labels"):
        statement_accuracy(judge, adapter, [{k: v for k, v in rows[0].items() if k != "labels"}])
    with pytest.raises(BatchError, match=r"from 0 to 2 do not fit 2 statements"):
        statement_accuracy(judge, adapter, [rows[0] | {"labels": torch.tensor([0, 2])}])


def test_fine_tuning_gets_both_images_of_a_sample(tmp_path: Path) -> None:
    save_statements(tmp_path, 4)
    data = read_samples("nlvr2", str(tmp_path))
    assert data.description == f"{tmp_path} (dev)"
    assert data.class_names == ()
    adapter = Redder(model())
    (batch,) = (make() for make in SampleEpochs(data.samples, Pixels(), adapter, 4)(0))
    left, right = batch["pixel_values"][:, :, 0, 0, 0].T
    assert torch.equal(right, left + 1)
    assert sorted(left.tolist()) == [0, 10, 20, 30]
    assert torch.equal(batch["labels"], (left / 10 % 2).long())


def save_statements(folder: Path, count: int) -> None:
    rows = []
    for number in range(count):
        names = [f"{number}-{side}.png" for side in (0, 1)]
        for side, name in enumerate(names):
            Image.new("RGB", (2, 2), (10 * number + side, 0, 0)).save(folder / name)
        rows.append({"images": names, "sentence": f"s{number}", "label": number % 2 == 1})
    (folder / "dev.json").write_text("\n".join(map(json.dumps, rows)))


def test_calibration_reads_statements(tmp_path: Path) -> None:
    save_statements(tmp_path, 5)
    processor, adapter = Pixels(), Redder(model())
    processor.tokenizer = object()
    made = open_batches(str(tmp_path), processor, adapter, 2)
    assert (len(made), made.source.description) == (2, f"{tmp_path} (dev)")
    found = list(made)
    assert [batch["labels"].tolist() for batch in found] == [[0, 1], [0, 1]]
    assert found[1]["pixel_values"][:, :, 0, 0, 0].tolist() == [[20, 21], [30, 31]]
    mixed = [
        [batch["pixel_values"][:, 0, 0, 0, 0].tolist() for batch in batches]
        for batches in (open_batches(str(tmp_path), processor, adapter, 2, shuffle_seed=1),) * 2
    ]
    assert mixed[0] == mixed[1] != [[0, 10], [20, 30]]
    (tmp_path / "3-1.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"\(dev\).* records .*cannot be used"):
        list(open_batches(str(tmp_path), processor, adapter, 2))
    assert has_statements(tmp_path)
    (tmp_path / "dev.json").write_text('[{"image": "0-0.png", "caption": "a dog"}]')
    assert not has_statements(tmp_path), "a list of another kind"
    assert not has_statements(tmp_path / "dev.json")


def test_data_of_another_kind_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no statements about two images: expected dev\.json"):
        read_samples("nlvr2", str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        read_samples("nlvr2", str(tmp_path / "nowhere"))
