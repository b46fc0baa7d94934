"""Passes of repeated shape as CUDA graphs: a small model must not be bound by kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from specdistill.errors import InputError

Step = Callable[..., Tensor]
Replay = Callable[[], None]
# From a step and its static inputs to what runs it again, and the output it writes each time.
Capture = Callable[[Step, list[Tensor]], tuple[Replay, Tensor]]


class _Captured(NamedTuple):
    inputs: list[Tensor]
    replay: Replay
    output: Tensor


class Graphs:
    """Captures a step once for each key and replays it on new inputs of the same shapes.

    The output belongs to the graph: the next replay of the same key overwrites it. What the step
    reads besides its inputs must stay where it is in memory until `clear`.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = CudaCapture() if capture is None else capture
        self.captured: dict[Hashable, _Captured] = {}

    def run(self, key: Hashable, step: Step, *inputs: Tensor) -> Tensor:
        captured = self.captured.get(key)
        if captured is None:
            static = [value.clone() for value in inputs]
            captured = self.captured[key] = _Captured(static, *self.capture(step, static))
        for held, value in zip(captured.inputs, inputs, strict=True):
            held.copy_(value)
        captured.replay()
        return captured.output

    def clear(self) -> None:
        self.captured.clear()


class CudaCapture:
    """Captures into one memory pool: graphs run one after the other, so they may share it. Raises
    `InputError` on a machine without CUDA.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("CUDA graphs need a CUDA device, and this machine has none")
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: list[Tensor]) -> tuple[Replay, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces on first use
            for _ in range(2):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = step(*inputs)
        return graph.replay, output
