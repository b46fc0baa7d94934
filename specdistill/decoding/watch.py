"""Where a round's time goes."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

PARTS = ("prefill", "draft", "target", "verify", "other")


class Watch:
    """The seconds of a round by part. On CUDA they are read from events when the round is over, so
    that the host does not wait for the device between the parts. It starts now, or at the end of
    another's.
    """

    def __init__(self, device: torch.device, after: Watch | None = None) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.parts: list[str] = []
        self.marks: list[Any] = [self._now() if after is None else after.marks[-1]]

    def mark(self, part: str) -> None:
        self.parts.append(part)
        self.marks.append(self._now())

    def seconds(self) -> dict[str, float]:
        if self.stream is None:
            spent = [b - a for a, b in pairwise(self.marks)]
        else:
            self.marks[-1].synchronize()
            spent = [a.elapsed_time(b) / 1000 for a, b in pairwise(self.marks)]
        return dict.fromkeys(PARTS, 0.0) | dict(zip(self.parts, spent, strict=True))

    def _now(self) -> float | torch.cuda.Event:
        if self.stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        self.stream.record_event(event)
        return event
