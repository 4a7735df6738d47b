"""`vlp sensitivity`: from a model and photos to curves, prunabilities and a verdict."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
from pathlib import Path

import pytest
from vlp_command import Command, command

from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap

SPARSITIES = ("0.5", "0.9")


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory, xvlm: Path) -> Path:
    """Made-up dimensions of the model, as `vlp id` would save them."""
    weights = WeightMap.of(*load_model(str(xvlm), device="cpu"))
    layers = [
        LayerDimension(name, w.modality, 0, w.owners[0].module, w.modality, w.depth,
                       5.0 + place % 7, 0.5, 64, 100)
        for place, (name, w) in enumerate(weights.items())
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("profile") / "id-profile.json"
    IdProfile(tuple(layers), weights.structure, "xvlm", {}).save(path)
    return path


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, xvlm: Path, photos: Path, profile: Path):
    """The folder of results and what the terminal showed."""
    out = tmp_path_factory.mktemp("sensitivity") / "out"
    words = ("--test", photos, "--batch-size", "4", "--sparsity", *SPARSITIES, "--device", "cpu")
    return out, command("sensitivity", xvlm, *words, "--id-profile", profile, "--out", out)


@pytest.fixture(scope="session")
def record(measured) -> dict:
    return json.loads((measured[0] / "sensitivity.json").read_text())


def test_the_folder_of_results(measured) -> None:
    names = sorted(path.name for path in measured[0].iterdir())
    assert names == ["points.csv", "report.html", "sensitivity.json"]
    assert [path.name for path in measured[0].parent.iterdir()] == ["out"]


def test_every_modality_then_every_block(record) -> None:
    assert [curve["title"] for curve in record["curves"]] == [
        "vision", "text", "fusion", "vision 0", "vision 1", "text 0", "fusion 0",
    ]  # fmt: skip
    assert record["settings"]["method"] == "omp"
    assert record["settings"]["pairs"] == 12
    assert record["settings"]["calibration"] is None


def test_every_point_has_exact_counts_a_loss_and_both_recalls(record) -> None:
    for curve in record["curves"]:
        assert [point["sparsity"] for point in curve["points"]] == [0.5, 0.9]
        for point in curve["points"]:
            assert point["removed"] == int(point["sparsity"] * curve["elements"])
            assert len(point["losses"]) == 3
            assert 0 <= point["image_to_text"] <= 100
            assert 0 <= point["text_to_image"] <= 100
        assert 0 < curve["prunability"]["loss"] < 1.5
        assert 0 <= curve["prunability"]["tolerated"] <= 0.9


def test_relations_with_the_dimensions(record) -> None:
    assert {r["scope"] for r in record["relations"]} >= {"all", "within modalities", "vision"}
    (found,) = (
        r for r in record["relations"]
        if (r["by"], r["measure"], r["scope"]) == ("ID", "loss", "all")
    )  # fmt: skip
    assert found["count"] == 4
    assert -1 <= found["rho"] <= 1
    assert found["low"] is None, "four blocks are too few for an interval"
    assert record["summary"]
    assert set(record["dimensions"].values()) == {5.0 + i for i in range(7)}


def test_the_csv_has_the_dense_model_and_every_point(measured) -> None:
    with (measured[0] / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 7 * 2
    assert rows[0]["level"] == "dense"
    assert {row["level"] for row in rows[1:]} == {"modality", "block"}
    assert all(float(row["loss"]) > 0 for row in rows)


def test_the_terminal_shows_tables_and_the_verdict(measured) -> None:
    text = measured[1].stdout
    assert re.search(
        r"^vision 0 +[\d,]+ +[\d.]+ ± [\d.]+ +[\d.]+ +\d+% +[\d.]+$", text, re.MULTILINE
    )
    assert re.search(r"^Vision more fragile than text: ", text, re.MULTILINE)
    assert re.search(r"^Higher ID, less prunable \(over 4 blocks\): ", text, re.MULTILINE)
    assert re.search(r"^ID, blocks, within modalities +loss +2 ", text, re.MULTILINE)
    assert text.endswith(f"written: {measured[0]}\n")


def test_the_page_has_charts_and_loads_nothing(measured) -> None:
    page = (measured[0] / "report.html").read_text()
    assert page.count('role="img"') == 2 * (1 + 3) + 1  # loss and R@1 of modalities and blocks; ID
    for heading in ("By modality: loss", "Blocks of fusion: R@1", "ID and prunability of blocks"):
        assert f"<h3>{heading}</h3>" in page
    assert not re.search(r" src=|href=\"(/|[^\"]*:)", page)
    assert "Vision more fragile than text" in page


def test_the_command_on_the_page_repeats_the_run(measured, record, vlp: Command, tmp_path) -> None:
    page = (measured[0] / "report.html").read_text()
    words = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[-1]))
    assert words[:2] == ["vlp", "sensitivity"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    vlp(*words[1:])
    again = json.loads((tmp_path / "again" / "sensitivity.json").read_text())
    assert again == record


def test_the_next_step_on_the_page_prunes_each_modality_as_far_as_it_takes(
    measured, record, vlp: Command, tmp_path
) -> None:
    page = (measured[0] / "report.html").read_text()
    words = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[0]))
    words[words.index("--out") + 1] = str(tmp_path / "pruned")
    vlp(*words[1:])
    (file,) = (tmp_path / "pruned").glob("masks-*.safetensors")
    found = Masks.load(file).counts().by_modality
    wanted = dict(part.split("=") for part in words[words.index("--sparsity") + 1].split(","))
    assert wanted.keys() == found.keys()
    for name, count in found.items():
        assert count.removed == int(float(wanted[name]) * count.total)


def test_single_weights_of_one_modality_by_another_method(vlp, xvlm, photos, tmp_path) -> None:
    words = ("--data", photos, "--batch-size", "4", "--sparsity", "0.5", "--by", "weight",
             "--modality", "text", "--method", "wanda", "--pairs", "4")  # fmt: skip
    vlp("sensitivity", xvlm, *words, "--out", tmp_path / "o")
    record = json.loads((tmp_path / "o" / "sensitivity.json").read_text())
    assert [curve["title"] for curve in record["curves"]][:2] == ["text.0.self.query",
                                                                  "text.0.self.key"]  # fmt: skip
    assert {curve["modality"] for curve in record["curves"]} == {"text"}
    assert record["settings"]["calibration"], "every other batch was read for the statistics"
    assert record["settings"]["batches"] == 1
    assert record["relations"] == []
    assert record["dimensions"] is None


def test_what_is_read_is_not_measured_on(vlp, xvlm, photos, tmp_path, monkeypatch) -> None:
    """Statistics come from other batches than the loss."""
    seen: dict[str, list] = {}
    import vlp_plugins.jobs.sensitivity as job

    original = job.sensitivity

    def noting(model, batches, **options):
        seen["measured"], seen["read"] = list(batches), list(options["calibration"])
        return original(model, batches, **options)

    monkeypatch.setattr(job, "sensitivity", noting)
    words = ("--data", photos, "--batch-size", "3", "--sparsity", "0.5", "--method", "wanda",
             "--by", "modality", "--out", tmp_path / "o")  # fmt: skip
    vlp("sensitivity", xvlm, *words)
    pixels = {name: [b["pixel_values"] for b in batches] for name, batches in seen.items()}
    assert (len(pixels["measured"]), len(pixels["read"])) == (2, 2)
    for measured in pixels["measured"]:
        assert not any(measured.equal(read) for read in pixels["read"])


def test_a_guided_method_reads_the_profile(vlp, xvlm, photos, profile, record, tmp_path) -> None:
    words = ("--test", photos, "--batch-size", "4", "--sparsity", *SPARSITIES, "--device", "cpu",
             "--by", "modality", "--id-profile", profile)  # fmt: skip
    vlp("sensitivity", xvlm, *words, "--method", "id*omp", "--out", tmp_path / "o")
    guided = json.loads((tmp_path / "o" / "sensitivity.json").read_text())
    assert guided["settings"]["method"] == "id*omp"
    assert guided["curves"][0]["points"] != record["curves"][0]["points"]


def test_an_interruption_says_how_to_go_on(vlp, xvlm, photos, tmp_path, monkeypatch) -> None:
    from vlp_plugins.tasks.sensitivity.measure import Evaluator

    original, points = Evaluator.measure, []

    def stopping(self, sparsity, removed):
        points.append(sparsity)
        if len(points) == 4:
            raise KeyboardInterrupt
        return original(self, sparsity, removed)

    words = ("--data", photos, "--sparsity", "0.5", "0.9", "--by", "modality", "--device", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "measure", stopping)
        result = vlp("sensitivity", xvlm, *words, "--out", tmp_path / "out", code=130)
    line = re.search(r"interrupted; to resume: (vlp sensitivity .* --resume)", result.stderr)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    vlp(*shlex.split(line)[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{xvlm}", "give --data FOLDER or --test FOLDER"),
        ("{xvlm} --data /nowhere/at/all", "/nowhere/at/all does not exist"),
        ("{xvlm} --data {photos} --modality vison", "did you mean 'vision'"),
        ("{xvlm} --data {photos} --by block blok", "'blok' is not one of"),
        ("{xvlm} --data {photos} --sparsity 1.5", "lies in"),
        ("{xvlm} --data {photos} --sparsity 0", "sparsity 0 is the dense model"),
        ("{xvlm} --data {photos} --method nonsense", "nonsense"),
        ("{xvlm} --data {photos} --method tamt", "runs the model as it goes"),
        ("{xvlm} --data {photos} --method id*omp", "'id.omp' needs .* intrinsic dimensions"),
        ("{xvlm} --data {photos} --method wanda --batch-size 12", "a single batch of 12"),
        ("{xvlm} --test {photos} --method wanda", "give --data FOLDER .*together with --test"),
        ("{xvlm} --data {photos} --id-profile {photos}/metadata.jsonl", "metadata.jsonl"),
        (
            "{vit} --data {photos} --id-profile {profile}",
            "profile is of a model of adapter .xvlm., and this one",
        ),
        ("{vit} --data {photos}", "loss"),
    ],
)
def test_a_mistake(vlp, models, photos, profile, tmp_path, words, message, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"xvlm": models / "xvlm", "vit": models / "vit", "photos": photos, "profile": profile}
    filled = words.format(**names).split()
    result = vlp("sensitivity", *filled, "--out", tmp_path / "out", code=2)
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken(vlp, xvlm, photos, tmp_path) -> None:
    (tmp_path / "precious").write_text("")
    result = vlp("sensitivity", xvlm, "--data", photos, "--out", tmp_path, code=2)
    assert "is not empty; give another one" in result.stderr
