"""`vlp id`: from a model and photos to dimensions per layer and modality."""

from __future__ import annotations

import csv
import html
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from click.testing import CliRunner
from vlp_command import Command, command

from vlp_plugins.cli.program import main
from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.report.dimensions import (
    by_modality,
    dimension_by_depth,
    dimension_sentences,
    duplicate_sentences,
    vision_sentences,
)

PAIRS = 48


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_photos(tmp_path_factory.mktemp("many") / "photos", PAIRS)


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, xvlm: Path, many: Path):
    """The folder of results and what the terminal showed."""
    out = tmp_path_factory.mktemp("dimensions") / "out"
    words = ("--data", many, "--batch-size", "8", "--device", "cpu", "--out", out)
    return out, command("id", xvlm, *words)


def test_the_folder_of_results(measured) -> None:
    out, _ = measured
    names = sorted(path.name for path in out.iterdir())
    assert names == ["id-profile.json", "layers.csv", "report.html"]
    assert [path.name for path in out.parent.iterdir()] == ["out"], "no folder of work is left"


def test_the_profile_can_be_used_again(measured, vlp: Command, xvlm, tmp_path) -> None:
    profile = IdProfile.load(measured[0] / "id-profile.json")
    assert profile.adapter == "xvlm"
    assert {layer.points for layer in profile.layers} == {PAIRS}
    words = ("--model", xvlm, "--method", "id*omp", "--sparsity", "0.5", "--out", tmp_path / "o")
    vlp("prune", *words, "--id-profile", measured[0] / "id-profile.json")


def test_the_table_has_every_layer_with_its_error(measured) -> None:
    profile = IdProfile.load(measured[0] / "id-profile.json")
    with (measured[0] / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["weight"] for row in rows] == [layer.weight for layer in profile.layers]
    for row, layer in zip(rows, profile.layers, strict=True):
        assert float(row["id"]) == pytest.approx(layer.dimension, rel=1e-5)
        assert float(row["error"]) == pytest.approx(layer.error, rel=1e-5)
        assert (int(row["ambient"]), row["stream"]) == (layer.ambient, layer.stream)


def test_the_terminal_shows_modalities_layers_and_a_summary(measured) -> None:
    text = measured[1].stdout
    for modality in ("vision", "text", "fusion"):
        assert re.search(rf"^{modality} +\d+ +[\d.]+ ± [\d.]+ +[\d.]+ +[\d.]+$", text, re.MULTILINE)
    assert re.search(
        r"^vision\.0\.mlp\.fc1 +vision +0 +[\d.]+ +[\d.]+ +[\d,]+ +48 +0$", text, re.MULTILINE
    )
    assert re.search(r"^\w+ has the highest mean ID, .*± .*Mean IDs: ", text, re.MULTILINE)
    assert re.search(r"^\w+ has the widest range of IDs, .*Ranges ", text, re.MULTILINE)
    assert text.endswith(f"written: {measured[0]}\n")


def test_the_page_has_a_chart_and_loads_nothing(measured) -> None:
    page = (measured[0] / "report.html").read_text()
    assert page.count('role="img"') == 1
    assert "intrinsic dimension" in page
    assert "has the highest mean ID" in page
    assert not re.search(r" src=|href=\"(/|[^\"]*:)", page)
    assert not re.search(r"url\((?!#)", page)


def test_the_command_on_the_page_repeats_the_run(measured, vlp, tmp_path) -> None:
    page = (measured[0] / "report.html").read_text()
    words = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[-1]))
    assert words[:2] == ["vlp", "id"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    vlp(*words[1:])
    again = IdProfile.load(tmp_path / "again" / "id-profile.json")
    assert again.layers == IdProfile.load(measured[0] / "id-profile.json").layers


def test_the_next_step_on_the_page_runs(measured, vlp, tmp_path) -> None:
    page = (measured[0] / "report.html").read_text()
    words = shlex.split(html.unescape(re.findall(r"<pre>(.*?)</pre>", page)[0]))
    words[words.index("--out") + 1] = str(tmp_path / "pruned")
    vlp(*words[1:])
    assert (tmp_path / "pruned" / "masks-0.5.safetensors").exists()


def small_budget(words: Sequence[object]) -> int:
    """Bytes in which the largest layer has room alone: refusals say what a layer takes.

    A plan, whose made-up captions are longer, asks for more than the run.
    """
    budget = 1024
    while "error" in (text := CliRunner().invoke(main, [*map(str, words), str(budget)]).stderr):
        budget = int(re.search(r"memory_budget=(\d+) ", text)[1])
    return budget


def test_a_small_budget_takes_more_passes(vlp, xvlm, many) -> None:
    words = ("id", xvlm, "--data", many, "--batch-size", "8", "--plan", "--memory-budget")
    planned = vlp(*words, small_budget(words)).stdout
    assert re.search(r"points of 28 layers for 48 samples: .*; \d+ passes over 6 batches", planned)
    assert re.search(r"^pass 2: ", planned, re.MULTILINE)


def test_a_small_budget_finds_the_same(measured, vlp, xvlm, many, tmp_path) -> None:
    words = ("id", xvlm, "--data", many, "--batch-size", "8", "--memory-budget")
    vlp(*words, small_budget(words), "--out", tmp_path / "o")
    small = IdProfile.load(tmp_path / "o" / "id-profile.json").layers
    large = IdProfile.load(measured[0] / "id-profile.json").layers
    assert [layer.dimension for layer in small] == pytest.approx(
        [layer.dimension for layer in large], rel=1e-4
    )


def test_the_plan_reads_no_image_and_writes_nothing(vlp, xvlm, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = vlp("id", xvlm, "--batches", "5", "--plan", "--out", "o").stdout
    assert "for 160 samples" in text
    assert re.search(r"^forward passes: about [\d.]+ (s|min|h), without", text, re.MULTILINE)
    assert re.search(r"^search for neighbours: about [\d.]+ s$", text, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_is_written(vlp, xvlm, many, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = vlp("id", xvlm, "--data", many, "--fit", "likelihood", "--drop", "0.1").stdout
    assert "has the highest mean ID" in text
    assert "written" not in text
    assert list(tmp_path.iterdir()) == []


def test_ways_to_estimate_reach_the_profile(vlp, xvlm, many, tmp_path) -> None:
    words = ("--fit", "likelihood", "--drop", "0.1", "--points-dtype", "bfloat16", "--blocks", "2")
    vlp("id", xvlm, "--data", many, *words, "--out", tmp_path / "o")
    settings = IdProfile.load(tmp_path / "o" / "id-profile.json").settings
    assert settings["estimator"] == {
        "fit": "likelihood", "drop": 0.1, "blocks": 2, "seed": 123, "duplicates": "rounding",
    }  # fmt: skip
    assert settings["dtype"] == "bfloat16"
    assert settings["padding"] == "real"


def test_the_published_variant(vlp, xvlm, many, tmp_path) -> None:
    words = ("--variant", "published", "--blocks", "2")
    vlp("id", xvlm, "--data", many, *words, "--out", tmp_path / "o")
    settings = IdProfile.load(tmp_path / "o" / "id-profile.json").settings
    assert settings["padding"] == "published"
    assert settings["published"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("id {xvlm}", "give --data FOLDER"),
        ("id {xvlm} --data /nowhere/at/all", "/nowhere/at/all does not exist"),
        ("id {xvlm} --data {photos} --out {taken}", "is not empty; give another one"),
        ("id {xvlm} --data {photos} --resume", "give the --out of that run"),
        ("id {xvlm} --data {photos} --memory-budget 1KiB", "(?i)budget"),
        ("id {xvlm} --data {photos} --memory-budget lots", "'lots' is not an amount of memory"),
        ("id {xvlm} --data {photos} --points-dtype int8", "dtype 'int8' is unknown"),
        ("id {xvlm} --data {photos} --fit best", "'best' is not one of"),
        ("id {xvlm} --data {photos}", "(?s)20.*points|points.*20"),  # 12 samples
        ("id {xvlm} --plan", "Give --batches, or --data"),
        ("id {xvlm}/nothing --data {photos}", "does not exist|nothing"),
    ],
)
def test_a_mistake(vlp, xvlm, photos, tmp_path, words, message, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("")
    filled = words.format(xvlm=xvlm, photos=photos, taken=taken).split()
    result = vlp(*filled, *(() if "--out" in filled or "--resume" in filled or "--plan" in filled
                            else ("--out", tmp_path / "out")), code=2)  # fmt: skip
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_interruption_says_how_to_go_on(vlp, xvlm, many, tmp_path, monkeypatch) -> None:
    import vlp_plugins.dimension.measure as measuring

    words = ("id", xvlm, "--data", many, "--batch-size", "8", "--memory-budget")
    words = (*words, small_budget(words))
    original, calls = measuring.compute, []

    def second_time(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(measuring, "compute", second_time)
    out = tmp_path / "out"
    result = vlp(*words, "--out", out, code=130)
    line = re.search(r"interrupted; to resume: (vlp id .* --resume)", result.stderr)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    calls += [1] * 10  # not again
    vlp(*shlex.split(line)[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_find_what_one_finds(measured, xvlm, many, tmp_path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["id", str(xvlm), "--data", str(many), "--batch-size", "8", "--device", "cpu"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", "-m", "vlp_plugins", *words, "--out",
         str(tmp_path / "o")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    both = IdProfile.load(tmp_path / "o" / "id-profile.json").layers
    one = IdProfile.load(measured[0] / "id-profile.json").layers
    assert [(x.weight, x.stream) for x in both] == [(x.weight, x.stream) for x in one]
    assert [x.dimension for x in both] == pytest.approx([x.dimension for x in one], rel=1e-4)


# What the summary says, for dimensions made by hand


def layer(modality: str, depth: int, dimension: float, error: float = 0.1) -> LayerDimension:
    name = f"{modality}.{depth}.{dimension}"
    return LayerDimension(name, modality, 0, name, modality, depth, dimension, error, 64, 100)


def test_means_and_ranges_by_hand() -> None:
    layers = [layer("vision", 0, 10, 1), layer("vision", 1, 20, 3), layer("text", 0, 5, 0.5)]
    vision, text = by_modality(layers)
    assert (vision.mean, vision.error, vision.spread) == (15, 2, 10)
    assert vision.spread_error == pytest.approx(10**0.5)
    assert (text.mean, text.error, text.spread, text.layers) == (5, 0.5, 0, 1)


def test_a_clear_difference_is_said_with_its_size() -> None:
    layers = [layer("text", 0, 5), layer("text", 1, 6), layer("vision", 0, 10),
              layer("vision", 1, 20)]  # fmt: skip
    mean, spread = dimension_sentences(layers)
    assert mean == (
        "vision has the highest mean ID, by 9.50 ± 0.14 over text. "
        "Mean IDs: vision 15.00 ± 0.10, text 5.50 ± 0.10."
    )
    assert spread.startswith("vision has the widest range of IDs, by 9.00 ± 0.20 over text.")


def test_a_difference_within_the_errors_is_called_so() -> None:
    layers = [layer("text", 0, 9, 2), layer("vision", 0, 10, 2)]
    assert (
        "but only by 1.00 ± 2.83 over text: the difference is less than two standard errors"
        in (dimension_sentences(layers)[0])
    )


@pytest.mark.parametrize(
    ("vision", "verdict"),
    [
        (20, "holds here: 20.00 ± 0.10 and 9.00 ± 0.10, +11.00 ± 0.14."),
        (5, "the opposite holds here: 5.00 ± 0.10 and 9.00 ± 0.10, -4.00 ± 0.14."),
        (9.1, "not shown, the difference is less than two standard errors: 9.10 ± 0.10 and"),
    ],
)
def test_the_claim_about_vision(vision: float, verdict: str) -> None:
    (sentence,) = vision_sentences([layer("vision", 0, vision), layer("text", 0, 9)])
    assert sentence.startswith(f"Vision of higher ID than text: {verdict}")
    assert vision_sentences([layer("vision", 0, vision)]) == []


def test_one_modality_has_nothing_to_compare_with() -> None:
    assert dimension_sentences([layer("vision", 0, 9)]) == [
        "vision: mean ID 9.00 ± 0.10, from 9.00 to 9.00; nothing to compare."
    ]


def test_duplicates_are_counted_in_a_sentence() -> None:
    layers = [layer("vision", 0, 10), layer("text", 0, 5), layer("text", 1, 5)]
    assert duplicate_sentences(layers) == []
    layers[1:] = [replace(layers[1], duplicates=18), replace(layers[2], duplicates=20)]
    (sentence,) = duplicate_sentences(layers)
    assert "so many points equal another one and are left out: text 20 of 100." in sentence


def test_the_chart_is_the_same_for_the_same_layers() -> None:
    layers = [layer("vision", 0, 10), layer("text", 0, 5), layer("text", 3, 6)]
    assert dimension_by_depth(layers) == dimension_by_depth(layers)
    assert dimension_by_depth(layers) != dimension_by_depth(layers[:2])
