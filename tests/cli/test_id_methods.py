"""`id*NAME` and `--allocation id` on the command line: measured first, or from a file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny_models
from vlp_command import Command

from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.masks.masks import Masks
from vlp_plugins.runtime.memory import bytes_of

PROFILE = "id-profile.json"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_photos(tmp_path_factory.mktemp("pictures") / "photos", 40)


@pytest.fixture(scope="module")
def words(xvlm: Path, pictures: Path) -> list[object]:
    return [
        *("--model", xvlm, "--sparsity", "0.5", "0.75"),
        *("--data", pictures, "--batch-size", "8", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def guided(vlp: Command, words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guided") / "out"
    result = vlp("prune", *words, "--method", "id*multiflow", "--out", out)
    assert re.search(r"intrinsic dimensions: of \d+ layers, from 40 samples", result.stdout)
    return out


def of(folder: Path) -> Masks:
    return Masks.load(folder / "masks-0.75.safetensors")


def test_a_run_writes_the_dimensions_beside_what_the_method_writes(guided: Path) -> None:
    assert sorted(path.name for path in guided.parent.iterdir()) == ["out"]
    assert sorted(path.name for path in guided.iterdir()) == [
        PROFILE, "layers.csv", "masks-0.5.safetensors", "masks-0.75.safetensors", "recipe.yaml",
        "report.html", "statistics.safetensors",
    ]  # fmt: skip
    profile = IdProfile.load(guided / PROFILE)
    manifest = of(guided).manifest
    assert manifest.method == "id*multiflow"
    assert manifest.parameters["id_profile"]["fingerprint"] == profile.settings["fingerprint"]
    page = (guided / "report.html").read_text(encoding="utf-8")
    assert "<h1>id*multiflow on " in page
    assert "--method &#39;id*multiflow&#39;" in page
    assert "Was that enough data?" in page


def test_dimensions_and_statistics_of_a_run_serve_another(vlp, xvlm, guided, tmp_path) -> None:
    files = ("--id-profile", guided / PROFILE, "--statistics", guided / "statistics.safetensors")
    same = ("--method", "id*multiflow", "--device", "cpu", *files)
    vlp("prune", "--model", xvlm, "--sparsity", "0.75", *same, "--out", tmp_path / "o")
    assert of(tmp_path / "o") == of(guided)
    assert not (tmp_path / "o" / PROFILE).exists()


def test_the_recipe_of_a_run_repeats_it(vlp, guided, tmp_path) -> None:
    text = (guided / "recipe.yaml").read_text()
    assert re.search(r"^method: id\*multiflow$", text, re.MULTILINE)
    vlp("prune", guided / "recipe.yaml", "--out", tmp_path / "o")
    assert of(tmp_path / "o") == of(guided)


def test_a_method_without_data_needs_none_beside_a_profile(vlp, xvlm, guided, tmp_path) -> None:
    profile = ("--id-profile", guided / PROFILE)
    start = ("--model", xvlm, "--sparsity", "0.75", "--device", "cpu", *profile)
    made = {}
    for name, options in {
        "score": ("--method", "id*omp"),
        "budgets": ("--method", "omp", "--allocation", "id"),
        "both": ("--method", "id*omp", "--allocation", "id"),
    }.items():
        vlp("prune", *start, *options, "--out", tmp_path / name)
        made[name] = of(tmp_path / name)
    counts = {name: masks.counts().by_modality for name, masks in made.items()}
    assert counts["budgets"] == counts["both"] != counts["score"]
    assert made["budgets"] != made["both"]


def test_a_procedure_works_in_the_folder_that_measuring_worked_in(vlp, words, tmp_path) -> None:
    options = ("--method", "id*itersnip", "--parameter", "rounds=2", "--out", tmp_path / "o")
    vlp("prune", *words, *options)
    assert (tmp_path / "o" / PROFILE).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert of(tmp_path / "o").manifest.method == "id*itersnip"


def test_an_interrupted_run_does_not_measure_again(vlp, words, guided, tmp_path, monkeypatch):
    from vlp_plugins.methods import composition as data_pass

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    line = ("prune", *words, "--method", "id*multiflow", "--out", tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(data_pass, "calibrate", interrupted)
        result = vlp(*line, code=130)
    command = shlex.split(result.stderr.splitlines()[-1].partition("to resume: ")[2])
    assert command[:2] == ["vlp", "prune"]
    assert command[command.index("--method") + 1] == "id*multiflow"
    assert (tmp_path / "o.work").is_dir()

    from vlp_plugins.dimension import measure as measuring

    monkeypatch.setattr(measuring.Pass, "run", interrupted)
    vlp(*command[1:])
    assert of(tmp_path / "o") == of(guided)
    assert not (tmp_path / "o.work").exists()


def test_a_plan_says_what_measuring_takes(vlp, words, guided, tmp_path) -> None:
    given = ("plan", *words, "--method", "id*omp", "--batches", "5", "--memory-budget", "64MiB")
    text = vlp(*given).stdout
    assert "passes over the data: 1\n" in text
    assert "Intrinsic dimensions, first" in text
    assert re.search(r"points of \d+ layers for 40 samples: .*; 1 pass over 5 batches", text)
    assert re.search(r"forward passes: about [\d.]+ s, [\d.]+ s a batch", text)
    assert "how modalities and layers share it depends on the data" in text

    known = vlp(*given, "--id-profile", guided / PROFILE).stdout
    assert "passes over the data: 0\n" in known
    assert "Intrinsic dimensions, first" not in known
    assert "depends on the data" not in known
    done = vlp(
        "prune", *words, "--method", "id*omp", "--id-profile", guided / PROFILE,
        "--out", tmp_path / "o",
    ).stdout  # fmt: skip
    rows = re.findall(r"^ *[\d.]+ +(?:vision|text|fusion|all) +[\d.]+% .*$", known, re.MULTILINE)
    assert len(rows) == 8
    assert all(row in done for row in rows)


def test_a_plan_of_more_layers_than_fit_says_how_many_passes(vlp, words) -> None:
    given = ("plan", *words, "--method", "id*multiflow", "--batches", "5", "--memory-budget")
    roomy = vlp(*given, "1GiB").stdout
    points = re.search(r"layers for 40 samples: (.*); 1 pass over 5 batches", roomy)[1]
    peak = re.search(r"^pass 1: .*, (.*); runs", roomy, re.MULTILINE)[1]
    text = vlp(*given, int(bytes_of(peak) - bytes_of(points) / 2)).stdout
    passes = int(re.search(r"(\d+) passes over 5 batches within", text)[1])
    assert passes > 1
    assert f"passes over the data: {passes + 1}\n" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "id*multiflo"), "no method is called 'multiflo' (did you mean 'multiflow'?)"),
        (("--method", "id*omp", "--allocation", "keep=2,of=4"), "give another allocation"),
        (("--method", "omp", "--id-profile", "PROFILE"), "call it 'id*omp' or give the allocation"),
        (("--method", "id*omp", "--id-profile", "nowhere.json"), "nowhere.json is not a file"),
        (("--method", "chita", "--allocation", "row"), "within modalities (modality, id)"),
        (("--method", "omp", "--allocation", "ids"), "unknown allocation 'ids'"),
    ],
)
def test_mistakes_are_named_on_one_line(vlp, words, guided, tmp_path, options, message) -> None:
    given = [guided / PROFILE if word == "PROFILE" else word for word in options]
    result = vlp("prune", *words, *given, "--out", tmp_path / "o", code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_profile_of_another_model_is_refused(vlp, models, pictures, guided, tmp_path) -> None:
    result = vlp(
        "prune", "--model", models / "vit", "--method", "id*omp", "--sparsity", "0.5",
        "--id-profile", guided / PROFILE, "--out", tmp_path / "o", code=2,
    )  # fmt: skip
    assert (
        "the profile is of a model of adapter 'xvlm', and this one is of adapter 'vit'"
        in result.stderr
    )


def test_what_is_missing_is_asked_for(vlp, xvlm, guided, tmp_path) -> None:
    start = ("prune", "--model", xvlm, "--sparsity", "0.5", "--out", tmp_path / "o")
    result = vlp(*start, "--method", "id*omp", code=2)
    assert "or --id-profile FILE of an earlier run" in result.stderr
    statistics = ("--statistics", guided / "statistics.safetensors")
    result = vlp(*start, "--method", "id*multiflow", *statistics, code=2)
    assert "give --id-profile FILE together with --statistics" in result.stderr
    plan = ("plan", "--model", xvlm, "--sparsity", "0.5", "--method", "id*omp")
    assert "give their number with --batches" in vlp(*plan, code=2).stderr


def test_a_plan_counts_the_batches_of_the_data(vlp, xvlm, photos) -> None:
    words = ("plan", "--model", xvlm, "--sparsity", "0.5", "--method", "id*omp", "--data", photos)
    assert "1 pass over 2 batches" in vlp(*words, "--batch-size", "10").stdout.replace("\n", " ")
    assert "10 are too few" in vlp(*words, "--batch-size", "10", "--batches", "1", code=2).stderr
