"""`load`, `batches` and `evaluate` of Python: what the commands do, bit for bit."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import chat_models
import pytest
import task_models
import torch
from tiny_models import save_photos
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import vlp_plugins as vlp_api
from vlp_plugins.calibration.batches import named
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.errors import (
    BatchError,
    DataError,
    MaskError,
    OutputError,
    RecipeError,
    UnclaimedModelError,
    UnknownNameError,
    UnsupportedError,
)
from vlp_plugins.scoring.magnitude import Magnitude


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "coco").mkdir()
    return task_models.save_coco(tmp_path / "coco")


@pytest.mark.parametrize("name", ["blip", "xvlm", "clip", "vit"])
def test_masks_are_those_of_the_command(vlp, models, photos, tmp_path, name: str) -> None:
    vlp("prune", "--model", models / name, "--method", "multiflow", "--sparsity", "0.5",
        "--data", photos, "--batch-size", "5", "--batches", "2", "--shuffle-seed", "3",
        "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip

    model = vlp_api.load(models / name, device="cpu")
    data = vlp_api.batches(photos, model, batch_size=5, count=2, seed=3)
    masks = vlp_api.prune(model, data, method="multiflow", sparsity=0.5)

    assert masks == Masks.load(tmp_path / "out" / "masks-0.5.safetensors")
    assert len(data) == len(list(data)) == 2
    assert 0.49 < masks.sparsity < 0.51


def test_batches_are_the_same_in_every_iteration_and_in_stored_order(models, photos) -> None:
    model = vlp_api.load(models / "clip", device="cpu")
    data = vlp_api.batches(photos, model, batch_size=5)
    first, second = list(data), list(data)
    assert [len(batch["input_ids"]) for batch in first] == [5, 5, 2]
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    mixed = list(vlp_api.batches(photos, model, batch_size=5, seed=1))
    assert not torch.equal(mixed[0]["pixel_values"], first[0]["pixel_values"])
    assert repr(data) == f"CaptionedBatches(3 batches of 5 from {photos})"


def test_a_model_of_from_pretrained_has_its_processor_too(models, photos) -> None:
    model = CLIPModel.from_pretrained(models / "clip").eval()
    loaded = vlp_api.load(models / "clip", device="cpu")
    one, two = (next(iter(vlp_api.batches(photos, each))) for each in (model, loaded))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_wrapped_model_is_the_model_itself(models, photos) -> None:
    model = vlp_api.load(models / "clip", device="cpu")
    wrapped = nn.DataParallel(model)
    assert len(vlp_api.batches(photos, wrapped, batch_size=6)) == 2
    plain = vlp_api.evaluate(model, photos, task="retrieval")
    assert vlp_api.evaluate(wrapped, photos, task="retrieval") == plain


def test_a_model_of_one_s_own_needs_a_processor(models, photos) -> None:
    model = BlipForImageTextRetrieval(
        BlipConfig(
            text_config={**task_models.TEXT, "pad_token_id": 0}, vision_config=task_models.VISION
        )
    )
    with pytest.raises(DataError, match="BlipForImageTextRetrieval does not say where .* pass "
                                        "processor="):  # fmt: skip
        vlp_api.batches(photos, model)
    model.name_or_path = str(photos)
    with pytest.raises(DataError, match=r"no processor at .* .in Python: processor=.$"):
        vlp_api.batches(photos, model)
    data = vlp_api.batches(photos, model, processor=models / "blip", batch_size=12)
    (batch,) = data
    again = vlp_api.batches(photos, model, processor=data.processor, batch_size=12)
    assert torch.equal(next(iter(again))["input_ids"], batch["input_ids"])
    (short,) = vlp_api.batches(
        photos, model, processor=models / "blip", batch_size=12, max_length=4
    )
    assert short["input_ids"].shape[1] == 4 < batch["input_ids"].shape[1]
    with pytest.raises(DataError, match="max_length=4 does not reach a processor"):
        vlp_api.batches(photos, model, processor=data.processor, max_length=4)


def test_any_module_takes_batches_of_images(models, photos, tmp_path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.layer(pixel_values)

    model = Net()
    with pytest.raises(UnclaimedModelError, match="ModuleAdapter"):
        vlp_api.batches(photos, model, processor=models / "vit")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    data = vlp_api.batches(photos, model, processor=processor, adapter="module", batch_size=4)
    masks = vlp_api.prune(model, data, adapter="module", method="wanda", sparsity=0.5)
    assert masks.removed == 64
    assert [list(batch) for batch in data] == [["pixel_values"]] * 3


@pytest.mark.parametrize("adapter", [None, "module"])
def test_a_model_of_no_family_is_taken_by_what_transformers_knows_or_by_its_layers(
    models, photos, adapter
) -> None:
    model = vlp_api.load(models / "chinese_clip", adapter=adapter, device="cpu")
    data = vlp_api.batches(photos, model, batch_size=6, adapter=adapter)
    masks = vlp_api.prune(model, data, method="wanda", sparsity=0.5, adapter=adapter)
    assert masks.removed == masks.total // 2
    assert masks.manifest.adapter == (adapter or "transformers")


def test_batches_of_other_shapes_are_read_as_what_they_are(models, photos) -> None:
    model = vlp_api.load(models / "clip", device="cpu")
    data = list(vlp_api.batches(photos, model, batch_size=4))
    keys = ("pixel_values", "input_ids", "attention_mask")
    labels = torch.arange(4)

    def masks(batches: object) -> Masks:
        return vlp_api.prune(model, batches, method="wanda", sparsity=0.5)

    expected = masks(data)
    assert masks([tuple(batch[key] for key in keys) for batch in data]) == expected
    assert masks([[batch[key] for key in reversed(keys)] for batch in data]) == expected
    assert masks((batch, labels) for batch in data) == expected
    assert masks([{k: v.tolist() for k, v in batch.items()} for batch in data]) == expected
    assert masks([{k: v.numpy() for k, v in batch.items()} for batch in data]) == expected
    rows = [[{k: v[n] for k, v in batch.items()} for n in range(4)] for batch in data]
    assert masks(DataLoader([row for part in rows for row in part], 4, collate_fn=list)) == expected
    words = [(batch, batch["input_ids"]) for batch in data]  # what a decoder is to write
    assert masks(words) == expected
    half = [{k: v.bfloat16() if k == "pixel_values" else v for k, v in b.items()} for b in data]
    listed = [{k: list(v) for k, v in batch.items()} for batch in half]
    for one, two in zip(map(named, listed), half, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in keys)
    several = {"pixel_values": [torch.ones(3, 4, 4), torch.ones(3, 8, 8)]}
    assert named(several)["pixel_values"] == several["pixel_values"]
    ragged = dict(data[0]) | {"input_ids": [[1, 2], [1]]}
    with pytest.raises(BatchError, match="input_ids holds rows of different lengths; pad them"):
        masks([ragged])
    for strange in ((data[0]["pixel_values"], data[0]["pixel_values"]), (torch.ones(2, 2),)):
        with pytest.raises(BatchError, match="batch is a tuple, not a mapping of pixel_values"):
            masks([strange])


def test_chat_models_take_inputs_and_labels_and_nothing_that_cannot_be_told() -> None:
    model = chat_models.llava()
    ids = torch.randint(10, 200, (2, 20))
    ids[:, 2:18] = model.config.image_token_id
    pixels = torch.randn(2, 3, 32, 32)
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for method in ("wanda", "snip"):
        expected = vlp_api.prune(model, [batch | {"labels": ids}], method=method, sparsity=0.5)
        assert vlp_api.prune(model, [(batch, ids)], method=method, sparsity=0.5) == expected
        with pytest.raises(BatchError, match="batch is a tuple, not a mapping of tensors by name"):
            vlp_api.prune(model, [(pixels, pixels)], method=method, sparsity=0.5)


def test_a_loader_of_unknown_length_is_no_mistake(models, photos) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(vlp_api.batches(photos, model, batch_size=4))

    model = vlp_api.load(models / "clip", device="cpu")
    loader = DataLoader(Stream(), batch_size=None)
    options = {"method": "itersnip", "sparsity": 0.5, "rounds": 2, "batches_per_round": 1}
    expected = vlp_api.prune(model, list(Stream()), **options)
    assert vlp_api.prune(model, loader, **options) == expected


def test_a_classifier_takes_images_and_labels() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**task_models.VISION, num_labels=3)).eval()
    pixels, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
    whole = {"pixel_values": pixels, "labels": labels}
    for method in ("wanda", "snip"):
        expected = vlp_api.prune(model, [whole], method=method, sparsity=0.5)
        for batch in ((pixels, labels), [pixels, labels], ({"pixel_values": pixels}, labels)):
            assert vlp_api.prune(model, [batch], method=method, sparsity=0.5) == expected
    statistics = vlp_api.gather(model, [pixels], method="wanda")
    assert vlp_api.prune(model, statistics=statistics, method="wanda", sparsity=0.5) == (
        vlp_api.prune(model, [whole], method="wanda", sparsity=0.5)
    )
    many = [torch.randn(8, 3, 16, 16) for _ in range(3)]
    named = vlp_api.measure_id(model, [{"pixel_values": each} for each in many])
    assert vlp_api.measure_id(model, [(each,) for each in many]) == named


def test_weights_without_values_are_named(models, photos) -> None:
    model = vlp_api.load(models / "clip", device="cpu")
    data = vlp_api.batches(photos, model)
    masks = vlp_api.prune(model, method="lamp", sparsity=0.5)
    with torch.device("meta"):
        empty = CLIPModel(model.config)
    eight = deepcopy(model)
    for module in eight.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    for lacking, why in (
        (empty, "meta device"),
        (eight, "float8_e4m3fn.*load the model in bfloat16"),
    ):
        for call in (
            lambda lacking=lacking: vlp_api.prune(lacking, method="lamp", sparsity=0.5),
            lambda lacking=lacking: vlp_api.prune(lacking, data, sparsity=0.5),
            lambda lacking=lacking: vlp_api.gather(lacking, data),
            lambda lacking=lacking: vlp_api.measure_id(lacking, data),
        ):
            with pytest.raises(UnsupportedError, match=f"weight 'text.0.self.key' .* is .*{why}"):
                call()
    with pytest.raises(MaskError, match="meta device; load its values first"):
        masks.apply(empty)
    masks.apply(eight)
    assert masks.verify(eight) == []
    mixed = vlp_api.ModuleAdapter(eight)
    assert [each.name for each in mixed.weights(eight)] == [
        "vision_model.embeddings.patch_embedding"
    ]


def test_mistakes_in_words_are_answered_with_the_right_ones(models, tmp_path) -> None:
    model = vlp_api.load(models / "clip", device="cpu")

    def said(**options: object) -> str:
        with pytest.raises((UnknownNameError, UnsupportedError)) as raised:
            vlp_api.prune(model, **{"sparsity": 0.5, "method": "lamp", **options})
        return str(raised.value)

    assert said(alocation="layer").endswith("(did you mean allocation= of prune?)")
    assert "did you mean allocation=" in said(alocation="layer", method=Magnitude())
    assert "did you mean" not in said(nonsense=1)
    assert said(method="MULTIFLOW").endswith(
        "no method is called 'MULTIFLOW' (did you mean 'multiflow'?)"
    )
    assert "did you mean 'wanda'" in said(method="WANDA")
    assert said(method="xyzzy").count("wanda") == 1
    path = str(models / "clip")
    masks = vlp_api.prune(model, method="lamp", sparsity=0.5)
    for call in (
        lambda: vlp_api.prune(path, sparsity=0.5),
        lambda: vlp_api.ModuleAdapter(path),
        lambda: masks.apply(path),
        lambda: vlp_api.SparsityLock(path, masks),
        lambda: vlp_api.GradualPruning(path, sparsity=0.5, steps=2),
    ):
        with pytest.raises(UnsupportedError, match=r"model is a str.*vlp_plugins.load\('/"):
            call()


def test_mistakes_are_said_before_anything_is_read(models, photos, tmp_path) -> None:
    model = vlp_api.load(models / "clip", device="cpu")
    with pytest.raises(DataError, match="does not exist"):
        vlp_api.batches(tmp_path / "nowhere", model)
    for take in (vlp_api.batches, lambda data, model: vlp_api.evaluate(model, data)):
        with pytest.raises(DataError, match="data is a list, not the path .* goes to prune"):
            take([{}], model)
    with pytest.raises(DataError, match=r"vlp_plugins.batches\('photos', model\) makes them"):
        vlp_api.prune(model, "photos", sparsity=0.5)
    for call in (lambda: vlp_api.batches(model, photos), lambda: vlp_api.evaluate(photos, model)):
        with pytest.raises(UnsupportedError, match="model is a .*, not a torch.nn.Module"):
            call()
    with pytest.raises(UnsupportedError, match="source is a CLIPModel, not a path or hub id"):
        vlp_api.load(model)
    with pytest.raises(DataError, match="batch size must be at least 1, not 0"):
        vlp_api.batches(photos, model, batch_size=0)
    with pytest.raises(DataError, match="number of batches must be at least 1, not 0"):
        vlp_api.batches(photos, model, count=0)


@pytest.mark.parametrize(
    ("name", "task", "options", "words"),
    [
        ("xvlm", "retrieval", {"rerank": 3, "split": "test"}, ("--rerank", 3, "--split", "test")),
        ("clip", None, {"split": "test", "limit": 2}, ("--limit", 2, "--split", "test")),
    ],
)
def test_figures_of_retrieval_are_those_of_the_command(
    vlp, models, coco, tmp_path, name, task, options, words
) -> None:
    vlp("evaluate", models / name, "--task", "retrieval", "--data", coco, "--device", "cpu",
        "--batch-size", "4", "--out", tmp_path / "out", *words)  # fmt: skip
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())

    model = vlp_api.load(models / name, device="cpu").train()
    steps = []
    found = vlp_api.evaluate(
        model, coco, task=task, batch_size=4, progress=lambda *step: steps.append(step), **options
    )

    assert dict(found) == record["before"]["metrics"]
    assert model.training
    assert steps[-1][0] == steps[-1][1] == len(steps)
    lines = repr(found).splitlines()
    assert lines[0] == f"retrieval on {coco} (test)"
    assert f"{found['image_to_text_r1']:.2f}" in lines[1]
    assert len(lines) == 1 + len(found)


def test_the_other_tasks_and_how_a_task_is_guessed(
    vlp, models, photos, coco, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("vlp_plugins.tasks.captioning.find_java", lambda: None)
    (tmp_path / "vqa").mkdir()
    questions = task_models.save_questions(tmp_path / "vqa")
    classes = task_models.save_classes(tmp_path / "classes")
    task_models.save_blip_task(tmp_path / "answering", task_models.BlipForQuestionAnswering)
    answering = vlp_api.load(tmp_path / "answering", device="cpu")
    classifier = vlp_api.load(task_models.save_classifier(tmp_path / "classifier"), device="cpu")

    found = vlp_api.evaluate(answering, questions, split="val")
    assert repr(found).startswith(f"vqa on {questions}")
    assert len(found.texts) == 5
    with pytest.raises(RecipeError, match="contradict each other"):
        vlp_api.evaluate(
            answering, questions, task="vqa", split="val", written=True, answers=questions / "a"
        )
    found = vlp_api.evaluate(classifier, classes)
    assert list(found) == ["top1", "top5"]
    assert repr(found).startswith(f"classification on {classes} (test)\n  top-1 ")

    writing = task_models.save_blip_task(tmp_path / "w", task_models.BlipForConditionalGeneration)
    found = vlp_api.evaluate(vlp_api.load(writing, device="cpu"), photos, limit=3)
    assert repr(found).startswith("captioning on ")  # models of its family can do retrieval, too

    blip = vlp_api.load(models / "blip", device="cpu")
    with pytest.raises(RecipeError, match=r"pass task \(--task\): retrieval or captioning$"):
        vlp_api.evaluate(blip, photos)
    with pytest.raises(RecipeError, match="no task is called 'retrival'.*'retrieval'"):
        vlp_api.evaluate(blip, photos, task="retrival")
    with pytest.raises(RecipeError, match=r"^rerank \(--rerank\) is of retrieval"):
        vlp_api.evaluate(blip, photos, task="captioning", rerank=2)
    with pytest.raises(DataError, match="needs the columns file_name and label"):
        vlp_api.evaluate(classifier, photos)
    clip = vlp_api.load(models / "clip", device="cpu")
    with pytest.raises(RecipeError, match="of any task.* do; retrieval: .*; classification: "):
        vlp_api.evaluate(clip, tmp_path / "w")
    written = vlp_api.evaluate(blip, coco, task="captioning", split="test", beams=1, limit=2)
    assert "METEOR is absent: " in repr(written)
    assert len(written.texts) == 2


def test_what_python_shows_is_short_and_files_are_replaced_only_if_asked_to(
    models, tmp_path
) -> None:
    model = vlp_api.load(models / "blip", device="cpu")
    data = vlp_api.batches(save_photos(tmp_path / "photos", 24), model, batch_size=8)
    statistics = vlp_api.gather(model, data)
    masks = vlp_api.prune(model, statistics=statistics, sparsity=0.63)
    profile = vlp_api.measure_id(model, data)
    count = f"{masks.total:,}"

    assert repr(masks) == f"Masks(multiflow, 63.0% of {count} elements removed, 36 weights)"
    assert repr(statistics) == (
        "Statistics(input_second_moment of 36 weights, 24 samples in 3 batches, adapter blip)"
    )
    assert re.fullmatch(
        r"IdProfile\(\d+ layer outputs, mean dimensions: vision \d+\.\d, text \d+\.\d; "
        r"24 samples, adapter blip\)",
        repr(profile),
    )
    halves = vlp_api.split_half(model, statistics, sparsity=0.63)
    assert re.fullmatch(
        rf"Overlap\(\d+\.\d% of {count} elements agree, IoU of what is kept \d+\.\d%\)",
        repr(halves["all"]),
    )
    assert repr(masks.compare(masks)["all"]).startswith("Overlap(100.0% of ")
    for number, found in enumerate((masks, statistics, profile)):
        path = tmp_path / str(number)
        found.save(path)
        with pytest.raises(OutputError, match=r"exists already; .* overwrite=True"):
            found.save(path)
        found.save(path, overwrite=True)
        assert repr(type(found).load(path)) == repr(found)
