"""`vlp finetune`: from a pruned model and a data set to a model of the task that is as sparse."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from vlp_command import Command

from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.structured.cuts import cut
from vlp_plugins.structured.files import save_structured
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FAST = ["--batch-size", "4", "--steps", "4", "--learning-rate", "1e-3", "--device", "cpu"]
MODELS = {
    ("xvlm", "retrieval"): "XvlmForPretraining",
    ("xvlm", "captioning"): "XvlmForCaptioning",
    ("xvlm", "vqa"): "XvlmForQuestionAnswering",
    ("blip", "retrieval"): "BlipForPretraining",
    ("blip", "captioning"): "BlipForConditionalGeneration",
    ("blip", "vqa"): "BlipForQuestionAnswering",
    ("clip", "retrieval"): "CLIPModel",
    ("vit", "classification"): "ViTForImageClassification",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data of every task: the same photos with captions, questions, classes."""
    folder = tmp_path_factory.mktemp("tasks")
    places = {}
    rows: dict[str, Any] = {
        "captions": lambda n: {"text": [f"a red {word}" for word in ("one", "two")[: 1 + n % 2]]},
        "vqa": lambda n: {"question": "one on the left of", "answers": ["two", "a seven"]},
        "classification": lambda n: {"label": ("dog", "cat", "owl")[n % 3]},
    }
    for task, row in rows.items():
        place = tiny_models.save_photos(folder / task)
        lines = [json.dumps({"file_name": f"{n:03}.png", **row(n)}) for n in range(12)]
        (place / "metadata.jsonl").write_text("\n".join(lines))
        places[task] = place
    return places | dict.fromkeys(("retrieval", "captioning"), places["captions"])


@pytest.fixture(scope="module")
def masks(models: Path, vlp: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("masks")
    found = {}
    for family in ("xvlm", "blip", "clip", "vit"):
        out = folder / family
        vlp("prune", "--model", models / family, "--method", "omp", "--sparsity", "0.75",
            "--out", out, "--device", "cpu")  # fmt: skip
        found[family] = out / "masks-0.75.safetensors"
    return found


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_the_folder_is_a_model_of_the_task_and_its_masks(
    family, task, vlp, models, masks, data, tmp_path
) -> None:
    out = tmp_path / "tuned"
    result = vlp("finetune", models / family, "--task", task, "--masks", masks[family],
                 "--data", data[task], "--out", out, *FAST)  # fmt: skip
    assert "steps: 4, 4 samples each" in result.stdout
    assert f"model: {MODELS[family, task]}" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]

    model, adapter = load_model(str(out), device="cpu")
    assert type(model).__name__ == MODELS[family, task]
    kept = Masks.load(out / "masks.safetensors")
    assert kept == Masks.load(masks[family])
    assert kept.verify(model, adapter) == []
    vlp("masks", "verify", out / "masks.safetensors", out, "--device", "cpu")
    record = json.loads((out / "finetuning.json").read_text())
    assert (record["schema"], record["task"], record["steps"]) == (1, task, 4)
    assert record["settings"]["learning_rate"] == 1e-3
    assert record["masks"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    (line,) = map(json.loads, (out / "losses.jsonl").read_text().splitlines())
    assert line["step"] == 4
    page = (out / "report.html").read_text()
    assert f"fine-tuned for {task} in 4 steps; what omp had removed stayed at zero." in page
    assert 'role="img"' in page
    next_step, repeated = re.findall(r"<pre>(.*?)</pre>", page)
    assert next_step.startswith(f"vlp evaluate {out} --task {task} --data TEST_DATA")
    assert repeated.startswith(f"vlp finetune {models / family} --masks ")
    evaluated = vlp("evaluate", out, "--task", task, "--data", data[task], "--device", "cpu",
                    "--limit", "4") if task != "captioning" else None  # fmt: skip
    assert evaluated is None or evaluated.exit_code == 0
    if task == "classification":
        assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_a_recipe_is_followed_and_options_win(vlp, models, masks, data, tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"task: captioning\ndata: {data['captioning']}\nbatch_size: 6\nepochs: 2\n"
        "learning_rate: 2.0e-4\nbetas: [0.9, 0.98]\nschedule: linear\nwarmup: 0.1\nlog_every: 1\n"
    )
    vlp("finetune", models / "xvlm", "--recipe", recipe, "--out", tmp_path / "o",
        "--learning-rate", "3e-4", "--masks", masks["xvlm"], "--device", "cpu")  # fmt: skip
    record = json.loads((tmp_path / "o" / "finetuning.json").read_text())
    assert record["settings"]["betas"] == [0.9, 0.98]
    assert record["settings"]["learning_rate"] == 3e-4
    assert record["steps"] == 6  # of 18 captions in steps of 6, twice
    assert shlex.split(record["command"])[:2] == ["vlp", "finetune"]
    lines = [json.loads(x) for x in (tmp_path / "o" / "losses.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]


def same_results(one: Path, other: Path) -> None:
    first, second = (load_model(str(folder), device="cpu")[0] for folder in (one, other))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert (one / "losses.jsonl").read_text() == (other / "losses.jsonl").read_text()


def test_an_interrupted_run_says_how_to_go_on_and_does(
    vlp, models, masks, data, tmp_path, monkeypatch
) -> None:
    words = ["finetune", models / "xvlm", "--task", "vqa", "--data", data["vqa"], "--masks",
             masks["xvlm"], *FAST, "--checkpoint-every", "2"]  # fmt: skip
    save = Checkpoint.save

    def save_and_stop(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_stop)
        result = vlp(*words, "--out", tmp_path / "out", code=130)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    repeat = shlex.split(result.stderr.splitlines()[-1].partition("to resume: ")[2])
    other = vlp(*repeat[1:], "--batch-size", "6", code=2)
    assert "its batch size is 4, this one's is 6" in other.stderr
    assert "resumed from step 2" in vlp(*repeat[1:]).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    vlp(*words, "--out", tmp_path / "whole")
    same_results(tmp_path / "out", tmp_path / "whole")


@pytest.mark.long
def test_ctrl_c_and_resume_give_the_bits_of_an_uninterrupted_run(
    vlp, models, masks, data, tmp_path
) -> None:
    words = [
        "finetune", str(models / "xvlm"), "--task", "captioning", "--data",
        str(data["captioning"]), "--masks", str(masks["xvlm"]), "--batch-size", "4", "--steps",
        "80", "--checkpoint-every", "20", "--learning-rate", "1e-3", "--device", "cpu",
    ]  # fmt: skip
    out, state = tmp_path / "out", tmp_path / "out.work" / "finetuning.safetensors"
    command = [sys.executable, "-m", "vlp_plugins", *words, "--out", str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    begin = time.monotonic()
    while not state.exists() and process.poll() is None and time.monotonic() - begin < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    repeat = shlex.split(re.search(r"^interrupted; to resume: (vlp .*)$", text, re.MULTILINE)[1])

    result = vlp(*repeat[1:])
    assert re.search(r"resumed from step \d+", result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    vlp(*words, "--out", tmp_path / "whole")
    same_results(tmp_path / "out", tmp_path / "whole")


@pytest.mark.long
def test_two_launched_processes_do_what_one_does_in_two_parts(
    vlp, models, masks, data, tmp_path
) -> None:
    pytest.importorskip("accelerate")
    words = ["finetune", str(models / "blip"), "--task", "captioning", "--data",
             str(data["captioning"]), "--masks", str(masks["blip"]), *FAST]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip
    done = subprocess.run(
        [*launch, "-m", "vlp_plugins", *words, "--out", str(tmp_path / "two")],
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("written: ") == 1
    vlp(*words, "--accumulate", "2", "--out", tmp_path / "one")
    two, one = (load_model(str(tmp_path / name), device="cpu")[0] for name in ("two", "one"))
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), parameter, atol=1e-5, rtol=1e-4)
    assert Masks.load(masks["blip"]).verify(two) == []


def mistakes(models: Path, masks: dict[str, Path], data: dict[str, Path]) -> dict[str, Any]:
    xvlm, photos = models / "xvlm", data["captioning"]
    return {
        "no task given": [xvlm, "--data", photos],
        "no data given": [xvlm, "--task", "vqa"],
        "'--task'": [xvlm, "--task", "captions", "--data", photos],
        "does not exist": [models / "none", "--task", "captioning", "--data", photos],
        "question": [xvlm, "--task", "vqa", "--data", photos],
        "made with adapter 'blip'": [
            xvlm, "--task", "captioning", "--data", photos, "--masks", masks["blip"],
        ],
        "not on 'classification'": [
            xvlm, "--task", "classification", "--data", data["classification"],
        ],
        "learning rate must be above 0": [
            xvlm, "--task", "captioning", "--data", photos, "--learning-rate", "0",
        ],
        "give a multiple of 3": [
            xvlm, "--task", "captioning", "--data", photos, "--accumulate", "3",
        ],
        "fewer than a batch of 32": [xvlm, "--task", "captioning", "--data", photos],
        "makes no model of the task 'retrieval'": [
            models / "vit", "--task", "retrieval", "--data", photos, "--batch-size", "4",
        ],
    }  # fmt: skip


def test_mistakes_are_told_in_one_line_and_leave_nothing(
    vlp, models, masks, data, tmp_path
) -> None:
    for said, words in mistakes(models, masks, data).items():
        result = vlp("finetune", *words, "--out", tmp_path / "o", "--device", "cpu", code=2)
        (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
        assert said in line
        assert list(tmp_path.iterdir()) == [], said


def test_models_that_were_cut_are_refused_with_the_way_to_train_them(
    vlp, models, data, tmp_path
) -> None:
    model, adapter = load_model(str(models / "clip"), device="cpu")
    mlps = [block.name for block in blocks_of(model, adapter) if block.name.endswith(".mlp")]
    record = Record(dict.fromkeys(mlps, Kept(units=(0, 1))))
    cut(model, adapter, record)
    source = str(models / "clip")
    save_structured(model, tmp_path / "smaller", record, adapter=adapter, source=source)
    words = ("--task", "retrieval", "--data", data["retrieval"], "--out", tmp_path / "o", *FAST)
    said = vlp("finetune", tmp_path / "smaller", *words, code=2).stderr
    assert "vlp finetune cannot train such models yet; train it in a loop of your own" in said


def test_a_taken_folder_is_refused_before_the_work(vlp, models, data, tmp_path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("")
    result = vlp("finetune", models / "xvlm", "--task", "captioning", "--data",
                 data["captioning"], "--out", tmp_path / "o", *FAST, code=2)  # fmt: skip
    assert "is not empty" in result.stderr
