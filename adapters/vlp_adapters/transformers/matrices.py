"""Parameters that hold several matrices, or one transposed: experts, projections, `Conv1D`."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlp_adapters.transformers.towers import is_a
from vlp_plugins.models.adapter import WeightView

_CONV1D = "transformers.pytorch_utils.Conv1D"
_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"
_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"


def output_projections(model: nn.Module) -> set[nn.Module]:
    """The layers that `nn.MultiheadAttention` reads without calling them."""
    return {
        module.out_proj
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    }


def matrices_of(module: nn.Module, name: str) -> dict[str, WeightView]:
    """The matrices of a parameter that is not the weight of a `Linear`, by what names them.

    Empty for a parameter that is no such; the whole of one has an empty name.
    """
    if is_a(module, _CONV1D) and name == "weight":
        return {"": WeightView(transposed=True)}
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        width = module.embed_dim
        return {
            each: WeightView(
                rows=(place * width, (place + 1) * width), reads=partial(_projected, place)
            )
            for place, each in enumerate(("query", "key", "value"))
        }
    if name in (*_FIRST, _LAST) and _is_fused(module) and module.get_parameter(name).ndim == 3:
        reads = _intermediate if name == _LAST else _routed
        transposed = _is_transposed(module)
        return {
            str(index): WeightView(index=index, transposed=transposed, reads=partial(reads, index))
            for index in range(len(module.get_parameter(name)))
        }
    return {}


def _is_fused(module: Any) -> bool:
    """Whether a module holds the matrices of all experts of a layer, as transformers writes it."""
    return is_a(module, _LLAMA4) or (
        hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, _LAST)
    )


def _is_transposed(module: Any) -> bool:
    return True if is_a(module, _LLAMA4) else bool(module.is_transposed)


def _routed(
    index: int, module: nn.Module, args: Any, kwargs: Any, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The tokens that are routed to an expert."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    hidden = given["hidden_states"]
    tokens = hidden.reshape(-1, hidden.shape[-1])
    mask = None if real is None else real.flatten().to(tokens.device)
    if is_a(module, _LLAMA4):  # all tokens for every expert, zero where they go to another one
        count = len(module.get_parameter(_LAST))
        tokens = tokens.view(count, -1, tokens.shape[-1])[index]
        mask = None if mask is None else mask.view(count, -1)[index]
        chosen = (tokens != 0).any(-1)
    else:
        routes = given["top_k_index"]
        chosen = (routes.reshape(-1, routes.shape[-1]) == index).any(-1)
    return tokens[chosen], None if mask is None else mask[chosen]


def _intermediate(
    index: int, module: nn.Module, args: Any, kwargs: Any, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the second matrix of an expert reads, made by the first one."""
    tokens, mask = _routed(index, module, args, kwargs, real)
    experts: Any = module
    name = next(each for each in _FIRST if hasattr(module, each))
    first = experts.get_parameter(name)[index]
    bias = getattr(experts, f"{name}_bias", None)
    hidden = functional.linear(
        tokens,
        first.T if _is_transposed(module) else first,
        None if bias is None else bias[index],
    )
    if is_a(module, _LLAMA4):
        gate, up = hidden.chunk(2, dim=-1)
        return up * experts.act_fn(gate), mask
    return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden), mask


def _projected(
    place: int, module: nn.Module, args: Any, kwargs: Any, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Query, key or value of `nn.MultiheadAttention`, whose padding is that of its keys."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    query, inputs = given["query"], given[("query", "key", "value")[place]]
    if inputs is query:
        return inputs, real
    padding = given.get("key_padding_mask")
    if place == 0 or padding is None:
        return inputs, None
    kept = ~padding if padding.dtype == torch.bool else padding == 0
    return inputs, kept if module.batch_first else kept.T


def attended() -> WeightView:
    """What `nn.MultiheadAttention` gives its `out_proj`, which it does not call."""
    return WeightView(reads=_attended)


def _attended(
    module: nn.Module, args: Any, kwargs: Any, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    attention: Any = module
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    turned = attention.batch_first and given["query"].ndim == 3
    inputs = [given[name] for name in ("query", "key", "value")]
    query, key, value = (each.transpose(0, 1) if turned else each for each in inputs)
    # The same attention once more, with nothing behind it.
    nothing = torch.eye(attention.embed_dim, dtype=query.dtype, device=query.device)
    output, _ = functional.multi_head_attention_forward(
        query, key, value, attention.embed_dim, attention.num_heads,
        attention.in_proj_weight, attention.in_proj_bias, attention.bias_k, attention.bias_v,
        attention.add_zero_attn, 0.0, nothing, None, training=False, need_weights=False,
        key_padding_mask=given.get("key_padding_mask"), attn_mask=given.get("attn_mask"),
    )  # fmt: skip
    return output.transpose(0, 1) if turned else output, real
