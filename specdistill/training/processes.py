"""The processes that train one draft together, and what a launcher may ask of them."""

from __future__ import annotations

import os

from accelerate import PartialState
from accelerate.tracking import get_available_trackers

from specdistill.config import DistillConfig
from specdistill.errors import InputError


def first_process() -> bool:
    """Of several that train one draft, the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def leave_processes() -> None:
    """At the end of a program that may be one of several processes: with threads of their group
    still running its exit may be aborted.
    """
    PartialState().destroy_process_group()


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
