"""`vlp evaluate`: from a model and a data set to metrics, before and after masks."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import pytest
import task_models
import torch
from PIL import Image
from tiny_models import WORDS, save_photos
from torch import nn
from transformers import BlipModel, ViTConfig
from vlp_command import Command, command

from vlp_plugins.cli.compare import compare
from vlp_plugins.data.labelled import class_numbers
from vlp_plugins.data.processors import load_processor
from vlp_plugins.data.records import upright_rgb
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.tasks.captioning import find_java
from vlp_plugins.tasks.vqa import vqa_accuracy


@pytest.fixture(scope="session")
def downstream(tmp_path_factory: pytest.TempPathFactory, xvlm: Path) -> Path:
    return task_models.save_all(tmp_path_factory.mktemp("downstream"), xvlm)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, save in (("coco", task_models.save_coco), ("vqa", task_models.save_questions),
                       ("classes", task_models.save_classes)):  # fmt: skip
        (folder / name).mkdir()
        save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def quick_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Java, whose programs take seconds to start; one long test has it."""
    monkeypatch.setattr("vlp_plugins.tasks.captioning.find_java", lambda: None)


def mask_of(model: Path, out: Path, method: str = "omp") -> Path:
    """Masks of 0.5, made by `vlp prune` without data."""
    command("prune", "--model", model, "--method", method, "--sparsity", "0.5", "--out", out,
            "--device", "cpu")  # fmt: skip
    (masks,) = out.glob("*.safetensors")
    return masks


def evaluate(vlp: Command, model: Path, task: str, data: Path, out: Path, *words: object):
    result = vlp("evaluate", model, "--task", task, "--data", data, "--device", "cpu",
                 "--out", out, *words)  # fmt: skip
    return result, json.loads((out / "evaluation.json").read_text())


def test_retrieval_on_coco_in_both_stages_before_and_after_masks(
    vlp, models, sets, tmp_path
) -> None:
    masks = mask_of(models / "xvlm", tmp_path / "pruned")
    result, record = evaluate(
        vlp, models / "xvlm", "retrieval", sets / "coco", tmp_path / "out",
        "--split", "test", "--masks", masks, "--rerank", "3", "--batch-size", "4",
    )  # fmt: skip
    assert record["settings"] == {"rerank": 3, "images": 3, "texts": 15}
    names = set(record["before"]["metrics"])
    assert {"image_to_text_r1", "text_to_image_r10", "mean", "features_mean"} <= names
    assert record["before"]["metrics"]["text_to_image_r5"] == 100, "there are three images"
    assert set(record["after"]["metrics"]) == names
    assert record["masks"]["method"] == "omp"
    assert record["masks"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    lines = [
        re.search(
            rf"^image to text R@1 \({stage}\) +[\d.]+ +[\d.]+ +[+-][\d.]+$", result.stdout, re.M
        )
        for stage in ("features alone", "re-ranked")
    ]
    assert lines[0].start() < lines[1].start(), "the ranking by features leads"
    assert f"retrieval on {sets / 'coco'} (test)" in result.stdout
    assert result.stdout.endswith(f"written: {tmp_path / 'out'}\n")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["evaluation.json", "report.html"]


def test_retrieval_is_ranked_by_features_unless_a_second_stage_is_asked_for(
    vlp, models, sets, tmp_path
) -> None:
    place, split = (vlp, models / "xvlm", "retrieval", sets / "coco"), ("--split", "test")
    result, record = evaluate(*place, tmp_path / "plain", *split)
    assert record["settings"]["rerank"] == 0
    assert "re-ranked" not in result.stdout
    _, both = evaluate(*place, tmp_path / "both", *split, "--rerank", "3")
    by_features = {f"features_{name}": v for name, v in record["before"]["metrics"].items()}
    assert by_features.items() <= both["before"]["metrics"].items()


def test_after_is_what_the_pruned_model_gives_by_itself(vlp, models, sets, tmp_path) -> None:
    masks = mask_of(models / "blip", tmp_path / "pruned")
    words = ("--split", "test", "--batch-size", "4")
    _, both = evaluate(vlp, models / "blip", "retrieval", sets / "coco", tmp_path / "both",
                       *words, "--masks", masks)  # fmt: skip
    vlp("masks", "apply", masks, models / "blip", "--out", tmp_path / "sparse")
    for file in (models / "blip").glob("*token*"):
        (tmp_path / "sparse" / file.name).write_bytes(file.read_bytes())
    _, alone = evaluate(vlp, tmp_path / "sparse", "retrieval", sets / "coco", tmp_path / "alone",
                        *words, "--processor", models / "blip")  # fmt: skip
    assert both["after"] == alone["before"]
    assert alone["after"] is alone["masks"] is None


def test_new_weights_of_masks_do_not_overwrite_what_was_learned_since(
    vlp, models, sets, tmp_path
) -> None:
    masks = Masks.load(mask_of(models / "siglip", tmp_path / "pruned"))
    model, _ = load_model(str(models / "siglip"))
    weights = WeightMap.of(model, registry().adapter_for(model))
    dense = {name: weight.parameter.detach() for name, weight in weights.items()}
    doubled = {name: 2 * value for name, value in dense.items()}
    Masks.from_dense(masks, masks.manifest, doubled).save(tmp_path / "values.safetensors")
    masks.save(tmp_path / "plain.safetensors")
    with torch.no_grad():
        for weight in weights.values():
            weight.parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "tuned")

    def after(model: Path, file: str, *words: str):
        result, record = evaluate(
            vlp, model, "retrieval", sets / "coco", tmp_path / f"{len(list(tmp_path.iterdir()))}",
            "--split", "test", "--masks", tmp_path / file, "--processor", models / "siglip", *words,
        )  # fmt: skip
        return record["after"], record["masks"]["new weights"], result.stdout

    def told(stdout: str) -> bool:
        return "new weights of the masks were left out" in stdout

    plain, none, _ = after(tmp_path / "tuned", "plain.safetensors")
    kept, left, stdout = after(tmp_path / "tuned", "values.safetensors")
    assert (kept, none, left, told(stdout)) == (plain, None, False, True)
    _, written, stdout = after(models / "siglip", "values.safetensors")
    assert (written, told(stdout)) == (True, False)
    _, written, _ = after(tmp_path / "tuned", "values.safetensors", "--new-weights")
    assert written
    _, record = evaluate(
        vlp, models / "siglip", "retrieval", sets / "coco", tmp_path / "kept", "--split", "test",
        "--masks", tmp_path / "values.safetensors", "--keep-weights",
    )  # fmt: skip
    assert record["masks"]["new weights"] is False
    assert " --keep-weights --" in record["command"], "the command that repeats it"


def test_the_command_says_so_if_it_measures_on_what_models_learn_from(
    vlp, models, tmp_path
) -> None:
    for split in ("train", "test"):
        save_photos(tmp_path / split, 4)
    words = ("evaluate", models / "siglip", "--task", "retrieval", "--data", tmp_path)
    assert "warning: measured on" not in vlp(*words, "--split", "train").stderr
    assert f"warning: measured on {tmp_path} (train); --split takes" in vlp(*words).stderr


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("captioning", ("--rerank", "4"), "rerank (--rerank) is of retrieval, not of captioning"),
        ("retrieval", ("--written",), "written (--written) is of vqa, not of retrieval"),
        ("classification", ("--beams", "2"), "beams (--beams) is of captioning and vqa, not of"),
    ],
)
def test_options_of_another_task_are_refused(vlp, models, sets, task, words, said) -> None:
    place = ("evaluate", models / "blip", "--data", sets / "coco")
    assert said in vlp(*place, "--task", task, *words, code=2).stderr


def test_the_model_of_the_command_is_the_dense_one_again_next_time(
    vlp, models, sets, tmp_path
) -> None:
    """Masks change the model in memory only."""
    masks = mask_of(models / "clip", tmp_path / "pruned")
    words = ("--split", "test", "--masks", masks)
    found = [
        evaluate(vlp, models / "clip", "retrieval", sets / "coco", tmp_path / name, *words)[1]
        for name in ("one", "two")
    ]
    assert found[0]["before"] == found[1]["before"]
    assert found[0]["settings"]["rerank"] == 0, "CLIP has no matching head"


def test_a_plain_folder_of_photos(vlp, models, photos, tmp_path) -> None:
    _, record = evaluate(vlp, models / "siglip", "retrieval", photos, tmp_path / "out",
                         "--limit", "5")  # fmt: skip
    assert record["settings"] == {"rerank": 0, "images": 5, "texts": 5}
    assert record["data"] == str(photos)


def test_the_only_task_of_model_and_data_needs_no_option(vlp, models, photos, tmp_path) -> None:
    vlp("evaluate", models / "siglip", "--data", photos, "--device", "cpu", "--out", tmp_path / "1")
    _, record = evaluate(vlp, models / "siglip", "retrieval", photos, tmp_path / "2")
    found = json.loads((tmp_path / "1" / "evaluation.json").read_text())
    assert found["task"] == "retrieval"
    assert found["before"] == record["before"]
    rows = [
        {"picture": path.name, "words": f"number {number}"}
        for number, path in enumerate(sorted(photos.glob("*.png"))[:4])
    ]
    named = tmp_path / "named"
    named.mkdir()
    for row in rows:
        (named / row["picture"]).symlink_to(photos / row["picture"])
    (named / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    vlp("evaluate", models / "siglip", "--data", named, "--device", "cpu",
        "--image-column", "picture", "--caption-column", "words")  # fmt: skip


def test_a_class_without_a_matching_head_is_ranked_by_features_only(vlp, photos, tmp_path) -> None:
    model = task_models.save_blip_task(tmp_path / "dual", BlipModel)
    _, record = evaluate(vlp, model, "retrieval", photos, tmp_path / "out")
    assert record["settings"]["rerank"] == 0
    place = ("evaluate", model, "--task", "retrieval", "--data", photos, "--device", "cpu")
    refused = vlp(*place, "--rerank", "3", code=2)
    assert "BlipModel has no matching head" in refused.stderr


@pytest.mark.parametrize("model", ["blip-captioning", "xvlm-captioning"])
def test_captions(vlp, downstream, sets, tmp_path, model) -> None:
    result, record = evaluate(
        vlp, downstream / model, "captioning", sets / "coco", tmp_path / "out",
        "--split", "test", "--beams", "2", "--longest", "7",
    )  # fmt: skip
    metrics = record["before"]["metrics"]
    assert set(metrics) == {"bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l"}
    assert set(record["before"]["absent"]) == {"meteor", "spice"}
    assert re.search(r"^METEOR is absent: no Java runtime", result.stdout, re.M)
    said = [json.loads(row) for row in (tmp_path / "out" / "said.jsonl").read_text().splitlines()]
    assert len(said) == 3
    assert all(len(row["people"]) == 5 and "after" not in row for row in said)
    assert all(len(row["before"].split()) <= 6 for row in said)
    assert record["settings"]["words"] == "plain"


@pytest.mark.parametrize("model", ["blip-vqa", "xvlm-vqa"])
@pytest.mark.parametrize("words", [(), ("--written",), ("--answers", "few.txt")])
def test_answers(vlp, downstream, sets, tmp_path, monkeypatch, model, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("red\ntwo\n\n")
    masks = mask_of(downstream / model, tmp_path / "pruned")
    _, record = evaluate(
        vlp, downstream / model, "vqa", sets / "vqa", tmp_path / "out",
        "--split", "val", "--masks", masks, "--batch-size", "2", *words,
    )  # fmt: skip
    said = [json.loads(row) for row in (tmp_path / "out" / "said.jsonl").read_text().splitlines()]
    assert len(said) == 5
    for when in ("before", "after"):
        found = vqa_accuracy([row[when] for row in said], [row["people"] for row in said])
        assert record[when]["metrics"] == {"accuracy": pytest.approx(found.accuracy)}
        if "--written" not in words:
            allowed = {"red", "two"} if words else set(WORDS)
            assert {row[when] for row in said} <= allowed
    listed = record["settings"].get("answers to choose among")
    assert listed == {(): len(WORDS), ("--written",): None}.get(words, 2)


def test_questions_of_a_data_set(vlp, downstream, sets, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = json.loads((sets / "vqa" / "vqa_val.json").read_text())
    columns = {
        "image": [{"bytes": (sets / "vqa" / row["image"]).read_bytes()} for row in rows],
        "question": [row["question"] for row in rows],
        "answers": [[{"answer": each} for each in row["answer"]] for row in rows],
    }
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    figures = [
        evaluate(vlp, downstream / "blip-vqa", "vqa", data, tmp_path / name, *words)[1]["before"]
        for name, data, words in (
            ("one", sets / "vqa", ("--split", "val", "--written")),
            ("two", tmp_path / "saved", ("--written",)),
        )
    ]
    assert figures[0] == figures[1]


def test_classes(vlp, downstream, sets, tmp_path) -> None:
    masks = mask_of(downstream / "vit-classifier", tmp_path / "pruned")
    _, record = evaluate(vlp, downstream / "vit-classifier", "classification", sets / "classes",
                         tmp_path / "out", "--masks", masks, "--split", "test")  # fmt: skip
    assert record["settings"] == {"images": 6}
    for when in ("before", "after"):
        assert 0 <= record[when]["metrics"]["top1"] <= record[when]["metrics"]["top5"] == 100


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_classes_are_told_apart_by_their_names_without_a_classifier(
    vlp, models, sets, tmp_path, name
) -> None:
    words = ("--split", "test", "--batch-size", "4")
    _, record = evaluate(vlp, models / name, "classification", sets / "classes",
                         tmp_path / "out", *words)  # fmt: skip
    assert record["settings"] == {"images": 6, "prompt": "a photo of a {}"}
    model, adapter = load_model(str(models / name), device="cpu")
    processor = load_processor(str(models / name))
    right = 0
    for number, (label, text) in enumerate(
        (label, label.replace("_", " ")) for label in sorted(task_models.CLASSES) for _ in range(2)
    ):
        image = upright_rgb(Image.open(sets / "classes" / "test" / label / f"{number % 2}.png"))
        names = sorted(task_models.CLASSES)
        prompts = [f"a photo of a {each.replace('_', ' ')}" for each in names]
        batch = adapter.collate(processor, [image] * len(names), prompts)
        with torch.no_grad():
            features = adapter.image_features(model, batch)[0]
            nearest = int((adapter.text_features(model, batch) @ features).argmax())
        right += names[nearest].replace("_", " ") == text
    assert record["before"]["metrics"]["top1"] == pytest.approx(100 * right / 6)
    _, other = evaluate(vlp, models / name, "classification", sets / "classes",
                        tmp_path / "other", *words, "--prompt", "two of {}")  # fmt: skip
    assert other["settings"]["prompt"] == "two of {}"
    vlp("evaluate", models / name, "--data", sets / "classes", "--device", "cpu", *words,
        "--prompt", "two of {}", "--out", tmp_path / "guessed")  # fmt: skip
    guessed = json.loads((tmp_path / "guessed" / "evaluation.json").read_text())
    assert (guessed["task"], guessed["before"]) == ("classification", other["before"])


def test_classes_are_compared_by_name_where_a_split_lacks_one(vlp, tmp_path) -> None:
    folder, photos = tmp_path / "model", tmp_path / "photos"
    task_models.save_classifier(folder)
    model, adapter = load_model(str(folder), device="cpu")
    for number in range(4):  # classes 1 and 2 of the model, 0 and 1 of the folder
        task_models.put_noise(photos / ("dog" if number else "owl") / f"{number}.png", number)
    processor = load_processor(str(folder))
    images = [upright_rgb(Image.open(path)) for path in sorted(photos.rglob("*.png"))]
    batch = adapter.collate(processor, images, [""] * 4)
    with torch.no_grad():
        model.classifier.bias[1] += 100  # all are dogs
        assert model(batch["pixel_values"]).logits.argmax(1).tolist() == [1] * 4
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    model.save_pretrained(folder)

    _, record = evaluate(vlp, folder, "classification", photos, tmp_path / "out")

    assert record["before"]["metrics"]["top1"] == 75


def test_numbers_of_classes_are_kept_where_names_do_not_tell(caplog) -> None:
    named = nn.Module()
    named.config = ViTConfig(id2label={0: "cat", 1: "dog", 2: "owl"})
    bare = nn.Module()
    bare.config = ViTConfig(num_labels=3)

    assert class_numbers(named, ("dog", "owl")) == {0: 1, 1: 2}
    assert class_numbers(named, ()) == class_numbers(bare, ("dog", "owl")) == {}
    assert class_numbers(nn.Linear(2, 3), ("dog", "owl")) == {}
    assert not caplog.records
    assert class_numbers(named, ("dog", "elk")) == {}
    assert "'elk'" in caplog.text


def test_masks_of_the_pretraining_model_fit_the_downstream_model(
    vlp, models, downstream, sets, tmp_path
) -> None:
    masks = mask_of(models / "xvlm", tmp_path / "pruned")
    for task, data in (("captioning", "coco"), ("vqa", "vqa")):
        _, record = evaluate(
            vlp, downstream / f"xvlm-{task}", task, sets / data, tmp_path / task,
            "--masks", masks, "--split", {"coco": "test", "vqa": "val"}[data],
        )  # fmt: skip
        assert record["after"]["metrics"].keys() == record["before"]["metrics"].keys()
        model, adapter = load_model(str(downstream / f"xvlm-{task}"), device="cpu")
        Masks.load(masks).apply(model, adapter)
        assert Masks.load(masks).verify(model, adapter) == []
        page = (tmp_path / task / "report.html").read_text()
        assert re.search(r'<dd class="note">[+-][\d.]+ ± [\d.]+ points by pruning', page)
        weights = WeightMap.of(model, adapter).values()
        zeros = sum(int((weight.parameter == 0).sum()) for weight in weights)
        whole = record["masks"]["sparsity of the whole model"]
        assert whole == pytest.approx(zeros / sum(map(torch.numel, model.parameters())), abs=1e-4)


def test_the_page_repeats_the_run_and_loads_nothing(vlp, downstream, sets, tmp_path) -> None:
    out = tmp_path / "out"
    _, record = evaluate(vlp, downstream / "blip-vqa", "vqa", sets / "vqa", out, "--split", "val")
    page = (out / "report.html").read_text()
    assert re.search(r'<dt>accuracy</dt><dd class="value">[\d.]+%</dd><dd class="note">± \d', page)
    assert re.search(r"<p>± is one standard error over \d+ samples\.</p>", page)
    assert not re.search(r" src=|href=\"(/|[^\"]*:)", page)
    words = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[-1]))
    assert words[:2] == ["vlp", "evaluate"]
    step = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[0]))
    assert step[:3] == ["vlp", "compare", str(downstream / "blip-vqa")]
    asked = compare.make_context("compare", step[2:]).params  # no option is unknown or missing
    assert (asked["task"], asked["out"]) == ("vqa", Path("compared"))
    words[words.index("--out") + 1] = str(tmp_path / "again")
    vlp(*words[1:])
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again["before"] == record["before"]
    assert again["schema"] == 1
    assert again["made_by"].startswith("vlp_plugins ")


def test_nothing_is_written_without_a_folder(vlp, downstream, sets, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = vlp("evaluate", downstream / "vit-classifier", "--task", "classification",
                 "--data", sets / "classes", "--split", "test", "--device", "cpu")  # fmt: skip
    assert re.search(r"^top-1 +[\d.]+$", result.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{xvlm} --task vqa --data {vqa} --split val", "XvlmForPretraining answers no questions"),
        (
            "{xvlm} --task captioning --data {coco} --split val",
            "XvlmForPretraining writes no captions",
        ),
        (
            "{vit} --task retrieval --data {coco} --split val",
            "does not say how images and texts are embedded",
        ),
        ("{vit} --task classification --data {classes}", "ViTModel has no classifier"),
        ("{xvlm} --task classification --data {classes}", "how its models classify"),
        ("{clip} --task retrieval --data {coco} --split val --rerank 4", "has no matching head"),
        ("{blipvqa} --task vqa --data {vqa} --split test", "has no answers to compare with"),
        ("{blipvqa} --task vqa --data {coco}", "holds no questions: expected"),
        ("{blipvqa} --task vqa --data /nowhere/at/all", "/nowhere/at/all does not exist"),
        ("{blipvqa} --task vqa --data {vqa} --split vla", "no split 'vla'"),
        (
            "{blipvqa} --task vqa --data {vqa} --split val --answers /none.txt",
            "cannot read the answers in",
        ),
        ("{blipvqa} --task vqa --data {vqa} --answers x --written", "contradict each other"),
        ("{xvlm} --task retrieval --data {coco} --split test --masks {vitmasks}", "adapter 'vit'"),
        ("{xvlm} --task retrieval --data {coco} --masks /no.safetensors", "is not a file"),
        ("{xvlm} --task parsing --data {coco}", "'parsing' is not one of"),
        ("{clip} --data /nowhere/at/all", "/nowhere/at/all does not exist"),
        ("{clip} --data {classes} --split tset", "no split 'tset' (did you mean 'test'?)"),
        ("{clip} --data {coco} --split test --prompt Hm", "prompt (--prompt) is for chat models"),
        ("{clip} --data {coco} --split test --beams 2", "beams (--beams) is of captioning and vqa"),
        ("{few} --task classification --data {classes}", "do not fit 6 images and 2 classes"),
    ],
)
def test_a_mistake(vlp, models, downstream, sets, tmp_path, words, message, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {name: models / name for name in ("xvlm", "vit", "clip")}
    names |= {name: sets / name for name in ("coco", "vqa", "classes")}
    names["blipvqa"] = downstream / "blip-vqa"
    if "{few}" in words:
        names["few"] = task_models.save_classifier(tmp_path / "few", classes=2)
    if "{vitmasks}" in words:
        names["vitmasks"] = mask_of(models / "vit", tmp_path / "pruned")
    before = sorted(tmp_path.iterdir())
    filled = words.format(**names).split()
    result = vlp("evaluate", *filled, "--device", "cpu", "--out", tmp_path / "out", code=2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_image_ends_the_measurement(vlp, downstream, tmp_path) -> None:
    data = task_models.save_classes(tmp_path / "classes")
    (data / "test" / "two" / "1.png").write_bytes(b"no image")
    result = vlp("evaluate", downstream / "vit-classifier", "--task", "classification",
                 "--data", data, "--split", "test", code=2)  # fmt: skip
    assert "the image of two/1.png cannot be read" in result.stderr


@pytest.mark.long
def test_captions_with_java(vlp, downstream, sets, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vlp_plugins.tasks.captioning.find_java", find_java)
    _, record = evaluate(vlp, downstream / "blip-captioning", "captioning", sets / "coco",
                         tmp_path / "out", "--split", "test")  # fmt: skip
    assert record["settings"]["words"] == "ptb"
    assert 0 <= record["before"]["metrics"]["meteor"] <= 100
    assert set(record["before"]["absent"]) == {"spice"}
