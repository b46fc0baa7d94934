"""Positions of a pair: stretched alike or refused, while a draft may have fewer."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig

from specdistill.errors import ModelError
from specdistill.models import LanguageModel, check_pair
from specdistill.models.rope import max_positions, scaling

Tiny = Callable[..., LanguageModel]
THETA = {"rope_theta": 1e4}
PLAIN = {"rope_type": "default", **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, **THETA}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **THETA,
}


@pytest.fixture
def pair(tiny: Tiny) -> Callable[..., None]:
    """`check_pair` of a target and a draft by their rotary settings and positions."""

    def check(
        target: dict[str, Any], draft: dict[str, Any], positions: tuple[int, int] = (64, 64)
    ) -> None:
        of_target, of_draft = (
            tiny(layers=layers, rope_parameters=rope, max_position_embeddings=most)
            for layers, rope, most in zip((2, 1), (target, draft), positions, strict=True)
        )
        check_pair(of_target, of_draft)

    return check


@pytest.mark.parametrize(
    ("target", "draft", "positions"),
    [
        (YARN, PLAIN, (64, 64)),
        (YARN, PLAIN, (256, 64)),  # with the positions that the factor makes, as some write it
        (PLAIN, YARN, (64, 64)),
        (LINEAR, PLAIN, (64, 64)),
        (YARN, {**YARN, "factor": 2.0}, (64, 64)),
        ({**LLAMA3, "factor": 8.0}, PLAIN, (512, 64)),
    ],
    ids=["yarn", "yarn, said", "the draft alone", "linear", "another factor", "llama3"],
)
def test_a_pair_that_is_not_stretched_alike_is_refused(
    pair: Callable[..., None], target: dict, draft: dict, positions: tuple[int, int]
) -> None:
    if positions[0] == 256:
        target = {**target, "original_max_position_embeddings": 64}
    with pytest.raises(ModelError) as refused:
        pair(target, draft, positions)
    words = str(refused.value)
    assert "must be stretched alike" in words
    assert "both made for 64" in words
    assert "reads 64 positions" in words or "factor: 2.0" in words
    assert f"rope_type: {target['rope_type']}" in words or "no scaling" in words


@pytest.mark.parametrize(
    ("target", "draft", "positions"),
    [
        (YARN, {**YARN, "factor": 4, "beta_fast": 32.0, "beta_slow": 1}, (64, 64)),
        (YARN, {**PLAIN, "rope_theta": 1e6}, (64, 256)),  # it reads as far by itself
        ({**LLAMA3, "factor": 8.0}, {**LLAMA3, "factor": 32.0}, (512, 512)),  # Llama 3.1 and 3.2
        (LINEAR, PLAIN, (512, 32)),  # trained apart, for other positions (Gemma 3)
        (PLAIN, {**PLAIN, "rope_theta": 1e6}, (64, 64)),
        (PLAIN, PLAIN, (64, 32)),  # fewer: what is longer is refused where texts are known
        ({**YARN, "factor": 1.0}, PLAIN, (64, 64)),
        ({"rope_type": "dynamic", "factor": 4.0, **THETA}, PLAIN, (64, 64)),
    ],
)
def test_what_decides_positions_is_compared_and_not_its_text(
    pair: Callable[..., None], target: dict, draft: dict, positions: tuple[int, int]
) -> None:
    pair(target, draft, positions)


def test_scaling_is_that_of_each_kind_of_layer() -> None:
    text = AutoConfig.for_model("gemma3_text", max_position_embeddings=128)
    assert scaling(text) == {}
    text.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    assert scaling(text) == {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    assert max_positions(text) == 128  # of its sliding layers
