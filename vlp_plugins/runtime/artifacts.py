"""The files that masks, statistics, checkpoints and profiles are kept in.

With tensors it is one safetensors file, whose JSON header holds the schema version, the program
and package versions that made it, a checksum over the tensors, and what the kind of file adds.
Without, it is JSON with the same fields. Reading a file of unknown origin executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlp_plugins.runtime.errors import (
    OutputError,
    StatisticsError,
    UnsupportedError,
    VlpError,
    first_line,
    shown,
)
from vlp_plugins.runtime.files import atomic_file, remove_abandoned, temporary_path, write_text
from vlp_plugins.runtime.mapped import release
from vlp_plugins.runtime.memory import spill_folder
from vlp_plugins.runtime.untrusted import check_read, read_as
from vlp_plugins.runtime.version import __version__

_ALIGNMENT = 8
MAPPED = 1 << 28
"""Bytes of tensors from which on they stay in their file."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a file that `safetensors` reads; two names may hold one tensor, which it refuses.

    `safetensors.torch.save_file` copies all tensors first: twice the memory for sums as large as
    the model. Here at most one at a time is copied. The format is a length, a JSON header and the
    bytes (https://github.com/huggingface/safetensors#format).

    Raises:
        OSError: if it cannot be written.
        KeyError: for a dtype that the format lacks.
    """
    # The widest first, as safetensors does: so every tensor starts at a multiple of its element.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(tensor_bytes(tensors[name]))
            release((tensors[name],))


def mapped_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a file whose names have a prefix, as views of it: read where they are used.

    They stay after the file was deleted or replaced by another one, but not if it is written in
    place. Nothing is checked.
    """
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def moved_to_disk(
    tensors: Mapping[str, torch.Tensor], folder: Path | None
) -> dict[str, torch.Tensor]:
    """The same tensors as views of an unnamed file, which goes with the last of them.

    Args:
        tensors: by name.
        folder: for the file; None, or one that this machine lacks: see `spill_folder`.

    Raises:
        OutputError: if it cannot be written.
    """
    place = spill_folder(folder if folder is not None and folder.is_dir() else None)
    path = None
    try:
        remove_abandoned(place)
        path = temporary_path(place / "values")
        write_tensors(path, tensors, {})
        return mapped_tensors(path)
    except OSError as error:
        raise OutputError(
            f"tensors cannot be kept in {place} ({first_line(error)}); free some of its disk, or "
            "name another folder in TMPDIR"
        ) from error
    finally:
        if path is not None:
            with suppress(PermissionError):  # Windows keeps the name of a file that is mapped
                path.unlink(missing_ok=True)


def stored_tensors(path: Path) -> dict[int, tuple[torch.dtype, int]]:
    """What lies in a safetensors file: by first byte the dtype and the number of bytes.

    Raises:
        UnsupportedError: if it is damaged or truncated.
    """
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    found = {}
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"its header would have {size:,} bytes")
            check_read(f"the header of {path}", size, UnsupportedError)
            header = json.loads(file.read(size))
        end = 8 + size
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = (8 + size + each for each in entry["data_offsets"])
                end = max(end, last)
                if entry["dtype"] in dtypes:
                    found[first] = dtypes[entry["dtype"]], last - first
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedError(
            f"{path} is damaged, truncated or no safetensors file ({first_line(error)}); copy it "
            "again"
        ) from error
    if (stored := path.stat().st_size) < end:
        raise UnsupportedError(
            f"{path} is truncated: it has {stored:,} of {end:,} bytes; copy it again"
        )
    return found


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order; no copy of a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def load_pickled(path: Path, error: type[Exception], *, mmap: bool = False) -> Any:
    """What `torch.save` wrote, if it is plain data: on the CPU, and no larger than the file.

    Tensors have one value for each element there: they are not sparse, quantized, nested, or on
    the meta device. With `mmap` they stay in the file.

    Raises:
        Exception: what `torch.load` raises for damaged files and for objects that could run code;
            of type `error`, if the file describes more than it has, see
            `runtime.untrusted.read_limit`, or has tensors of another kind.
    """
    check_unpacked(path, error)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # A tensor of stride 0, or a sparse one, has any number of elements in a few bytes.
    views: dict[object, int] = {}
    tensors = list(_tensors(content, set()))
    for tensor in tensors:
        strided = tensor.layout == torch.strided
        view = (tensor.data_ptr(), tensor.shape, tensor.stride()) if strided else id(tensor)
        views[view] = tensor.numel() * tensor.element_size()
    check_read(f"{path}: its tensors", sum(views.values()), error, stored=path.stat().st_size)
    for tensor in tensors:
        if kind := _other_kind(tensor):
            raise error(
                f"{path} has a {kind} tensor of {list(tensor.shape)}, whose values are not plain "
                "numbers in the file; save a state_dict of ordinary tensors"
            )
    return content


def _other_kind(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being an ordinary one."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout == torch.strided else "sparse"


def check_unpacked(path: Path, error: type[Exception]) -> None:
    """Checks that a zip archive, which a PyTorch file is, does not unpack to more than it has.

    Raises:
        Exception: of type `error`, if it does.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:  # torch.load says so
        return
    check_read(f"{path}, unpacked,", size, error, stored=path.stat().st_size)


def _tensors(content: object, visited: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor in mappings and lists, which may hold one another."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple) and id(content) not in visited:
        visited.add(id(content))
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(part, visited)


_VERSION = re.compile(r"vlp_plugins (\d+)\.(\d+)\.(\d+)")
_PACKAGES = ("vlp-plugins", "torch", "transformers", "numpy")  # they decide the values


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of file.

    Attributes:
        kind: what messages call it, as in "mask file".
        key: of the safetensors metadata under which the header lies.
        schema: version of the format; a change that old code cannot read adds 1.
        error: what is raised.
        remedy: what the user should do about a file that is missing, damaged or foreign.
    """

    kind: str
    key: str
    schema: int
    error: type[VlpError]
    remedy: str


def write_artifact(
    path: str | os.PathLike[str],
    form: Format,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
    *,
    overwrite: bool = False,
    state: bool = False,
) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: the file.
        form: its kind.
        tensors: on any device, by name; at most one at a time is copied.
        header: is added to schema, checksum, `made_by` and `versions`; may replace the last two.
            Values that JSON lacks become text.
        overwrite: replace an existing file.
        state: replace a file of this kind and nothing else; a link is not followed.

    Raises:
        OutputError: if the file exists and is not to be overwritten, or cannot be written.
    """
    own = (lambda path: is_of(path, form)) if state else None
    made = {"made_by": made_by(), "versions": versions(), **header}
    made |= {"schema": form.schema, "checksum": checksum(tensors)}
    with atomic_file(path, overwrite=overwrite, own=own) as temporary:
        write_tensors(temporary, tensors, {form.key: json.dumps(made, default=str)})


def read_artifact(
    path: str | os.PathLike[str], form: Format, *, mapped: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `write_artifact` wrote.

    Args:
        path: the file.
        form: its kind.
        mapped: prefix of the names of tensors that stay in the file if they take `MAPPED` or more,
            see `mapped_tensors`.

    Returns:
        Tensors by name, and the header.

    Raises:
        VlpError: `form.error`, if it is missing, damaged, truncated, of another kind or too new.
    """
    path = Path(path)
    if not path.is_file():
        raise form.error(f"{path} is not a file; {form.remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, form, file.metadata() or {})
            views = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stay = {name for name in views if mapped is not None and name.startswith(mapped)}
        if sum(views[name].nbytes for name in stay) < MAPPED:
            stay = set()
        # Views of the pages on the disk; copied, unless they are to stay there.
        tensors = {name: t if name in stay else t.clone() for name, t in views.items()}
        del views
        damaged = header["checksum"] != checksum(tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise form.error(
            f"{path} is damaged, truncated or no {form.kind} file "
            f"({type(error).__name__}: {first_line(error)}); {form.remedy}"
        ) from error
    if damaged:
        raise form.error(f"{path} is damaged: the checksum differs; {form.remedy}")
    return tensors, header


def is_of(path: Path, form: Format) -> bool:
    """True for a regular file, and no link to one, of that kind, whether damaged or not."""
    if path.is_symlink() or not path.is_file():
        return False
    begin = f'{{"__metadata__":{{{json.dumps(form.key)}:'.encode()
    with suppress(FileNotFoundError), path.open("rb") as file:  # another process may delete it
        return file.read(8 + len(begin))[8:] == begin
    return False


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors; their order does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
        release((tensor,))
    return digest.hexdigest()


def made_by() -> str:
    """This program and its version."""
    return f"vlp_plugins {__version__}"


def made_before(program: object, version: tuple[int, int, int]) -> bool:
    """Whether what `made_by` says is this program in an older version; False if it says nothing."""
    found = _VERSION.match(str(program))
    return found is not None and tuple(map(int, found.groups())) < version


def versions() -> dict[str, str]:
    """Versions of the installed packages that decide what is in a file."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _header(path: Path, form: Format, metadata: Mapping[str, str]) -> dict[str, Any]:
    if form.key not in metadata:
        raise form.error(
            f"{path} is not a {form.kind} file of vlp-plugins (perhaps a checkpoint?); "
            f"{form.remedy}"
        )
    header: dict[str, Any] = read_as(dict[str, Any], json.loads(metadata[form.key]), "its header")
    _check_schema(path, header, form.schema, form.error)
    return header


def _check_schema(
    path: Path, header: Mapping[str, Any], newest: int, error: type[VlpError]
) -> None:
    """Raises `error` for a newer format, `ValueError` for what is none."""
    schema = header.get("schema")
    if type(schema) is not int or schema < 1:
        raise ValueError(f"format {shown(schema)}")
    if schema > newest:
        raise error(
            f"{path} has format {schema}, newer than the {newest} that this version reads; it was "
            f"made by {header.get('made_by')!s:.80}: upgrade vlp-plugins"
        )


SCHEMA = 1
"""Version of the format; a change that old code cannot read adds 1."""


def write_json(
    path: str | os.PathLike[str],
    kind: str,
    content: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes what JSON can say, and of which `kind` it is, whole or not at all.

    Raises:
        OutputError: if the file exists and is not to be overwritten, or cannot be written.
    """
    header = {"kind": kind, "schema": SCHEMA, "made_by": made_by(), "versions": versions()}
    text = json.dumps({**header, **content}, indent=1, allow_nan=False)
    write_text(path, text + "\n", overwrite=overwrite)


def read_json(path: str | os.PathLike[str], kind: str, remedy: str) -> dict[str, Any]:
    """Reads what `write_json` wrote; errors end with the `remedy`.

    Raises:
        StatisticsError: if it is missing, damaged, of another kind or too new.
    """
    path = Path(path)
    if not path.is_file():
        raise StatisticsError(f"{path} is not a file; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"{path} is damaged, truncated or no JSON ({type(error).__name__}: "
            f"{first_line(error)}); {remedy}"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise StatisticsError(f"{path} holds {shown(found)}, not {kind!r}; {remedy}")
    try:
        _check_schema(path, content, SCHEMA, StatisticsError)
    except ValueError as error:
        raise StatisticsError(f"{path} is damaged ({error}); {remedy}") from error
    return content
