"""What has to hold for every family of transformers, on a tiny model of each: see `families`."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEOS, Family, Videos, pairs, pixels, written
from torch import Tensor, nn
from vlp_command import command

import vlp_plugins as vlp
from vlp_adapters.transformers.tokens import Sequences
from vlp_adapters.transformers.towers import Towers
from vlp_plugins.calibration import block_pass
from vlp_plugins.calibration.block_pass import BlockPass
from vlp_plugins.calibration.block_sums import BlockStatistics
from vlp_plugins.calibration.moments import INPUT_SECOND_MOMENT, InputSecondMoment
from vlp_plugins.calibration.outputs import Output, OutputProbe
from vlp_plugins.calibration.paused import Visit
from vlp_plugins.calibration.tokens import kinds_of
from vlp_plugins.dimension.plan import plan
from vlp_plugins.jobs.dimensions import summary_of
from vlp_plugins.masks.packed import Pruned, pack
from vlp_plugins.models.adapter import Adapter, Owner, Stream, TokenKind
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap

SHORT = {family.kind: name for name, family in reversed(FAMILIES.items())}
"""The first family of every kind: the others take longer than a quick run of the tests may."""

ALL = [
    pytest.param(name, marks=() if name in SHORT.values() else pytest.mark.long)
    for name in FAMILIES
]


@dataclass(frozen=True)
class Case:
    name: str
    family: Family
    model: nn.Module
    adapter: Adapter
    weights: WeightMap

    @property
    def sides(self) -> list[str]:
        return ["right", "left"] if self.family.left else ["right"]


@pytest.fixture(scope="module", params=ALL)
def original(request: pytest.FixtureRequest) -> Case:
    family = FAMILIES[request.param]
    torch.manual_seed(0)
    model = family.model().eval()
    adapter = registry().adapter_for(model)
    return Case(request.param, family, model, adapter, WeightMap.of(model, adapter))


@pytest.fixture
def case(original: Case) -> Case:
    model = copy.deepcopy(original.model)
    weights = WeightMap.of(model, original.adapter)
    return Case(original.name, original.family, model, original.adapter, weights)


def seen_tokens(case: Case, batch: dict[str, Tensor]) -> dict[str, Counter[str]]:
    """By module the tokens that entered it, by kind."""
    seen: dict[str, Counter[str]] = {}
    running: list[Any] = []

    def hook(owner: Owner) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            kinds = kinds_of(case.adapter, running[-1], owner, inputs)
            found = seen.setdefault(owner.module, Counter())
            if isinstance(kinds, TokenKind):
                found[kinds.name] += inputs.shape[:-1].numel()
            else:
                assert kinds.shape == inputs.shape[:-1], owner.module
                found.update(TokenKind(kind).name for kind in kinds.flatten().tolist())

        return count

    owners = [owner for weight in case.weights.values() for owner in weight.owners]
    handles = [
        case.model.get_submodule(owner.module).register_forward_pre_hook(
            hook(owner), with_kwargs=True
        )
        for owner in owners
    ]
    with torch.no_grad():
        for stream in case.adapter.streams(case.model, batch):
            running.append(stream)
            stream.run()
    for handle in handles:
        handle.remove()
    for found in seen.values():
        del found["PADDING"]
    return seen


def test_is_claimed_and_every_parameter_is_explained(case: Case) -> None:
    assert case.adapter.name in ("transformers", "siglip")
    assert len({weight.modality for weight in case.weights.values()}) >= 1
    prunable = {alias for weight in case.weights.values() for alias in weight.aliases}
    patterns = [exclusion.pattern for exclusion in case.adapter.exclusions(case.model)]
    unexplained = [
        path
        for path, _ in case.model.named_parameters(remove_duplicate=False)
        if path not in prunable and not any(re.search(pattern, path) for pattern in patterns)
    ]
    assert unexplained == []


def test_tokens_of_each_kind_are_those_counted_by_hand(case: Case) -> None:
    for side in case.sides:
        seen = seen_tokens(case, case.family.batch(side))
        counted = {path: dict(seen.get(path, {})) for path in case.family.tokens}
        assert counted == {path: dict(found) for path, found in case.family.tokens.items()}, side
        assert set(seen) == {w.owners[0].module for w in case.weights.values()}, side


@pytest.fixture(
    params=[
        pytest.param((name, place), id=f"{name}-{place}", marks=() if place else pytest.mark.long)
        for name, several in VIDEOS.items()
        for place in range(len(several))
    ]
)
def shown(request: pytest.FixtureRequest) -> tuple[Case, Videos]:
    name, place = request.param
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.model().eval()
    adapter = registry().adapter_for(model)
    return Case(name, family, model, adapter, WeightMap.of(model, adapter)), VIDEOS[name][place]


def test_tokens_of_videos_are_those_counted_by_hand(shown: tuple[Case, Videos]) -> None:
    case, videos = shown
    for side in case.sides:
        seen = seen_tokens(case, videos.batch(side))
        counted = {path: dict(seen[path]) for path in videos.tokens}
        assert counted == {path: dict(found) for path, found in videos.tokens.items()}, side


def test_what_is_seen_does_not_depend_on_the_name_of_a_caller() -> None:
    family, (_, videos) = FAMILIES["qwen2_vl"], VIDEOS["qwen2_vl"]
    model = family.model().eval()
    adapter = registry().adapter_for(model)
    case = Case("qwen2_vl", family, model, adapter, WeightMap.of(model, adapter))

    def get_video_features() -> dict[str, Counter[str]]:
        return seen_tokens(case, videos.batch("right"))

    found = get_video_features()
    assert {path: dict(found[path]) for path in videos.tokens} == dict(videos.tokens)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("qwen2_vl", "visual.blocks.0."),
        ("perception_lm", "vision_tower.encoder.layers.0."),
        pytest.param("llava_onevision", "vision_tower.encoder.layers.0.", marks=pytest.mark.long),
    ],
)
def test_a_walk_knows_images_from_videos(
    name: str, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, (run, both) = FAMILIES[name], VIDEOS[name]
    model = family.model().eval()
    found: list[TokenKind] = []

    def noted(adapter: Adapter, stream: Stream, owner: Owner, inputs: Tensor) -> Any:
        kinds = kinds_of(adapter, stream, owner, inputs)
        if block in owner.module:
            found.append(kinds)
        return kinds

    monkeypatch.setattr(block_pass, "kinds_of", noted)
    inner: Any = model.model
    inner.get_image_features = given = inner.get_image_features
    batches = [each.batch("right") for each in (both, both, family, run)]
    vlp.prune(model, batches, method="wanda", sparsity=0.5, tokens="image")

    first, second = TokenKind.IMAGE, TokenKind.VIDEO
    assert found == [first, first, first, second, second, second]
    assert vars(inner).pop("get_image_features") is given
    left = [vars(m).keys() & {"get_image_features", "get_video_features"} for m in model.modules()]
    assert not any(left)


@pytest.mark.long
def test_videos_calibrate_and_have_a_point_per_sample(shown: tuple[Case, Videos]) -> None:
    case, videos = shown
    batch = videos.batch("right")
    batches = [samples_of(batch, seed) for seed in range(24)]
    for method in ("wanda", "snip"):
        masks = vlp.prune(case.model, batches[:2], method=method, sparsity=0.6)
        assert masks.counts().all.removed == exact(case.weights, method)
    check_walk(case, batches[:2])
    profile = vlp.measure_id(case.model, batches)
    assert {layer.weight for layer in profile.layers} == set(case.weights)
    with_any = int((batch["input_ids"] >= IMAGE).any(1).sum())
    for layer in profile.layers:
        of_all = layer.modality == "text"
        assert layer.points == 24 * (len(batch["input_ids"]) if of_all else with_any), layer.module


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        pytest.param(name, tokens, marks=() if tokens == quick else pytest.mark.long)
        for name, quick in {"qwen2_vl": "image", "llava_onevision": "amia"}.items()
        for tokens in ("text", "image", "atv", "amia")
    ],
)
def test_all_tokens_of_a_vision_tower_count_whether_of_images_or_videos(
    name: str, tokens: str
) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.model().eval()
    run, both = VIDEOS[name]
    batches = [each.batch("right") for each in (both, family, run)]
    all_of_them, chosen = (
        vlp.prune(model, batches, method="wanda", sparsity=0.5, walk="blocks", tokens=each)
        for each in ("all", tokens)
    )
    tower = [weight for weight in chosen if chosen.manifest.weights[weight]["modality"] == "vision"]
    assert tower
    assert all(torch.equal(chosen[weight], all_of_them[weight]) for weight in tower)
    assert any(not torch.equal(chosen[weight], all_of_them[weight]) for weight in chosen)


@pytest.mark.parametrize("name", ["internvl", "smolvlm", "llava"])
def test_videos_are_refused_where_a_model_takes_none(name: str) -> None:
    family = FAMILIES[name]
    model = family.model().eval()
    batch = family.batch("right") | {"pixel_values_videos": pixels(2)}
    with pytest.raises(vlp.VlpError, match=r"takes no pixel_values_videos: .*frames as images"):
        vlp.prune(model, [batch], method="wanda", sparsity=0.5)


def test_queries_are_not_taken_for_the_padding_of_texts_as_long_as_they_are() -> None:
    family = FAMILIES["blip2_itr"]  # it has 4 queries
    torch.manual_seed(0)
    model = family.model().eval()
    adapter = registry().adapter_for(model)
    case = Case("blip2_itr", family, model, adapter, WeightMap.of(model, adapter))
    path = "qformer.encoder.layer.0.attention.attention.query"
    for matching in (False, True):
        seen = Counter[str]()
        for side in case.sides:
            batch = pairs(("tttt", "t"), use_image_text_matching_head=matching)(side)
            seen.update(seen_tokens(case, batch)[path])
        assert seen == {"QUERY": 2 * 8, "TEXT": 2 * 5}
        assert seen.total() == 26


ONE_IMAGE_EACH = (
    "queries", "joint sequence", "two towers", "encoder-decoder", "cross-attention", "images only",
)  # fmt: skip


def test_samples_alone_have_the_tokens_that_they_have_together(case: Case) -> None:
    """A single sample is not padded, so most models get no mask at all."""
    if case.family.kind not in ONE_IMAGE_EACH:
        pytest.skip("its images are not in the first dimension, one for each sample")
    batch = case.family.batch("right")
    alone: dict[str, Counter[str]] = {}
    for row in range(len(next(iter(batch.values())))):
        sample = {name: value[row : row + 1] for name, value in batch.items()}
        for ids in {"input_ids", "qformer_input_ids"} & batch.keys():
            mask = ids.replace("input_ids", "attention_mask")
            length = int(batch[mask][row].sum())
            sample |= {name: sample[name][:, :length] for name in (ids, mask)}
        if "cross_attention_mask" in sample:
            sample["cross_attention_mask"] = sample["cross_attention_mask"][:, :length]
        for path, found in seen_tokens(case, sample).items():
            alone.setdefault(path, Counter()).update(found)
    assert alone == seen_tokens(case, batch)


def test_statistics_do_not_depend_on_the_ids_under_the_padding(case: Case) -> None:
    for side in case.sides:
        batch = case.family.batch(side)
        if "attention_mask" not in batch or bool(batch["attention_mask"].all()):
            pytest.skip("its batches have no padding")
        padding = batch["attention_mask"] == 0
        other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 33)}
        first, second = (
            vlp.gather(case.model, [each], method="wanda").sums for each in (batch, other)
        )
        for key, value in first.items():
            # The largest attention score, which is taken off all, may be that of padding.
            torch.testing.assert_close(
                value, second[key], rtol=1e-5, atol=1e-7, msg=f"{side}: {key}"
            )


def exact(weights: WeightMap, method: str) -> int:
    """How many elements of ten are six: of the model, of each modality, or of each row."""
    if method == "multiflow":
        groups = weights.by_modality().values()
        return sum(int(0.6 * sum(weight.numel for weight in group)) for group in groups)
    if method == "wanda":
        shapes = [weight.rows_and_columns for weight in weights.values()]
        return sum(rows * int(0.6 * columns) for rows, columns in shapes)
    return int(0.6 * weights.numel)


@pytest.mark.parametrize("method", ["omp", "lamp", "wanda", "multiflow", "snip"])
def test_masks_are_exact_and_survive_a_way_through_files(
    case: Case, method: str, tmp_path: Path
) -> None:
    if method == "snip" and not case.family.gradients:
        pytest.skip("the model has no loss of its own")
    batches = [case.family.batch(side) for side in case.sides]
    made = vlp.prune(case.model, batches, method=method, sparsity=0.6)
    assert made.counts().all.removed == exact(case.weights, method)
    made.save(tmp_path / "masks.safetensors")
    masks = vlp.Masks.load(tmp_path / "masks.safetensors")
    masks.apply(case.model)
    assert masks.verify(case.model) == []
    zeros = sum(int((weight.parameter == 0).sum()) for weight in case.weights.values())
    assert zeros >= exact(case.weights, method)


def test_chita_prunes(case: Case) -> None:
    if not case.family.gradients:
        pytest.skip("the model has no loss of its own")
    batches = [case.family.batch(side) for side in 2 * case.sides]
    masks = vlp.prune(case.model, batches, method="chita", sparsity=0.5)
    masks.apply(case.model)
    assert masks.verify(case.model) == []


def samples_of(batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same batch with other words and images."""
    random = torch.Generator().manual_seed(seed)
    other = dict(batch)
    for name, value in batch.items():
        if "pixel_values" in name:
            other[name] = torch.randn(value.shape, generator=random).masked_fill(value == 0, 0)
        elif name in ("input_ids", "qformer_input_ids", "labels") and value.ndim > 1:
            words = torch.randint(10, 60, value.shape, generator=random)
            other[name] = torch.where((value >= 10) & (value < 60), words, value)
    return other


def test_dimensions_are_measured_with_a_point_per_sample(case: Case) -> None:
    batch = case.family.batch("right")
    batches = [samples_of(batch, seed) for seed in range(24)]
    profile = vlp.measure_id(case.model, batches)
    assert set(profile.without) == set(case.family.constant)
    assert {layer.weight for layer in profile.layers} == set(case.weights) - set(profile.without)
    size = len(batch["input_ids" if "input_ids" in batch else "pixel_values"])
    said = " ".join(summary_of(profile))
    assert ("Without a dimension" in said) == bool(case.family.constant)
    assert all(name in said for name in case.family.constant)
    planned = plan(case.model, case.adapter, case.weights, batch, 24 * size)
    assert planned.batches == 24
    # A sample without an image has no point in the layers that read images.
    assert all(24 <= layer.points <= 24 * size for layer in profile.layers)
    masks = vlp.prune(case.model, method="id*omp", sparsity=0.6, id_profile=profile)
    assert masks.counts().all.removed == exact(case.weights, "omp")


@pytest.mark.parametrize("first", ["tt####t##t", "tt######tt"])
def test_the_images_of_a_sample_make_one_point_also_if_they_are_projected_one_by_one(
    first: str,
) -> None:
    family = FAMILIES["lfm2_vl"]
    torch.manual_seed(0)
    model = family.model().eval()
    adapter = registry().adapter_for(model)
    path = "model.multi_modal_projector.linear_1"
    rows: list[Tensor] = []
    module = model.get_submodule(path)
    module.register_forward_hook(lambda _, __, output: rows.append(output.flatten(0, -2)))
    outputs: list[Output] = []
    probe = OutputProbe(model, adapter, WeightMap.of(model, adapter), kinds=True)
    with probe.attached():
        batch = family.batch("right") | written((first, "t####tt", "ttt"), "right")
        probe.run(batch, outputs.append)
    (found,) = [each for each in outputs if each.module == path]
    large, small, other = rows  # of 4 and 2 tokens in the first sample, and of 4 in the second
    assert torch.equal(found.tokens[0], torch.cat([large, small]))
    assert torch.equal(found.tokens[1, :4], other)
    assert found.padding is not None
    assert found.padding.tolist() == [6 * [False], [False] * 4 + [True] * 2]
    assert found.kinds is not None
    assert found.kinds.tolist() == [6 * [TokenKind.IMAGE], 4 * [TokenKind.IMAGE] + [0, 0]]


def test_a_module_that_reads_some_images_alone_is_refused() -> None:
    family = FAMILIES["lfm2_vl"]
    model = family.model().eval()
    sequences = Sequences(Towers.of(model), family.batch("right"))
    owner = Owner("model.multi_modal_projector.linear_1", "vision")
    for call, shape in enumerate([(1, 2, 2), (1, 1, 2)]):
        places = sequences.samples(owner, torch.Size(shape), call)
        assert places is not None
        assert not places.whole
        assert places.samples.tolist() == torch.zeros(shape).tolist()
    with pytest.raises(vlp.VlpError, match="linear_1 are 6 tokens .* has 10 placeholders"):
        sequences.check_read()
    with pytest.raises(vlp.VlpError, match="linear_1 are 14 tokens .* has 10 placeholders"):
        sequences.samples(owner, torch.Size((1, 2, 4)), 2)


def test_zeros_and_ties_are_kept_by_save_pretrained(case: Case, tmp_path: Path) -> None:
    masks = vlp.prune(case.model, method="omp", sparsity=0.5)
    masks.apply(case.model)
    model: Any = case.model
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert masks.verify(again) == []
    ties = WeightMap.of(again, case.adapter)
    assert {n: w.aliases for n, w in ties.items()} == {
        n: w.aliases for n, w in case.weights.items()
    }
    for (name, first), second in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_is_pruned_from_the_command_line(case: Case, tmp_path: Path) -> None:
    model: Any = case.model
    model.save_pretrained(tmp_path / "model")
    command(
        "prune", "--model", tmp_path / "model", "--method", "omp", "--sparsity", 0.5,
        "--save-model", "--out", tmp_path / "out",
    )  # fmt: skip
    result = command(
        "masks", "verify", tmp_path / "out/masks-0.5.safetensors", tmp_path / "out/model-0.5"
    )
    assert f"all {int(0.5 * case.weights.numel):,} removed elements" in result.stdout


def test_block_by_block_each_weight_is_measured_as_in_a_whole_forward(case: Case) -> None:
    check_walk(case, [case.family.batch(side) for side in case.sides])


def check_walk(case: Case, batches: list[dict[str, Tensor]]) -> None:
    dense = vlp.gather(case.model, batches, adapter=case.adapter, method="wanda")
    walk = BlockPass(case.model, case.adapter, case.weights, batches)
    found: dict[str, Tensor] = {}

    def keep(_: Visit, weights: Any, statistics: BlockStatistics) -> dict[str, Pruned]:
        found.update({name: statistics.mean(INPUT_SECOND_MOMENT, name) for name in weights})
        return {name: Pruned(pack(torch.ones(w.shape).bool())) for name, w in weights.items()}

    walk.run([InputSecondMoment()], keep)
    assert found.keys() == case.weights.keys()
    for name, moment in found.items():
        torch.testing.assert_close(moment, dense.mean(INPUT_SECOND_MOMENT, name), rtol=1e-6, atol=0)
