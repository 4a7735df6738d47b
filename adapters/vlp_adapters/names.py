"""What the families' names have in common."""

from __future__ import annotations

BERT_PARTS = {  # path in a layer of BERT, with or without cross-attention -> canonical name
    "attention.self.query": "self.query",
    "attention.self.key": "self.key",
    "attention.self.value": "self.value",
    "attention.output.dense": "self.output",
    "crossattention.self.query": "cross.query",
    "crossattention.self.key": "cross.key",
    "crossattention.self.value": "cross.value",
    "crossattention.output.dense": "cross.output",
    "intermediate.dense": "ffn.fc1",
    "output.dense": "ffn.fc2",
}
CROSS_INPUTS = ("cross.key", "cross.value")
"""The parts that read what is attended to, not the text."""

CLIP_PARTS = {  # the same of a vision layer of CLIP
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.out_proj": "attention.output",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VIT_PARTS = {  # and of ViT
    "attention.q_proj": "attention.query",
    "attention.k_proj": "attention.key",
    "attention.v_proj": "attention.value",
    "attention.o_proj": "attention.output",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

Beginnings = tuple[tuple[str, str], ...]
"""Pairs of the old beginning of a name and the new one."""


def rebegin(name: str, beginnings: Beginnings) -> str:
    """A name with its beginning replaced by that of the first pair that matches."""
    for old, new in beginnings:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def reverse(beginnings: Beginnings) -> Beginnings:
    """The pairs for the way back."""
    return tuple((new, old) for old, new in beginnings)
