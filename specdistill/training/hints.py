"""Hidden-state hints: the draft's layers drawn towards the target's (FitNets 1412.6550), beside a
loss of the distributions. Adding one is one function and one entry in `HINTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from specdistill.errors import InputError
from specdistill.models import LanguageModel


def mse(draft: Tensor, target: Tensor) -> Tensor:
    """Mean over the d values of the squared difference, [N, d] to [N]."""
    return nn.functional.mse_loss(draft, target, reduction="none").mean(-1)


def smooth_l1(draft: Tensor, target: Tensor) -> Tensor:
    """As mse, but linear where a value is off by more than 1 (Huber)."""
    return nn.functional.smooth_l1_loss(draft, target, reduction="none").mean(-1)


def cosine(draft: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine: the direction alone."""
    return 1 - nn.functional.cosine_similarity(draft, target, dim=-1)


HINTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
}


def map_layers(
    layers: Mapping[int, int] | None, draft: LanguageModel, target: LanguageModel
) -> list[tuple[int, int]]:
    """(draft layer, target layer), from 1; None pairs every draft layer with the target's at the
    same relative depth. The last of either stands for its final states, after the norm. Raises
    `InputError` for a layer that is not there.
    """
    n, total = draft.num_layers, target.num_layers
    if layers is None:
        return [(i, max(1, round(i * total / n))) for i in range(1, n + 1)]
    for of_draft, of_target in layers.items():
        if not 1 <= of_draft <= n or not 1 <= of_target <= total:
            raise InputError(
                f"hints.layers maps draft layer {of_draft} to target layer {of_target}; the draft "
                f"has layers 1 to {n}, the target 1 to {total}"
            )
    if not layers:
        raise InputError("hints.layers is empty; name a pair, or leave it out for all layers")
    return sorted(layers.items())


class HintLoss(nn.Module):
    """Σ over positions of the mean over mapped layers of `HINTS[name]`, times `weight`. Where the
    widths differ, a learned linear map takes the draft's states to the target's width; it is
    trained beside the draft and is no part of it.
    """

    def __init__(
        self,
        name: str,
        layers: Mapping[int, int] | None,
        weight: float,
        draft: LanguageModel,
        target: LanguageModel,
    ) -> None:
        super().__init__()
        self.distance, self.weight = HINTS[name], weight
        pairs = map_layers(layers, draft, target)
        self.draft_layers = [i for i, _ in pairs]
        self.target_layers = [j for _, j in pairs]
        wide, narrow = target.head.weight.shape[1], draft.head.weight.shape[1]
        self.maps = nn.ModuleList(
            nn.Identity() if wide == narrow else nn.Linear(narrow, wide, bias=False) for _ in pairs
        ).to(draft.device, torch.promote_types(draft.dtype, torch.float32))

    def forward(self, draft_states: list[Tensor], target_states: list[Tensor]) -> Tensor:
        """Both one [N, d] tensor a mapped layer."""
        kind = torch.promote_types(draft_states[0].dtype, torch.float32)
        states = zip(self.maps, draft_states, target_states, strict=True)
        sums = [
            self.distance(mapped(ours.to(kind)), theirs.detach().to(kind)).sum()
            for mapped, ours, theirs in states
        ]
        return self.weight * torch.stack(sums).mean()
