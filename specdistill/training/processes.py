"""The processes that train one draft together, and what a launcher may ask of them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from specdistill.config import DistillConfig
from specdistill.data.signal import States
from specdistill.errors import InputError
from specdistill.training.batches import Batch


def first_process() -> bool:
    """Of several that train one draft, the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def leave_processes() -> None:
    """At the end of a program that may be one of several processes: with threads of their group
    still running its exit may be aborted.
    """
    PartialState().destroy_process_group()


class WholeLoss(nn.Module):
    """All that is differentiated in one call: what runs a model in several processes must see it
    whole.
    """

    def __init__(
        self,
        draft: nn.Module,
        hints: nn.Module | None,
        mask: nn.Module | None,
        loss_of: Callable[[Batch], Tensor],
        states: Callable[[Batch], States],
    ) -> None:
        super().__init__()
        self.draft, self.hints, self.mask = draft, hints, mask
        self.loss_of, self.states = loss_of, states

    def forward(self, batch: Batch, states_alone: bool = False) -> tuple[Tensor, Tensor | None]:
        """The loss, and what a window owes, see `Prefix.debt`."""
        if states_alone:
            return self.states(batch).hidden, None
        return self.loss_of(batch), None if batch.prefix is None else batch.prefix.debt()

    @torch.no_grad()
    def read(self, batch: Batch) -> None:
        """Pass over a window for its keys and values: through `forward`, where a draft that is cut
        is put together.
        """
        self(batch, states_alone=True)


def most(accelerator: Accelerator, numbers: list[int]) -> list[int]:
    """The largest of each number that any process has."""
    each = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    return each.amax(0).tolist()


def check_launch(config: DistillConfig) -> None:
    """Raises `InputError` for what this machine lacks, or accelerate was told and we do not do."""
    missing = set(config.trackers) - {str(t) for t in get_available_trackers()}
    if missing:
        raise InputError(
            f"trackers: {', '.join(sorted(missing))} cannot be imported; install it or leave it out"
        )
    for variable in (
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_MEGATRON_LM",
    ):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"{variable} is set, and a draft is cut over processes by training.shard: true; "
                "launch with configs/multi_gpu.yaml"
            )


def check_processes(config: DistillConfig, processes: int) -> None:
    """An update's micro-batches are dealt to the processes, so that it is the same with any number
    of them; and they must all end at one step.
    """
    training = config.training
    if training.accumulate % processes:
        raise InputError(
            f"training.accumulate is {training.accumulate}, the forward passes in one update, and "
            f"{processes} processes share them: make it a multiple of {processes}"
        )
    if processes > 1 and training.max_steps is None:
        raise InputError(
            f"training.max_seconds would end {processes} processes at different steps; give "
            "training.max_steps"
        )
