"""CHITA block by block: the joint problem of a layer against plain loops, and its gradients."""

from dataclasses import replace
from functools import partial

import chat_models
import pytest
import torch
from chat_models import qwen_batch
from drawn_layers import drawn_layer
from torch.nn import functional as F

import vlp_plugins as vlp
from benchmarks.memory import peak_memory
from vlp_plugins.calibration.block_gradients import GradientRows, layer_bytes
from vlp_plugins.calibration.loss import LossProbe
from vlp_plugins.calibration.paused import HiddenStates
from vlp_plugins.calibration.visits import weights_by_block
from vlp_plugins.methods.chita.layerwise import Joint, LayerChita
from vlp_plugins.methods.chita.method import Chita, chita
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.reconstruction.alps import Alps
from vlp_plugins.methods.reconstruction.layer import Largest, Layer, Solver, solved
from vlp_plugins.methods.resolve import resolve_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.scoring.allocation import GlobalAllocation, ModalityAllocation


def layer_with_rows(seed=0, rows=5):
    plain = drawn_layer(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    # Some outputs matter to the loss more than others, which the Gram matrix cannot say.
    sizes = torch.linspace(0.1, 3, len(plain.weight))[:, None]
    gradients = torch.randn(rows, *plain.weight.shape, generator=generator) * sizes
    return Layer(plain.weight, plain.gram, gradients)


def forms(layer, weight):
    """M_i of every row in the coordinates of the weights, float64, by a plain loop."""
    gram = layer.gram.double()
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    norms = gram.diagonal().sqrt()
    rows = layer.rows.double()
    mean = torch.stack([(g / norms).square() for g in rows]).sum(0).mean()
    return [
        (1 - weight) * gram + weight / mean * sum(torch.outer(g, g) for g in rows[:, i])
        for i in range(len(layer.weight))
    ]


def objective(layer, values, weight):
    change = (values - layer.weight).double()
    return sum(
        float(row @ form @ row) for row, form in zip(change, forms(layer, weight), strict=True)
    )


def test_products_and_shifted_systems_are_those_of_the_written_matrices():
    layer, rho = layer_with_rows(), 0.3
    joint = LayerChita(gradient_weight=0.6).scaled(layer)
    assert isinstance(joint, Joint)
    values = torch.randn(12, 32, generator=torch.Generator().manual_seed(9))
    solve = joint.shifted(rho)
    solutions = solve(values.clone())
    for i, form in enumerate(forms(layer, 0.6)):
        scaled = form / joint.norms[i].double() / joint.norms[i].double()[:, None]
        torch.testing.assert_close(scaled.diagonal().mean().item(), 1.0, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            joint.product(values)[i], (scaled @ values[i].double()).float(), atol=1e-4, rtol=1e-4
        )
        shifted = scaled + rho * torch.eye(32, dtype=torch.float64)
        exact = torch.linalg.solve(shifted, values[i].double())
        torch.testing.assert_close(solutions[i], exact.float(), atol=1e-4, rtol=1e-4)


def test_equal_rows_of_great_size_are_solved_in_float64():
    layer = layer_with_rows()
    equal = Layer(layer.weight, layer.gram, layer.rows[:1].repeat(6, 1, 1))
    joint = LayerChita(gradient_weight=0.6).scaled(equal)
    large = replace(joint, rows=joint.rows * 3e4, turned=joint.turned * 3e4)
    inner = torch.eye(6) + large.turned @ large.turned.mT
    assert torch.linalg.cholesky_ex(inner).info.any()
    values = torch.randn(12, 32, generator=torch.Generator().manual_seed(9))
    found = large.shifted(1.0)(values.clone())
    # What the rows see of a solution is next to nothing.
    assert float((large.turned / 3e4 @ (found @ large.vectors)[:, :, None]).abs().max()) < 1e-2
    with pytest.raises(UnsupportedError, match="give a smaller gradient_weight"):
        replace(joint, turned=joint.turned * 1e12).shifted(1.0)


def test_a_large_layer_with_gradients_of_its_own_rows_is_solved_at_once(monkeypatch):
    layer, solver = layer_with_rows(), LayerChita(gradient_weight=0.6)
    find = partial(solved, solver, layer, layer.weight, [Largest(200)])
    whole = find()[0]
    monkeypatch.setattr("vlp_plugins.methods.reconstruction.layer._ELEMENTS", 64)
    assert all(map(torch.equal, find()[0], whole))


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_joint_problem_is_solved_better_than_by_what_knows_one_term(share):
    layer = layer_with_rows()
    rule = Largest(int(share * layer.weight.numel()))
    find = partial(solved, layer=layer, scores=layer.weight, selections=[rule])
    support, values = find(LayerChita(gradient_weight=0.6))[0]
    _, plain = find(Alps())[0]
    ours, theirs = (objective(layer, each, 0.6) for each in (values, plain))
    magnitude = rule.mask(layer.weight.abs())
    assert ours < 0.8 * theirs
    assert ours < 0.5 * objective(layer, layer.weight * magnitude, 0.6)
    # and its values are nearly the best on its support
    best = torch.zeros_like(layer.weight, dtype=torch.float64)
    for i, form in enumerate(forms(layer, 0.6)):
        kept = support[i]
        target = (form @ layer.weight[i].double())[kept]
        best[i, kept] = torch.linalg.solve(form[kept][:, kept], target)
    assert ours < 1.1 * objective(layer, best.float(), 0.6)


def test_neither_the_scale_of_gradients_nor_of_inputs_counts():
    layer = layer_with_rows(1)
    solve = partial(LayerChita().solve, scores=layer.weight, selections=[Largest(200)])
    support, values = solve(layer)[0]
    again = solve(Layer(layer.weight, layer.gram * 4096, layer.rows / 1024))[0]
    assert torch.equal(again[0], support)
    torch.testing.assert_close(again[1], values, atol=1e-5, rtol=1e-4)


def test_a_layer_that_the_loss_does_not_depend_on_is_that_of_alps():
    layer = layer_with_rows(2)
    empty = Layer(layer.weight, layer.gram, torch.zeros_like(layer.rows))
    rule = [Largest(200)]
    (ours, values), (theirs, plain) = (
        each.solve(empty, layer.weight, rule)[0] for each in (LayerChita(), Alps())
    )
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(values, plain, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    return chat_models.qwen().eval()


BATCHES = [qwen_batch(0), qwen_batch(1), qwen_batch(2, image=False)]


def one_block(model, rows):
    """The least budget: the rows of the largest block, and what its layers take."""
    adapter = registry().adapter_for(model)
    weights = WeightMap.of(model, adapter)
    blocks = weights_by_block(adapter.blocks(model), weights).values()
    most = max(sum(weights[name].numel for name in names) for names in blocks)
    layer = max(layer_bytes(rows, torch.float32, names, weights) for names in blocks)
    return rows * 4 * most + layer


@pytest.mark.parametrize("grouped", [True, False], ids=["one group", "a block at a time"])
def test_a_solver_gets_the_gradients_of_the_dense_model(qwen, monkeypatch, grouped):
    budget = None if grouped else one_block(qwen, 2)
    adapter = registry().adapter_for(qwen)
    weights = WeightMap.of(qwen, adapter)
    with LossProbe(qwen, adapter, weights).attached() as probe:
        expected = [
            {n: g.view(weights[n].rows_and_columns).clone() for n, g in found.items()}
            for found in (probe.measure(batch, index) for index, batch in enumerate(BATCHES))
        ]
    seen = []
    monkeypatch.setattr(
        LayerChita, "solve",
        lambda self, layer, scores, rules: (
            seen.append(layer) or Alps().solve(layer, scores, rules)
        ),
    )  # fmt: skip
    vlp.prune(
        qwen, BATCHES, method="chita", sparsity=0.5, walk="blocks", rows=2, memory_budget=budget
    )
    assert len(seen) == len(weights)
    for layer in seen:
        name = next(n for n, w in weights.items() if torch.equal(w.matrix, layer.weight))
        wanted = torch.stack([each[name] for each in expected[:2]])
        assert torch.equal(layer.rows, wanted)


def test_groups_of_blocks_change_no_bit_and_the_model_is_as_before(qwen):
    before = {key: value.clone() for key, value in qwen.state_dict().items()}
    flags = [parameter.requires_grad for parameter in qwen.parameters()]
    prune = partial(
        vlp.prune, qwen, BATCHES[1:], method="chita", sparsity=[0.5, 0.7], walk="blocks"
    )
    at_once, one_by_one = prune(), prune(memory_budget=one_block(qwen, 2))
    assert at_once == one_by_one
    assert all(each.new_values for each in at_once)
    assert at_once[0].manifest.parameters["gradient_weight"] == LayerChita().gradient_weight
    assert all(torch.equal(value, before[key]) for key, value in qwen.state_dict().items())
    assert [parameter.requires_grad for parameter in qwen.parameters()] == flags
    assert all(parameter.grad is None for parameter in qwen.parameters())


def test_a_token_selection_and_an_allocation_are_taken_too(qwen):
    masks = vlp.prune(
        qwen, BATCHES, method="chita", sparsity=0.5, tokens="text", allocation="row",
        row_dtype="bfloat16",
    )  # fmt: skip
    assert masks.sparsity == 0.5
    assert masks.manifest.parameters["walk"] == "blocks"
    assert masks.manifest.parameters["allocation"] == "row"


def test_a_plan_counts_passes_for_gradients(qwen):
    adapter = registry().adapter_for(qwen)
    weights = WeightMap.of(qwen, adapter)
    method = resolve_method("chita", None, [0.5], {}, walk="blocks")
    few_bytes = one_block(qwen, 8)
    cost = {
        budget: method.cost(
            Context(
                qwen, adapter, weights, targets=[0.5, 0.7], walk="blocks", limit=8,
                memory_budget=budget,
            )
        )
        for budget in (None, few_bytes)
    }  # fmt: skip
    alps = resolve_method("alps", None, [0.5], {}, walk="blocks").cost(
        Context(qwen, adapter, weights, targets=[0.5, 0.7], walk="blocks", limit=8)
    )
    layer = few_bytes - 8 * 4 * 7680
    assert cost[None].ram_bytes - alps.ram_bytes == 8 * 4 * weights.numel + layer
    assert (cost[None].passes, cost[None].gradient_batches) == (3, 8)
    three = resolve_method("chita", None, [0.5], {"rows": 3}, walk="blocks").cost(
        Context(qwen, adapter, weights, targets=[0.5, 0.7], walk="blocks", limit=8)
    )
    assert (three.passes, three.gradient_batches) == (3, 3)
    few = cost[few_bytes]
    assert few.ram_bytes - alps.ram_bytes == few_bytes
    assert few.gradient_batches == 8 * 2 * 4  # two blocks of the vision tower fit together
    assert "8 passes over the dense model" in few.notes[-1]


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, states):
        for layer in self.layers:
            states = layer(states).relu()
        return states


def towers(**options):
    torch.manual_seed(0)
    model = Towers()
    return model, ModuleAdapter(model, **options)


def loss(model, batch):
    return F.mse_loss(model(batch), torch.ones(len(batch), 6))


def test_a_model_without_a_loss_takes_the_gram_matrix_alone():
    model, adapter = towers()
    prune = partial(
        vlp.prune, model, [torch.rand(8, 6)], sparsity=0.5, walk="blocks", adapter=adapter
    )
    with pytest.raises(UnsupportedError, match=r"loss.*gradient_weight=0"):
        prune(method="chita")
    alone, alps = prune(method="chita", gradient_weight=0), prune(method="alps")
    assert all(torch.equal(alone[name], alps[name]) for name in alps)


def test_a_batch_without_finite_gradients_is_named_or_left_out():
    model, adapter = towers(loss=loss)
    good, bad = torch.rand(8, 6), torch.full((8, 6), 1e30)
    prune = partial(vlp.prune, model, method="chita", sparsity=0.5, walk="blocks", adapter=adapter)
    with pytest.raises(NonFiniteError, match="batch 1"):
        prune([good, bad])
    skipped = prune([good, bad], skip_nonfinite=True)
    alone = prune([good])
    assert all(torch.equal(skipped[name], alone[name]) for name in alone)
    with pytest.raises(NonFiniteError):
        prune([bad, bad], skip_nonfinite=True)


class Loudest(Solver):
    """Keeps what the gradients of the batches are largest for, as an outsider's solver might."""

    name = "loudest"
    gradients = GradientRows(count=2)

    def solve(self, layer, scores, selections):
        sizes = layer.rows.square().sum(0) * layer.weight.square()
        return [(selection.mask(sizes), layer.weight) for selection in selections]


def test_any_solver_may_ask_for_gradients_and_then_walks_by_blocks(qwen):
    prune = partial(vlp.prune, qwen, method=Loudest(), sparsity=0.5)
    assert prune(BATCHES).manifest.parameters["walk"] == "blocks"
    with pytest.raises(UnsupportedError, match=r"'loudest' reads gradients .* leave the walk out"):
        prune(BATCHES, walk="model")


def test_rows_are_at_most_the_batches():
    model, adapter = towers(loss=loss)
    batches = [torch.rand(8, 6), torch.rand(8, 6)]
    prune = partial(
        vlp.prune, model, batches, method="chita", sparsity=0.5, walk="blocks", adapter=adapter
    )
    few, many, one = prune(), prune(rows=9), prune(rows=1)
    assert all(torch.equal(few.new_values[name], many.new_values[name]) for name in few)
    assert not all(torch.equal(few.new_values[name], one.new_values[name]) for name in few)


def test_an_instance_keeps_its_allocation():
    resolve = partial(resolve_method, allocation=None, targets=[0.5], parameters={}, walk="blocks")
    assert resolve(Chita()).allocation.name == "layer"
    assert resolve(Chita(allocation=ModalityAllocation())).allocation.name == "modality"
    assert resolve(Chita(allocation=GlobalAllocation())).allocation.name == "global"
    assert resolve(replace(Chita(), gradient_weight=0.5)).allocation.name == "layer"
    by_blocks = resolve(Chita())
    assert f"is `{by_blocks.allocation.name}` then" in (chita.__doc__ or "")
    assert f"its cost {by_blocks.relative_cost}" in (chita.__doc__ or "")
    with pytest.raises(UnsupportedError, match="factors for the problem of the whole model"):
        resolve(Chita().with_factors({"layers.0": 2.0}))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"row_dtype": "float16"}])
def test_parameters_that_make_no_sense_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(UnsupportedError, match=f"^{name}="):
        LayerChita(**wrong)


@pytest.mark.parametrize(
    ("method", "options", "hint"),
    [
        ("chita", {}, r"take fewer \(rows\), keep them in row_dtype='bfloat16', or give a larger"),
        ("chita", {"row_dtype": "bfloat16"}, r"take fewer \(rows\), or give a larger"),
        (Loudest(), {}, "give fewer batches, or give a larger memory_budget"),
    ],
)
def test_gradients_that_do_not_fit_say_what_their_solver_can_do(method, options, hint):
    model, adapter = towers(loss=loss)
    with pytest.raises(UnsupportedError, match=hint):
        vlp.prune(
            model, [torch.rand(8, 6)], method=method, sparsity=0.5, walk="blocks",
            adapter=adapter, memory_budget=100, **options,
        )  # fmt: skip


def test_batches_wait_with_what_gradients_leave_of_the_budget(qwen, monkeypatch):
    budgets = []
    original = HiddenStates.__init__
    monkeypatch.setattr(
        HiddenStates, "__init__",
        lambda self, budget, folder: budgets.append(budget) or original(self, budget, folder),
    )  # fmt: skip
    budget = one_block(qwen, 2)
    vlp.prune(
        qwen, BATCHES[:2], method="chita", sparsity=0.5, walk="blocks", memory_budget=budget + 7
    )
    assert budgets[-1] == 7
    vlp.prune(qwen, BATCHES[:2], method="wanda", sparsity=0.5, walk="blocks", memory_budget=budget)
    assert budgets[-1] == budget


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_walk_takes_what_its_plan_says(dtype):
    width, number = 256, 64
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(2)])
    adapter = ModuleAdapter(model, loss=lambda module, batch: module(batch).square().mean())
    weights = WeightMap.of(model, adapter)
    batches = [torch.rand(8, width) for _ in range(number)]
    rows = getattr(torch, dtype)
    layer = layer_bytes(number, rows, list(weights), weights)
    budget = number * rows.itemsize * width**2 + layer + 2**20
    options = {"row_dtype": dtype}
    plan = resolve_method("chita", None, [0.5], options, walk="blocks").cost(
        Context(
            model, adapter, weights, targets=[0.5], walk="blocks", limit=number,
            memory_budget=budget,
        )
    )  # fmt: skip
    extras = []
    for _ in range(4):  # the first one loads libraries, and what is free is not given back at once
        with peak_memory() as meter:
            vlp.prune(
                model, batches, method="chita", sparsity=0.5, walk="blocks", adapter=adapter,
                memory_budget=budget, **options,
            )  # fmt: skip
        extras.append(meter.extra)
    assert min(extras) <= 1.15 * plan.ram_bytes, [extra / 2**20 for extra in extras]
