"""`--overwrite` replaces what the same command wrote, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models

FOLDERS = {
    "prune": "prune --model {xvlm} --method omp --sparsity 0.5",
    "id": "id {xvlm} --data {photos} --batch-size 8",
    "sensitivity": "sensitivity {xvlm} --data {photos} --batch-size 8 --pairs 8 --by modality "
    "--sparsity 0.5",
    "evaluate": "evaluate {xvlm} --task retrieval --data {photos}",
    "compare": "compare {xvlm} --data {photos} --methods omp --sparsity 0.5 --batch-size 8 "
    "--batches 1 --limit 8 --task retrieval",
    "finetune": "finetune {xvlm} --task retrieval --data {photos} --batch-size 8 --steps 1",
    "masks apply": "masks apply {masks} {xvlm}",
    "masks apply --sparse": "masks apply {masks} {xvlm} --sparse",
}
FILES = {
    "masks invert": "masks invert {masks}",
    "masks export": "masks export {masks} {xvlm}",
    "masks import": "masks import {published} {xvlm}",
}


@pytest.fixture(scope="module")
def names(tmp_path_factory, vlp, xvlm, pruned) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("overwrite")
    masks, published = pruned / "masks-0.75.safetensors", folder / "published.pth"
    vlp("masks", "export", masks, xvlm, "--out", published)
    photos = tiny_models.save_photos(folder / "photos", 40)
    return {"masks": masks, "published": published, "xvlm": xvlm, "photos": photos}


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("line", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_of_the_same_command_is_replaced(line, names, vlp, tmp_path) -> None:
    out = tmp_path / "out"
    words = [*line.format(**names).split(), "--out", out]
    vlp(*words)
    before = contents(out)
    (out / "stale.json").touch()
    refused = vlp(*words, code=2).stderr
    assert "out exists and is not empty; give another one, or replace it with" in refused
    assert "--overwrite" in refused
    assert (out / "stale.json").exists()

    vlp(*words, "--overwrite")

    assert contents(out) == before
    assert contents(tmp_path) == ["out", *(f"out/{name}" for name in before)]


@pytest.mark.parametrize("line", FOLDERS.values(), ids=FOLDERS)
def test_no_other_folder_is_replaced(line, names, vlp, tmp_path) -> None:
    """Neither one of the user nor one of another command."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    for name in ("recipe.yaml", "evaluation.json", "id-profile.json", "config.json"):
        (mine / name).write_text("method: omp\n")
    command = "evaluate" if line.startswith("prune") else "prune"
    vlp(*FOLDERS[command].format(**names).split(), "--out", other)
    for folder in (mine, other):
        before = contents(folder)
        words = [*line.format(**names).split(), "--overwrite", "--out", folder]
        assert "not one to be overwritten; give another one" in vlp(*words, code=2).stderr
        assert contents(folder) == before


def test_nothing_that_the_run_reads_is_deleted(names, vlp, tmp_path) -> None:
    """Neither given on the command line nor in a recipe; the recipe itself was read before."""
    out = tmp_path / "out"
    words = [*FOLDERS["prune"].format(**names).split(), "--save-model", "--out", out]
    vlp(*words)
    model, before = out / "model-0.5", contents(out)
    lines = [
        ("prune", "--model", model, "--method", "omp", "--sparsity", "0.6"),
        ("compare", names["xvlm"], "--data", out, "--methods", "omp", "--sparsity", "0.5"),
        ("masks", "apply", out / "masks-0.5.safetensors", names["xvlm"]),
    ]
    for line in lines:
        said = vlp(*line, "--out", out, "--overwrite", code=2).stderr
        assert "is read by this run and lies in" in said
    recipe = tmp_path / "recipe.yaml"
    text = (out / "recipe.yaml").read_text()
    recipe.write_text(text.replace(f"model: {names['xvlm']}", f"model: {model}"))
    assert "is read by this run" in vlp("prune", recipe, "--overwrite", code=2).stderr
    assert contents(out) == before
    vlp("prune", out / "recipe.yaml", "--overwrite")
    assert contents(out) == before


@pytest.mark.parametrize("name", ["photos/1.png", ".git/config", "notes.txt"])
def test_what_no_command_writes_is_never_deleted(name, names, vlp, tmp_path) -> None:
    """A recipe that was copied next to the data makes its folder no folder of results."""
    out = tmp_path / "out"
    words = [*FOLDERS["prune"].format(**names).split(), "--out", out]
    vlp(*words)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
    before = contents(out)
    refused = vlp(*words, "--overwrite", code=2).stderr
    assert f"holds {name.split('/')[0]}" in refused
    assert contents(out) == before


def test_a_folder_with_a_recipe_of_init_is_not_replaced(xvlm, vlp, tmp_path) -> None:
    """It names a module of ours in the help of a setting, but holds what the user has."""
    recipe = tmp_path / "recipe.yaml"
    vlp("init", "--model", xvlm, "--method", "chita++", "--out", recipe)
    assert "vlp_plugins" in recipe.read_text()
    words = ("prune", recipe, "--method", "omp", "--out", tmp_path, "--overwrite")
    assert "not one to be overwritten" in vlp(*words, code=2).stderr
    assert contents(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize("line", FILES.values(), ids=FILES)
def test_a_file_is_replaced(line, names, vlp, tmp_path) -> None:
    out = tmp_path / ("out.pth" if "export" in line else "out.safetensors")
    out.write_text("old")
    words = [*line.format(**names).split(), "--out", out]
    assert "--overwrite" in vlp(*words, code=2).stderr
    assert out.read_text() == "old"
    vlp(*words, "--overwrite")
    assert out.read_bytes() != b"old"
    assert contents(tmp_path) == [out.name]


def test_what_is_interrupted_resumes_with_it(names, vlp, tmp_path, monkeypatch) -> None:
    """The folder of before is there until the new one is whole, so the line must say it again."""
    out = tmp_path / "out"
    words = ["prune", "--model", names["xvlm"], "--data", names["photos"], "--sparsity", "0.5",
             "--batch-size", "8", "--out", out]  # fmt: skip
    vlp(*words)
    before = (out / "masks-0.5.safetensors").read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlp_plugins.jobs.prune.Prepared.masks", interrupt)
    words += ["--sparsity", "0.75", "--checkpoint-every", "1"]
    shown = vlp(*words, "--overwrite", code=130).stderr
    assert shown.startswith("interrupted; to resume: vlp prune ")
    assert shown.endswith(" --overwrite --resume\n")
    assert (out / "masks-0.5.safetensors").read_bytes() == before
