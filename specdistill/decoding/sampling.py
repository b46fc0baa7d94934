"""How a request wants its tokens drawn, and the settings of a batch of rows as the kernels take
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdistill import limits
from specdistill_kernels import RowSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Settings of Transformers' `generate` that change which token comes next or where a text ends, and
# that the engine does not have, each with the value that turns it off. Most depend on the text so
# far. Those of the second group act on sampled text only.
_UNSUPPORTED: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "force_words_ids": None,
    "constraints": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "token_healing": False,
    "stop_strings": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "dola_layers": None,
}
_UNSUPPORTED_SAMPLED: dict[str, Any] = {
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Applied in this order, ties
    kept.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        limits.check("temperature", self.temperature, limits.TEMPERATURE, off=0)
        limits.check("top_k", self.top_k, limits.TOP_K)
        limits.check("top_p", self.top_p, limits.TOP_P)
        limits.check("min_p", self.min_p, limits.MIN_P)


def unsupported_settings(config: GenerationConfig) -> list[str]:
    """Each setting of a generation config that is on and that the engine does not have, as
    "name=value".
    """
    settings = []
    for name, off in (_UNSUPPORTED | (_UNSUPPORTED_SAMPLED if config.do_sample else {})).items():
        value = getattr(config, name, None)
        if value not in (None, off, [], {}):
            settings.append(f"{name}={value.to_dict() if hasattr(value, 'to_dict') else value}")
    return settings


GREEDY = Sampling()


def row_settings(
    samplings: Sequence[Sampling], seeds: Sequence[int], device: torch.device
) -> RowSettings:
    """The settings of a batch of rows in their first round, for `sample` and `verify`. A filter
    that no row uses is None.
    """

    def column(name: str, dtype: torch.dtype, off: float) -> Tensor | None:
        values = [getattr(sampling, name) for sampling in samplings]
        if all(value == off for value in values):
            return None
        return torch.tensor(values, dtype=dtype, device=device)

    temperatures = [sampling.temperature for sampling in samplings]
    row_seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
    return RowSettings(
        torch.tensor(temperatures, dtype=torch.float64, device=device),
        row_seeds,
        torch.zeros_like(row_seeds),
        column("top_k", torch.int64, 0),
        column("top_p", torch.float64, 1.0),
        column("min_p", torch.float64, 0.0),
    )


def own_sampling(samplings: Sequence[Sampling], seed: int, request_id: str) -> Sampling:
    """The one of several settings that a request gets, by its id and the run's seed."""
    return samplings[row_seed(seed, request_id) % len(samplings)]


def row_seed(seed: int, request_id: str) -> int:
    """A row's own 63-bit seed from the run's seed and the request's id, so that its draws do not
    depend on its slot.
    """
    digest = hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
