"""Work of repeated shape as CUDA graphs: a small model must not be bound by kernel launches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdistill.errors import DecodingError, InputError

Step = Callable[..., Any]  # returns a tensor, or a tuple of them
Commit = Callable[[Any], None]  # writes what a step returned over what the next one reads
Replay = Callable[[], None]
# From a step, its static inputs and a commit to what runs both again, and the output that is
# written each time.
Capture = Callable[[Step, list[Tensor], Commit], tuple[Replay, Any]]


class CannotCaptureError(Exception):
    """A step waits for the host, does what no graph may hold, or takes more memory as a graph than
    there is.
    """


@functools.cache
def warn_of_eager_rounds(reason: str) -> None:
    """Once for a reason."""
    warnings.warn(
        f"rounds are not captured in CUDA graphs, and take longer: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


class _Captured(NamedTuple):
    inputs: list[Tensor]
    replay: Replay
    output: Any


class Graphs:
    """Captures a step once for each key and replays it on new inputs of the same shapes.

    The output belongs to the graph: the next replay of the same key overwrites it. What the step
    reads besides its inputs must stay where it is in memory until `clear`. `captures` and `replays`
    count.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self.capture = CudaCapture(device) if capture is None else capture
        self.captured: dict[Hashable, _Captured] = {}
        self.captures = self.replays = 0

    def run(self, key: Hashable, step: Step, *inputs: Tensor, commit: Commit | None = None) -> Any:
        """What `step` returns for the inputs. `commit` runs after it in each replay, but not while
        capturing, which runs the step several times. Raises `CannotCaptureError`.
        """
        graph = self.captured.get(key)
        if graph is None:
            static = [value.clone() for value in inputs]
            replay, output = self.capture(step, static, commit or _nothing)
            graph = self.captured[key] = _Captured(static, replay, output)
            self.captures += 1
        for held, value in zip(graph.inputs, inputs, strict=True):
            held.copy_(value)
        graph.replay()
        self.replays += 1
        return graph.output

    def clear(self) -> None:
        self.captured.clear()


def _nothing(output: Any) -> None:
    pass


class CudaCapture:
    """Captures what runs on a device, whichever is the current one, into one memory pool: graphs
    run one after the other, so they may share it. Raises `InputError` for a device that is no CUDA
    device of this machine, and `CannotCaptureError` where a capture fails.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise InputError("CUDA graphs need a CUDA device, and this machine has none")
        if device.type != "cuda":
            raise InputError(f"CUDA graphs need a model on a CUDA device; this one is on {device}")
        self.device = device
        self.stream = torch.cuda.Stream(device)  # of all captures, or they shared no memory
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: list[Tensor], commit: Commit) -> tuple[Replay, Any]:
        try:
            return self._captured(step, inputs, commit)
        except (RuntimeError, DecodingError) as error:
            reason = str(error).partition("\n")[0]
            raise CannotCaptureError(reason or type(error).__name__) from error

    def _captured(self, step: Step, inputs: list[Tensor], commit: Commit) -> tuple[Replay, Any]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            # `graph` does not give the stream back where the end of a capture raises.
            with torch.cuda.stream(self.stream):
                step(*inputs)  # libraries allocate their workspaces on first use
                _check_no_wait(step, inputs)
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    output = step(*inputs)
                    commit(output)
        finally:
            current.wait_stream(self.stream)
        return graph.replay, output


def _check_no_wait(step: Step, inputs: list[Tensor]) -> None:
    """A capture that a wait for the device breaks leaves torch's random generator unusable, so it
    is found out before: torch raises a `RuntimeError`.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # that the mode is a prototype, which is no user's concern
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)
