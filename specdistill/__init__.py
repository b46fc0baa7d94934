"""SpecDistill: make a draft model for your target and your prompts, distil it, and score it by real
speculative decoding.

The names below are loaded when they are first used: importing this package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specdistill.data.decoder import Decoder as Decoder
    from specdistill.data.generation import generate as generate
    from specdistill.data.prompt_list import prompts as prompts
    from specdistill.decoding import Sampling as Sampling
    from specdistill.drafts.export import export as export
    from specdistill.drafts.making import make_draft as make_draft
    from specdistill.models import load as load
    from specdistill.report.plots import figure_speedup as plot  # noqa: F401
    from specdistill.scoring.check import check as check
    from specdistill.scoring.compare import compare as compare
    from specdistill.scoring.measure import score as score
    from specdistill.training.run import distill as distill

_PLACES = {
    "Decoder": "data.decoder:Decoder",
    "Sampling": "decoding:Sampling",
    "check": "scoring.check:check",
    "compare": "scoring.compare:compare",
    "distill": "training.run:distill",
    "export": "drafts.export:export",
    "generate": "data.generation:generate",
    "load": "models:load",
    "make_draft": "drafts.making:make_draft",
    "plot": "report.plots:figure_speedup",
    "prompts": "data.prompt_list:prompts",
    "score": "scoring.measure:score",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'specdistill' has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    return getattr(import_module(f"specdistill.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _PLACES.keys())
