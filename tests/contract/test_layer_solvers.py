"""What every registered solver has to keep, ours and any outsider's that is installed."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from drawn_layers import drawn_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp_plugins.calibration.block_gradients import GradientRows
from vlp_plugins.methods.reconstruction.layer import Largest, Layer, Solver, solved
from vlp_plugins.methods.resolve import make_method
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.registry import make
from vlp_plugins.pruning import prune
from vlp_plugins.runtime.errors import NonFiniteError, UnsupportedError
from vlp_plugins.scoring.score import Scorer
from vlp_plugins.scoring.selection import PatternSelection, RowSelection

SOLVERS = registry().names("solvers")


def named(name, **parameters):
    return make(registry().find(name, "solvers"), parameters, Solver)


def rule_of(kind, share, shape):
    rows, columns = shape
    return {
        "tensor": Largest(int(share * rows * columns)),
        "row": RowSelection(int(share * columns), rows, extra=min(3, int(share * columns))),
        "pattern": PatternSelection(2, 4, rows * columns),
    }[kind]


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_a_method_of_its_name(name):
    solver = named(name)
    assert solver.name == name
    assert type(solver).__doc__
    method = make_method(registry(), name)
    assert method.name == name
    assert method.solver == solver
    assert method.changes_weights
    assert name in registry().method_names()


@pytest.mark.parametrize("name", SOLVERS)
@given(
    seed=st.integers(0, 50),
    share=st.floats(0, 0.95),
    kind=st.sampled_from(["tensor", "row", "pattern"]),
)
@settings(max_examples=15, deadline=None)
def test_exactly_so_many_elements_stay_under_every_rule(name, seed, share, kind):
    layer = drawn_layer(seed)
    selection = rule_of(kind, share, layer.weight.shape)
    ((support, values),) = solved(named(name), layer, layer.weight.abs(), [selection])
    assert int((~support).sum()) == selection.remove
    assert not values[~support].any()
    if kind == "pattern":
        assert support.view(-1, 4).sum(1).tolist() == [2] * (support.numel() // 4)
    if kind == "row":
        assert set((~support).sum(1).tolist()) <= {selection.per_row, selection.per_row + 1}


@pytest.mark.parametrize("name", SOLVERS)
def test_selections_do_not_depend_on_each_other_and_nothing_is_changed(name):
    layer, random = drawn_layer(1), torch.get_rng_state()
    before = layer.weight.clone(), layer.gram.clone()
    rules = [Largest(100), Largest(250)]
    both = solved(named(name), layer, layer.weight.abs(), rules)
    for rule, (support, values) in zip(rules, both, strict=True):
        ((alone, its),) = solved(named(name), layer, layer.weight.abs(), [rule])
        assert torch.equal(alone, support)
        assert torch.equal(its[alone], values[support])
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.gram, before[1])
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_published_variant_prunes_or_there_is_none(name):
    layer = drawn_layer(2)
    published = named(name).as_published()
    if published is None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        with pytest.raises(UnsupportedError, match="leave out variant='published'"):
            prune(
                model, [torch.randn(8, 4)], method=name, sparsity=0.5,
                adapter=ModuleAdapter(model), variant="published",
            )  # fmt: skip
        return
    ((support, _),) = solved(published, layer, layer.weight, [Largest(192)], exact=False)
    assert 192 <= int((~support).sum()) <= 192 + 4


@pytest.mark.parametrize("name", SOLVERS)
def test_what_it_records_makes_it_again(name):
    record = json.loads(json.dumps(named(name).record()))
    assert named(name, **record) == named(name)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("form", ["name", "instance"])
def test_a_model_is_pruned_and_left_as_it_was(name, form):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = prune(
        model, [torch.randn(32, 8)], sparsity=0.5, adapter=ModuleAdapter(model),
        method=name if form == "name" else named(name),
    )  # fmt: skip
    assert masks.removed == (8 * 16 + 16 * 4) // 2
    assert masks.manifest.method == name
    assert masks.manifest.parameters.items() >= named(name).record().items()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Answering(Solver):
    """Returns what a function makes of layer and selections."""

    name = "answering"
    internal = ("answer",)

    def __init__(self, answer):
        self.answer = answer

    def solve(self, layer, scores, selections):
        return self.answer(layer, selections)


def mask(layer, rule):
    return rule.mask(layer.weight.abs())


WRONG = {
    "nothing": (lambda layer, rules: None, UnsupportedError, "returned NoneType for 1 selections"),
    "too few": (lambda layer, rules: [], UnsupportedError, "returned list for 1 selections"),
    "no pair": (
        lambda layer, rules: [mask(layer, rules[0])],
        UnsupportedError,
        r"returned bool \[12, 32\]; a reconstruction is a support, bool \[12, 32\], and values",
    ),
    "no support": (
        lambda layer, rules: [(layer.weight, layer.weight)],
        UnsupportedError,
        r"returned tuple of float32 \[12, 32\], float32 \[12, 32\]; a reconstruction",
    ),
    "too many": (
        lambda layer, rules: [(layer.weight < 9e9, layer.weight)],
        UnsupportedError,
        "keeps 384 of 384 elements, but 192 were asked for",
    ),
    "not finite": (
        lambda layer, rules: [(mask(layer, rules[0]), layer.weight / 0)],
        NonFiniteError,
        "'answering' gives NaN or infinite values",
    ),
    "not finite in float32": (
        lambda layer, rules: [
            (mask(layer, rules[0]), torch.full((12, 32), 1e200, dtype=torch.float64))
        ],
        NonFiniteError,
        "'answering' gives NaN or infinite values, in float32",
    ),
    "an error": (
        lambda layer, rules: {}["singular"],
        UnsupportedError,
        "solver 'answering' raises KeyError: 'singular'",
    ),
    "exit": (lambda layer, rules: exit(0), UnsupportedError, "solver 'answering' calls sys.exit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_that_is_none_is_refused(case):
    answer, error, message = WRONG[case]
    layer = drawn_layer(3)
    with pytest.raises(error, match=message):
        solved(Answering(answer), layer, layer.weight, [Largest(192)])


GIVEN = {
    "weight": "the weight",
    "gram": "the Gram matrix",
    "rows": "the gradients",
    "scores": "the scores",
}
WRITES = {
    "in place": lambda tensor: tensor.zero_(),
    "behind autograd": lambda tensor: tensor.data.zero_(),
    "by NumPy": lambda tensor: tensor.numpy().fill(0),
}


class Writing(Solver):
    """Changes one of the tensors that it is given."""

    name = "writing"

    def __init__(self, what, write, *, gradients=None, ends=False):
        self._what, self._write, self._gradients, self._ends = what, write, gradients, ends

    @property
    def gradients(self):
        return self._gradients

    def solve(self, layer, scores, selections):
        found = [(selection.mask(scores), layer.weight.clone()) for selection in selections]
        WRITES[self._write](scores if self._what == "scores" else getattr(layer, self._what))
        if self._ends:
            raise ValueError("singular")
        return found


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("what", GIVEN)
def test_a_solver_that_writes_into_what_it_is_given_is_refused(what, write):
    plain = drawn_layer(3)
    layer = Layer(plain.weight, plain.gram, torch.rand(2, *plain.weight.shape) + 1)
    with pytest.raises(UnsupportedError, match=f"'writing' changes {GIVEN[what]} that it is given"):
        solved(Writing(what, write), layer, layer.weight.abs(), [Largest(192)])


class Bare(Scorer):
    """The weights as they are, in the memory of the model."""

    name = "bare"

    def score(self, weight, evidence):
        return weight


class WritingBare(Writing):
    name = "writing"
    score = Bare()


@pytest.mark.parametrize("walk", ["model", "blocks"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("what", ["weight", "scores"])
def test_the_model_is_as_it_was_whatever_a_solver_writes(walk, write, ends, what):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = "'writing' raises ValueError: singular" if ends else "'writing' changes the"
    with pytest.raises(UnsupportedError, match=f"^weight '0.*': solver {text}"):
        prune(
            model, [torch.randn(32, 8)], sparsity=0.5, adapter=ModuleAdapter(model), walk=walk,
            method=WritingBare(what, write, ends=ends), allocation="layer",
        )  # fmt: skip
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def loss(model, batch):
    return model(batch).square().mean()


def test_gradients_that_all_sparsities_read_are_not_written_into():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    with pytest.raises(UnsupportedError, match="changes the gradients that it is given"):
        prune(
            model, [torch.randn(32, 8)], sparsity=[0.5, 0.6],
            adapter=ModuleAdapter(model, loss=loss),
            method=Writing("rows", "in place", gradients=GradientRows()),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0 batches; give a whole number from 1 on"),
        ({"count": -1}, "count=-1 batches"),
        ({"count": True}, "count=True batches"),
        ({"count": 2.0}, r"count=2\.0 batches"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8; give a floating one"),
        ({"dtype": "float32"}, "dtype='float32'; give a floating one"),
    ],
)
def test_gradients_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UnsupportedError, match=message):
        GradientRows(**options)


def prune_a_layer(solver, **options):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    adapter = ModuleAdapter(model, loss=loss)
    return prune(
        model, [torch.randn(9, 8)], method=solver, sparsity=0.5, adapter=adapter, **options
    )


def test_what_is_no_gradient_rows_is_refused():
    with pytest.raises(UnsupportedError, match=r"'writing' is 'yes'; it must be GradientRows\(\)"):
        prune_a_layer(Writing("rows", "in place", gradients="yes"))


class Published(Solver):
    """Another solver is its published variant."""

    name = "published"

    def __init__(self, published, gradients=None):
        self._published, self._gradients = published, gradients
        self.seen = []

    internal = ("seen",)

    @property
    def gradients(self):
        return self._gradients

    def as_published(self):
        return self._published

    def solve(self, layer, scores, selections):
        self.seen.append(None if layer.rows is None else len(layer.rows))
        return [(selection.mask(scores), layer.weight) for selection in selections]


@pytest.mark.parametrize("asks", ["published", "default"])
def test_gradients_are_those_of_the_variant_that_runs(asks):
    rows = GradientRows()
    published = Published(None, rows if asks == "published" else None)
    default = Published(published, rows if asks == "default" else None)
    masks = prune_a_layer(default, variant="published")
    assert published.seen == [1 if asks == "published" else None]
    assert ("walk" in masks.manifest.parameters) == (asks == "published")
    prune_a_layer(default)
    assert default.seen == [1 if asks == "default" else None]


def test_a_published_variant_that_is_no_solver_is_refused():
    with pytest.raises(UnsupportedError, match="as_published of solver 'published' returned 3"):
        prune_a_layer(Published(3), variant="published")


def test_a_support_that_breaks_its_rule_is_refused():
    layer = drawn_layer(3)
    rule = RowSelection(16, 12)
    answer = Answering(lambda layer, rules: [(mask(layer, Largest(192)), layer.weight)])
    with pytest.raises(UnsupportedError, match=r"not by the rule of RowSelection\(per_row=16"):
        solved(answer, layer, layer.weight, [rule])


def test_an_error_of_a_solver_names_the_weight():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    answer = Answering(lambda layer, rules: None)
    with pytest.raises(UnsupportedError, match=r"weight '0': solver 'answering' returned NoneType"):
        prune(model, [torch.randn(9, 8)], method=answer, sparsity=0.5, adapter=ModuleAdapter(model))


def test_a_layer_without_numbers_is_refused_before_any_solver_sees_it():
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Layer(torch.ones(2, 2), torch.full((2, 2), float("nan")))


class Nameless(Solver):
    def solve(self, layer, scores, selections):
        return []


def test_a_solver_without_a_name_is_refused():
    with pytest.raises(UnsupportedError, match="solver Nameless has no name; give its class one"):
        prune_a_layer(Nameless())


def test_what_a_mask_file_cannot_keep_is_refused():
    answer = Answering(None)
    answer.scale = torch.ones(3)
    with pytest.raises(UnsupportedError, match=r"'answering' records scale=tensor.*\.internal"):
        prune_a_layer(answer)


def test_a_dataclass_with_slots_records_its_parameters():
    @dataclass(frozen=True, slots=True)
    class Slots(Solver):
        name: ClassVar[str] = "slots"
        power: int = 3

        def solve(self, layer, scores, selections):
            return [(selection.mask(scores), layer.weight) for selection in selections]

    assert prune_a_layer(Slots()).manifest.parameters["power"] == 3
