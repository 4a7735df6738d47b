"""What NNI's `config_list` means for our pruners."""

from __future__ import annotations

import logging
import math

import pytest
import torch

pytest.importorskip("nni", reason="the host is an extra")

import nni_examples as examples
from torch import nn

from vlp_plugins.hosts import nni as host
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, prune
from vlp_plugins.runtime.errors import SparsityError, UnsupportedError


def masks_for(config_list, method="magnitude", model=None, **options):
    pruner = host.pruner_class(method)(model or examples.net(), config_list, **options)
    pruner.compress()
    masks = host.masks_of(pruner)
    host.finalize(pruner)
    return masks


def removed(masks):
    return {name: int((~masks[name]).sum()) for name in masks}


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ({"op_types": ["Linear"]}, {"first", "second", "last"}),
        ({"op_names": ["first"]}, {"first"}),
        ({"op_names": ["first", "again"], "op_types": ["Linear"]}, {"first", "second"}),
        ({"op_names_re": [".*st$"]}, {"first", "last"}),
        ({"op_types": ["Linear"], "exclude_op_names": ["last"]}, {"first", "second"}),
        ({"op_types": ["Linear"], "exclude_op_names_re": ["fir.*"]}, {"second", "last"}),
        ({"op_names": ["last"], "exclude_op_types": ["LayerNorm"]}, {"last"}),
    ],
)
def test_selection_is_nnis_own(selection, names):
    masks = masks_for([{**selection, "sparse_ratio": 0.5}])
    assert {name for name, count in removed(masks).items() if count} == names


def test_a_ratio_is_shared_out_within_an_entry_by_the_methods_allocation():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    adapter = ModuleAdapter(examples.net())
    model = examples.net()
    with torch.no_grad():
        model.last.weight.mul_(10)
    alone = prune(model, method="magnitude", sparsity=0.5, adapter=adapter)

    assert masks_for(config, model=model) == alone
    assert removed(alone)["last"] < 20


def test_the_allocation_layer_is_what_nnis_pruners_do():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    masks = masks_for(config, allocation="layer")
    assert removed(masks) == {"first": 30, "second": 50, "last": 20}


def test_entries_have_ratios_of_their_own_and_groups_share_one():
    config = [
        {"op_names": ["first"], "sparse_ratio": 0.9},
        {"op_names": ["second"], "sparse_ratio": 0.5, "global_group_id": "rest"},
        {"op_names": ["last"], "sparse_ratio": 0.5, "global_group_id": "rest"},
    ]
    found = removed(masks_for(config))

    assert found["first"] == 54
    assert found["second"] + found["last"] == 70
    alone = prune(
        nn.ModuleDict({"second": examples.net().second, "last": examples.net().last}),
        method="magnitude",
        sparsity=0.5,
        adapter=ModuleAdapter(
            nn.ModuleDict({"second": examples.net().second, "last": examples.net().last})
        ),
    )
    assert {name: found[name] for name in ("second", "last")} == removed(alone)


def test_the_first_entry_that_selects_a_weight_counts(caplog):
    config = [
        {"op_names": ["again"], "sparse_ratio": 0.25},
        {"op_types": ["Linear"], "sparse_ratio": 0.5},
    ]
    with caplog.at_level(logging.WARNING, "vlp_plugins"):
        found = removed(masks_for(config))

    assert found["second"] == 25
    assert found["first"] + found["last"] == 50
    assert "an earlier entry has (first 'second')" in caplog.text


def test_settings_may_stand_by_the_target():
    config = [
        {
            "op_types": ["Linear"],
            "target_names": ["weight"],
            "target_settings": {"weight": {"sparse_ratio": 0.5, "max_sparse_ratio": 0.6}},
        }
    ]
    masks = masks_for(config)
    assert masks.removed == 100
    assert max(count / masks[name].numel() for name, count in removed(masks).items()) <= 0.6


def test_the_old_format_of_nni_still_works():
    config = [{"op_types": ["Linear"], "sparsity": 0.5}]
    found = removed(masks_for(config))
    assert sum(found.values()) == 100
    total = [{"op_types": ["Linear"], "total_sparsity": 0.5}]
    assert removed(masks_for(total)) == found


@pytest.mark.parametrize(
    "left_out",
    [{"op_names": ["last"]}, {"op_types": ["Linear"], "op_names_re": ["l.*"]},
     {"op_partial_names": ["as"]}],
)  # fmt: skip
@pytest.mark.parametrize("amount", ["sparsity", "sparse_ratio"])
def test_an_entry_of_nni_2_excludes_layers_of_all_others(left_out, amount):
    entry = {"op_types": ["Linear"], amount: 0.5}
    modern = {"op_types": ["Linear"], "exclude_op_names": ["last"], "sparse_ratio": 0.5}
    expected = removed(masks_for([modern]))
    assert expected["last"] == 0 < expected["first"]
    out = {**left_out, "exclude": True}
    for config in ([entry, out], [out, entry], [{**entry, "exclude": False}, out]):
        assert removed(masks_for(config)) == expected


def net_with_differences():
    model = examples.net()
    with torch.no_grad():
        model.first.weight.mul_(10)
        model.last.weight.mul_(0.1)
    return model


@pytest.mark.parametrize("bounds", [(0.2, 0.8), (0.45, 1.0), (0.0, 0.55), (0.5, 0.5)])
def test_bounds_hold_for_every_layer_and_the_whole_count_stays(bounds):
    least, most = bounds
    config = [
        {
            "op_types": ["Linear"],
            "sparse_ratio": 0.5,
            "max_sparse_ratio": most,
            "min_sparse_ratio": least,
        }
    ]
    masks = masks_for(config, model=net_with_differences())

    assert masks.removed == 100
    for name, count in removed(masks).items():
        assert int(least * masks[name].numel()) <= count <= most * masks[name].numel() + 1e-9


def test_without_bounds_the_layers_differ_by_more():
    masks = masks_for([{"op_types": ["Linear"], "sparse_ratio": 0.5}], model=net_with_differences())
    found = removed(masks)
    assert found["last"] == 40
    assert found["first"] < 0.2 * 60


@pytest.mark.parametrize(("ratio", "expected"), [(0.9, 0.6), (0.1, 0.3)])
def test_a_ratio_outside_of_its_bounds_is_the_nearest(ratio, expected):
    config = [
        {
            "op_types": ["Linear"],
            "sparse_ratio": ratio,
            "max_sparse_ratio": 0.6,
            "min_sparse_ratio": 0.3,
        }
    ]
    masks = masks_for(config, model=net_with_differences())
    assert removed(masks) == {n: int(expected * masks[n].numel()) for n in masks}


def test_several_scopes_of_a_vision_language_model_take_one_data_pass():
    batches = examples.blip_batches()
    reads = []

    class Counting(list):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    config = [
        {"op_names_re": [r"vision_model\..*"], "sparse_ratio": 0.5},
        {"op_types": ["Linear"], "sparse_ratio": 0.75},
    ]
    model = examples.blip()
    weights = WeightMap.of(model, registry().adapter_for(model))
    masks = masks_for(config, "multiflow", model, batches=Counting(batches))

    assert len(reads) == 1
    vision = [w for w in weights.values() if w.modality == "vision"]
    counts = masks.counts().by_modality
    assert counts["vision"].removed == int(0.5 * sum(w.numel for w in vision))
    assert counts["text"].removed == int(0.75 * counts["text"].total)
    alone = prune(examples.blip(), batches, sparsity={"vision": 0.5, "text": 0.75})
    assert removed(masks) == removed(alone)
    assert all(torch.equal(masks[name], alone[name]) for name in masks)


@pytest.mark.parametrize("entries", [1, 2])
def test_statistics_of_an_earlier_pass_serve_a_part_of_the_model(entries):
    batches = examples.blip_batches()
    config = [
        {"op_names_re": [r"vision_model\..*fc1"], "sparse_ratio": 0.5},
        {"op_names_re": [r"text_encoder\..*"], "sparse_ratio": 0.75},
    ][:entries]
    statistics = gather(examples.blip(), batches)

    found = masks_for(config, "multiflow", examples.blip(), statistics=statistics)

    assert found == masks_for(config, "multiflow", examples.blip(), batches=batches)
    assert 0 < found.sparsity < 0.75


@pytest.mark.parametrize("method", ["chita", "tamt", "platon", "itersnip"])
def test_procedures_prune_scope_by_scope(method):
    config = [
        {"op_names_re": [r"vision_model\..*fc1"], "sparse_ratio": 0.5},
        {"op_names_re": [r"vision_model\..*fc2"], "sparse_ratio": 0.75},
    ]
    options = examples.QUICK.get(method, {})
    masks = masks_for(config, method, examples.blip(), batches=examples.blip_batches(), **options)
    found = removed(masks)
    for layer, ratio in {"fc1": 0.5, "fc2": 0.75}.items():
        names = [n for n in masks if n.startswith("vision") and n.endswith(layer)]
        assert sum(found.pop(n) for n in names) == int(ratio * sum(masks[n].numel() for n in names))
    assert not any(found.values())


@pytest.mark.parametrize("allocation", ["owl", "das", "ecoflap(batches=1)"])
@pytest.mark.parametrize("ratios", [(0.5,), (0.5, 0.75)])
def test_budgets_of_blocks_are_those_of_each_scope(allocation, ratios):
    names = [r"vision_model\..*", r"text_encoder\..*"]
    config = [
        {"op_names_re": [name], "sparse_ratio": ratio}
        for name, ratio in zip(names, ratios, strict=False)
    ]
    batches = examples.blip_batches()[:2]

    masks = masks_for(config, "omp", examples.blip(), batches=batches, allocation=allocation)

    weights = WeightMap.of(examples.blip(), registry().adapter_for(examples.blip()))
    found = removed(masks)
    vision = [name for name, weight in weights.items() if weight.modality == "vision"]
    size = sum(weights[name].numel for name in vision)
    assert sum(found[name] for name in vision) == int(0.5 * size)
    shares = {found[name] / weights[name].numel for name in vision}
    assert max(shares) - min(shares) > 0.01 or allocation != "das"
    assert (sum(found.values()) > int(0.5 * size)) == (len(ratios) == 2)
    assert masks.manifest.parameters


def test_a_pattern_is_an_allocation():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    masks = masks_for(
        [{"op_types": ["Linear"], "sparse_ratio": 0.5}], model=model, allocation="keep=2,of=4"
    )
    assert all((masks[n].view(-1, 4).sum(1) == 2).all() for n in masks)


HALF = {"op_types": ["Linear"], "sparse_ratio": 0.5}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "config_list is empty"),
        ([{"op_types": ["Linear"]}], "config_list.0. has no sparse_ratio"),
        ([{"op_types": ["Linear"], "sparse_ratio": 1}], "ratios are floats"),
        ([{"op_types": ["Linear"], "sparse_ratio": 1.0}], r"lies in \[0, 1\)"),
        ([{"op_types": ["Linear"], "sparse_ratio": -0.5}], "sparse_ratio=-0.5; fractions lie in"),
        ([{"op_types": ["Linear"], "sparse_ratio": 1.5}], "sparse_ratio=1.5; fractions lie in"),
        ([{"op_types": ["Linear"], "sparse_ratio": math.nan}], "sparse_ratio=nan"),
        (
            [{**HALF, "min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4}],
            "min_sparse_ratio=0.6 above max_sparse_ratio=0.4",
        ),
        (HALF, "is one entry, not a list"),
        ([{**HALF, "exclude_op_names": ["lst"]}], "did you mean 'last'"),
        ([{"op_names_re": ["("], "sparse_ratio": 0.5}], "'\\(', which is not a regular expression"),
        ([{"op_types": ["Linear"], "sparse_threshold": 0.1}], "give sparse_ratio"),
        ([{"op_types": ["Linear"], "sparse_ratio": 0.5, "group_id": 1}], "global_group_id"),
        (
            [
                {"op_types": ["Linear"], "sparse_ratio": 0.5},
                {"op_names": ["last"], "exclude": True, "sparse_ratio": 0.5},
            ],
            r"config_list\[1\] has sparse_ratio next to exclude; give op_types, op_names or",
        ),
        ([HALF, {"op_names": ["lst"], "exclude": True}], r"list\[1\] names 'lst'.*mean 'last'"),
        ([HALF, {"exclude": True}], "has exclude alone"),
        ([{"op_names": ["lst"], "sparse_ratio": 0.5}], "did you mean 'last'"),
        ([{"op_names": ["norm"], "sparse_ratio": 0.5}], "'norm', which is not pruned: normal"),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], "selects no weight"),
        (
            [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "out_channel"}],
            "hosts.torch_pruning",
        ),
        (
            [{"op_types": ["Linear"], "sparse_ratio": 0.5, "target_names": ["weight", "bias"]}],
            "weights are what is pruned",
        ),
        (
            [
                {"op_names": ["first"], "sparse_ratio": 0.5, "global_group_id": "g"},
                {"op_names": ["last"], "sparse_ratio": 0.6, "global_group_id": "g"},
            ],
            "entries of global_group_id 'g' ask for",
        ),
    ],
)
def test_what_cannot_be_done_is_said(config, words):
    """At once, and not by the last step of a schedule."""
    with pytest.raises((SparsityError, UnsupportedError), match=words):
        host.OmpPruner(examples.net(), config)


def test_what_a_procedure_cannot_keep_is_said():
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "min_sparse_ratio": 0.1}]
    with pytest.raises(UnsupportedError, match="min_sparse_ratio=0.1 cannot be kept by method"):
        masks_for(config, "chita", examples.blip(), batches=examples.blip_batches())


@pytest.mark.parametrize("option", ["sparsity", "floor"])
def test_amounts_come_from_the_config_list(option):
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    with pytest.raises(UnsupportedError, match=f"{option} is not given here"):
        masks_for(config, **{option: 0.5})


def test_a_refused_config_leaves_the_model_alone():
    model = examples.net()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UnsupportedError):
        host.OmpPruner(model, [{"op_names": ["lst"], "sparse_ratio": 0.5}])
    assert [name for name, _ in model.named_parameters()] == names
    host.OmpPruner(model, [{"op_names": ["last"], "sparse_ratio": 0.5}]).compress()
