"""What a model's generation config asks for and the engine does not do is named."""

from __future__ import annotations

import inspect
import re

import pytest
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from specdistill.decoding.sampling import unsupported_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.1),
        ("encoder_repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[5, 6]]),
        ("min_length", 4),
        ("min_new_tokens", 2),
        ("forced_bos_token_id", 1),
        ("forced_eos_token_id", 2),
        ("suppress_tokens", [7]),
        ("begin_suppress_tokens", [8]),
        ("sequence_bias", [[[5, 6], -2.0]]),
        ("exponential_decay_length_penalty", (5, 1.1)),
        ("guidance_scale", 1.5),
        ("watermarking_config", {"bias": 3.5}),
        ("stop_strings", ["END"]),
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("token_healing", True),
    ],
)
def test_what_the_engine_cannot_do_is_named(name: str, value: object) -> None:
    config = GenerationConfig(do_sample=True, **{name: value})
    (told,) = unsupported_settings(config)
    assert told.startswith(f"{name}=")
    assert "3.5" in told if name == "watermarking_config" else told == f"{name}={value}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("typical_p", 0.9), ("epsilon_cutoff", 3e-4), ("eta_cutoff", 1e-3), ("top_h", 0.4)],
)
def test_filters_of_sampled_text_are_named_where_text_is_sampled(name: str, value: float) -> None:
    assert unsupported_settings(GenerationConfig(**{name: value})) == []
    sampled = GenerationConfig(do_sample=True, **{name: value})
    assert unsupported_settings(sampled) == [f"{name}={value}"]


def test_every_one_is_named() -> None:
    config = GenerationConfig(repetition_penalty=1.1, num_beams=2, min_new_tokens=3)
    wanted = {"repetition_penalty=1.1", "num_beams=2", "min_new_tokens=3"}
    assert {*unsupported_settings(config)} == wanted


def test_settings_that_are_off_are_not_named() -> None:
    off = GenerationConfig()._get_default_generation_params()
    assert unsupported_settings(GenerationConfig(**off | {"bad_words_ids": []})) == []
    assert unsupported_settings(GenerationConfig(**off | {"do_sample": True})) == []


def test_no_processor_of_transformers_is_unknown_here() -> None:
    """A setting that a new release of Transformers turns into a processor fails this test."""
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    read = set(re.findall(r"generation_config\.(\w+)", source))
    taken = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
    # No processors of their own; what verification does anyway; broken logits, which raise.
    harmless = {"_eos_token_tensor", "max_length", "renormalize_logits", "remove_invalid_values"}
    harmless |= {"use_cache"}
    everything = GenerationConfig(do_sample=True)
    for name in read - taken - harmless:
        setattr(everything, name, "on")
    told = {setting.split("=")[0] for setting in unsupported_settings(everything)}
    assert read - taken - harmless == told
