"""How the GPU suite measures time and memory.

On a CUDA device a call is captured in a CUDA graph and its replays are timed by events, so that
neither Python nor launches are measured: with a warm L2 cache, and cold, after a buffer larger than
it was written. Elsewhere the wall clock is read around a single call.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_session import Session

FLUSH_BYTES = 256 << 20  # well above the L2 of any device (50 MB on an H100)
SLEEP_CYCLES = 100_000  # about 50 µs, in which the host gets ahead of the device
MICROSECONDS = 1e6

Call = Callable[[], Any]


class Stopwatch:
    def __init__(self, session: Session) -> None:
        self.cuda = session.device.type == "cuda"
        self.seconds = 0.12  # for one figure
        self.flush = torch.empty(
            FLUSH_BYTES if self.cuda else 1 << 20, dtype=torch.int8, device=session.device
        )

    def time(self, call: Call) -> dict[str, Any]:
        """Microseconds of a call: "cold" and "warm", medians, and "launched", one call after the
        other as Python makes them. `graph` is false where the call waits for the device, which no
        graph can hold; its figures then include launches.
        """
        call()
        if not self.cuda:
            cold, warm = self._wall(call, flush=True), self._wall(call, flush=False)
            return {"cold": cold, "warm": warm, "launched": warm, "graph": False}
        launched = self._back_to_back(call)
        graph = never_waits(call)
        replay = capture(call) if graph else call
        cold, warm = self._events(replay, flush=True), self._events(replay, flush=False)
        return {"cold": cold, "warm": warm, "launched": launched, "graph": graph}

    def once(self, call: Call) -> float:
        """Microseconds of a long call, launches included: the median of a few."""
        call()
        if not self.cuda:
            return self._wall(call, flush=False)
        return self._events(call, flush=False, least=5)

    def _events(self, call: Call, flush: bool, least: int = 10) -> float:
        marks: list[list[torch.cuda.Event]] = []
        stop = time.perf_counter() + self.seconds
        while len(marks) < least or (time.perf_counter() < stop and len(marks) < 300):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if flush:
                self.flush.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)
            pair[0].record()
            call()
            pair[1].record()
            marks.append(pair)
            if len(marks) % 20 == 0:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in marks) * 1e3

    def _back_to_back(self, call: Call, count: int = 20) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * MICROSECONDS

    def _wall(self, call: Call, flush: bool) -> float:
        if flush:
            self.flush.zero_()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * MICROSECONDS

    def bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written bytes counted."""
        size = 1 << 30 if self.cuda else 1 << 22
        source = torch.ones(size, dtype=torch.int8, device=self.flush.device)
        target = torch.empty_like(source)
        return 2 * size / self.once(lambda: target.copy_(source)) * MICROSECONDS

    def nothing(self) -> float | None:
        """Microseconds of a graph that does next to nothing: no figure can be below it."""
        tiny = self.flush[:16]
        return self._events(capture(tiny.zero_), flush=False) if self.cuda else None

    def peak_bytes(self, call: Call) -> int | None:
        """Memory that a call takes at its peak beyond what was taken before; None on a CPU."""
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def never_waits(call: Call) -> bool:
    """Whether a call runs without waiting for the device. A capture that such a wait breaks would
    leave torch's random generator unusable, so it is found out before."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def capture(call: Call) -> Call:
    """What replays a call from a CUDA graph; the call itself where there is no CUDA."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
