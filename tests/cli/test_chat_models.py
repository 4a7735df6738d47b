"""Chat models on the command line: measured on what they were taught, pruned, compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chat_models
import pytest
import torch
from PIL import Image
from vlp_command import Command

import vlp_plugins
from vlp_plugins.data.chat import chat_processor
from vlp_plugins.data.conversations import Asked
from vlp_plugins.data.processors import load_processor
from vlp_plugins.jobs import compare
from vlp_plugins.jobs.held_out import CompareRequest, open_data
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime import artifacts
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.tasks.captioning import generate

COLOURS = {"red": (230, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 230)}


@pytest.fixture(autouse=True)
def quick_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Java, whose programs take seconds to start."""
    monkeypatch.setattr("vlp_plugins.tasks.captioning.find_java", lambda: None)


def write_images(folder: Path, said: Any) -> Path:
    """An image of each colour, four times, with a row of what is said about it."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(12):
        colour = list(COLOURS)[number % 3]
        Image.new("RGB", (32 + 16 * (number % 2), 32), COLOURS[colour]).save(
            folder / f"{number}.png"
        )
        rows.append({"file_name": f"{number}.png", **said(colour)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that knows three colours, and data to measure it on."""
    folder = tmp_path_factory.mktemp("chat")
    model = chat_models.llava()
    chat_models.save_llava(folder / "model", model)
    chat = chat_processor(load_processor(str(folder / "model")))
    images = [Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()]
    asked = [Asked("Which colour?", colour) for colour in COLOURS]
    choices = [Asked("Which one?", colour, tuple(COLOURS)) for colour in COLOURS]
    batch = dict(chat(images=images * 3, text=[*COLOURS, *asked, *choices]))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    model.eval().save_pretrained(folder / "model")
    return {
        "model": folder / "model",
        "captions": write_images(folder / "captions", lambda colour: {"text": colour}),
        "choices": write_images(
            folder / "choices",
            lambda colour: {"question": "Which one?", "choices": [*COLOURS], "answer": colour},
        ),
        "questions": write_images(
            folder / "questions",
            lambda colour: {"question": "Which colour?", "answers": [colour, colour, "blurred"]},
        ),
    }


def measure(vlp: Command, taught: dict[str, Path], task: str, data: str, out: Path) -> Any:
    vlp("evaluate", taught["model"], "--task", task,
        "--data", taught[data], "--batch-size", 5, "--out", out)  # fmt: skip
    return json.loads((out / "evaluation.json").read_text())


def test_captions_are_written(vlp: Command, taught: dict[str, Path], tmp_path: Path) -> None:
    record = measure(vlp, taught, "captioning", "captions", tmp_path / "out")
    assert record["before"]["metrics"]["bleu1"] == pytest.approx(100)
    assert record["settings"] == {
        "images": 12, "beams": 1, "longest": 64, "words": "plain", "prompt": "Describe the image.",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "said.jsonl").open()]
    assert [row["before"] for row in rows] == [row["people"][0] for row in rows]


def test_questions_are_answered(vlp: Command, taught: dict[str, Path], tmp_path: Path) -> None:
    record = measure(vlp, taught, "vqa", "questions", tmp_path / "out")
    # Two of three people say what the model says: one or two of each two, a third each.
    assert record["before"]["metrics"]["accuracy"] == pytest.approx(100 * 4 / 9)
    rows = [json.loads(line) for line in (tmp_path / "out" / "said.jsonl").open()]
    assert all(row["before"] == row["people"][0] for row in rows)


def test_questions_of_a_data_set(vlp: Command, taught: dict[str, Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows: dict[str, list[Any]] = {"image": [], "question": [], "answers": []}
    for number, colour in enumerate(COLOURS):
        content = (taught["questions"] / f"{number}.png").read_bytes()
        rows["image"].append({"bytes": content, "path": None})
        rows["question"].append("Which colour?")
        rows["answers"].append([colour, "blurred", colour, colour])
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "rows.parquet")
    vlp("evaluate", taught["model"], "--task", "vqa", "--data", tmp_path / "rows.parquet",
        "--out", tmp_path / "out")  # fmt: skip
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # Leaving out one of those who agree, two of three are left.
    assert record["before"]["metrics"]["accuracy"] == pytest.approx(100 * (3 * 2 / 3 + 1) / 4)
    assert record["settings"]["questions"] == 3


def test_letters_stand_for_choices(vlp: Command, taught: dict[str, Path], tmp_path: Path) -> None:
    record = measure(vlp, taught, "vqa", "choices", tmp_path / "out")
    assert record["before"]["metrics"]["accuracy"] == 100
    assert record["settings"]["prompt"].startswith("{question} {choices} Answer with the option's")
    rows = [json.loads(line) for line in (tmp_path / "out" / "said.jsonl").open()]
    assert {row["before"] for row in rows} == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("--method", "tamp"), ("measuring for the allocation: ", "pruning: ")),
        (("--method", "alps", "--tokens", "atv(alpha=2)"), ("pruning: ",)),
        (("--method", "omp", "--allocation", "das"), ("read by the allocation alone", "masks: ")),
        (("--method", "wanda", "--allocation", "ecoflap(batches=1)"), ("data pass: ",)),
        (("--method", "multiflow", "--allocation", "owl(M=3)"), ("data pass: ",)),
        (("--method", "wanda", "--allocation", "owl", "--walk", "blocks"), ("pruning: ",)),
        (("--method", "chita", "--walk", "blocks"), ("pruning: ",)),
    ],
)
def test_tokens_and_budgets_of_blocks(
    vlp: Command, taught: dict[str, Path], tmp_path: Path, words: Any, facts: Any
) -> None:
    data = ("--data", taught["captions"], "--batch-size", 4, "--batches", 2)
    words = ("--model", taught["model"], *data, "--sparsity", 0.5, *words)
    planned = vlp("plan", *words).stdout
    done = vlp("prune", *words, "--out", tmp_path / "out").stdout

    assert all(fact in done for fact in facts)
    masks = Masks.load(tmp_path / "out" / "masks-0.5.safetensors")
    total, record = masks.total, masks.manifest.parameters
    assert masks.removed == pytest.approx(
        0.5 * total, abs=20 if record["allocation"] == "layer" else 0.5
    )
    assert f"{masks.removed:,}" in planned
    if "blocks" in words:
        assert record["walk"] == "blocks"
    if "atv(alpha=2)" in words:
        assert record["tokens"] == "atv(alpha=2)"
        assert record["walk"] == "blocks"
    elif "chita" in words:
        assert "1 pass over the dense model, forward and backward, for the gradients" in planned
    else:
        assert "depends on the data" in planned
    again = vlp("prune", *words, "--out", tmp_path / "again").stdout
    assert Masks.load(tmp_path / "again" / "masks-0.5.safetensors") == masks
    assert again
    if record["allocation"] == "das":
        assert "allocation das measures the model first: 2 forward passes" in planned


def test_a_disk_without_room_for_new_values_is_told_before_the_work(
    vlp: Command, taught: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "MAPPED", 1)
    data = ("--data", taught["captions"], "--batch-size", 4, "--batches", 2)
    words = ("--model", taught["model"], *data, "--method", "alps", "--walk", "blocks")
    words = (*words, "--sparsity", 0.5)
    planned = json.loads(vlp("plan", *words, "--json").stdout)["bytes"]
    # In files of the work until they are in the file of masks.
    needed = planned["disk"] + planned["masks"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=planned["masks"]))
    refused = vlp("prune", *words, "--out", tmp_path / "out", code=2).stderr
    assert "out will take" in refused
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    vlp("prune", *words, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "masks-0.5.safetensors").stat().st_size > planned["masks"]
    assert not list(tmp_path.glob("out.work"))


def test_a_plan_of_measuring_needs_the_number_of_batches(
    vlp: Command, taught: dict[str, Path]
) -> None:
    words = ("--model", taught["model"], "--method", "omp", "--allocation", "das")
    refused = vlp("plan", *words, "--sparsity", 0.5, code=2).stderr
    assert "what measuring for allocation 'das' takes; give their number with --batches" in refused


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tokens", "atvv"), "no token selection is called 'atvv' (did you mean 'atv'?)"),
        (("--tokens", "atv(alpha=-1)"), "alpha=-1; give a number from 0 on"),
        (("--tokens", "text", "--method", "lamp"), "method 'lamp' reads no inputs"),
        (("--tokens", "text", "--walk", "model"), "tokens are chosen block by block"),
        (("--method", "tamp", "--walk", "model"), "method 'tamp' chooses tokens block by block"),
        (("--method", "chita", "--allocation", "owl"), "not by allocation 'owl'"),
        (("--method", "snip", "--tokens", "text"), "needs gradients of the whole model's loss"),
        (("--method", "wanda", "--allocation", "owl(N=3)"), "has no parameter 'N'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    vlp: Command, taught: dict[str, Path], tmp_path: Path, words: Any, sentence: str
) -> None:
    words = ("--model", taught["model"], "--data", taught["captions"], "--sparsity", 0.5, *words)
    result = vlp("prune", *words, "--out", tmp_path / "out", code=2)

    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_was_removed_is_missed(vlp: Command, taught: dict[str, Path], tmp_path: Path) -> None:
    words = ("--sparsity", 0.98, "--method", "omp")
    vlp("prune", "--model", taught["model"], *words, "--out", tmp_path / "pruned", "--save-model")
    masks = tmp_path / "pruned" / "masks-0.98.safetensors"
    vlp("evaluate", taught["model"], "--task", "vqa", "--masks", masks,
        "--data", taught["questions"], "--out", tmp_path / "out")  # fmt: skip
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    before, after = (record[when]["metrics"]["accuracy"] for when in ("before", "after"))
    assert after < before
    pruned = load_processor(str(tmp_path / "pruned" / "model-0.98"))
    assert chat_processor(pruned) is not pruned  # template and all are there


def test_the_loss_is_that_of_the_answers(
    vlp: Command, taught: dict[str, Path], tmp_path: Path
) -> None:
    found = measure(vlp, taught, "loss", "questions", tmp_path / "out")["before"]["metrics"]
    model: Any = vlp_plugins.load(taught["model"])
    data = vlp_plugins.batches(taught["questions"], model, batch_size=5)
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in data]
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["loss"] < 1  # it was taught these answers
    other = measure(vlp, taught, "loss", "captions", tmp_path / "other")["before"]["metrics"]
    assert other["loss"] != found["loss"]


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize("method", ["multiflow", "wanda", "snip"])
def test_a_folder_of_photos_is_all_that_pruning_needs(
    vlp: Command, photos: Path, tmp_path: Path, family: str, method: str
) -> None:
    model: Any = {"llava": chat_models.llava, "qwen": chat_models.qwen}[family]()
    save = {"llava": chat_models.save_llava, "qwen": chat_models.save_qwen}[family]
    save(tmp_path / "model", model.to(torch.bfloat16))
    vlp("prune", "--model", tmp_path / "model", "--data", photos, "--method", method,
        "--sparsity", "0.5", "0.7", "--out", tmp_path / "out", "--save-model")  # fmt: skip
    for sparsity in ("0.5", "0.7"):
        masks = Masks.load(tmp_path / "out" / f"masks-{sparsity}.safetensors")
        assert masks.sparsity == pytest.approx(float(sparsity), abs=0.02)  # wanda: by row
        folder = tmp_path / "out" / f"model-{sparsity}"
        pruned: Any = type(model).from_pretrained(folder)
        assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
        vlp("masks", "verify", tmp_path / "out" / f"masks-{sparsity}.safetensors", folder)
        assert {"chat_template.jinja", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


def test_paligemma_writes_on_after_a_prompt(vlp: Command, photos: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    chat_models.paligemma().save_pretrained(model)
    chat_models.without_template("paligemma").save_pretrained(model)
    words = ("--data", photos, "--method", "snip", "--sparsity", "0.5")
    vlp("prune", "--model", model, *words, "--out", tmp_path / "out")
    assert Masks.load(tmp_path / "out" / "masks-0.5.safetensors").sparsity == 0.5
    for task, prompt in (("captioning", "caption en"), ("captioning", "describe en")):
        asked = () if prompt == "caption en" else ("--prompt", prompt)
        found = vlp("evaluate", model, "--task", task, "--data", photos, "--longest", 3, *asked,
                    "--json")  # fmt: skip
        assert json.loads(found.stdout)["settings"]["prompt"] == prompt


def test_methods_are_compared_by_answers_or_by_the_loss(
    vlp: Command, taught: dict[str, Path], tmp_path: Path
) -> None:
    for task, data in ((None, "questions"), (None, "captions"), ("captioning", "captions")):
        out = tmp_path / f"{task}-{data}"
        named = () if task is None else ("--task", task)
        vlp("compare", taught["model"], "--data", taught[data], *named, "--out", out,
            "--methods", "omp", "snip", "--sparsity", 0.5, "--batch-size", 3)  # fmt: skip
        record = json.loads((out / "compare.json").read_text())
        assert record["task"] == (task or {"questions": "vqa", "captions": "loss"}[data])


def test_methods_that_walk_by_blocks_are_compared_as_prune_runs_them(
    vlp: Command, taught: dict[str, Path], tmp_path: Path
) -> None:
    """One pass over the dense model would give ATV and TAMP other masks."""
    out, methods = tmp_path / "out", ("atv", "tamp", "wanda")
    vlp("compare", taught["model"], "--data", taught["questions"], "--methods", *methods,
        "--sparsity", 0.5, 0.75, "--batch-size", 3, "--out", out)  # fmt: skip
    record = json.loads((out / "compare.json").read_text())
    assert record["left_out"] == {}
    request = CompareRequest(DataRecipe(str(taught["questions"]), batch_size=3))
    loaded = Loaded.of(ModelSource(str(taught["model"]), device="cpu"))
    test, pool = open_data(loaded, request)
    run = compare._Run(loaded, request, test, pool, {}, {}, work=tmp_path, resume=False)
    batches = list(run._batches(0))
    for method in methods:
        alone = vlp_plugins.prune(loaded.model, batches, method=method, sparsity=[0.5, 0.75])
        files = (out / "masks" / f"{method}-{sparsity}.safetensors" for sparsity in (0.5, 0.75))
        assert [Masks.load(file) for file in files] == alone, method
        assert (alone[0].manifest.parameters.get("walk") == "blocks") == (method != "wanda")


def test_a_cpu_gets_smaller_images_unless_more_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = chat_models.save_qwen(tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_pixels": 1024 * 1024}))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (900, 900)).save(tmp_path / "photos" / "0.png")
    (tmp_path / "photos" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "dark"}')
    model: Any = vlp_plugins.load(folder, device="cpu")

    def pixels(**options: int) -> int:
        (batch,) = vlp_plugins.batches(tmp_path / "photos", model, **options)
        return 64 * int(batch["image_grid_thw"].prod())

    assert 300_000 < pixels() <= 512 * 28 * 28
    assert "no larger than 401,408 pixels on a CPU" in caplog.text
    assert 700_000 < pixels(max_pixels=1024 * 1024) <= 900 * 900
    assert pixels(max_pixels=64 * 64) == 64 * 64
    llava: Any = vlp_plugins.load(chat_models.save_llava(tmp_path / "llava"), device="cpu")
    with pytest.raises(DataError, match="makes all images of one size"):
        vlp_plugins.batches(tmp_path / "photos", llava, max_pixels=100)


def test_a_prompt_is_for_chat_models(models: Path, photos: Path) -> None:
    model: Any = vlp_plugins.load(models / "clip", device="cpu")
    with pytest.raises(DataError, match="prompt .* is for chat models"):
        vlp_plugins.batches(photos, model, prompt="Describe it.")


def test_python_measures_the_same(taught: dict[str, Path]) -> None:
    model = vlp_plugins.load(taught["model"])
    found = vlp_plugins.evaluate(model, taught["questions"], task="vqa")
    assert found.title.startswith("vqa on")
    assert found.texts == [list(COLOURS)[n % 3] for n in range(12)]


def test_a_list_to_choose_from_is_for_models_that_choose(
    vlp: Command, taught: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "answers.txt").write_text("red\nblue\n")
    result = vlp(
        "evaluate", taught["model"], "--task", "vqa",
        "--data", taught["questions"], "--answers", tmp_path / "answers.txt", code=2,
    )  # fmt: skip
    assert "writes its answers and does not choose" in result.stderr


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_texts_do_not_depend_on_the_others_of_a_batch(
    family: str, beams: int, tmp_path: Path
) -> None:
    save = {"llava": chat_models.save_llava, "qwen": chat_models.save_qwen}[family]
    model: Any = {"llava": chat_models.llava, "qwen": chat_models.qwen}[family]()
    chat = chat_processor(load_processor(str(save(tmp_path, model))))
    images = [Image.new("RGB", (40, 30), (200, 10, 10)), Image.new("RGB", (64, 96), (0, 10, 210))]
    asked = [Asked("what?"), Asked("how many digits are to be seen?")]
    together = generate(model, chat(images=images, text=asked), max_length=6, num_beams=beams)
    for row, (image, text) in enumerate(zip(images, asked, strict=True)):
        batch = chat(images=[image], text=[text])
        alone = generate(model, batch, max_length=6, num_beams=beams)[0]
        assert alone.tolist() == together[row, : len(alone)].tolist()
