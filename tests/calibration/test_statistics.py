"""Statistics: means over sites and halves, the file, and what does not fit."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toy import Toy, ToyAdapter, toy_batches, toy_model

from vlp_plugins.calibration.data_pass import calibrate
from vlp_plugins.calibration.moments import ActivationStatistic, InputGram, InputSecondMoment, Site
from vlp_plugins.calibration.statistics import Statistics
from vlp_plugins.methods.composition import Composition
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.runtime.errors import OutputError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.score import Scorer


def toy_weights(model: Toy | None = None) -> WeightMap:
    return WeightMap.of(model or toy_model(), ToyAdapter())


@pytest.fixture
def statistics() -> Statistics:
    model = toy_model()
    needs = [InputSecondMoment()]
    return calibrate(model, ToyAdapter(), toy_weights(model), toy_batches(3), needs)


@pytest.fixture
def by_hand() -> Statistics:
    def sums(*rows: list[float]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    return Statistics(
        sums={
            ("moment", Site("w", "text", 0)): sums([1, 2], [3, 4]),
            ("moment", Site("w", "decoder", 1)): sums([10, 20], [30, 40]),
            ("moment", Site("v", "decoder", 1)): sums([5], [6]),
        },
        samples=(2, 4),
        batches=2,
        fingerprint="f",
        structure="s",
        adapter="toy",
        published=False,
    )


def test_a_mean_is_the_sum_over_sites_divided_by_the_samples(by_hand):
    assert by_hand.mean("moment", "w").tolist() == [44 / 6, 66 / 6]
    assert by_hand.mean("moment", "w", owners="first").tolist() == [4 / 6, 6 / 6]
    assert by_hand.mean("moment", "w", half=0).tolist() == [11 / 2, 22 / 2]
    assert by_hand.mean("moment", "w", owners="first", half=1).tolist() == [3 / 4, 4 / 4]
    assert by_hand.mean("moment", "w").dtype == torch.float64
    assert by_hand.names() == {"moment"}


def test_a_mean_that_was_not_measured_is_an_error(by_hand):
    with pytest.raises(StatisticsError, match="no 'other' of weight 'w'.*hold moment"):
        by_hand.mean("other", "w")
    with pytest.raises(StatisticsError, match="no 'moment' of weight 'x' at any module"):
        by_hand.mean("moment", "x")
    with pytest.raises(StatisticsError, match="weight 'v' at its first owner"):
        by_hand.mean("moment", "v", owners="first")
    by_hand.samples = (2, 0)
    with pytest.raises(StatisticsError, match="half 1 is empty; use at least 2 batches"):
        by_hand.mean("moment", "w", half=1)


def test_a_file_gives_back_every_bit(statistics, tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)

    assert loaded.sums.keys() == statistics.sums.keys()
    assert all(torch.equal(loaded.sums[key], value) for key, value in statistics.sums.items())
    for name in (
        "samples",
        "batches",
        "fingerprint",
        "structure",
        "adapter",
        "published",
        "shapes",
        "weights_hash",
    ):
        assert getattr(loaded, name) == getattr(statistics, name), name
    loaded.check(toy_weights())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_says_what_made_it(statistics, tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vlp_statistics"])
    assert header["schema"] == 1
    assert header["made_by"].startswith("vlp_plugins ")
    assert header["versions"]["torch"] == version("torch")  # without the build: +cu130
    assert "transformers" in header["versions"]


def test_saving_again_replaces_the_file_only_if_asked_to(statistics, by_hand, tmp_path):
    path = tmp_path / "statistics.safetensors"
    by_hand.save(path)
    with pytest.raises(OutputError, match="exists already; .* overwrite=True"):
        statistics.save(path)
    statistics.save(path, overwrite=True)
    assert Statistics.load(path).batches == 3


def test_a_file_that_cannot_be_written_leaves_nothing(statistics, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        statistics.save(tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


def test_damaged_files_say_what_to_do(statistics, tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    whole = path.read_bytes()

    def loading(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(StatisticsError) as caught:
            Statistics.load(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    repeat = "repeat the data pass"
    assert repeat in loading(whole[: len(whole) // 2])
    assert repeat in loading(whole[:-1])
    assert repeat in loading(b"")
    assert repeat in loading(b"not at all a safetensors file")
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    assert "checksum differs" in loading(bytes(flipped))

    path.unlink()
    with pytest.raises(StatisticsError, match=f"is not a file; {repeat}"):
        Statistics.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(StatisticsError, match="is not a statistics file of vlp-plugins"):
        Statistics.load(path)


def test_files_of_a_newer_version_ask_for_an_upgrade(statistics, tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vlp_statistics"])
    header |= {"schema": 99, "made_by": "vlp_plugins 9.0"}
    save_file(load_file(path), path, metadata={"vlp_statistics": json.dumps(header)})
    with pytest.raises(StatisticsError, match="format 99, newer.*vlp_plugins 9.0: upgrade"):
        Statistics.load(path)


def test_statistics_of_another_model_name_the_first_difference(statistics):
    statistics.check(toy_weights())

    wider = toy_model()
    wider.feed = nn.Linear(6, 7)
    with pytest.raises(StatisticsError, match=r"'text.feed' is \[7, 6\] in the model, \[6, 6\]"):
        statistics.check(toy_weights(wider))

    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(StatisticsError, match=r"adapter 'toy'.*adapter 'module'.*model has '0'"):
        statistics.check(WeightMap.of(other, ModuleAdapter(other)))

    statistics.shapes["text.more"] = (2, 2)
    statistics.structure = "another"
    with pytest.raises(StatisticsError, match="statistics have 'text.more', the model does not"):
        statistics.check(toy_weights())


def test_statistics_of_one_variant_do_not_serve_the_other(statistics):
    statistics.check(toy_weights(), published=False)
    with pytest.raises(StatisticsError, match="with variant='default', but variant='published'"):
        statistics.check(toy_weights(), published=True)
    statistics.published = True
    with pytest.raises(StatisticsError, match="repeat the data pass with variant='default'"):
        statistics.check(toy_weights(), published=False)


def test_statistics_of_other_weights_serve_with_a_warning(statistics, caplog):
    fine_tuned = toy_model()
    with torch.no_grad():
        fine_tuned.feed.weight += 0.1
    with caplog.at_level(logging.WARNING, "vlp_plugins.statistics"):
        statistics.check(toy_weights())
        assert not caplog.records
        statistics.check(toy_weights(fine_tuned))
        statistics.check(toy_weights(fine_tuned))
    (said,) = caplog.messages
    assert "gathered with other weights" in said
    assert toy_weights().content_hash() in said


class Power(ActivationStatistic):
    """What an outsider might write: a statistic with a parameter."""

    def __init__(self, p: int, name: str) -> None:
        self.p = p
        self.name = name

    def size(self, weight: Weight) -> int:
        return weight.matrix.shape[1]

    def measure(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.float().abs().pow(self.p).sum(0)


def gathered(*needs: ActivationStatistic) -> Statistics:
    model = toy_model()
    return calibrate(model, ToyAdapter(), toy_weights(model), toy_batches(2), needs)


def test_the_name_of_a_statistic_tells_its_parameters():
    both = gathered(Power(1, "power_1"), Power(4, "power_4"))
    for p in (1, 4):
        alone = gathered(Power(p, f"power_{p}"))
        mine = both.mean(f"power_{p}", "text.q")
        assert torch.equal(mine, alone.mean(f"power_{p}", "text.q"))
    assert not torch.equal(mine, both.mean("power_1", "text.q"))


def test_two_different_statistics_of_one_name_are_refused():
    message = (
        r"called 'power'.*Power\(p=1, name='power'\).*Power\(p=4, .*must contain its parameters"
    )
    with pytest.raises(UnsupportedError, match=message):
        gathered(Power(1, "power"), Power(4, "power"))
    same = gathered(Power(1, "power"), Power(1, "power"))
    assert torch.equal(
        same.mean("power", "text.q"), gathered(Power(1, "power")).mean("power", "text.q")
    )


def test_scores_that_need_different_statistics_of_one_name_are_refused():
    class Reads(Scorer):
        name = "reads"

        def __init__(self, p: int) -> None:
            self.needs = (Power(p, "power"),)

        def score(self, weight, evidence):
            raise NotImplementedError

    method = Composition("mixed", Reads(1), allocation_score=Reads(4))
    with pytest.raises(UnsupportedError, match="two statistics are called 'power'"):
        _ = method.needs


def test_statistics_of_another_adapter_with_the_same_names_and_shapes_are_refused(statistics):
    weights = toy_weights()
    other = WeightMap(dict(weights.items()), "other")
    assert other.structure == statistics.structure
    with pytest.raises(StatisticsError, match="adapter 'toy'.*adapter 'other'.*names mean other"):
        statistics.check(other)


def test_statistics_that_do_not_say_their_adapter_are_checked_by_names_and_shapes(
    statistics, tmp_path
):
    path = tmp_path / "statistics.safetensors"
    replace(statistics, adapter="").save(path)
    Statistics.load(path).check(toy_weights())
    fewer = {name: weight for name, weight in toy_weights().items() if name.startswith("text")}
    with pytest.raises(StatisticsError, match="the statistics have 'vision.patch'"):
        Statistics.load(path).check(WeightMap(fewer, "toy"))


@pytest.mark.parametrize(
    ("adapter", "version", "told"),
    [("module", "0.1.0", True), ("toy", "0.1.0", False), ("module", "0.2.0.dev0", False)],
)
def test_a_file_of_a_version_that_fed_labels_is_told(
    statistics, tmp_path, caplog, monkeypatch, adapter, version, told
):
    monkeypatch.setattr("vlp_plugins.runtime.artifacts.__version__", version)
    replace(statistics, adapter=adapter).save(tmp_path / "statistics.safetensors")
    Statistics.load(tmp_path / "statistics.safetensors")
    assert ("labels of (inputs, labels) batches" in caplog.text) == told


@pytest.mark.parametrize("features", [1, 7, 128, 300, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_matrix_made_of_parts_is_the_whole_product(features, dtype):
    inputs = torch.randn(50, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = InputGram().measure(inputs).view(features, features)
    exact = inputs.double().T @ inputs.double()
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)
