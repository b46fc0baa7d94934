"""The decoding engine: settings of decoders and drafters, caches with a length per row, and the
round loop; text from tokens.
"""

from specdistill.decoding.detokenizer import Detokenizer
from specdistill.decoding.drafters import CombinedDrafter, Drafter, ModelDrafter, NgramDrafter
from specdistill.decoding.engine import SpeculativeDecoder
from specdistill.decoding.parallel import Drafting, ParallelDrafter, drafter_for
from specdistill.decoding.records import CacheSize, Generation, Output, Request, Round, RowRound
from specdistill.decoding.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "CacheSize",
    "CombinedDrafter",
    "Detokenizer",
    "Drafter",
    "Drafting",
    "Generation",
    "ModelDrafter",
    "NgramDrafter",
    "Output",
    "ParallelDrafter",
    "Request",
    "Round",
    "RowRound",
    "Sampling",
    "SpeculativeDecoder",
    "drafter_for",
]
