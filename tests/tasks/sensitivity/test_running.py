"""sensitivity(): only the group is pruned, everything comes back, nothing is measured twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy, spoilt

from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import (
    DataError,
    NonFiniteError,
    SparsityError,
    StatisticsError,
    UnknownNameError,
    UnsupportedError,
)
from vlp_plugins.tasks.sensitivity.curves import groups_of
from vlp_plugins.tasks.sensitivity.measure import sensitivity

BATCHES = toy_batches(3)
SPARSITIES = [0.25, 0.5, 0.8]


class Watching(LosingAdapter):
    """Notes how many elements of every weight are zero whenever a loss is computed."""

    def __init__(self) -> None:
        self.zeros: list[dict[str, int]] = []

    def losses(self, model, batch, **options):
        weights = WeightMap.of(model, self)
        self.zeros.append({n: int((w.matrix == 0).sum()) for n, w in weights.items()})
        return super().losses(model, batch, **options)


class Embedding(LosingAdapter):
    """Embeds images and texts, badly."""

    def image_features(self, model, batch):
        return torch.nn.functional.normalize(model.see(batch["pixel_values"]).mean(1), dim=-1)

    def text_features(self, model, batch):
        states = model.text(model.words(batch["input_ids"])).mean(1)
        return torch.nn.functional.normalize(states, dim=-1)


@pytest.fixture
def model():
    return losing_toy().train()


def weights_of(model):
    return WeightMap.of(model, LosingAdapter())


def test_groups_of_every_level(model):
    weights = weights_of(model)
    found = groups_of(weights, ["modality", "block", "weight"])
    titles = {level: [g.title for g in found if g.level == level]
              for level in ("modality", "block", "weight")}  # fmt: skip
    assert titles["modality"] == ["vision", "text"]
    assert titles["block"] == ["vision 0", "vision 1", "text 0", "text 1", "text 2", "text 3"]
    assert titles["weight"] == list(weights)
    for level in titles:
        members = [name for g in found if g.level == level for name in g.weights]
        assert sorted(members) == sorted(weights), "every weight is in one group of each level"
        assert sum(g.elements for g in found if g.level == level) == weights.numel


def test_only_the_group_is_pruned_and_by_the_exact_count(model):
    adapter = Watching()
    dense = {name: int((w.matrix == 0).sum()) for name, w in weights_of(model).items()}
    found = sensitivity(model, BATCHES, adapter=adapter, sparsity=SPARSITIES)
    assert adapter.zeros[:3] == [dense] * 3, "the dense model comes first"
    seen = iter(adapter.zeros[3:])
    for curve in found.curves:
        assert [p.removed for p in curve.points] == [int(s * curve.group.elements)
                                                     for s in SPARSITIES]  # fmt: skip
        for point in curve.points:
            for _ in BATCHES:
                zeros = next(seen)
                pruned = sum(zeros[name] for name in curve.group.weights)
                assert pruned == point.removed
                others = {n: z for n, z in zeros.items() if n not in curve.group.weights}
                assert others == dict.fromkeys(others, 0)
    assert next(seen, None) is None, "one forward pass per batch and point"


def test_the_losses_are_those_of_the_model_pruned_by_hand(model):
    found = sensitivity(model, BATCHES, adapter=LosingAdapter(), sparsity=[0.5], groups=["block"])
    weights = weights_of(model)
    for curve in found.curves:
        members = [weights[name].parameter for name in curve.group.weights]
        everything = torch.cat([p.detach().abs().flatten() for p in members])
        threshold = everything.kthvalue(int(0.5 * len(everything))).values
        before = [p.detach().clone() for p in members]
        with torch.no_grad():
            for parameter in members:
                parameter[parameter.abs() <= threshold] = 0
        probe = LossProbe(model, LosingAdapter(), weights)
        with probe.attached(()):
            expected = [probe.loss(batch, index) for index, batch in enumerate(BATCHES)]
        with torch.no_grad():
            for parameter, values in zip(members, before, strict=True):
                parameter.copy_(values)
        assert curve.points[0].losses == pytest.approx(expected, rel=1e-6)


def test_the_model_is_left_as_it_was(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    sensitivity(model, BATCHES, adapter=Embedding(), sparsity=[0.9])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.decoder_out.weight is model.encoder_out.weight
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_error_in_the_middle_leaves_it_as_it_was(model):
    class Failing(Watching):
        def losses(self, model, batch, **options):
            if len(self.zeros) == 5:
                raise UnsupportedError("enough")
            return super().losses(model, batch, **options)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="enough"):
        sensitivity(model, BATCHES, adapter=Failing(), sparsity=[0.9])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_retrieval_is_measured_where_the_adapter_embeds(model):
    found = sensitivity(model, BATCHES, adapter=Embedding(), sparsity=[0.5], groups=["modality"])
    assert 0 <= found.dense.image_to_text <= 100
    assert found.curves[0].points[0].recall is not None
    assert found.settings["retrieval"]
    for other in (
        sensitivity(model, BATCHES, adapter=LosingAdapter(), sparsity=[0.5]),
        sensitivity(model, BATCHES, adapter=Embedding(), sparsity=[0.5], retrieve=False),
    ):
        assert other.dense.recall is None
        assert not other.settings["retrieval"]


def test_one_modality_alone(model):
    found = sensitivity(
        model, BATCHES, adapter=LosingAdapter(), sparsity=[0.9], groups=["modality", "block"],
        modalities=["vision"],
    )  # fmt: skip
    assert [curve.group.title for curve in found.curves] == ["vision", "vision 0", "vision 1"]


@pytest.mark.parametrize("allocation", [None, "layer"])
def test_the_allocation_works_within_the_group(model, allocation):
    adapter = Watching()
    found = sensitivity(model, BATCHES[:1], adapter=adapter, sparsity=[0.5], groups=["modality"],
                        allocation=allocation)  # fmt: skip
    weights = weights_of(model)
    vision = found.curves[0].group.weights
    fractions = [adapter.zeros[1][name] / weights[name].numel for name in vision]
    if allocation == "layer":
        assert fractions == pytest.approx([0.5] * len(vision), abs=0.02)
    else:
        assert max(fractions) - min(fractions) > 0.1


def test_a_method_that_reads_data_needs_other_data_to_read(model):
    with pytest.raises(StatisticsError, match="'wanda' reads data: give calibration batches"):
        sensitivity(model, BATCHES, adapter=LosingAdapter(), method="wanda", sparsity=[0.5])
    other = toy_batches(2, seed=7)
    for method in ("wanda", "multiflow"):
        found = sensitivity(model, BATCHES, calibration=other, adapter=LosingAdapter(),
                            method=method, sparsity=[0.5], groups=["block"])  # fmt: skip
        assert len(found.curves) == 6
        again = sensitivity(model, BATCHES, calibration=BATCHES, adapter=LosingAdapter(),
                            method=method, sparsity=[0.5], groups=["block"])  # fmt: skip
        assert again.settings["calibration"] != found.settings["calibration"]


def test_sparsities_rise_and_come_once(model):
    found = sensitivity(model, BATCHES[:1], adapter=LosingAdapter(), sparsity=[0.8, 0.25, 0.8],
                        groups=["modality"])  # fmt: skip
    assert [point.sparsity for point in found.curves[0].points] == [0.25, 0.8]


def test_progress_counts_points(model):
    seen = []
    sensitivity(model, BATCHES[:1], adapter=LosingAdapter(), sparsity=[0.25, 0.8],
                groups=["modality"], progress=lambda done, of: seen.append((done, of)))  # fmt: skip
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_loss_that_is_lost_is_recorded_and_not_an_error(model):
    class Dying(LosingAdapter):
        def losses(self, model, batch, **options):
            terms = super().losses(model, batch, **options)
            dead = bool((model.vision.q.weight == 0).any())
            return {name: term * (math.nan if dead else 1) for name, term in terms.items()}

    found = sensitivity(model, BATCHES, adapter=Dying(), sparsity=[0.8], groups=["modality"])
    vision, text = (curve.points[0] for curve in found.curves)
    assert math.isnan(vision.loss)
    assert vision.rise(found.dense) == math.inf
    assert math.isfinite(text.loss)


# Going on after an interruption


def run(model, folder, *, adapter=None, **options):
    words = {"sparsity": SPARSITIES, "groups": ["modality"]} | options
    return sensitivity(model, BATCHES, adapter=adapter or Watching(), workplace=folder, **words)


def interrupted(model, folder: Path, after: int):
    def stop(done, of):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, folder, progress=stop)


def test_resuming_measures_only_what_is_missing(model, tmp_path):
    whole = run(model, None)
    interrupted(model, tmp_path, after=4)
    adapter = Watching()
    assert run(model, tmp_path, adapter=adapter, resume=True) == whole
    assert len(adapter.zeros) == len(BATCHES) * (1 + 2), "the dense model and two points of six"


def test_a_last_line_that_was_cut_short_counts_as_not_written(model, tmp_path):
    whole = run(model, None)
    interrupted(model, tmp_path, after=4)
    (path,) = tmp_path.glob("points-*.jsonl")
    path.write_text(path.read_text()[:-20])
    adapter = Watching()
    assert run(model, tmp_path, adapter=adapter, resume=True) == whole
    assert len(adapter.zeros) == len(BATCHES) * (1 + 3)


def test_without_resume_all_is_measured_anew(model, tmp_path):
    interrupted(model, tmp_path, after=4)
    adapter = Watching()
    run(model, tmp_path, adapter=adapter)
    assert len(adapter.zeros) == len(BATCHES) * (1 + 6)


@pytest.mark.parametrize(
    "change", [{"method": "lamp"}, {"sparsity": [0.25, 0.5]}, {"groups": ["block"]}]
)
def test_points_of_another_run_are_refused(model, tmp_path, change):
    interrupted(model, tmp_path, after=2)
    with pytest.raises(DataError, match="holds points of another run.*without --resume"):
        run(model, tmp_path, resume=True, **change)


@pytest.mark.parametrize("damage", ["{", "[]", '{"level": "modality"}'])
def test_damaged_points_are_refused(model, tmp_path, damage):
    interrupted(model, tmp_path, after=3)
    (path,) = tmp_path.glob("points-*.jsonl")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], damage, *lines[3:]]))
    with pytest.raises(DataError, match=r"points-0.jsonl is damaged .* without --resume"):
        run(model, tmp_path, resume=True)


def test_points_of_other_weights_are_refused(model, tmp_path):
    interrupted(model, tmp_path, after=2)
    with torch.no_grad():
        model.vision.q.weight += 1
    with pytest.raises(DataError, match="another run"):
        run(model, tmp_path, resume=True)


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": []}, SparsityError, "no sparsities given"),
        ({"sparsity": [0.0, 0.5]}, SparsityError, "sparsity 0 is the dense model"),
        ({"sparsity": [1.5]}, SparsityError, r"lies in \[0, 1\)"),
        ({"groups": []}, UnsupportedError, "no groups named"),
        ({"groups": ["blok"]}, UnknownNameError, "did you mean 'block'"),
        ({"modalities": ["vison"]}, UnknownNameError, "did you mean 'vision'"),
        ({"method": "nonsense"}, UnknownNameError, "nonsense"),
        ({"method": "tamt"}, UnsupportedError, "runs the model as it goes"),
    ],
)
def test_what_cannot_be_done_is_said(model, options, error, message):
    with pytest.raises(error, match=message):
        sensitivity(model, BATCHES, adapter=LosingAdapter(), **options)


def test_no_batches_and_a_single_batch(model):
    with pytest.raises(DataError, match="no batches to measure on"):
        sensitivity(model, [], adapter=LosingAdapter())
    with pytest.raises(DataError, match="that is a single batch"):
        sensitivity(model, BATCHES[0], adapter=LosingAdapter())


def test_a_dense_loss_that_is_not_finite_is_an_error(model):
    with pytest.raises(NonFiniteError, match="dense model on batch 1 is NaN"):
        sensitivity(model, [BATCHES[0], spoilt(BATCHES[1])], adapter=LosingAdapter())
