"""The lean pass against Transformers' own, where it is taken and where it is not. That its text and
its hidden states are those of the stock model is tested by families in test_architectures.py.
"""

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model
from dispatch import Sizes
from test_architectures import family_model
from torch import nn

from specdistill.decoding.cache import CachedModel, attention_mask
from specdistill.models import LanguageModel, packed_linear
from specdistill.models.llama import FAMILIES, LlamaBody, _added, llama_body
from specdistill.models.packed_linear import Joined, packs
from specdistill.models.packing import pack

Tiny = Callable[..., LanguageModel]
LEAN = ["llama", "llama:dynamic", "mistral", "qwen2", "qwen2:sliding", "qwen3"]
needs_packing = pytest.mark.skipif(not packs(torch.float32), reason="nothing here packs float32")


def test_the_listed_families_are_the_tested_ones() -> None:
    assert {name.split(":")[0] for name in LEAN} == FAMILIES


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.filterwarnings("error")
def test_the_lean_pass_is_taken(name: str) -> None:
    assert family_model(name).body is not None


@pytest.mark.filterwarnings("error")
def test_rounding_is_not_taken_for_another_computation() -> None:
    """In bfloat16 it adds up over the layers, to a tenth of the largest state here."""
    model = tiny_model(5, layers=200, dtype=torch.bfloat16, initializer_range=0.05)
    assert llama_body(model.model) is not None


@pytest.mark.parametrize("name", ["gemma", "gpt2", "olmo2", "qwen3_moe", "smollm3", "granite"])
@pytest.mark.filterwarnings("error")
def test_other_families_keep_their_own(name: str) -> None:
    assert family_model(name).body is None


def test_eager_attention_and_adapted_layers_keep_their_own() -> None:
    model = tiny_model().model
    model.config._attn_implementation = "eager"
    assert llama_body(model) is None

    class Adapted(nn.Linear):
        pass

    model = tiny_model().model
    assert llama_body(model) is not None
    projection = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = Adapted(
        projection.in_features, projection.out_features
    )
    assert llama_body(model) is None


@pytest.mark.parametrize("change", ["another result", "another name"])
def test_layers_that_have_changed_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = tiny_model(layers=2).model
    first = model.model.layers[0]
    if change == "another result":
        monkeypatch.setattr(first.mlp, "forward", lambda x: 2 * x)
    else:
        first.self_attn.query = first.self_attn.__dict__["_modules"].pop("q_proj")
        monkeypatch.setattr(first, "forward", lambda hidden_states, **_: hidden_states)
    with pytest.warns(UserWarning, match="the layers of llama are not what they were"):
        assert llama_body(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_layer_that_is_a_little_off_is_left_to_transformers(
    dtype: torch.dtype, index: int
) -> None:
    """Less than half precision tells from its rounding."""
    model = tiny_model(layers=5, dtype=dtype).model
    assert llama_body(model) is not None
    mlp = type(model.model.layers[index].mlp)

    class Off(mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.02 * super().forward(x)

    model.model.layers[index].mlp.__class__ = Off
    with pytest.warns(UserWarning, match="the layers of llama are not what they were"):
        assert llama_body(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["window", "position"])
def test_windows_and_far_positions_are_seen(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, what: str
) -> None:
    model = family_model("mistral" if what == "window" else "llama").model.to(dtype)
    assert llama_body(model) is not None
    if what == "window":
        real = LlamaBody.__call__

        def call(self, tokens, positions, masks, slots):
            seen = torch.full((8, 8), -torch.inf, dtype=self.norm.weight.dtype).triu(1)[None, None]
            return real(self, tokens, positions, dict.fromkeys(masks, seen), slots)

        monkeypatch.setattr(LlamaBody, "__call__", call)
    else:
        monkeypatch.setattr(
            LlamaBody,
            "__call__",
            lambda self, tokens, positions, masks, slots, real=LlamaBody.__call__: real(
                self, tokens, positions.where(positions < 100, positions * 1.01), masks, slots
            ),
        )
    with pytest.warns(UserWarning, match="are not what they were"):
        assert llama_body(model) is None


def states(model: LanguageModel, count: int) -> torch.Tensor:
    """Of `count` tokens after a prompt, in two rows."""
    cached = CachedModel(model, 2, 40)
    cached.prefill(torch.arange(2), [[7, 8, 9, 10], [5, 6]])
    positions = torch.tensor([[4], [2]]) + torch.arange(count)
    return cached.run(torch.full((2, count), 11), positions, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_lean_pass_in_every_dtype(tiny: Tiny, dtype: torch.dtype) -> None:
    model, stock = tiny(3, layers=3, dtype=dtype), tiny(3, layers=3, dtype=dtype)
    assert isinstance(model.body, LlamaBody)
    stock.body = None
    expected = states(stock, 3).float()
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (states(model, 3).float() - expected).abs().max() < 8 * tolerance


@needs_packing
def test_packed_passes_are_the_same_passes() -> None:
    for name in ("llama", "qwen2", "qwen3"):  # without biases, with some, with norms of heads
        model = family_model(name)
        model.model.float()
        expected = {count: states(model, count) for count in (1, 3, 9)}
        pack(model, 2)
        assert all(p.max_rows > 0 for p in model.body.products())
        for count, hidden in expected.items():
            assert torch.allclose(states(model, count), hidden, atol=1e-4), (name, count)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
def test_a_product_packed_by_mkl_takes_the_stock_one_beyond_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_linear, "_library", lambda dtype: "MKL")
    torch.manual_seed(0)
    linears = [nn.Linear(6, n).requires_grad_(False) for n in (5, 3)]
    joined = Joined(*linears)
    joined.pack(2)
    for rows in (1, 2, 8, 9, 30):
        x = torch.randn(rows, 6)
        expected = torch.cat([linear(x) for linear in linears], -1)
        assert torch.allclose(joined(x), expected, atol=1e-6)
        assert [part.shape[-1] for part in joined.parts(x)] == [5, 3]
        assert torch.equal(torch.cat(list(joined.parts(x)), -1), joined(x))
    linears[0].weight.zero_()  # the packed copy is used up to 4 times its rows, and does not see it
    assert joined(torch.ones(8, 6))[:, :5].ne(linears[0].bias).all()
    assert joined(torch.ones(9, 6))[:, :5].eq(linears[0].bias).all()


def test_unpacked_passes_follow_the_weights(tiny: Tiny) -> None:
    """A draft in training is decoded with the weights that it has."""
    model = tiny(4, layers=2)
    before = states(model, 2)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    stock = tiny(4, layers=2)
    stock.model.load_state_dict(model.model.state_dict())
    stock.body = None
    assert not torch.allclose(states(model, 2), before, atol=1e-3)
    assert torch.allclose(states(model, 2), states(stock, 2), atol=1e-5)


def test_masks_to_be_added(tiny: Tiny) -> None:
    model = tiny(0)
    slots, positions = torch.arange(4), torch.tensor([[1, 2]])
    seen = attention_mask(model, slots, positions)
    added = _added(seen, model.dtype, 2)
    assert seen.dtype == torch.bool
    assert torch.equal(_added(added[:, :, :2], model.dtype, 2), added)
    assert torch.equal(added == 0, seen.repeat(1, 1, 2, 1))
    assert added.dtype == model.dtype
    assert added[added != 0].max() < -1e30


@pytest.mark.skipif(not packs(torch.bfloat16), reason="nothing here packs bfloat16")
def test_a_packed_pass_in_bfloat16_rounds_the_same_at_any_width() -> None:
    """So that greedy text with a draft is that of plain decoding in half precision too."""
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "initializer_range": 0.1}
    for kv_heads in (4, 2, 1):
        model = tiny_model(3, dtype=torch.bfloat16, num_key_value_heads=kv_heads, **wide)
        pack(model, 8)
        text = torch.randint(64, (1, 220), generator=torch.Generator().manual_seed(0))

        def states_by(width: int, model: LanguageModel = model, text: torch.Tensor = text):
            cached = CachedModel(model, 1, 220)
            cached.prefill(torch.tensor([0]), [text[0, :148].tolist()])
            places = torch.arange(220)[None]
            return torch.cat(
                [
                    cached.run(text[:, i : i + width], places[:, i : i + width], i + width)
                    for i in range(148, 220, width)
                ],
                1,
            )

        plain = states_by(1)
        for width in (2, 3, 4, 6, 8, 9, 36):
            assert torch.equal(states_by(width), plain), (kv_heads, width)


def test_heads_that_share_keys_are_not_expanded() -> None:
    """Nothing a step makes is as large as the keys would be if each head had its own."""
    model = tiny_model(0, head_dim=64, num_attention_heads=8, num_key_value_heads=1)
    cached = CachedModel(model, 2, 512)
    token = torch.full((2, 1), 7)
    with torch.inference_mode(), Sizes() as sizes:
        cached.run(token, token + 490, 512)
    assert sizes.largest < 2 * 512 * 64 * 8 / 2
    assert sizes.largest >= 2 * 512, "of its mask"
