"""The decoding engine: caches with a length per row, drafters, sampling settings and the round
loop.
"""

from specdistill.decoding.drafters import Drafter, ModelDrafter
from specdistill.decoding.engine import Generation, Output, Request, Round, SpeculativeDecoder
from specdistill.decoding.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "Drafter",
    "Generation",
    "ModelDrafter",
    "Output",
    "Request",
    "Round",
    "Sampling",
    "SpeculativeDecoder",
]
