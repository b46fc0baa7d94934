"""The last layer at the rows that are read: what is read, and its gradients, by whole passes."""

from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_architectures import FAMILIES, family_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from specdistill.drafts.making import decoder_layers
from specdistill.models import LanguageModel
from specdistill.training.last_layer import PARTS, is_by_row, only_at

TOKENS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([5, 6, 7, 11, 21, 22])  # of 24


def states_and_gradients(model: LanguageModel, rows: Tensor) -> list[Tensor]:
    hidden = model.hidden(TOKENS, use_cache=False).flatten(0, 1)[rows]
    toward = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    weights = [p for p in model.model.base_model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(hidden, weights, toward, allow_unused=True)
    whole = zip(weights, gradients, strict=True)
    return [hidden.detach(), *(torch.zeros_like(w) if g is None else g for w, g in whole)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_and_its_gradients_are_those_of_a_whole_pass(name: str) -> None:
    model = family_model(name)
    model.model.requires_grad_(True)
    for rows in (ROWS, ROWS[:0]):
        expected = states_and_gradients(model, rows)
        with only_at(model, rows):
            values = states_and_gradients(model, rows)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(values, expected, strict=True))
    assert all("forward" not in vars(module) for module in model.model.modules())


def products(model: LanguageModel, rows: Tensor | None) -> int:
    """Floating point operations of a pass, of the linear layers and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if rows is None:
            model.hidden(TOKENS, use_cache=False)
        else:
            with only_at(model, rows):
                model.hidden(TOKENS, use_cache=False)
    return counter.get_total_flops()


def test_the_other_rows_are_not_computed() -> None:
    model = tiny_model(0, num_hidden_layers=2)
    modules = dict(decoder_layers(model)[-1].named_modules())
    weights = sum(p.numel() for name in PARTS for p in modules[name].parameters())
    spared = TOKENS.numel() - len(ROWS)
    assert products(model, None) - products(model, ROWS) == 2 * weights * spared


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_see_all_rows(name: str) -> None:
    layer: Any = decoder_layers(family_model(name))[-1]
    assert not is_by_row(layer.mlp)
    assert is_by_row(layer.self_attn.o_proj)
