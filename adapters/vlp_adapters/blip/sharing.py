"""Which parameters of BLIP's two text towers are one parameter."""

from __future__ import annotations

import re

from torch import nn

_OWN = re.compile(r"\.attention\.")  # self-attention; `crossattention` is shared


def shared_names(text_encoder: nn.Module) -> dict[str, str]:
    """Name in the decoder -> name in the encoder, for every parameter that the towers share.

    All but self-attention (arXiv:2201.12086, section 3.2). The encoder's name is the first one:
    published masks and scores are keyed by it.
    """
    return {
        f"text_decoder.bert.{name}": f"text_encoder.{name}"
        for name, _ in text_encoder.named_parameters()
        if not _OWN.search(name)
    }
