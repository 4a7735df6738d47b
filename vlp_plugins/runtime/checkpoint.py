"""The state of a run that can be resumed: one file of tensors and JSON, for every kind of run.

A run saves its state after every step (a batch, a round, a pass); after `kill -9` the file holds
the last one whole, and a resumed run gives the same bits. What is in a state, its owner says: one
function makes tensors and JSON of it, another turns them back.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from vlp_plugins.runtime.artifacts import Format, is_of, made_by, read_artifact, write_artifact
from vlp_plugins.runtime.distributed import broadcast, failing_together, rank_and_size
from vlp_plugins.runtime.errors import VlpError, first_line, shown
from vlp_plugins.runtime.files import check_own

logger = logging.getLogger(__name__)

State = TypeVar("State")
Tensors = dict[str, torch.Tensor]
Content = dict[str, Any]

_NOT_A_STATE = (KeyError, IndexError, ValueError, TypeError, AttributeError)


class Checkpoint:
    """The file of one run. Rank 0 writes and reads it; what it read is broadcast.

    `path` is the file, or None. It replaces files of its own kind only, and follows no link. It
    stays after the run: the caller deletes it when the result is safe.
    """

    def __init__(
        self,
        path: Path | None,
        form: Format,
        identity: Mapping[str, Any],
        *,
        unit: str,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """Reads and writes nothing yet.

        Args:
            path: the file; None keeps none.
            form: its kind; a state of a lower schema is not resumed.
            identity: what a run must have in common with the one that it resumes; values that JSON
                lacks are compared as text.
            unit: what a run without a file starts from the first of, for messages.
            shard: rank and number of processes, if each has a state and a file of its own
                (`name.rank0of2`) and writes it when it likes; None: all have the same state, and
                save and load together.
        """
        self._form = form
        self._identity: Content = json.loads(json.dumps(dict(identity), default=str))
        self._unit = unit
        self._shard = shard
        self._base = path
        self.path = path
        if path is not None and shard is not None:
            self.path = path.with_name(path.name + self._mark(shard[0]))

    @classmethod
    def of_run(
        cls, folder: Path | None, name: str, form: Format, identity: Mapping[str, Any], *, unit: str
    ) -> Checkpoint:
        """One of many files in a folder; its name has the hash of the identity."""
        text = json.dumps(dict(identity), sort_keys=True, default=str)
        mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = None if folder is None else Path(folder) / f"{name}-{mark}.safetensors"
        return cls(path, form, identity, unit=unit)

    def begin(self) -> None:
        """Makes sure, before a run that resumes nothing, that its state has a place.

        Raises:
            OutputError: if another file, or a link, is there.
        """
        with failing_together():
            if self.path is not None and self._is_mine():
                check_own(self.path, lambda path: is_of(path, self._form))
                if self.path.exists():
                    logger.warning("%s is not resumed and will be overwritten", self.path)

    def save(self, convert: Callable[[], tuple[Mapping[str, torch.Tensor], Content]]) -> None:
        """Writes a state over the one before, whole or not at all.

        Args:
            convert: makes tensors, on any device, and JSON of the state; called by the process
                that writes.

        Raises:
            OutputError: if it cannot be written; in all processes that have the same state.
        """
        if self.path is None:
            return
        if self._shard is not None:
            self._write(self.path, convert)
            return
        with failing_together():
            if self._is_mine():
                self._write(self.path, convert)

    def load(self, convert: Callable[[Tensors, Content], State]) -> State | None:
        """Reads the state to resume from; None if there is no file.

        Args:
            convert: makes a state of tensors, on the CPU, and JSON; called by every process.

        Raises:
            VlpError: the error of the format, if there is no place to look in, or the file is
                damaged, of another run, or of a version whose states this one cannot resume.
        """
        if self.path is None:
            raise self._form.error(
                "resume needs the folder that the earlier run kept its checkpoints in; give "
                "workplace"
            )
        found = None
        with failing_together():
            if self._is_mine():
                found = self._read(self.path)
        if self._shard is None:
            found = _broadcast(found)
        state = None
        with failing_together():
            if found is not None:
                try:
                    state = convert(*found)
                except _NOT_A_STATE as error:
                    raise self._unusable(found[1], error) from error
        return state

    def _write(
        self, path: Path, convert: Callable[[], tuple[Mapping[str, torch.Tensor], Content]]
    ) -> None:
        tensors, content = convert()
        write_artifact(
            path, self._form, tensors, {"identity": self._identity, **content}, state=True
        )
        logger.debug("wrote %s", path)

    def _read(self, path: Path) -> tuple[Tensors, Content] | None:
        if not path.exists():
            if others := self._others():
                raise self._form.error(
                    f"{others[0]} was written by another number of processes; resume with as many "
                    f"as before, or {self._form.remedy}"
                )
            logger.warning("no checkpoint at %s; starting from the first %s", path, self._unit)
            return None
        tensors, content = read_artifact(path, self._form)
        if content["schema"] < self._form.schema:
            raise self._form.error(
                f"{path} has format {content['schema']} of an earlier version "
                f"({content.get('made_by')!s:.80}), which this one ({made_by()}) does not resume; "
                f"resume with that version, or {self._form.remedy}"
            )
        theirs = content.get("identity")
        if not isinstance(theirs, dict):
            raise self._unusable(content, KeyError("identity"))
        for key in {**theirs, **self._identity}:
            if theirs.get(key) != self._identity.get(key):
                raise self._form.error(
                    f"checkpoint {path} is of another run: its {key:.80} is "
                    f"{shown(theirs.get(key))}, this one's is {shown(self._identity.get(key))}; "
                    f"give the same model, data and settings, or {self._form.remedy}"
                )
        return tensors, content

    def _unusable(self, content: Content, error: Exception) -> VlpError:
        why = f"{type(error).__name__}: {first_line(error)}"
        writer = content.get("made_by")
        if writer == made_by():
            return self._form.error(f"{self.path} is damaged ({why}); {self._form.remedy}")
        return self._form.error(
            f"{self.path} was written by {writer!s:.80} and cannot be resumed by {made_by()} "
            f"({why}); resume with that version, or {self._form.remedy}"
        )

    def _is_mine(self) -> bool:
        return self._shard is not None or rank_and_size()[0] == 0

    def _mark(self, rank: int | str) -> str:
        world = 1 if self._shard is None else self._shard[1]
        return "" if world == 1 else f".rank{rank}of{world}"

    def _others(self) -> list[Path]:
        """Files of the same name that another number of processes wrote."""
        if self._shard is None or self._base is None:
            return []
        name = glob.escape(self._base.name)
        mine = f"{name}{self._mark('*')}"
        marked = self._base.parent.glob(f"{name}.rank*of*")
        found = sorted(path for path in (self._base, *marked) if path.exists())
        return [path for path in found if not fnmatchcase(path.name, mine)]


def state_tensor(tensors: Tensors, name: str, like: torch.Tensor) -> torch.Tensor:
    """The tensor of a state that takes the place of another one.

    Raises:
        KeyError: if there is none.
        ValueError: if it is of another shape or dtype.
    """
    found = tensors[name]
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"{name} is {found.dtype} {list(found.shape)}, not {like.dtype} {list(like.shape)}"
        )
    return found


_MOMENT = "moment|"


def pack_moments(optimizer: Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """What an optimizer remembers of parameters, by a text that `restore_moments` reads."""
    return {
        f"{_MOMENT}{key}|{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: Optimizer, parameters: Mapping[str, torch.nn.Parameter], tensors: Tensors
) -> None:
    """Inverse of `pack_moments`; other tensors are passed over.

    Raises:
        KeyError: if there is no such parameter, or not all is there that others have.
        ValueError: if what is remembered has another shape than the parameter.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for full in tensors:
        if full.startswith(_MOMENT):
            key, _, name = full.removeprefix(_MOMENT).partition("|")
            parameter = parameters[name]
            value = state_tensor(tensors, full, torch.zeros(()) if key == "step" else parameter)
            # AdamW keeps its count of steps on the CPU.
            there = value if key == "step" else value.to(parameter.device)
            found.setdefault(name, {})[key] = there
    keys = {key for moments in found.values() for key in moments}
    for name, moments in found.items():
        if missing := keys - moments.keys():
            raise KeyError(f"{min(missing)} of {name}")
        optimizer.state[parameters[name]].update(moments)


def _broadcast(found: tuple[Tensors, Content] | None) -> tuple[Tensors, Content] | None:
    """What rank 0 read, in all processes; one tensor at a time, as a copy travels."""
    tensors: Tensors = {} if found is None else found[0]
    header = broadcast(None if found is None else (found[1], list(tensors)))
    if header is None:
        return None
    content, names = header
    nothing = torch.empty(0)
    return {name: broadcast(tensors.get(name, nothing)) for name in names}, content
