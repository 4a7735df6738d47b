"""Models and files of unknown origin: none runs code, takes the memory, or reads elsewhere."""

from __future__ import annotations

import ast
import io
import json
import subprocess
from pathlib import Path

import pytest

from vlp_plugins.architecture import meta_model
from vlp_plugins.data import load_processor
from vlp_plugins.errors import DataError, UnsupportedError
from vlp_plugins.loading import load_model, load_structure

ROOT = Path(__file__).parents[2]
EVIL = "from pathlib import Path\nPath({touched!r}).touch()\nclass Evil: pass\n"
KINDS = ("Config", "Model", "Processor", "ImageProcessor", "FeatureExtractor")
OWN_CODE = {f"Auto{kind}": "evil.Evil" for kind in KINDS}


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, stdout=-1, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split() if not name.startswith("tests/")]


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Calls of a method or function of that name outside the tests, also through `partial`."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            reached = [node.func, *node.args] if _name(node.func) == "partial" else [node.func]
            if any(_name(inner) == name for inner in reached):
                found.append((path, node))
    return found


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.parametrize("name", ["from_pretrained", "load_dataset", "from_config"])
def test_no_call_leaves_it_to_the_terminal_whether_code_runs(name: str) -> None:
    found = calls(name)
    assert found
    for path, call in found:
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch) -> Path:
    """A model folder with code of its own, and a user who answers every question with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    folder = tmp_path / "evil"
    folder.mkdir()
    config = {"model_type": "evil", "architectures": ["Evil"], "auto_map": OWN_CODE}
    (folder / "config.json").write_text(json.dumps(config))
    own = {"auto_map": OWN_CODE, "image_processor_type": "Evil", "processor_class": "Evil"}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    (folder / "processor_config.json").write_text(json.dumps(own))
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(EVIL.format(touched=str(tmp_path / "touched")))
    return folder


@pytest.mark.parametrize("weights", [True, False])
def test_a_model_with_code_of_its_own_is_refused(evil: Path, weights: bool) -> None:
    if weights:
        (evil / "model.safetensors").write_bytes(b"")
    for load in (load_structure, load_model) if weights else (load_structure,):
        with pytest.raises(UnsupportedError, match=r"needs code of its own \(evil\.Evil .*'evil'"):
            load(str(evil))
    with pytest.raises(UnsupportedError, match=r"load the model in Python with trust_remote_code"):
        meta_model(str(evil), [])
    assert not (evil.parent / "touched").exists()


def test_a_processor_with_code_of_its_own_is_refused(evil: Path) -> None:
    with pytest.raises(DataError, match="needs code of its own"):
        load_processor(str(evil))
    assert not (evil.parent / "touched").exists()


def test_a_class_that_is_no_model_is_not_called(tmp_path: Path) -> None:
    config = {"model_type": "vit", "architectures": ["pipeline"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(meta_model(str(tmp_path), [])).__name__ == "ViTModel"
