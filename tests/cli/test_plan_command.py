"""`vlp plan`: counts, memory and time before any data is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlp_command import Command

from vlp_adapters.xvlm import XvlmForPretraining, XvlmPretrainConfig
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.outputs import OutputProbe
from vlp_plugins.calibration.probes import ActivationProbe
from vlp_plugins.jobs import facts
from vlp_plugins.jobs.preparation import prepare
from vlp_plugins.jobs.recipes import DataRecipe, Recipe
from vlp_plugins.methods.method import Procedure
from vlp_plugins.runtime.memory import bytes_of
from vlp_plugins.scoring.allocation import GlobalAllocation


def counts_of(text: str) -> list[str]:
    """The rows of counts: sparsity, modality, numbers."""
    return re.findall(r"^ *[\d.]+ +(?:vision|text|fusion|all) +[\d.]+% .*$", text, re.MULTILINE)


@pytest.mark.parametrize("method", ["multiflow", "omp", "wanda"])
def test_the_counts_are_those_of_the_run(vlp: Command, xvlm, photos, tmp_path, method) -> None:
    words = ("--model", xvlm, "--method", method, "--sparsity", "0.63", "0.9", "--data", photos)
    planned = vlp("plan", *words).stdout
    done = vlp("prune", *words, "--out", tmp_path / "o").stdout
    assert len(counts_of(planned)) == 8
    assert counts_of(planned) == counts_of(done)


def test_groups_memory_passes_and_time(vlp, xvlm) -> None:
    words = ("--model", xvlm, "--sparsity", "0.5", "--batches", "10", "--data", "nowhere")
    text = vlp("plan", *words).stdout
    assert re.search(r"fusion +1 +10 +[\d,]+$", text, re.MULTILINE)
    assert re.search(r"^peak of the process +\d\.\d{3}$", text, re.MULTILINE)
    assert "passes over the data: 1\n" in text
    assert re.search(r"a batch of 32: about [\d.]+ s\n10 batches: about [\d.]+ (s|min)", text)


def test_no_data_is_read_and_nothing_written(vlp, xvlm, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--sparsity", "0.5", "--data", tmp_path / "not there", "--out", tmp_path / "o")
    vlp("plan", "--model", xvlm, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_data_needs_no_pass_and_no_processor(vlp, xvlm, tmp_path) -> None:
    model = XvlmForPretraining.from_pretrained(xvlm)
    model.save_pretrained(tmp_path / "bare")
    text = vlp("plan", "--model", tmp_path / "bare", "--method", "lamp", "--sparsity", "0.5").stdout
    assert "passes over the data: 0\n" in text
    assert "a batch" not in text


def test_statistics_of_an_earlier_run_need_no_pass(vlp, xvlm, pruned) -> None:
    words = ("--sparsity", "0.5", "--statistics", pruned / "statistics.safetensors")
    assert "passes over the data: 0\n" in vlp("plan", "--model", xvlm, *words).stdout


def test_no_more_batches_are_planned_than_the_data_has(vlp, xvlm, photos) -> None:
    words = ("--sparsity", "0.5", "--batch-size", "5", "--data", photos, "--batches")
    for asked, planned in (3000, 3), (2, 2):
        text = vlp("plan", "--model", xvlm, *words, asked).stdout
        assert re.search(rf"^{planned} batches: about", text, re.MULTILINE)


def test_images_that_are_not_resized_are_of_the_size_of_the_model(
    vlp, models, tmp_path, caplog
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models / "clip", model)
    CLIPImageProcessorPil(do_resize=False, do_center_crop=False).save_pretrained(model)
    vlp("plan", "--model", model, "--sparsity", "0.5", "--batches", "2", "--data", "nowhere")
    assert "but the model is for" not in caplog.text


def peak_of(model: Path, *words: object) -> float:
    """Bytes that `vlp plan` (in GB) or `vlp prune` prints, in a process of its own."""
    command = [sys.executable, "-m", "vlp_plugins", *words, "--model", model, "--device", "cpu"]
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"peak (?:memory )?of the process:? +([\d.]+)(.*)", done.stdout)
    return bytes_of(found[1] + (found[2] or " GB"))


def test_the_predicted_peak_is_that_of_the_run(xvlm, photos, tmp_path) -> None:
    words = ("--sparsity", "0.5", "--data", photos)
    planned = peak_of(xvlm, "plan", *words)
    measured = peak_of(xvlm, "prune", *words, "--out", tmp_path / "o")
    assert abs(planned - measured) <= 0.2 * measured


METHODS = [
    ("random", []),
    ("omp", []),
    ("lamp", []),
    ("multiflow", []),
    ("snip", []),
    ("itersnip", ["--parameter", "rounds=2"]),
    ("tamt", []),
    ("lamp-tamt", []),
    ("taylor", []),
    ("platon", ["--parameter", "steps=6"]),
    ("chita", ["--lambda", "0.1"]),
    ("chita++", ["--lambda", "0.1", "--parameter", "rounds=2"]),
    ("id*multiflow", []),
    ("id*tamt", []),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_photos(tmp_path_factory.mktemp("pictures") / "photos", 24)


@pytest.fixture
def words(xvlm, pictures) -> list[object]:
    data = ("--data", pictures, "--batch-size", "6", "--device", "cpu")
    return ["--model", xvlm, *data, "--sparsity", "0.5", "0.75"]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_batches_are_counted_as_they_run(
    vlp, words, tmp_path, monkeypatch, method, options
) -> None:
    runs: Counter[str] = Counter()
    for kind in (LossProbe, ActivationProbe, OutputProbe):
        name = "run" if kind is OutputProbe else "measure"
        counted(monkeypatch, kind, name, runs)
    counted(monkeypatch, LossProbe, "_hand_over", runs)  # in place of `measure`, for sums
    vlp("prune", *words, "--method", method, *options, "--out", tmp_path / "o")
    ran = dict(runs)
    text = vlp("plan", *words, "--method", method, *options).stdout

    found = re.search(r"^(\d+) (?:of them in all|batches): about", text, re.MULTILINE)
    assert (0 if found is None else int(found[1])) == sum(
        ran.get(kind, 0) for kind in ("LossProbe", "ActivationProbe")
    )
    first = re.search(r"(\d+) pass(?:es)? over 4 batches within", text)
    assert (0 if first is None else 4 * int(first[1])) == ran.get("OutputProbe", 0)
    assert re.search(r"\nIn all\nabout [\d.]+ s, peak memory about [\d.]+ GB\n", text)


def counted(patch: pytest.MonkeyPatch, kind: type, name: str, runs: Counter[str]) -> None:
    """Counts the calls of a method by the class's name."""
    called = getattr(kind, name)

    def counting(*given: Any, **named: Any) -> Any:
        runs[kind.__name__] += 1
        return called(*given, **named)

    patch.setattr(kind, name, counting)


@pytest.mark.parametrize("method", ["itersnip", "tamt", "taylor", "platon"])
def test_the_choices_of_masks_are_about_those_of_the_run(
    vlp, words, tmp_path, monkeypatch, method
) -> None:
    made: Counter[str] = Counter()
    counted(monkeypatch, GlobalAllocation, "select", made)
    given = [*words, "--method", method, "--batches", "4"]
    vlp("prune", *given, "--out", tmp_path / "o")
    ran = made["GlobalAllocation"]
    recipe = Recipe(model=str(words[1]), method=method, sparsity=(0.5, 0.75), device="cpu")
    job = prepare(replace(recipe, data=DataRecipe(batches=4)))
    assert isinstance(job.method, Procedure)
    assert job.method.cost(job.context()).choices == pytest.approx(ran, rel=0.7)


@pytest.mark.long
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_time_is_about_that_of_the_run(vlp, tmp_path, method, options) -> None:
    """By a model large enough for its work to take longer than getting ready for it."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    model = tiny_models.save_xvlm(tmp_path / "model", **sizes)
    data = tiny_models.save_photos(tmp_path / "photos", 48)
    given = ["--model", model, "--data", data, "--batch-size", "8", "--device", "cpu"]
    given += ["--sparsity", "0.5", "0.75", "--method", method, *options]
    text = vlp("plan", *given).stdout
    done = vlp("prune", *given, "--out", tmp_path / "o").stdout

    found = re.search(r"^about ([\d.]+) (s|min), peak", text, re.MULTILINE)
    planned = float(found[1]) * {"s": 1, "min": 60}[found[2]]
    laps = "data pass|pruning|masks|masks of either half of the data|measuring .*"
    real = sum(map(float, re.findall(rf"^(?:{laps}): ([\d.]+) s$", done, re.MULTILINE)))
    assert planned / 3 - 0.5 <= real <= 3 * planned + 0.5


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("multiflow", [], "for 4 batches; making masks comes on top"),
        ("itersnip", ["--parameter", "rounds=2"], "for 8 batches"),
        ("chita", ["--lambda", "0.1"], "for 4 batches"),
        ("id*omp", [], "for 4 batches to measure dimensions; the search for neighbours comes on"),
    ],
)
def test_a_long_run_says_after_its_first_batches_how_long_it_takes(
    vlp, words, tmp_path, monkeypatch, method, options, said
) -> None:
    given = ["prune", *words, "--method", method, *options, "--out"]
    assert " batches" not in vlp(*given, tmp_path / "short").stderr

    monkeypatch.setattr(facts, "LONG", 0.0)
    monkeypatch.setattr(facts, "_SAMPLE", 0.0)
    (line,) = re.findall("^about .* batches.*$", vlp(*given, tmp_path / "o").stderr, re.MULTILINE)
    assert re.match(rf"about \d+\.\d s {re.escape(said)}", line)
    assert " batches" not in vlp("-q", *given, tmp_path / "quiet").stderr


def test_a_forecast_leaves_out_the_first_batch(caplog, monkeypatch) -> None:
    caplog.set_level("INFO", "vlp_plugins.methods")
    times = iter([10.0, 10.5, 12.0, 14.0])
    monkeypatch.setattr(facts.time, "perf_counter", lambda: next(times))
    seen: list[tuple[int, int | None]] = []
    ahead = facts.Forecast(lambda *at: seen.append(at), ", the rest to solve", 600)
    for done in range(1, 6):
        ahead(done, 1201)

    assert seen == [(done, 1201) for done in range(1, 6)]
    # A batch takes a second, from the end of the first to that of the third.
    assert [record.message for record in caplog.records] == [
        "about 30.0 min for 1,201 batches, the rest to solve"
    ]


@pytest.mark.long
def test_the_predicted_peak_of_a_full_size_model(xvlm, photos, tmp_path) -> None:
    torch.manual_seed(0)
    model = XvlmForPretraining(XvlmPretrainConfig.base())
    model.save_pretrained(tmp_path / "base")
    for path in xvlm.glob("tokenizer*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "base" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessorPil", "size": {"shortest_edge": 224}, '
        '"crop_size": {"height": 224, "width": 224}}'
    )
    words = ("--sparsity", "0.63", "0.75", "0.9", "--data", photos, "--batch-size", "4")
    planned = peak_of(tmp_path / "base", "plan", *words)
    measured = peak_of(tmp_path / "base", "prune", *words, "--out", tmp_path / "o")
    assert abs(planned - measured) <= 0.2 * measured


class TestWithoutWeights:
    """A folder with a configuration alone."""

    @pytest.mark.parametrize(
        "words",
        [
            ("--method", "multiflow"),
            ("--method", "omp"),
            ("--method", "wanda"),
            ("--method", "snip"),
            ("--method", "omp", "--allocation", "layer"),
            ("--method", "omp", "--allocation", "modality", "--dtype", "bfloat16"),
        ],
        ids=" ".join,
    )
    def test_counts_and_bytes_are_those_of_the_model_with_weights(
        self, vlp: Command, models: Path, photos: Path, tmp_path: Path, words: tuple[str, ...]
    ) -> None:
        shutil.copy(models / "clip" / "config.json", tmp_path)
        words = (*words, "--sparsity", "0.63", "0.9", "--data", str(photos), "--json")
        whole, bare = (
            json.loads(vlp("plan", "--model", model, *words).stdout)
            for model in (models / "clip", tmp_path)
        )
        for name in ("prunable", "passes"):
            assert bare[name] == whole[name]
        for one, other in zip(bare["targets"], whole["targets"], strict=True):
            assert one["counts"]["all"] == other["counts"]["all"]
            # One threshold for all: how it divides them among modalities, weights decide.
            assert one == other or (words[1:2] == ("omp",) and "--allocation" not in words)
        for name in ("model", "statistics", "masks"):
            assert bare["bytes"][name] == whole["bytes"][name]
        assert bare["seconds"] is None

    def test_patterns_and_a_sentence(self, vlp: Command, models: Path, tmp_path: Path) -> None:
        shutil.copy(models / "clip" / "config.json", tmp_path)
        words = ("--method", "omp", "--allocation", "keep=2,of=4")
        text = vlp("plan", "--model", tmp_path, *words).stdout
        assert counts_of(text) == counts_of(vlp("plan", "--model", models / "clip", *words).stdout)
        assert "has no weights: counts and memory follow from their shapes" in text

    def test_there_is_nothing_to_prune(self, vlp: Command, models: Path, tmp_path: Path) -> None:
        shutil.copy(models / "clip" / "config.json", tmp_path)
        words = ("--method", "omp", "--sparsity", "0.5", "--out", tmp_path / "out")
        result = vlp("prune", "--model", tmp_path, *words, code=2)
        assert "has a configuration and no weights" in result.stderr

    @pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b"])
    def test_chat_models_of_seven_billion_parameters(
        self, vlp: Command, tmp_path: Path, name: str
    ) -> None:
        config = dict(SEVEN_BILLION[name])
        (tmp_path / "config.json").write_text(json.dumps(config))
        start = time.process_time()
        text = vlp("plan", "--model", tmp_path, "--data", "none", "--sparsity", "0.5", "--json")
        assert time.process_time() - start < 60
        found = json.loads(text.stdout)
        groups = found["targets"][0]
        decoder, vision = {
            "llava-1.5-7b": (
                32 * (4 * 4096**2 + 3 * 4096 * 11008),
                23 * (4 * 1024**2 + 2 * 1024 * 4096),  # the last layer is not read
            ),
            "qwen2.5-vl-7b": (28 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18944), None),
        }[name]
        sizes = {key: each["total"] for key, each in groups["counts"].items()}
        assert sizes["text"] == decoder
        assert vision is None or sizes["vision"] == vision
        parameters = {"llava-1.5-7b": 7_063_427_072, "qwen2.5-vl-7b": 8_292_166_656}[name]
        assert found["bytes"]["model"] == 2 * parameters

    def test_what_is_mapped_takes_no_memory_by_blocks(self, vlp: Command, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(SEVEN_BILLION["qwen2.5-vl-7b"]))
        words = ("plan", "--model", tmp_path, "--data", "none", "--device", "cpu", "--json")
        blocks = ("--method", "wanda", "--walk", "blocks", "--sparsity", "0.5", "--save-model")
        found = json.loads(vlp(*words, *blocks).stdout)["bytes"]
        assert found["peak"] < 8e9 < found["model"]
        for held in (("--dtype", "float32"), ("--walk", "model")):
            found = json.loads(vlp(*words, *blocks, *held).stdout)["bytes"]
            assert found["peak"] > found["model"]


SEVEN_BILLION: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": 32000, "torch_dtype": "float16", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "vocab_size": 32064,
                        "max_position_embeddings": 4096},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024,
                          "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                          "projection_dim": 768, "vocab_size": 32000},
    },
    "qwen2.5-vl-7b": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 128000, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064,
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584,
                          "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
                          "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2},
    },
}  # fmt: skip
