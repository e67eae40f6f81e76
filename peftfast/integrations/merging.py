"""Merging adapters into weights that are changed as a whole, such as those in 4 bits."""

from __future__ import annotations

import warnings
import weakref

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from peftfast.integrations.forwards import name_of, outermost


class MergesAtOnce:
    """merge and unmerge of one of PEFT's layers.

    The layer has `_add(names, sign)`, which adds (sign 1) or takes out (-1) what these adapters add to the base weight:
    all of them or, on an error, none.
    """

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the base weight, all of them or, on an error, none.

        Args:
            safe_merge: without effect, since a weight that is not finite is refused in any case.
            adapter_names: None for the active ones.
        Raises:
            ValueError: the sum is not finite.
            RuntimeError: an adapter has a bias, the base layer none.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if names:
            self._add(names, 1)
            self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._add([name for name in self.merged_adapters if name in self.lora_A], -1)
        self.merged_adapters.clear()


_warned_of: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


def warn_of_rounding(layer: nn.Module, error: float, weight: str = "weight") -> None:
    """Of a model's many layers, which are much alike, warns of the first and of those that are clearly worse.

    For `_add` to call: the warning is then said of the line that called `merge` or `unmerge`.
    """
    _, model = outermost(layer)
    if error > 1.1 * _warned_of.get(model, 0.0):
        _warned_of[model] = error
        warnings.warn(
            f"Layer {name_of(layer, 'lora')} was quantized anew as its adapters were merged or unmerged, with a "
            f"relative error of its {weight} of {error:.2%}. Other layers are reported only if theirs is clearly "
            "larger.",
            stacklevel=5,
        )
