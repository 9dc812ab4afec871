"""Parameters that are unfrozen, added or replaced while training goes on."""

from __future__ import annotations

from torch import nn

from hf_reset.anchor.scopes import named_parameters, unwrapped
from hf_reset.anchor.shards import has_units


class TrainedParameters:
    """The parameters that train, by name, to notice when they have become others.

    Gradual unfreezing, `add_adapter` and `resize_token_embeddings` in the midst of training change them, and an anchor
    of those from before would silently leave some out, or copy tensors that nothing reads any more.

    Args:
        model: the model being trained, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = _trained(model)

    def changes(self, model: nn.Module) -> list[str]:
        """Names of those that came, went or were replaced since the last call; under FSDP, that came or went."""
        before, self._known = self._known, _trained(model)
        names = [*before, *(name for name in self._known if name not in before)]
        return [name for name in names if before.get(name, ...) is not self._known.get(name, ...)]


def _trained(model: nn.Module) -> dict[str, nn.Parameter | None]:
    """By name; FSDP shows other objects while weights are gathered, and giving these up would cost a gather more."""
    named, sharded = named_parameters(unwrapped(model)), has_units(model)
    return {name: None if sharded else p for name, p in named.items() if p.requires_grad}
