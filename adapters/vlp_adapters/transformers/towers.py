"""What transformers knows about a model: towers, heads, and what else is no part of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

VISION, TEXT, FUSION, PROJECTOR, AUDIO = "vision", "text", "fusion", "projector", "audio"

_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
_PEFT = "peft.peft_model.PeftModel"

# What part of a model a sub-configuration or a module outside all towers is, by its name.
_NAMES = (
    (re.compile(r"fusion|multimodal|cross_modal|qformer"), FUSION),
    (re.compile(r"proj|connector|align|merger|resampl|perceiver|mapper|adaptor"), PROJECTOR),
    (re.compile(r"vision|visual|image|img|pixel|patch|backbone"), VISION),
    (re.compile(r"audio|speech"), AUDIO),
    (re.compile(r"text|language|llm|decoder|thinker|talker"), TEXT),
)
_INPUTS = {"image": VISION, "video": VISION, "text": TEXT, "audio": AUDIO}
_READS = re.compile(r"(text|language|word)|image|img|vision|visual|pixel|patch")
_HEARS = re.compile(r"audio|speech")
_TO = re.compile(r"([a-z]+)_to_")

_ADDED = "added by PEFT: not part of the model"
_HEAD = "head: belongs to the task, not to the model"
_OUTPUT = "output embedding: the head over the vocabulary"
_COMMON = "projection into the common space of images and texts"
_FIRST = "embeddings: patches, positions, class token"
_QUERY = "learned query or position: what is read, not a matrix that reads"
_ROUTER = "router of a mixture of experts"
_GENERATOR = "image tokenizer or generator: not run when the model reads images"
_BEHIND = "vision layer behind vision_feature_layer: its output is not used"
_SOUND = "reads sound: run by no batch of images and texts"
DESIGNED = (
    _ADDED, _HEAD, _OUTPUT, _COMMON, _FIRST, _QUERY, _ROUTER, _GENERATOR, _BEHIND, _SOUND,
)  # fmt: skip
"""Reasons that are no lack of ours."""

_HEADS = re.compile(
    r"(^|\.)(\w+_heads?|heads?|classifier|score|qa_outputs|cls|itm_score|\w*pooler|"
    r"attention_pool\w*)(\.|$)"
)
_COMMON_SPACE = re.compile(r"^(visual|vision|image|text|audio)_projection(\.|$)")
_EMBEDDERS = re.compile(r"(^|\.)(\w*embed(ding|der)?s?(_\w+)?|patch_conv|\w*stem)(\.|$)")
_GENERATORS = re.compile(
    r"(^|\.)(vq_?model|vqvae|vision_tokenizer|image_codebook|generation_\w+)(\.|$)"
)
_LEARNED = re.compile(r"quer(y|ies)$|latents?$|probe$|token$|position|embedding|img_feature|sub_")
_ROUTERS = re.compile(r"(^|\.)(router|\w*gate)$")
_ROUTER_CLASS = re.compile(r"Router|TopK|Gate$")
_EXPERTS = re.compile(r"^(moe_)?(num|n)_(\w+_)?experts$")
_INDEX = re.compile(r"(?:^|\.)(\d+)\.")  # of a layer, not of a module in a Sequential
_MOST_CHANNELS = 4  # of an image


def is_a(module: object, name: str) -> bool:
    """Whether a module is of the class of that full name, without importing it."""
    return any(f"{c.__module__}.{c.__qualname__}" == name for c in type(module).__mro__)


def is_pretrained(module: object) -> bool:
    """Whether it is a model of transformers."""
    return is_a(module, _PRETRAINED)


def inner_model(model: nn.Module) -> tuple[str, Any]:
    """The model of transformers inside, with its path and a dot: PEFT wraps it."""
    if is_a(model, _PEFT):
        base: Any = model
        base = base.get_base_model()
        path = next(path for path, module in model.named_modules() if module is base)
        return (f"{path}." if path else ""), base
    return "", model


def sub_configs(config: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the configurations inside a configuration, at any depth."""
    for name in getattr(config, "sub_configs", None) or ():
        if (value := getattr(config, name, None)) is not None:
            yield name, value
            yield from sub_configs(value)


@dataclass(frozen=True)
class Towers:
    """The parts of a model.

    Attributes:
        prefix: path of the model of transformers inside, with a dot; empty if it is itself.
        model: that model.
        roots: paths of the towers in it, and their modality.
        base: path of what pre-training made in it, with a dot; empty if that is all.
        outputs: ids of the heads over the vocabulary.
        experts: numbers of experts that its configurations name.
        behind: how many layers of each tower's path are read, where not all are.
        inputs: what it reads: `image`, `text`, ...
        children: names of the modules that its pre-trained part has.
    """

    prefix: str
    model: Any
    roots: Mapping[str, str]
    base: str
    outputs: frozenset[int]
    experts: frozenset[int]
    behind: Mapping[str | None, int]
    inputs: frozenset[str]
    children: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Towers:
        """Reads a model of transformers, bare or wrapped by PEFT."""
        prefix, inner = inner_model(model)
        known = {id(value): name for name, value in sub_configs(inner.config)}
        roots: dict[str, str] = {}
        for path, module in inner.named_modules():
            name = known.get(id(getattr(module, "config", None)))
            inside = any(path.startswith(f"{root}.") for root in roots)
            if path and name is not None and is_pretrained(module) and not inside:
                roots[path] = _modality(name, module)
        outputs = [
            head
            for module in inner.modules()
            if is_pretrained(module) and (head := module.get_output_embeddings()) is not None
        ]
        configs = [inner.config, *(value for _, value in sub_configs(inner.config))]
        experts = {
            value
            for config in configs
            for name, value in vars(config).items()
            if isinstance(value, int) and _EXPERTS.match(name)
        }
        return cls(
            prefix=prefix,
            model=inner,
            roots=roots,
            base=_base(inner),
            outputs=frozenset(map(id, outputs)),
            experts=frozenset(experts),
            behind=_read_layers(inner, roots),
            inputs=frozenset(_inputs(inner)),
            children=frozenset(
                n for n, _ in inner.get_submodule(_base(inner)[:-1]).named_children()
            ),
        )

    def root_of(self, path: str) -> str | None:
        """The tower that a module of `model` is in; None outside all."""
        return next((r for r in self.roots if path == r or path.startswith(f"{r}.")), None)

    def modality(self, path: str) -> str:
        """The modality of a module of `model`."""
        root = self.root_of(path)
        if root is not None:
            return self.roots[root]
        # A layer in a list is named by the list: `layers.0.self_attn.o_proj` is no projector.
        own = re.split(r"\.\d+\.", f"{path}.".removeprefix(self.base))[0]
        if len(self.inputs) == 1 and len(set(self.roots.values())) <= 1:
            return _INPUTS.get(next(iter(self.inputs)), TEXT)
        if self.roots:
            for pattern, modality in _NAMES[:-1]:
                if pattern.search(own):
                    return modality
        # Outside the towers of both, layers join them; with a vision tower alone they are the
        # language model, which some families have at the root.
        found = set(self.roots.values())
        return TEXT if VISION in found and TEXT not in found else FUSION

    def reads(self, path: str) -> str:
        """What the sequence that enters a module is made of, where no call says it."""
        modality = self.modality(path)
        if modality not in (PROJECTOR, FUSION) or self.root_of(path) is not None:
            return VISION if modality == PROJECTOR else modality
        own = f"{path}.".removeprefix(self.base)
        if modality == PROJECTOR:
            named = _TO.search(own)  # text_to_image: it reads the text
            return VISION if named is None or named[1] != TEXT else TEXT
        named = _READS.search(own)
        return FUSION if named is None else TEXT if named[1] else VISION

    def depth(self, path: str) -> int:
        """Layer index within its tower."""
        index = _INDEX.search(path.removeprefix(self.root_of(path) or self.base))
        return int(index[1]) if index else 0

    def canonical(self, path: str) -> str:
        """The name that a module of the whole model has in the bare one, and without wrappers."""
        path = path.removeprefix(self.prefix).replace("_orig_mod.", "")
        return path.removesuffix(".base_layer").removeprefix(self.base)

    def excluded(self, path: str, module: nn.Module, name: str) -> str | None:
        """Why a parameter of a module of the whole model is not pruned by default; None if it is.

        Args:
            path: of the module.
            module: itself.
            name: of the parameter.
        """
        if self.prefix and not path.startswith(self.prefix):
            return _ADDED
        path = path.removeprefix(self.prefix)
        if self.prefix and re.search(r"(^|\.)modules_to_save\.", path):
            return _ADDED
        path = path.removesuffix(".base_layer")
        root = self.root_of(path)
        inside = path.removeprefix(root).removeprefix(".") if root else path.removeprefix(self.base)
        if id(module) in self.outputs:
            return _OUTPUT
        if _GENERATORS.search(path) or (root and self.roots[root] == "generator"):
            return _GENERATOR
        if self.base and not path.startswith(self.base) and path:
            return _HEAD
        hears = self.modality(path) == AUDIO or _HEARS.search(path)
        if hears and VISION in self.roots.values():
            return _SOUND
        if _COMMON_SPACE.match(inside) and not root and "text_projection" in self.children:
            return _COMMON
        if _HEADS.search(inside) or self._outside_base(path):
            return _HEAD
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels <= _MOST_CHANNELS:
            return _FIRST
        if self.modality(path) in (VISION, AUDIO) and _EMBEDDERS.search(inside):
            return _FIRST
        if self._is_router(path, module):
            return _ROUTER
        if name != "weight" and _LEARNED.search(name):
            return _QUERY
        index = _INDEX.search(inside)
        if root in self.behind and index is not None and int(index[1]) >= self.behind[root]:
            return _BEHIND
        return None

    def _outside_base(self, path: str) -> bool:
        """Whether a module is a head of a tower: in the tower, but outside its base model."""
        root = self.root_of(path)
        if root is None or path == root:
            return False
        base = _base(self.model.get_submodule(root))
        return bool(base) and not path.startswith(f"{root}.{base}"[:-1])

    def _is_router(self, path: str, module: nn.Module) -> bool:
        if not self.experts or not _ROUTERS.search(path):
            return False
        if _ROUTER_CLASS.search(type(module).__name__):
            return True
        return isinstance(module, nn.Linear) and module.out_features in {1, *self.experts}


def _modality(name: str, module: Any) -> str:
    """The modality of a tower with the sub-configuration of that name."""
    if re.search(r"(^|_)vq|codebook", name):
        return "generator"
    for pattern, modality in _NAMES:
        if pattern.search(name):
            return modality
    found = {_INPUTS.get(each, TEXT) for each in _inputs(module)}
    return next(iter(found)) if len(found) == 1 else FUSION


def _inputs(module: Any) -> set[str]:
    given = getattr(module, "input_modalities", None) or ()
    return {given} if isinstance(given, str) else set(given)


def _base(model: Any) -> str:
    """Path of the pre-trained part with a dot; empty if the model has no such part."""
    name = getattr(model, "base_model_prefix", "")
    part = getattr(model, name, None) if name else None
    return f"{name}." if isinstance(part, nn.Module) and part is not model else ""


def _read_layers(model: Any, roots: Mapping[str, str]) -> dict[str | None, int]:
    """By path of a vision tower, how many of its layers are read if not all are."""
    vision = getattr(model.config, "vision_config", None)
    own = getattr(vision, "feature_layer", None)
    chosen = getattr(model.config, "vision_feature_layer", own)
    if chosen is None:
        return {}
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    found: dict[str | None, int] = {}
    for root, modality in roots.items():
        count = getattr(model.get_submodule(root).config, "num_hidden_layers", None)
        if modality == VISION and isinstance(count, int):
            last = max(layer if layer >= 0 else count + 1 + layer for layer in chosen)
            if 0 <= last < count:
                found[root] = last
    return found
