"""An engine that answers in place of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from specdistill.data.questions import AnyDecoder
from specdistill.models import LanguageModel

Loader = Callable[[], LanguageModel]


class OutsideDecoder(AnyDecoder, Protocol):
    """An engine in place of ours, and what it runs: name, version, dtype and the like."""

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Prompts that it will not answer in this call, by id, and why."""


class Outside(NamedTuple):
    """What makes an engine of a model and the batch size, and what settings of its own decide the
    answers. Where it tells the target's signal, `reader` is the target that checks some of it.
    """

    name: str
    decoder: Callable[[LanguageModel, int], OutsideDecoder]
    settings: Mapping[str, Any] = {}
    reader: Loader | None = None
