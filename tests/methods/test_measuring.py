"""Allocations that run the model before they allocate: DAS and ECoFLaP."""

from dataclasses import replace
from pathlib import Path

import chat_models
import pytest
import torch
from measuring_in_processes import RUNS, masks_of, qwen_batch
from toy import toy_batches
from toy_loss import LosingAdapter, losing_toy, spoilt
from two_processes import run_two_processes

import vlp_plugins as vlp
from benchmarks.parity.lvlm import TinyQwen
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.methods.composition import Composition
from vlp_plugins.methods.guided import Measuring
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.resolve import make_method, resolve_method
from vlp_plugins.models.adapter import Owner
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import Weight, WeightMap
from vlp_plugins.pruning import gather, prune
from vlp_plugins.runtime.errors import NonFiniteError, StatisticsError, UnsupportedError
from vlp_plugins.scoring.das import measure_similarities
from vlp_plugins.scoring.ecoflap import Ecoflap, _seed, moved, normal_noise, projected_gradients
from vlp_plugins.scoring.magnitude import Magnitude
from vlp_plugins.scoring.owl import Owl

GOLDEN = Path(__file__).parents[1] / "golden" / "lvlm"
BATCHES = toy_batches(4, size=4)


@pytest.fixture(scope="module")
def qwen():
    return TinyQwen(GOLDEN)


@pytest.fixture
def model():
    return losing_toy()


def context(model, batches=BATCHES, **options):
    adapter = LosingAdapter()
    return Context(model, adapter, WeightMap.of(model, adapter), batches=batches, **options)


def toy_pruned(model, **options):
    options = {"adapter": LosingAdapter(), "sparsity": 0.6, **options}
    return prune(model, options.pop("batches", BATCHES), **options)


@torch.no_grad()
def naive_means(recorded, name):
    """Mean cosines of one layer's outputs, pair by pair, over the samples that have them."""
    outputs = []
    module = recorded.model.get_submodule(f"model.{name}")
    hook = module.register_forward_hook(lambda *args: outputs.append(args[2][0].double()))
    found = [[], [], []]
    for sample, batch in enumerate(recorded.batches[:3]):
        recorded.model(**batch)
        rows = torch.nn.functional.normalize(outputs.pop(), dim=-1)
        kinds = recorded.images(sample).tolist()
        parts = [[], [], []]
        for i, first in enumerate(kinds):
            for j, second in enumerate(kinds):
                value = float(rows[i] @ rows[j])
                if first and not second:
                    parts[2].append(value)
                elif first == second and i < j and value > 0:
                    parts[0 if first else 1].append(value)
        for each, values in zip(found, parts, strict=True):
            each.append(sum(values) / len(values))
    hook.remove()
    return [sum(each) / len(each) for each in found]


def test_similarities_are_the_formula(qwen):
    run = replace(qwen.context(published=False), limit=3)
    found = measure_similarities(run)

    for name in ("language_model.layers.0.self_attn.k_proj", "language_model.layers.2.mlp.up_proj"):
        assert found[name] == pytest.approx(naive_means(qwen, name), abs=1e-6)


def test_similarities_of_padded_batches_are_those_of_each_sample(qwen):
    few = [qwen.batches[1], qwen.batches[2]]  # of equal length
    joined = {key: torch.cat([batch[key] for batch in few]) for key in few[0] if key != "labels"}
    pad = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}
    padded = {
        key: torch.nn.functional.pad(value, (0, 5), value=pad[key]) if key in pad else value
        for key, value in joined.items()
    }
    alone = measure_similarities(_of(qwen, few))
    together = measure_similarities(_of(qwen, [padded]))

    for name, means in alone.items():
        assert together[name] == pytest.approx(means, abs=1e-5)


def _of(qwen, batches):
    return Context(qwen.model, qwen.adapter, qwen.weights, batches=batches)


def test_a_tower_of_images_has_one_mean_and_still_a_budget():
    model = chat_models.qwen()
    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)
    batches = [qwen_batch(0), qwen_batch(1)]

    found = measure_similarities(Context(model, adapter, weights, batches=batches))

    for name, weight in weights.items():
        known = [mean is not None for mean in found[name]]
        assert known == ([True, False, False] if weight.modality == "vision" else known)
        assert any(known)
    masks = vlp.prune(model, batches, method="wanda", allocation="das", sparsity=0.5)
    assert masks.removed == int(0.5 * weights.numel)


def naive_gradients(run, eps):
    """Every weight moved by hand; the memory of the loss starts from the same state."""
    found = {}
    probe = LossProbe(run.model, run.adapter, run.weights)
    for name, weight in run.weights.items():
        total = 0.0
        for index, batch in enumerate(run.batches):
            parameter = weight.parameter.detach()
            before = parameter.clone()
            noise = normal_noise(parameter, _seed(run.seed, name, index))
            losses = []
            for step in (eps, -eps):
                parameter.copy_(before + step * noise)
                with probe.attached(()):
                    losses.append(probe.loss(batch, index))
            parameter.copy_(before)
            total += abs(losses[0] - losses[1]) / (2 * eps)
        found[name] = total
    return found


def test_projected_gradients_are_the_formula(model):
    run = context(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    found = projected_gradients(run, 1e-3, None)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found == pytest.approx(naive_gradients(run, 1e-3))
    assert found == projected_gradients(run, 1e-3, None)
    assert found != projected_gradients(replace(run, seed=1), 1e-3, None)


def test_they_are_near_the_gradient_along_the_noise():
    """A quadratic loss: what differs is linear in eps, and the rest cancels."""
    values = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    weight = Weight("w", "text", 0, values, (Owner("layer", "text"),), ("layer.weight",))
    noise = normal_noise(values, 3)
    losses = []
    with moved(weight) as move:
        for step in (1e-3, -1e-3):
            move(noise, step)
            losses.append(float(values.detach().double().square().sum()))

    slope = float((2 * values.detach().double() * noise.double()).sum())
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_put_back_bit_by_bit_after_an_error_too(dtype):
    """Quirk ecoflap-E2."""
    model = losing_toy().to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    class Failing(LosingAdapter):
        def losses(self, *args, **options):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return super().losses(*args, **options)

    adapter = Failing()
    run = Context(model, adapter, WeightMap.of(model, adapter), batches=_in(BATCHES, dtype))
    with pytest.raises(KeyboardInterrupt):
        projected_gradients(run, 1e-3, None)

    assert len(calls) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _in(batches, dtype):
    return [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches]


def test_a_loss_that_is_not_finite_is_named_or_left_out(model):
    batches = [spoilt(BATCHES[0]), *BATCHES[1:]]
    with pytest.raises(NonFiniteError, match=r"batch 0 .* is moved"):
        toy_pruned(model, method="omp", allocation="ecoflap", batches=batches)

    with_one_less = toy_pruned(
        model, method="omp", allocation="ecoflap", batches=batches, skip_nonfinite=True
    )
    assert with_one_less.removed == int(0.6 * WeightMap.of(model, LosingAdapter()).numel)
    with pytest.raises(NonFiniteError, match="all batches"):
        toy_pruned(
            model, method="omp", allocation="ecoflap", batches=batches[:1], skip_nonfinite=True
        )


def test_an_output_that_is_not_finite_is_named_or_left_out(model, caplog):
    batches = [spoilt(BATCHES[0]), *BATCHES[1:]]
    with pytest.raises(NonFiniteError, match=r"the output of .* in batch 0.*--skip-nonfinite"):
        toy_pruned(model, method="omp", allocation="das", batches=batches)

    found = measure_similarities(context(model, batches, skip_nonfinite=True))
    assert found == measure_similarities(context(model, BATCHES[1:]))
    assert "left batch 0 out: the output of" in caplog.text
    with pytest.raises(NonFiniteError, match="in all batches"):
        measure_similarities(context(model, batches[:1], skip_nonfinite=True))


def test_few_batches_are_read(model):
    found = Ecoflap(batches=2).measure(context(model))

    assert found.found == projected_gradients(context(model), 1e-3, 2)
    assert found.forwards({}, 4) == 0
    weights = WeightMap.of(model, LosingAdapter())
    assert Ecoflap(batches=2).forwards(weights, 4) == 2 * len(weights) * 2
    assert Measuring(Composition("omp", Magnitude(), Ecoflap())).cost(
        context(model)
    ).forward_batches == 8 * len(weights)


def test_what_is_measured_decides_and_statistics_serve_again(model):
    method = resolve_method("wanda", "das", [0.6], {})
    assert isinstance(method, Measuring)
    measured = method.ready(context(model))
    assert isinstance(measured, Composition)
    assert measured.allocation.found == measure_similarities(context(model))

    expected = toy_pruned(model, method="wanda", allocation="das")

    assert expected == toy_pruned(model, method=measured)
    statistics = gather(model, BATCHES, adapter=LosingAdapter(), method="wanda")
    assert expected == toy_pruned(model, method="wanda", allocation="das", statistics=statistics)
    assert expected != toy_pruned(model, method="wanda")
    record = expected.manifest.parameters
    assert record["allocation"] == "das"
    assert len(record["measured"]) == 16


def test_owl_reads_the_scores_of_wanda_whatever_the_method_ranks_by(model):
    omp = make_method(registry(), "omp").with_allocation(Owl())
    wanda = make_method(registry(), "wanda").with_allocation(Owl())

    found, like_wanda = (toy_pruned(model, method=each) for each in (omp, wanda))

    counts = {name: int((~found[name]).sum()) for name in found}
    assert counts == {name: int((~like_wanda[name]).sum()) for name in like_wanda}
    for name, weight in WeightMap.of(model, LosingAdapter()).items():
        sizes = weight.matrix.abs()[found[name].view(weight.rows_and_columns)]
        rest = weight.matrix.abs()[~found[name].view(weight.rows_and_columns)]
        assert not len(rest) or not len(sizes) or sizes.min() >= rest.max()


def test_methods_that_gather_no_such_score_say_so(model):
    for method in ("tamt", "taylor"):
        with pytest.raises(UnsupportedError, match="reads scores of 'wanda', which method"):
            toy_pruned(model, method=method, allocation="owl")
    with pytest.raises(UnsupportedError, match="gradual pruning has only"):
        vlp.GradualPruning(model, sparsity=0.5, steps=10, allocation="owl", adapter=LosingAdapter())


def test_what_walks_on_its_own_is_made_of_no_statistics(qwen):
    """Masks of ATV's tokens must not be those of Wanda by mistake."""
    options = {"adapter": qwen.adapter, "method": "atv"}
    with pytest.raises(UnsupportedError, match="no statistics that one pass"):
        gather(qwen.model, qwen.batches, **options)
    statistics = gather(qwen.model, qwen.batches, adapter=qwen.adapter, method="wanda")
    with pytest.raises(UnsupportedError, match="no statistics that one pass"):
        vlp.split_half(qwen.model, statistics, sparsity=0.5, **options)
    with pytest.raises(StatisticsError, match="cannot use"):
        prune(qwen.model, sparsity=0.5, statistics=statistics, **options)


def test_several_processes_measure_and_select_as_one(tmp_path):
    run_two_processes(Path(__file__).with_name("measuring_in_processes.py"), tmp_path)

    for run in RUNS:
        one = masks_of(run)
        two = [vlp.Masks.load(tmp_path / f"{run}-{rank}.safetensors") for rank in (0, 1)]
        assert two[0] == two[1]
        different = sum(int((one[name] != two[0][name]).sum()) for name in one)
        assert different <= 1e-3 * one.total, run
        if run in ("das", "ecoflap"):
            measured = [each.manifest.parameters["measured"] for each in (one, *two)]
            assert len(set(measured)) == 1
