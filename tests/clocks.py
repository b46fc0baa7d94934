"""Time that the machine has no part in, for what scores: a verdict then follows from tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from specdistill.decoding import watch
from specdistill.decoding.cache import CachedModel
from specdistill.engines import transformers
from specdistill.scoring import measure

PassCost = Callable[[CachedModel, int], float]  # of a pass of so many tokens a row


@contextmanager
def clock_of_passes(cost: PassCost, reading: float = 0.0) -> Iterator[None]:
    """Scores read a clock that the models' passes move, and each reading a little."""
    now = 0.0

    def read() -> float:
        nonlocal now
        now += reading
        return now

    real = CachedModel.run

    def run(cached: CachedModel, tokens: Tensor, *rest: Any, **others: Any) -> Tensor:
        nonlocal now
        now += cost(cached, tokens.shape[1])
        return real(cached, tokens, *rest, **others)

    with pytest.MonkeyPatch.context() as patch:
        for module in (measure, watch, transformers):
            patch.setattr(module, "time", SimpleNamespace(perf_counter=read))
        patch.setattr(CachedModel, "run", run)
        yield


def by_layers(cached: CachedModel, tokens: int) -> float:
    """Seconds of a pass on a machine where further tokens cost little beside the weights."""
    return 0.01 * len(cached.layers) * (1 + tokens / 64)
