"""Models and files of unknown origin: none runs code, takes the memory, or names other files."""

from __future__ import annotations

import ast
import io
import json
import resource
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlp_adapters.checkpoints import read_state, tensor_names
from vlp_plugins.data.processors import load_processor
from vlp_plugins.data.sources import open_source
from vlp_plugins.jobs.recipe_values import parse_yaml
from vlp_plugins.loading import load_model, load_structure
from vlp_plugins.masks.published_files import SUFFIX, import_published
from vlp_plugins.models.architecture import bounded, meta_model, unfilled_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import DataError, MaskError, RecipeError, UnsupportedError
from vlp_plugins.runtime.untrusted import check_inside

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


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("internvl_chat", "the class InternVLForConditionalGeneration of transformers"),
        ("llava_llama", "the class LlavaForConditionalGeneration of transformers"),
        ("phi4mm", "the class Phi4MultimodalForCausalLM of transformers"),
    ],
)
def test_a_model_in_the_format_of_its_authors_is_refused_with_the_class_to_take(
    tmp_path: Path, kind: str, named: str
) -> None:
    content = {"model_type": kind, "auto_map": OWN_CODE}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for read in (load_model, load_structure):
        with pytest.raises(UnsupportedError, match=named):
            read(str(tmp_path))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_quantized_weights_are_refused(tmp_path: Path, method: str, inside: bool) -> None:
    packed: dict[str, object] = {"quantization_config": {"quant_method": method}}
    content = {"model_type": "llava", **({"text_config": packed} if inside else packed)}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for read in (load_model, load_structure):
        with pytest.raises(UnsupportedError, match=rf"are quantized \({method}\).*prune the"):
            read(str(tmp_path))


def test_a_processor_with_code_of_its_own_is_refused(evil: Path) -> None:
    with pytest.raises(DataError, match="needs code of its own"):
        load_processor(str(evil))
    assert not (evil.parent / "touched").exists()


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": {"text_config": "evil/kernel@main:attend"}},
        {"text_config": {"attn_implementation": "evil/kernel"}},
    ],
)
def test_kernels_of_the_hub_are_refused(tmp_path: Path, named) -> None:
    folder = config(tmp_path, **named)
    for read in (load_model, lambda source: meta_model(source, [])):
        with pytest.raises(UnsupportedError, match=r"code of its own \(\w+ evil/kernel"):
            read(str(folder))


def test_a_class_that_is_no_model_is_not_called(tmp_path: Path) -> None:
    config = {"model_type": "vit", "architectures": ["pipeline"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(meta_model(str(tmp_path), [])).__name__ == "ViTModel"


@pytest.fixture
def little_memory() -> Iterator[None]:
    """This process gets no more than a gigabyte beyond what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def laughs(levels: int, width: int) -> str:
    lines = [f"a0: &a0 [{', '.join(['1'] * width)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.usefixtures("little_memory")
def test_aliases_that_stand_for_many_values() -> None:
    with pytest.raises(
        RecipeError, match=r"billion.yaml: [\d,]+ values would take .*_LIMIT=\d+MiB"
    ):
        parse_yaml(laughs(4, 150), "billion.yaml", "billion")
    assert parse_yaml("a: &a [1, 2]\nb: *a", "few.yaml", "few").items()["b"].data


def test_yaml_and_json_that_nest_without_end(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="deep.yaml: nested far deeper than 5 levels"):
        parse_yaml(f"a: {'[' * 10**5}", "deep.yaml", "deep")
    for name in ("metadata.jsonl", "dataset_coco.json"):
        (tmp_path / name).write_text("[" * 10**6)
        with pytest.raises(DataError, match=f"{name}.* not JSON"):
            open_source(str(tmp_path))


def deflated(path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(2**27)}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as small,
    ):
        for member in whole.infolist():
            with whole.open(member) as source, small.open(member.filename, "w") as target:
                while part := source.read(2**20):
                    target.write(part)
    path.with_suffix(".whole").unlink()


def strided(path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(1).expand(2**20, 2**20)}, path)


def spread(path: Path) -> None:
    indices = torch.zeros(1, 1, dtype=torch.long)
    torch.save(
        {"visual.proj": torch.sparse_coo_tensor(indices, [1.0], (2**40,), check_invariants=True)},
        path,
    )


@pytest.mark.parametrize("write", [deflated, strided, spread])
def test_a_pytorch_file_that_describes_more_than_it_has(tmp_path, write, request) -> None:
    path = tmp_path / "x.pth"
    write(path)
    request.getfixturevalue("little_memory")
    for read in (read_state, tensor_names):
        with pytest.raises(UnsupportedError, match=r"x.pth.* would take .* VLP_READ_LIMIT=\d+MiB"):
            read(path)
    weights = WeightMap({}, "toy")
    with pytest.raises(MaskError, match=r"x.pth.* would take .* VLP_READ_LIMIT=\d+MiB"):
        import_published(path, weights, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("meta", lambda: torch.zeros(2, 3, device="meta")),
        ("sparse", lambda: torch.eye(3).to_sparse()),
        ("sparse", lambda: torch.eye(3).to_sparse_csr()),
        ("quantized", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    ],
)
def test_a_tensor_that_is_no_plain_one_is_refused(tmp_path: Path, kind: str, made) -> None:
    torch.save({f"a{SUFFIX}": made()}, tmp_path / "x.pth")
    with pytest.raises(UnsupportedError, match=rf"x.pth has a {kind} tensor of \[.*ordinary"):
        read_state(tmp_path / "x.pth")
    with pytest.raises(MaskError, match=rf"x.pth has a {kind} tensor of \[.*ordinary"):
        import_published(tmp_path / "x.pth", WeightMap({}, "toy"), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["0x" + "f" * 400, "0b" + "1" * 20_000, "9" * 400, "9" * 5000, "!!int ''", "!!float 1:x",
     "!!binary x", "!!bool maybe", "2020-01-01", "2020-99-99"],
)  # fmt: skip
def test_yaml_that_is_no_plain_value(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^x.yaml, line 2: ") as found:
        parse_yaml(f"model: m\nseed: {text}", "x.yaml", "x").items()["seed"].items()
    assert len(str(found.value)) < 300


def test_yaml_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"x.yaml: not YAML \(.*#x0000"):
        parse_yaml("model: a\0b", "x.yaml", "x")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        row = {"file_name": name, "text": "a caption"}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=r"names 1 of 1 images that do not exist") as found:
            open_source(str(tmp_path))
        assert len(str(found.value)) < 600


def test_one_tensor_under_many_names_counts_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VLP_READ_LIMIT", "1KiB")
    tensor = torch.zeros(1000)
    torch.save({f"name{SUFFIX}{n}": tensor for n in range(50)}, tmp_path / "x.pth")
    assert len(read_state(tmp_path / "x.pth")) == 50


def config(folder: Path, **changes: object) -> Path:
    """A folder with a tiny ViT's configuration, and weights of a kilobyte."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    named = {"model_type": "vit", "architectures": ["ViTModel"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(named | sizes | changes))
    save_file({"x": torch.zeros(256)}, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 2**64}, {"depths": [10**5]}, {"hidden_size": 2**40}]
)
def test_a_configuration_of_no_model(tmp_path: Path, sizes) -> None:
    folder = config(tmp_path, **sizes)
    for read in (load_model, lambda source: meta_model(source, [])):
        with pytest.raises(UnsupportedError, match=f"has {min(sizes)} .* the size of no model"):
            read(str(folder))
    with pytest.raises(UnsupportedError, match=f"has {min(sizes)} "), bounded(folder):
        pass


@pytest.mark.usefixtures("little_memory")
def test_a_model_far_larger_than_its_files(tmp_path: Path, monkeypatch) -> None:
    folder = config(tmp_path, hidden_size=2**13, intermediate_size=2**13)
    for read in (load_model, lambda source: unfilled_model(source, [])):
        with pytest.raises(UnsupportedError, match=r"config.json describes would take .*_LIMIT="):
            read(str(folder))
    assert meta_model(str(folder), []), "which takes no memory"
    monkeypatch.setenv("VLP_READ_LIMIT", "1TiB")
    with bounded(folder), torch.device("meta"):
        torch.nn.Linear(2**19, 2**15)


def test_shards_of_another_folder(tmp_path: Path) -> None:
    folder = config(tmp_path)
    index = {"metadata": {}, "weight_map": {"x": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match=r"index.json names .*/secret.safetensors.*outside"):
        load_model(str(folder))


def test_a_safetensors_header_that_claims_more_than_the_file_has(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(UnsupportedError, match="damaged or no checkpoint"):
        read_state(path)


def test_a_processor_that_makes_images_larger_than_memory(tmp_path: Path) -> None:
    side = {"height": 10**6, "width": 10**6}
    kind = {"image_processor_type": "ViTImageProcessor", "size": side}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind))
    with pytest.raises(DataError, match="an image of size 1000000 x 1000000 would take"):
        load_processor(str(tmp_path))


def test_a_sparse_member_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("0000.png")
    entry.size = 512
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % 5_000_000_000
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + bytes(512) + bytes(1024))
    with pytest.raises(DataError, match=r"x.tar: record 0000 would take 4.7 GiB .*_LIMIT=4769MiB"):
        open_source(str(path))


def test_the_name_of_a_member_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("././@LongLink")
    entry.size, entry.type = 2**32, tarfile.GNUTYPE_LONGNAME
    path = tmp_path / "x.tar"
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"the name of a member would take 4.0 GiB"):
        open_source(str(path))


@pytest.mark.parametrize("value", ["", "0", "no", "false"])
def test_a_variable_that_says_no_allows_no_path_outside(value, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLP_READ_OUTSIDE", value)
    with pytest.raises(DataError, match="outside of"):
        check_inside(tmp_path / "other" / "x.png", tmp_path / "data", "metadata.jsonl")
    monkeypatch.setenv("VLP_READ_OUTSIDE", "yes")
    check_inside(tmp_path / "other" / "x.png", tmp_path / "data", "metadata.jsonl")
    monkeypatch.setenv("VLP_READ_OUTSIDE", "perhaps")
    with pytest.raises(UnsupportedError, match="set it to 1 or 0"):
        check_inside(tmp_path / "other" / "x.png", tmp_path / "data", "metadata.jsonl")
