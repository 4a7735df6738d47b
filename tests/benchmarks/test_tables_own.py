"""Tables of one's own checkpoints and data: the file that names them, its cells, its pages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.demo.build_data import build as build_pretraining
from benchmarks.papers import __main__ as command
from benchmarks.papers import cell as cell_module
from benchmarks.papers.budgets import tuning_of, way_of
from benchmarks.papers.catalogue import TABLES, Table, grid
from benchmarks.papers.cell import Cell
from benchmarks.papers.downstream.build import build as build_downstream
from benchmarks.papers.downstream.vit import MODEL as VIT
from benchmarks.papers.experiments.lambda_grid import POWERS
from benchmarks.papers.own import OwnWorld
from benchmarks.papers.rendering import render
from benchmarks.papers.ways import VIT_WAYS, WAYS, Way
from vlp_plugins.dimension.profile import IdProfile
from vlp_plugins.runtime.errors import DataError, RecipeError, VlpError
from vlp_plugins.tasks.finetuning.finetune import finetune

PAPER = {"models": {"blip": "b", "xvlm": "x"}, "calibration": "c", "data": {"retrieval": "r"}}
QUICK = {"steps": 2, "batch_size": 4, "measured": 4}


def written(folder: Path, content: Mapping[str, Any]) -> Path:
    """The file of a world."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def read(folder: Path, **changes: Any) -> OwnWorld:
    return OwnWorld.read(written(folder, {**PAPER, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a few images, as somebody might have them."""
    made = tmp_path_factory.mktemp("own")
    sizes = {"train": 10, "dev": 4, "test": 4}
    build_downstream(made / "down", parts=("scenes", "digits", "models"), sizes=sizes)
    build_pretraining(made / "pairs", calibration=24, downstream=0, test=0)
    written(
        made,
        {
            "models": {name: str(made / "down" / "models" / name) for name in ("blip", "xvlm")}
            | {"vit": str(VIT)},
            "calibration": str(made / "pairs" / "calibration"),
            "images": str(made / "pairs" / "calibration"),
            "data": dict.fromkeys(("retrieval", "captioning", "vqa"), str(made / "down/scenes"))
            | {"cifar10": str(made / "down/digits")},
            "device": "cpu",
            "accumulate": 2,
            "prune": {"batches": 6, "batch_size": 4},
            "finetune": {
                "retrieval": {**QUICK, "rerank": 2},
                "captioning": QUICK,
                "vqa": QUICK,
                "cifar10": QUICK,
            },
        },
    )
    return made


def test_methods_have_the_budgets_of_the_paper() -> None:
    def way(name: str) -> tuple[dict[str, Any], int, int]:
        made = way_of("blip", WAYS[name], {})
        return dict(made.parameters), made.samples, made.batch_size

    assert way("multiflow") == ({}, 3000 * 64, 64)
    assert way("itersnip")[0] == {"rounds": 60, "batches_per_round": 50, "schedule": "exp"}
    assert way("chita") == ({"lambda": "auto"}, 500 * 64, 64)
    assert way("tamt")[0] == way("lamp-tamt")[0] == way("taylor")[0] == {"steps": 3000}
    assert way("multiflow-edges")[0] == {"nodes": False}
    assert way_of("xvlm", WAYS["snip-64-pairs"], {}) == WAYS["snip-64-pairs"]
    assert way_of("xvlm", WAYS["chita-64-pairs"], {}).parameters == {"lambda": "auto"}


def test_dimensions_are_measured_with_fewer_samples() -> None:
    made = way_of("blip", WAYS["id-factor-chita"], {})
    assert (made.parameters, made.samples, made.dimensions) == ({"lambda": "auto"}, 32000, 2000)
    assert way_of("xvlm", WAYS["id-budgets-omp"], {"batches": 4}).dimensions == 4 * 64
    assert way_of("xvlm", WAYS["omp"], {}).dimensions == 0


def test_a_vision_transformer_sees_as_many_images_as_in_the_paper() -> None:
    made = [way_of("vit", way, {}) for way in VIT_WAYS]
    assert [(way.name, way.samples) for way in made[1:]] == [
        ("tamt", 64000),
        ("multiflow-128-images", 128),
        ("multiflow-64000-images", 64000),
    ]
    tuning = tuning_of("vit", "cifar10", {})
    assert (tuning.epochs, tuning.batch_size, tuning.learning_rate) == (10, 32, 1e-5)


def test_fewer_batches_are_shared_out_among_the_rounds() -> None:
    made = way_of("blip", WAYS["chita++"], {"batches": 240, "batch_size": 16})
    assert way_of("blip", WAYS["chita"], {"batches": 900}).samples == 500 * 64

    assert made.parameters == {"lambda": "auto", "rounds": 60, "rows": 4, "schedule": "exp"}
    assert made.samples == 240 * 16


def test_fine_tuning_is_that_of_table_11_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    world = read(tmp_path, finetune={"retrieval": {"epochs": 1, "learning_rate": 2e-5}})

    tuning = world.tuning("xvlm", "retrieval")

    assert (tuning.batch_size, tuning.betas, tuning.schedule) == (128, (0.9, 0.98), "linear")
    assert (tuning.epochs, tuning.learning_rate, tuning.rerank) == (1, 2e-5, 256)
    settings = tuning.settings(1)
    assert (settings.epochs, settings.steps) == (1, None)


def test_only_what_there_is_data_for_is_run(tmp_path: Path) -> None:
    cells = read(tmp_path).cells(TABLES["main"].cells(1))

    assert {(cell.model, cell.task) for cell in cells} == {
        ("blip", "retrieval"),
        ("xvlm", "retrieval"),
    }
    identity = cells[0].identity()
    assert (identity["checkpoint"], identity["calibration"], identity["data"]) == ("b", "c", "r")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {"blip": "b", "clip": "c"}}, "own.yaml, line .: unknown key 'clip'"),
        ({"finetune": {"retrieval": {"epoch": 1}}}, "did you mean 'epochs'"),
        ({"data": {}}, "no data given"),
        ({"models": {"vit": "v"}}, "no images given"),
        ({"calibration": None}, "no calibration given"),
        ({"prune": {"batches": 0}}, "a whole number from 1 on"),
        ({"memory_budget": "much"}, "memory_budget"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        read(tmp_path, **changes)


def test_a_step_falls_into_equal_parts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="128 rows cannot be .* accumulate 6 batches each"):
        read(tmp_path, accumulate=6).tuning("blip", "retrieval")


def test_an_interrupted_cell_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = OwnWorld.read(folder / "own.yaml")
    (cell,) = world.cells(grid([None], 1, models=["blip"], tasks=["captioning"]))
    whole = cell.path(tmp_path)

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(cell_module, "measured", stopped)
        with pytest.raises(KeyboardInterrupt):
            cell.run(world, tmp_path)
    assert (whole.with_suffix(".work") / "losses.jsonl").exists()
    assert not whole.exists()

    cell.run(world, tmp_path)

    assert whole.exists()
    assert not whole.with_suffix(".work").exists()


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_a_cell_prunes_fine_tunes_and_measures(folder: Path, tmp_path: Path, task: str) -> None:
    world = OwnWorld.read(folder / "own.yaml")
    world.make()
    ways = [WAYS["multiflow"]]
    (cell,) = world.cells(grid(ways, 1, models=["blip"], tasks=[task], sparsities=[0.75]))

    cell.run(world, tmp_path)

    content = cell.content(tmp_path)
    assert content is not None
    assert content["pruned"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert content["metrics"]
    assert content["tuning"]["steps"] == 2
    assert list(world.masks.glob("blip-multiflow-0.75-*.safetensors"))


@pytest.mark.parametrize("way", VIT_WAYS, ids=lambda way: way.name)
def test_a_vision_transformer_learns_the_paper_s_sets(
    folder: Path, tmp_path: Path, way: Way
) -> None:
    world = OwnWorld.read(folder / "own.yaml")
    world.make()
    (cell,) = world.cells(grid([way], 1, models=["vit"], tasks=["digits"], sparsities=[0.75]))

    cell.run(world, tmp_path)

    content = cell.content(tmp_path)
    assert content is not None
    assert (content["task"], content["calibration"]) == ("cifar10", world.images)
    assert content["pruned"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert 0 <= content["metrics"]["top1"] <= 100


def test_all_methods_share_the_dimensions(folder: Path, tmp_path: Path) -> None:
    world = OwnWorld.read(folder / "own.yaml")
    world.make()
    ways = [WAYS["id-factor-omp"], WAYS["id-budgets-multiflow"]]
    before = set(world.masks.glob("*-dimensions-*"))

    for cell in world.cells(grid(ways, 1, models=["xvlm"], tasks=["captioning"], sparsities=[0.9])):
        cell.run(world, tmp_path)
        assert cell.content(tmp_path) is not None

    (profile,) = set(world.masks.glob("*-dimensions-*")) - before
    assert IdProfile.load(profile).settings["samples"] == 24


def test_table_10_is_its_grid_after_one_epoch(folder: Path, tmp_path: Path) -> None:
    world = read(tmp_path)
    table = world.table(TABLES["table10"])
    cells = table.of(None)
    assert table.run is None
    assert {cell.tuning.epochs for cell in cells} == {1}
    assert {(cell.model, cell.split, cell.sparsity) for cell in cells} == {
        (model, "dev", 0.63) for model in ("blip", "xvlm")
    }
    ways = [cell.way for cell in cells if cell.model == "blip" and cell.way]
    assert [way.parameters["lambda"] for way in ways] == [*POWERS, *POWERS]
    assert "search" not in render(table, None, tmp_path / "cells", tmp_path)


def test_the_page_names_the_checkpoints(folder: Path, tmp_path: Path) -> None:
    world = OwnWorld.read(folder / "own.yaml")
    table = Table("small", "Small", lambda seed: [Cell("blip", "retrieval", None, 0.0, seed)])

    page = render(world.table(table), None, tmp_path / "cells", tmp_path)

    assert f"BLIP is {folder}/down/models/blip." in page
    assert "2 steps of 4 at 1e-05" in page
    assert "small --world FILE.yaml --cells FOLDER --render" in page
    assert "Scaled down" not in page


def test_the_command_asks_for_another_place_and_for_tables_that_can_be(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*words: str) -> tuple[Any, str, str]:
        arguments = ["tables", *words, "--world", str(folder / "own.yaml")]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            command.main()
        return (end.value.code, *capsys.readouterr())

    place = ("--cells", str(tmp_path / "cells"))
    assert said("main", "--list")[0] == 2
    assert "give --cells FOLDER" in said("main", "--list")[2]
    assert "table7 is not of models of one's own" in said("table7", *place)[2]
    assert "table7" not in said("--list", *place)[1]
    listed = said("table6", "--list", *place)[1]
    assert "missing vit/cifar10/multiflow-24-images" in listed
    assert "seed2" not in listed
    assert "missing" in said("table6", "--render", *place)[1]
    code, out, _ = said("table5", "--list", *place)
    assert not code
    assert out.splitlines()[0].startswith("missing blip/retrieval/")


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("models", "blip", "nowhere"),
        ("data", "vqa", "nowhere"),
        ("data", "cifar10", "nowhere"),
        ("images", None, "nowhere"),
    ],
)
def test_what_cannot_be_opened_shows_before_anything_is_run(
    folder: Path, tmp_path: Path, section: str, name: str | None, said: str
) -> None:
    content = yaml.safe_load((folder / "own.yaml").read_text())
    if name is None:
        content[section] = str(tmp_path / "nowhere")
    else:
        content[section][name] = str(tmp_path / "nowhere")
    world = OwnWorld.read(written(tmp_path, content))
    with pytest.raises(VlpError, match=said):
        world.make()
    assert not world.masks.exists()


def test_a_model_of_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((folder / "own.yaml").read_text())
    content["models"]["blip"] = content["models"]["xvlm"]
    with pytest.raises(RecipeError, match="is a model of xvlm, not of blip"):
        OwnWorld.read(written(tmp_path, content)).make()


def test_another_checkpoint_does_not_go_on_from_an_interrupted_cell(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((folder / "own.yaml").read_text())
    shutil.copytree(VIT, tmp_path / "other")
    other = {**content, "models": {"vit": str(tmp_path / "other")}}

    def interrupted(*arguments: Any, **options: Any) -> Any:
        def stop(done: int, of: int) -> None:
            if done == of:
                raise KeyboardInterrupt

        return finetune(*arguments, **options, checkpoint_every=1, progress=stop)

    def cell_of(world: OwnWorld) -> Cell:
        return world.cells(grid([None], 1, models=["vit"], tasks=["digits"]))[0]

    world = OwnWorld.read(written(tmp_path, content))
    with monkeypatch.context() as broken:
        broken.setattr("benchmarks.papers.tuning.finetune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cell_of(world).run(world, tmp_path)

    changed = OwnWorld.read(written(tmp_path, other))
    with pytest.raises(DataError, match=f"its cell checkpoint is '{VIT}'.*or delete"):
        cell_of(changed).run(changed, tmp_path)
    cell_of(world).run(world, tmp_path)
    assert cell_of(world).content(tmp_path) is not None


def test_a_table_without_its_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, PAPER)
    words = ["tables", "table6", "--world", str(file), "--cells", str(tmp_path / "cells")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        command.main()
    assert "has no model with data that table6 is about" in capsys.readouterr().err
