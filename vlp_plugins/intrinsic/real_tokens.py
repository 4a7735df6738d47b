"""The real tokens of a batch in front, padding behind them."""

from __future__ import annotations

import torch

from vlp_plugins.runtime.errors import BatchError, UnsupportedError


class RealTokens:
    """What a mask of real tokens makes of the outputs of a layer.

    Padding on the right (what `Adapter.collate` makes) is cut down to the longest text; where it is
    elsewhere, real tokens are moved to the front in their order. So a sample's tokens are at the
    same positions whatever it shares its batch with.
    """

    def __init__(self, real: torch.Tensor) -> None:
        """Looks at a mask once (a transfer, on a GPU), for all layers that it is for.

        Args:
            real: bool `[batch, ...tokens]`, true where a token is real.

        Raises:
            UnsupportedError: if it is not bool.
        """
        if real.dtype != torch.bool:
            raise UnsupportedError(f"a token mask is {real.dtype}; an adapter must give bool")
        self._shape = real.shape
        real = real.flatten(1)
        in_front = (real[:, 1:] <= real[:, :-1]).all()
        longest = real.sum(1).max() if len(real) else in_front.new_zeros((), dtype=torch.long)
        self._length, right = torch.stack([longest, in_front.long()]).tolist()
        self._order = None if right else torch.argsort(real, dim=1, descending=True, stable=True)
        counts = real.sum(1, keepdim=True)
        self._padding = torch.arange(self._length, device=real.device) >= counts

    def select(self, tokens: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens up to the longest text of the batch.

        Args:
            tokens: `[batch, ...tokens, features]`, or one vector per sample `[batch, features]`
                (a pooler's output), which has no tokens to leave out.
            layer: for the error message.

        Returns:
            `[batch, T, features]`, and bool `[batch, T]`, true where that is padding; None:
            nowhere.

        Raises:
            BatchError: if the mask does not fit the tokens.
        """
        if tokens.shape[:-1] != self._shape:
            if tokens.ndim == 2 and len(tokens) == self._shape[0]:
                return tokens.unsqueeze(1), None
            raise BatchError(
                f"the output of {layer} is {list(tokens.shape)}, but the mask of its tokens is "
                f"{list(self._shape)}; if the layer sees other tokens than those, the adapter must "
                "give it a token space of its own: with ModuleAdapter, "
                "tokens={regular expression: None}"
            )
        tokens = tokens.flatten(1, -2)
        if self._order is not None:
            tokens = tokens.gather(1, self._order.unsqueeze(-1).expand_as(tokens))
        return tokens[:, : self._length], self._padding
