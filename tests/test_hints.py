"""Hints: the layers that are compared, each distance in closed form, the learned map."""

from collections.abc import Callable

import pytest
import torch

from specdistill.config import DistillConfig, Hints, Training
from specdistill.data.token_store import Example
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.training.batches import make_batch
from specdistill.training.distiller import Distiller
from specdistill.training.hints import HINTS, HintLoss, map_layers

Tiny = Callable[..., LanguageModel]
EXAMPLES = [Example("a", [5, 6, 7], [8, 9, 10, 11]), Example("b", [9, 6], [7, 12])]


def settings(**hints: object) -> DistillConfig:
    return DistillConfig(
        target="t",
        draft="d",
        data="none",
        run_dir="none",
        signal="live",
        hints=Hints(**hints),
        training=Training(max_steps=1, clip_norm=1e9),
    )


def test_distances_in_closed_form() -> None:
    ours, theirs = torch.tensor([[3.0, 0.5]]), torch.tensor([[0.0, 0.0]])
    assert HINTS["mse"](ours, theirs).item() == pytest.approx((9 + 0.25) / 2)
    assert HINTS["smooth_l1"](ours, theirs).item() == pytest.approx((2.5 + 0.125) / 2)
    angle = HINTS["cosine"](torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert angle.item() == pytest.approx(1 - 0.5**0.5)


def test_layers_are_mapped_by_relative_depth_or_as_given(tiny: Tiny) -> None:
    target, draft = tiny(layers=6), tiny(1, layers=2)
    assert map_layers(None, draft, target) == [(1, 3), (2, 6)]
    assert map_layers({2: 5, 1: 1}, draft, target) == [(1, 1), (2, 5)]
    for layers, message in (
        ({3: 1}, "draft layer 3 to target layer 1; the draft has layers 1 to 2"),
        ({1: 7}, "target 1 to 6"),
        ({0: 1}, "draft layer 0"),
        ({}, "empty"),
    ):
        with pytest.raises(InputError, match=message):
            map_layers(layers, draft, target)


@pytest.mark.parametrize("kind", HINTS)
def test_a_step_adds_the_distance_of_the_mapped_layers(kind: str, tiny: Tiny) -> None:
    """Against stock forward passes: the mean over layers, summed over the response positions, and
    divided by their number.
    """
    target = tiny(layers=4)
    draft = make_draft(target, [1, 2])
    loss = {}
    for weight in (1.0, 3.0):
        config = settings(kind=kind, layers={1: 3, 2: 4}, weight=weight)
        distiller = Distiller(target, make_draft(target, [1, 2]), config)
        loss[weight] = distiller.step([make_batch(EXAMPLES, 0, draft.device)], 0.0).loss
    total = 0.0
    for example in EXAMPLES:
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        at = slice(len(example.prompt_tokens) - 1, -1)
        ours, theirs = (
            m.model(tokens, output_hidden_states=True).hidden_states for m in (draft, target)
        )
        for a, b in ((1, 3), (2, 4)):
            total += HINTS[kind](ours[a][0, at], theirs[b][0, at]).sum().item() / 2
    assert (loss[3.0] - loss[1.0]) / 2 == pytest.approx(total / 6, rel=1e-4)


def test_the_learned_map_where_widths_differ_is_trained_and_is_no_part_of_the_draft(
    tiny: Tiny,
) -> None:
    target = tiny(layers=4, hidden_size=48)
    draft = tiny(1, layers=2)
    distiller = Distiller(target, draft, settings())
    names = [n for n in distiller.parameters if n.startswith("hints.")]
    assert names == ["hints.maps.0.weight", "hints.maps.1.weight"]
    before = [distiller.parameters[n].detach().clone() for n in names]
    assert before[0].shape == (48, 32)
    batch = make_batch(EXAMPLES, 0, draft.device)
    losses = [distiller.step([batch], 1e-2).loss for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    for name, old in zip(names, before, strict=True):
        assert not torch.equal(distiller.parameters[name], old)
    assert not [n for n in draft.model.state_dict() if "hint" in n]
    assert all(p.grad is None for p in target.model.parameters())


def test_equal_widths_need_no_map(tiny: Tiny) -> None:
    target = tiny(layers=4)
    assert not list(HintLoss("mse", None, 1.0, make_draft(target, [0, 1]), target).parameters())


def test_the_last_layer_is_the_kept_final_state(tiny: Tiny) -> None:
    """So a hint on it alone can be trained from the kept signal."""
    target = tiny(layers=4)
    draft = make_draft(target, [0, 1])
    distiller = Distiller(target, draft, settings(layers={2: 4}))
    batch = make_batch(EXAMPLES, 0, draft.device)
    live = distiller.signal(batch)
    assert {*live.inner} == {4}
    expected = target.hidden(batch.tokens, attention_mask=batch.mask)[batch.response]
    assert torch.equal(live.hidden, expected)
    assert torch.equal(live.inner[4], expected)
