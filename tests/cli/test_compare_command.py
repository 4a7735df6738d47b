"""`vlp compare`: every method measured on samples that none has seen."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import task_models
import tiny_models
from vlp_command import Command, command

from vlp_plugins import prune
from vlp_plugins.jobs import COMPARED
from vlp_plugins.jobs import compare as job
from vlp_plugins.jobs.held_out import CompareRequest, open_data
from vlp_plugins.jobs.preparation import Loaded, ModelSource
from vlp_plugins.jobs.recipes import DataRecipe
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.errors import DataError, RecipeError

WORDS = ("--batch-size", "4", "--device", "cpu")


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def without_times(out: Path) -> list[dict[str, str]]:
    return [
        {name: value for name, value in row.items() if not name.endswith("_seconds")}
        for row in rows_of(out)
    ]


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_photos(tmp_path_factory.mktemp("data") / "many", count=40)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, xvlm: Path, many_photos: Path):
    out = tmp_path_factory.mktemp("compared") / "out"
    result = command(
        "compare", xvlm, "--data", many_photos, *WORDS, "--batches", "3", "--limit", "15",
        "--out", out,
    )  # fmt: skip
    return out, result


@pytest.fixture(scope="module")
def record(finished) -> dict:
    return json.loads((finished[0] / "compare.json").read_text())


def test_the_folder_has_figures_and_the_masks_of_every_cell(finished, record) -> None:
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert {"compare.csv", "compare.json", "masks"} <= names
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no work is left"
    assert len(record["cells"]) == len(COMPARED) * 2
    for cell in record["cells"]:
        masks = Masks.load(out / cell["masks"])
        assert masks.manifest.method == cell["method"]
        assert masks.manifest.sparsity == float(cell["sparsity"])
        assert masks.removed == cell["removed"]
    assert len(list((out / "masks").iterdir())) == len(record["cells"])


def test_the_table_fits_a_terminal_and_starts_with_the_dense_model(finished) -> None:
    lines = finished[1].stdout.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("sparsity"))
    table = lines[start : start + 2 + len(COMPARED) * 2]
    assert table[1].split()[0] == "dense"
    assert max(map(len, table)) <= 80
    assert "15 images of" in finished[1].stdout
    assert "12 images of" in finished[1].stdout
    assert "one standard error over 15 test samples" in " ".join(finished[1].stdout.split())
    assert sum(line.endswith("best") for line in table) == 2


def test_the_report_says_the_best_first_and_draws_every_method(finished, record) -> None:
    page = (finished[0] / "report.html").read_text()
    names = ["Best at 50%", "Best at 75%", "Quality against sparsity", "All figures", "Repeat it"]
    places = [page.index(name) for name in names]
    assert places == sorted(places)
    assert page.count("<svg viewBox") == 3  # the mean, and either way
    legend = page.split('class="legend"')[1].split("</ul>")[0]
    assert all(f"<span>{method}</span>" in legend for method in COMPARED)
    for verdict in record["verdicts"]:
        assert f'<dd class="value">{verdict["best"]}</dd>' in page
        assert verdict["masks"] in page
    assert '<a href="compare.csv">' in page
    assert "http" not in page.replace("http-equiv", "")


def test_quiet_prints_the_result_alone(xvlm, many_photos, tmp_path) -> None:
    result = command(
        "compare", xvlm, "--data", many_photos, *WORDS, "--methods", "omp", "--sparsity", "0.5",
        "--out", tmp_path / "out", "-q",
    )  # fmt: skip
    assert result.stdout.startswith("\nretrieval: R@1 in percent\nsparsity")
    assert "plan:" not in result.stdout
    assert "peak memory" not in result.stdout


def test_figures_are_those_of_the_commands_one_by_one(
    finished, xvlm, many_photos, tmp_path
) -> None:
    """Masks are those of `prune`, figures those of `vlp evaluate`, on the same parts."""
    out, _ = finished
    request = CompareRequest(
        DataRecipe(str(many_photos), batch_size=4, batches=3), limit=15, seed=0
    )
    loaded = Loaded.of(ModelSource(str(xvlm), device="cpu"))
    test, pool = open_data(loaded, request)
    places = [sample.place for sample in test.data.samples]
    assert len(places) == 15
    assert not {*places} & {sample.place for sample in pool.samples}

    part = tmp_path / "test"
    part.mkdir()
    texts = {row["file_name"]: row for row in map(json.loads, (many_photos / "metadata.jsonl")
             .read_text().splitlines())}  # fmt: skip
    for place in places:
        (part / place).write_bytes((many_photos / place).read_bytes())
    (part / "metadata.jsonl").write_text("\n".join(json.dumps(texts[place]) for place in places))
    masks = out / "masks" / "multiflow-0.75.safetensors"
    command("evaluate", xvlm, "--task", "retrieval", "--data", part, "--masks", masks, *WORDS,
            "--out", tmp_path / "evaluated")  # fmt: skip
    evaluated = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    cell = next(c for c in json.loads((out / "compare.json").read_text())["cells"]
                if (c["method"], c["sparsity"]) == ("multiflow", "0.75"))  # fmt: skip
    assert cell["metrics"] == evaluated["after"]["metrics"]

    run = job._Run(loaded, request, test, pool, {}, {}, work=tmp_path, resume=False)
    batches = list(run._batches(0))
    for method in COMPARED:
        alone = prune(loaded.model, batches, adapter=loaded.adapter, method=method, sparsity=0.75)
        assert Masks.load(out / "masks" / f"{method}-0.75.safetensors") == alone, method


def test_the_printed_command_applies_the_masks_of_the_best(finished, record, xvlm, tmp_path):
    best = record["verdicts"][1]
    lines = finished[1].stdout.replace(" \\\n", "").splitlines()  # as a shell reads them
    words = shlex.split(next(line for line in lines if best["masks"] in line))
    assert words[:3] == ["vlp", "masks", "apply"]
    outs = [line.split()[-1] for line in lines if "masks apply" in line]
    assert len(set(outs)) == 2, "one command does not stand in the way of the other"
    words[words.index("--out") + 1] = str(tmp_path / "pruned")
    command(*words[1:])
    model, adapter = load_model(str(tmp_path / "pruned"), device="cpu")
    assert Masks.load(finished[0] / best["masks"]).verify(model, adapter) == []


def test_a_run_that_is_killed_resumes_with_the_same_figures(
    finished, xvlm, many_photos, tmp_path
) -> None:
    out = tmp_path / "out"
    words = ["compare", str(xvlm), "--data", str(many_photos), *WORDS, "--batches", "3",
             "--limit", "15", "--out", str(out)]  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-m", "vlp_plugins", *words], stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    state = tmp_path / "out.work" / "comparison.safetensors"
    deadline = time.monotonic() + 120
    while not (state.exists() and b"multiflow-0.5" in state.read_bytes()):
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    result = command(*words, "--resume")
    assert "are known" in result.stdout
    assert without_times(out) == without_times(finished[0])
    assert not (tmp_path / "out.work").exists()


def test_cells_that_are_done_are_not_run_again(
    xvlm, many_photos, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ("compare", xvlm, "--data", many_photos, *WORDS, "--batches", "2", "--limit", "8",
             "--sparsity", "0.5", "--out", out)  # fmt: skip
    measured = job._Run._measured
    calls = []

    def third_fails(run):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(run)

    monkeypatch.setattr(job._Run, "_measured", third_fails)
    plans: list[job.ComparisonPlan] = []
    monkeypatch.setattr(sys.modules["vlp_plugins.cli.compare"], "_print_plan", plans.append)
    stopped = command(*words, "--methods", "omp", "lamp", "l2", code=130)
    assert "to resume:" in stopped.stderr
    assert "--resume" in stopped.stderr
    command(*words, "--methods", "omp", "lamp", "random", "--resume")
    # dense, omp, the one that was stopped; then lamp and a method that was not asked for before
    assert len(calls) == 3 + 2
    assert [plan.done for plan in plans] == [0, 1]
    assert plans[1].measuring_seconds == pytest.approx(plans[0].measuring_seconds * 2 / 3)
    assert [row["method"] for row in rows_of(out)] == ["dense", "omp", "lamp", "random"]


def test_another_model_or_other_data_is_not_resumed(
    xvlm, photos, many_photos, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(run):
        raise KeyboardInterrupt

    words = ("compare", xvlm, *WORDS, "--methods", "omp", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(job._Run, "_measure", lambda *_: stop(None))
        command(*words, "--data", many_photos, code=130)
    refused = command(*words, "--data", photos, "--resume", code=2)
    assert "is of another run: its data is" in refused.stderr
    cut = command(*words, "--data", many_photos, "--max-length", "5", "--resume", code=2)
    assert "is of another run: its max length is" in cut.stderr
    assert not out.exists()


def test_several_seeds_calibrate_with_other_samples(xvlm, many_photos, tmp_path) -> None:
    out = tmp_path / "out"
    result = command(
        "compare", xvlm, "--data", many_photos, *WORDS, "--methods", "omp", "wanda", "random",
        "--sparsity", "0.5", "--seeds", "2", "--out", out,
    )  # fmt: skip
    rows = rows_of(out)[1:]
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("omp", "wanda", "random") for seed in ("0", "1")
    ]
    files = {(row["method"], row["seed"]): row["masks"] for row in rows}
    assert files["omp", "0"] == files["omp", "1"], "it reads no data and draws nothing"
    assert files["wanda", "0"] != files["wanda", "1"]
    assert files["random", "0"] != files["random", "1"]
    wanda = [Masks.load(out / files["wanda", seed]) for seed in ("0", "1")]
    first, second = (each.manifest.calibration["fingerprint"] for each in wanda)
    assert first != second
    assert "2 sets of calibration samples" in " ".join(result.stdout.split())
    record = json.loads((out / "compare.json").read_text())
    by_method = {each["method"]: each for each in record["methods"]}
    cells = [c["score"] for c in record["cells"] if c["method"] == "random"]
    assert by_method["random"]["score"] == pytest.approx(sum(cells) / 2)


def test_a_method_that_cannot_be_used_is_named_and_left_out(models, photos, tmp_path) -> None:
    result = command(
        "compare", models / "clip", "--data", photos, *WORDS, "--methods", "omp", "tamt",
        "wanda", "id*chita", "--sparsity", "0.5", "--out", tmp_path / "out",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["method"] for row in record["cells"]] == ["omp", "tamt", "wanda"]
    assert "6 are too few, an intrinsic dimension needs 20" in record["left_out"]["id*chita"]
    for name, reason in record["left_out"].items():
        assert f"{name} is left out: {reason}" in " ".join(result.stdout.split())


def test_whatever_a_method_raises_leaves_out_that_method(
    xvlm, photos, tmp_path, monkeypatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("vlp_plugins.scoring.wanda.Wanda.score", broken)
    out = tmp_path / "out"
    words = ("--methods", "wanda", "omp", "--sparsity", "0.5", "--out", out)
    command("compare", xvlm, "--data", photos, *WORDS, *words)
    record = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in record["cells"]] == ["omp"]
    said = "weight 'vision.0.attention.key': scorer 'wanda' raises RuntimeError: no such thing"
    assert record["left_out"] == {"wanda": said}


def test_unknown_methods_and_data_that_would_be_seen_are_errors(xvlm, photos, tmp_path) -> None:
    out = tmp_path / "out"
    words = ("compare", xvlm, *WORDS, "--out", out)
    assert "multiflow" in command(
        *words, "--data", photos, "--methods", "multflow", code=2
    ).stderr  # fmt: skip
    seen = command(*words, "--data", photos, "--test", photos, code=2).stderr
    assert "would be calibrated with and measured on" in seen
    (tmp_path / "link").symlink_to(photos)
    same = command(*words, "--data", photos, "--test", tmp_path / "link", code=2).stderr
    assert "would be calibrated with and measured on" in same
    assert "give --data" in command(*words, code=2).stderr
    twice = command(*words, "--data", photos, "--sparsity", "0.5", "0.50", code=2).stderr
    assert "twice" in twice
    assert not out.exists()


def test_classes_are_classified_and_a_model_without_task_has_its_loss(models, tmp_path) -> None:
    classes = task_models.save_classes(tmp_path / "classes")
    model = task_models.save_classifier(tmp_path / "classifier")
    words = (*WORDS, "--methods", "omp", "snip", "--sparsity", "0.5")
    command("compare", model, "--data", classes, *words, "--out", tmp_path / "top1")
    record = json.loads((tmp_path / "top1" / "compare.json").read_text())
    assert record["task"] == "classification"
    assert record["score"]["mean_of"] == ["top1"]
    assert {cell["method"] for cell in record["cells"]} == {"omp", "snip"}

    photos = tiny_models.save_photos(tmp_path / "photos", count=20)
    command("compare", models / "blip", "--data", photos, "--task", "loss", *words,
            "--out", tmp_path / "loss")  # fmt: skip
    record = json.loads((tmp_path / "loss" / "compare.json").read_text())
    assert record["score"] == {"name": "loss", "mean_of": ["loss"], "lower_is_better": True}
    best = record["verdicts"][0]["best"]
    scores = {each["method"]: each["score"] for each in record["methods"]}
    assert scores[best] == min(scores.values())
    page = (tmp_path / "loss" / "report.html").read_text()
    assert f"vlp finetune {models / 'blip'} --task retrieval" in page, "a loss is no task"


def test_all_captions_of_an_image_are_on_one_side(models, tmp_path) -> None:
    """An image that is in several rows of the metadata, each with a caption of its own."""
    photos = tiny_models.save_photos(tmp_path / "photos", count=10)
    lines = (photos / "metadata.jsonl").read_text().splitlines()
    (photos / "metadata.jsonl").write_text("\n".join(lines * 3))
    loaded = Loaded.of(ModelSource(str(models / "blip"), device="cpu"))
    sides = []
    for seed in range(4):
        request = CompareRequest(DataRecipe(str(photos), batch_size=4), limit=4, seed=seed)
        task, pool = open_data(loaded, request)
        test, rest = ({s.place for s in part.samples} for part in (task.data, pool))
        assert len(test) == 4
        assert not test & rest
        assert len(task.data.samples) == 12
        sides.append(test)
        again, _ = open_data(loaded, request)
        assert [s.place for s in again.data.samples] == [s.place for s in task.data.samples]
    assert any(side != sides[0] for side in sides), "the seed divides"


def test_of_other_data_a_random_part_is_measured(models, tmp_path) -> None:
    """Data is often sorted, by class for instance."""
    photos = tiny_models.save_photos(tmp_path / "photos", count=6)
    test = tiny_models.save_photos(tmp_path / "test", count=30)
    loaded = Loaded.of(ModelSource(str(models / "blip"), device="cpu"))

    def places(seed: int, limit: int = 5) -> list[str]:
        data = DataRecipe(str(photos), batch_size=2)
        request = CompareRequest(data, str(test), task="retrieval", limit=limit, seed=seed)
        return [sample.place for sample in open_data(loaded, request)[0].data.samples]

    assert len({*places(0)}) == 5
    assert places(0) == places(0) == sorted(places(0))
    assert {*places(0)} != {*places(1)}
    assert len({*places(0, limit=100)}) == 30


def test_one_image_to_measure_on_has_no_error(xvlm, photos, tmp_path) -> None:
    out = tmp_path / "out"
    words = ("--methods", "omp", "--sparsity", "0.5", "--limit", "1", "--out", out)
    command("compare", xvlm, "--data", photos, *WORDS, *words)
    assert [row["standard_error"] for row in rows_of(out)] == ["nan", "nan"]
    assert json.loads((out / "compare.json").read_text())["cells"][0]["standard_error"] is None
    assert (out / "report.html").exists()


def test_one_image_cannot_be_divided(models, tmp_path) -> None:
    photos = tiny_models.save_photos(tmp_path / "photos", count=1)
    loaded = Loaded.of(ModelSource(str(models / "blip"), device="cpu"))
    request = CompareRequest(DataRecipe(str(photos)), task="retrieval")
    with pytest.raises(DataError, match="a single image"):
        open_data(loaded, request)
    with pytest.raises(RecipeError, match="give --data"):
        open_data(loaded, CompareRequest(DataRecipe()))


def test_splits_of_one_folder_are_kept_apart(vlp: Command, models, tmp_path) -> None:
    folder = tmp_path / "photos"
    for split, count in (("train", 12), ("test", 6)):
        tiny_models.save_photos(folder / split, count=count)
    result = vlp("compare", models / "clip", "--data", folder, "--test-split", "test", *WORDS,
                 "--methods", "wanda", "--out", tmp_path / "out")  # fmt: skip
    assert f"6 images of {folder} (test)" in result.stdout
    assert f"12 images of {folder} (train)" in result.stdout
