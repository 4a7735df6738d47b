"""A profile: what it gives pruning methods, and its file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from toy import ToyAdapter, toy_model

from vlp_plugins.dimension.profile import IdProfile, LayerDimension
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import OutputError, StatisticsError


def layer(weight: str, stream: str, owner: int, dimension: float) -> LayerDimension:
    return LayerDimension(weight, stream, owner, "m", "text", 0, dimension, 0.1, 24, 30)


def profile_of(*layers: LayerDimension) -> IdProfile:
    """Dimension 5 for what is not given."""
    given = {each.weight for each in layers}
    weights = WeightMap.of(toy_model(), ToyAdapter())
    rest = [layer(name, "text", 0, 5.0) for name in weights if name not in given]
    return IdProfile((*layers, *rest), weights.structure, "toy", {"padding": "real"})


WEIGHTS = WeightMap.of(toy_model(), ToyAdapter())
TIED = (
    layer("text.out_proj", "decoder", 1, 12.0),
    layer("text.out_proj", "text", 0, 4.0),
    layer("text.out_proj", "fusion", 0, 8.0),
)


def test_factors_are_the_mean_of_streams_and_then_of_owners():
    profile = profile_of(*TIED)
    factors = profile.factors(WEIGHTS)
    assert list(factors) == list(WEIGHTS)
    assert factors["text.out_proj"] == 9.0
    assert factors["vision.q"] == 5.0
    assert profile.factors(WEIGHTS, owners="first")["text.out_proj"] == 6.0


def test_the_first_owner_is_the_first_that_was_reached():
    assert profile_of(TIED[0]).factors(WEIGHTS, owners="first")["text.out_proj"] == 12.0


def test_a_model_of_the_family_with_fewer_weights_is_served():
    profile = replace(profile_of(), structure="another")
    fewer = {name: weight for name, weight in WEIGHTS.items() if name.startswith("text")}
    assert set(profile.factors(WeightMap(fewer, "toy"))) == set(fewer)


def test_weights_that_were_not_measured_are_named():
    profile = profile_of()
    kept = tuple(each for each in profile.layers if not each.weight.startswith("cross"))
    with pytest.raises(StatisticsError) as caught:
        replace(profile, layers=kept).factors(WEIGHTS)
    message = str(caught.value)
    assert "lacks 8 of the model's 19 weights" in message
    assert "cross.0.q, cross.0.k" in message
    assert message.count("cross") == 5


def test_a_weight_without_a_dimension_gets_the_mean_of_its_modality(tmp_path):
    full = profile_of(layer("vision.q", "vision", 0, 9.0))
    lacking = {"vision.k": "it is constant", "cross.0.q": "it is constant"}
    kept = tuple(each for each in full.layers if each.weight not in lacking)
    profile = replace(full, layers=kept, without=lacking)
    factors = profile.factors(WEIGHTS)

    for members in WEIGHTS.by_modality().values():  # budgets of modalities stay as without it
        counted = [w for w in members if w.name not in lacking]
        for weight in members:
            if weight.name in lacking:
                assert factors[weight.name] == pytest.approx(mean(factors, counted))
    assert factors["vision.k"] > 5
    assert factors.record()["id_profile"]["without_dimension"] == ["vision.k", "cross.0.q"]
    profile.save(tmp_path / "dimensions.json")
    assert IdProfile.load(tmp_path / "dimensions.json") == profile


def mean(factors, weights):
    return sum(w.numel * factors[w.name] for w in weights) / sum(w.numel for w in weights)


def test_a_modality_without_any_dimension_gets_the_mean_of_the_model():
    full = profile_of(layer("vision.q", "vision", 0, 9.0))
    group = WEIGHTS["cross.0.q"].modality
    lacking = {w.name: "it is constant" for w in WEIGHTS.by_modality()[group]}
    assert len(lacking) < len(WEIGHTS)
    kept = tuple(each for each in full.layers if each.weight not in lacking)
    factors = replace(full, layers=kept, without=lacking).factors(WEIGHTS)
    others = [w for name, w in WEIGHTS.items() if name not in lacking]
    assert [factors[name] for name in lacking] == pytest.approx(
        [mean(factors, others)] * len(lacking)
    )


@pytest.mark.parametrize("dimension", [0.0, -1.0, math.nan, math.inf])
def test_a_dimension_that_is_no_positive_number_is_no_factor(dimension):
    with pytest.raises(StatisticsError, match="'vision.q' at m"):
        profile_of(layer("vision.q", "vision", 0, dimension)).factors(WEIGHTS)


def test_a_file_holds_the_profile_to_the_last_bit(tmp_path):
    profile = profile_of(*TIED, layer("vision.q", "vision", 0, 1 / 3))
    file = tmp_path / "new" / "dimensions.json"
    profile.save(file)
    with pytest.raises(OutputError, match="overwrite=True"):
        profile.save(file)
    profile.save(file, overwrite=True)
    assert IdProfile.load(file) == profile
    content = json.loads(file.read_text())
    assert content["schema"] == 1
    assert content["made_by"].startswith("vlp_plugins ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("{", "is damaged, truncated or no JSON"),
        ("[1]", "holds 'list', not 'intrinsic dimensions'"),
        ('{"kind": "masks"}', "holds 'masks'"),
        ('{"kind": "intrinsic dimensions", "schema": "x"}', "is damaged"),
        ('{"kind": "intrinsic dimensions", "schema": 2, "made_by": "B"}', "made by B: upgrade"),
        ('{"kind": "intrinsic dimensions", "schema": 1}', "is damaged .the profile has no"),
        ('{"kind": "intrinsic dimensions", "schema": 1, "layers": [{}]}', "is damaged"),
    ],
)
def test_other_files_are_told(tmp_path, text, message):
    file = tmp_path / "dimensions.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(StatisticsError, match=message) as caught:
        IdProfile.load(file)
    assert str(file) in str(caught.value)


def renamed(layers: tuple[LayerDimension, ...]) -> tuple[LayerDimension, ...]:
    return (*layers, replace(layers[0], weight="cross.7.q"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "clip"}, "of adapter 'clip', and this one is of adapter 'toy'"),
        ({"shapes": {"vision.q": (7, 6)}}, r"'vision.q' is \[6, 6\] in this one, \[7, 6\] in"),
        ({"layers": renamed(profile_of().layers)}, "it has 'cross.7.q', which this one lacks"),
    ],
)
def test_a_profile_of_another_model_is_refused(change, message):
    profile = replace(profile_of(), structure="another", **change)
    with pytest.raises(StatisticsError, match=message):
        profile.factors(WEIGHTS)


def test_a_file_of_an_older_version_is_checked_by_what_it_says(tmp_path):
    file = tmp_path / "dimensions.json"
    profile_of().save(file)
    content = json.loads(file.read_text())
    del content["shapes"], content["adapter"]
    file.write_text(json.dumps(content))
    assert set(IdProfile.load(file).factors(WEIGHTS)) == set(WEIGHTS)


def test_a_file_of_a_version_that_measured_wrongly_is_told(tmp_path, caplog):
    file = tmp_path / "dimensions.json"
    profile_of().save(file)
    IdProfile.load(file)
    assert not caplog.records
    content = json.loads(file.read_text()) | {"made_by": "vlp_plugins 0.1.0"}
    file.write_text(json.dumps(content))
    IdProfile.load(file)
    assert "made by vlp_plugins 0.1.0, where samples that were all but equal" in caplog.text
