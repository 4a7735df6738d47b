"""Sizes of a model, read from the shapes of the tensors of its checkpoint."""

from __future__ import annotations

import logging
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlp_plugins.runtime.errors import UnsupportedError, VlpError, first_line

_log = logging.getLogger(__name__)

_HEAD_WIDTH = 64  # of ViT and BERT up to a width of 1024; wider towers have 64 to 104
_MOST_HEADS = 16


@contextmanager
def shapes_of(path: str | os.PathLike[str], family: str) -> Iterator[None]:
    """Around what makes a model of the tensors of a file: shapes that fit no model are its fault.

    Args:
        path: for messages.
        family: how errors call the model.

    Raises:
        UnsupportedError: in place of what torch, transformers and Python raise.
    """
    try:
        yield
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, VlpError):
            raise
        raise UnsupportedError(
            f"{path} is damaged, or no checkpoint of {family}: its tensors do not fit together "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


@dataclass(frozen=True)
class CheckpointShapes:
    """The tensors of a checkpoint by their original names, and what errors call the model."""

    state: Mapping[str, Tensor]
    family: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            UnsupportedError: if the checkpoint does not have it.
        """
        if name not in self.state:
            raise UnsupportedError(
                f"the checkpoint has no {name}: it is damaged, or none of {self.family}"
            )
        return tuple(self.state[name].shape)

    def indices(self, pattern: str) -> list[int]:
        """The different numbers that `pattern` captures at the start of names, sorted."""
        found = (re.match(pattern, name) for name in self.state)
        return sorted({int(match[1]) for match in found if match})

    def grid(self, name: str, *, dim: int = 0) -> int:
        """Patches per side, from a table of positions whose first is that of the class token."""
        return math.isqrt(self[name][dim] - 1)

    def vision_transformer(self, root: str, heads: int | None) -> dict[str, int]:
        """Sizes of one with the names of timm, by the keywords of transformers' configurations.

        Args:
            root: what its names begin with.
            heads: see `attention_heads`.
        """
        width, _, _, patch_size = self[f"{root}patch_embed.proj.weight"]
        return {
            "hidden_size": width,
            "intermediate_size": self[f"{root}blocks.0.mlp.fc1.weight"][0],
            "num_hidden_layers": len(self.indices(rf"{re.escape(root)}blocks\.(\d+)\.")),
            "num_attention_heads": attention_heads(width, "vision", heads),
            "image_size": self.grid(f"{root}pos_embed", dim=1) * patch_size,
            "patch_size": patch_size,
        }


def attention_heads(width: int, tower: str, given: int | None = None) -> int:
    """The number of attention heads, which shapes do not tell: 64 dimensions each.

    Args:
        width: of the tower.
        tower: `vision` or `text`, the beginning of the loader's keyword.
        given: the number, if it is known.

    Raises:
        UnsupportedError: if it does not divide the width; or it is None, and 64 does not divide the
            width, or that is above 1024.
    """
    if given is not None:
        check_options({f"{tower}_heads": given}, {tower: width})
        return given
    heads, rest = divmod(width, _HEAD_WIDTH)
    if rest or heads > _MOST_HEADS:
        raise UnsupportedError(
            f"the {tower} encoder is {width} wide, so its number of attention heads cannot be "
            f"guessed (published models up to {_HEAD_WIDTH * _MOST_HEADS} wide have {_HEAD_WIDTH} "
            f"dimensions per head); pass {tower}_heads, or put a file with the checkpoint's name "
            f'and the ending .json next to it: {{"{tower}_heads": ...}}'
        )
    return heads


def check_options(options: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    """Checks keywords that say what shapes do not; None stands for a guess.

    Args:
        options: by name, which ends in `_heads`, `_act` or `_eps`.
        widths: of the towers, by the beginning of the names of their `_heads`.

    Raises:
        UnsupportedError: naming the first that is impossible.
    """
    from transformers.activations import ACT2FN

    for name, value in options.items():
        tower, _, kind = name.rpartition("_")
        if value is None:
            continue
        if kind == "heads":
            good = type(value) is int and value > 0 and widths[tower] % value == 0
            wanted = f"a number that divides the {widths[tower]} of the {tower} encoder's width"
        elif kind == "act":
            good = isinstance(value, str) and value in ACT2FN
            wanted = "an activation of transformers, such as gelu or quick_gelu"
        else:
            good = isinstance(value, float) and 0 < value < 1
            wanted = "a number between 0 and 1, such as 1e-5"
        if not good:
            raise UnsupportedError(f"{name} is {reprlib.repr(value)}, not {wanted}")


def token_id(name: str, token: Any, words: int) -> int:
    """A token that a keyword of that name gives, checked.

    Raises:
        UnsupportedError: if it is none of the `words` of the vocabulary.
    """
    if type(token) is not int or not 0 <= token < words:
        raise UnsupportedError(
            f"{name} has {token!r}, which is no id of a vocabulary of {words} tokens; pass {name}, "
            "or put a file with the checkpoint's name and the ending .json next to it: "
            f'{{"{name}": ...}}'
        )
    return token


def caption_prompt(given: Any, words: int, *, is_bert: bool) -> list[int]:
    """The tokens between the first one and every caption.

    Args:
        given: a list of them; None for a guess, which a warning says: `a picture of` in the
            vocabulary of bert-base-uncased, none in any other.
        words: size of the vocabulary.
        is_bert: whether it is that of bert-base-uncased.

    Raises:
        UnsupportedError: if it is no list of ids.
    """
    if given is None and is_bert:
        _log.warning(
            "captions are taken to begin with 'a picture of', as in the original's configuration; "
            "prompt_ids says otherwise"
        )
        return [1037, 3861, 1997]
    if not isinstance(given, Sequence | None) or isinstance(given, str):
        raise UnsupportedError(f"prompt_ids={given!r} is no list of token ids")
    return [token_id("prompt_ids", token, words) for token in given or ()]
