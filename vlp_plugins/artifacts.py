"""The files that masks, statistics and checkpoints are kept in, all of one build.

One safetensors file: tensors, and one JSON header that holds the schema version, what made the
file, package versions, a checksum over the tensors, and whatever the kind of file has to say.
safetensors holds nothing but numbers and text: reading a file of unknown origin executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlp_plugins.atomic import atomic_file
from vlp_plugins.errors import VlpError, first_line
from vlp_plugins.tensor_files import bytes_of_tensor, has_metadata, write_tensors
from vlp_plugins.version import __version__

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


def write(
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
        tensors: on any device, by name; copied one at a time if at all.
        header: goes beside schema, checksum, `made_by` and `versions`; the last two may be in it.
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


def read(
    path: str | os.PathLike[str], form: Format
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `write` wrote.

    Returns:
        Tensors by name, and the header.

    Raises:
        VlpError: `form.error`, if it is missing, damaged, truncated, of another kind or too new.
    """
    path = Path(path)
    if not path.is_file():
        raise form.error(f"{path} is no file; {form.remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, form, file.metadata() or {})
            # Cloned, because the tensors of an open file are a view of its pages on the disk.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
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
    return not path.is_symlink() and path.is_file() and has_metadata(path, form.key)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors; their order does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(bytes_of_tensor(tensor))
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
            f"{path} is no {form.kind} file of vlp-plugins (perhaps a checkpoint?); {form.remedy}"
        )
    header: dict[str, Any] = json.loads(metadata[form.key])
    schema = header["schema"]
    if not isinstance(schema, int) or schema < 1:
        raise ValueError(f"format {schema!r}")
    if schema > form.schema:
        raise form.error(
            f"{path} has format {schema}, newer than the {form.schema} that this version reads; "
            f"it was made by {header.get('made_by')}: upgrade vlp-plugins"
        )
    return header
