"""The pass of Llama-shaped models in as few operations as it takes.

Between the products of a small model a general library spends as long as in them. Families that are
not listed here, and what is adapted or quantised, run by Transformers' own modules.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdistill.models.packed_linear import Joined
from specdistill.models.rope import max_positions

# Fused attention on a CPU takes queries 32 at a time; in half precision it rounds fewer than four
# of them otherwise, and takes longer for them.
QUERIES, FEW = 32, 4
TOLERANCE = 1e-4  # of the states, in float32: far above rounding
WINDOW = 3  # of the text that tells, which is longer
EXCERPTS = 8  # layers that are seen in float32, of a model in half precision
FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}

Masks = Tensor | Mapping[str, Tensor]


@runtime_checkable
class Slots(Protocol):
    """What keeps one layer's keys and values."""

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [B, n, H, D] of new tokens; returns those to attend to,
        [B, H, L, D].
        """
        ...


class _Norm:
    """Of the root of the mean square, over the last dimension."""

    def __init__(self, module: Any) -> None:
        self.weight, self.epsilon = module.weight, module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class _Layer(NamedTuple):
    qkv: Joined
    out: Joined
    gate_up: Joined
    down: Joined
    before: _Norm
    after: _Norm
    heads: tuple[int, int]  # of queries, of keys and values
    head_norms: tuple[_Norm, _Norm] | None
    scaling: float
    activation: Callable[[Tensor], Tensor]
    kind: str

    @classmethod
    def of(cls, layer: Any, kind: str) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        heads = [p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj)]
        has_norms = hasattr(attention, "q_norm")
        return cls(
            Joined(attention.q_proj, attention.k_proj, attention.v_proj),
            Joined(attention.o_proj),
            Joined(mlp.gate_proj, mlp.up_proj),
            Joined(mlp.down_proj),
            _Norm(layer.input_layernorm),
            _Norm(layer.post_attention_layernorm),
            (heads[0], heads[1]),
            (_Norm(attention.q_norm), _Norm(attention.k_norm)) if has_norms else None,
            attention.scaling,
            mlp.act_fn,
            kind,
        )

    def products(self) -> tuple[Joined, ...]:
        return self.qkv, self.out, self.gate_up, self.down


class LlamaBody:
    """Embedding, layers and last norm of a model, by its own modules' weights."""

    def __init__(self, base: Any) -> None:
        layers = list(base.layers)
        kinds = getattr(base.config, "layer_types", None) or ["full_attention"] * len(layers)
        self.embed, self.rotary, self.norm = base.embed_tokens, base.rotary_emb, _Norm(base.norm)
        self.layers = [_Layer.of(layer, kind) for layer, kind in zip(layers, kinds, strict=True)]
        self.kinds = set(kinds)
        heads, kv_heads = self.layers[0].heads
        self.sharing = heads // kv_heads  # so many heads' queries see the same keys

    def products(self) -> list[Joined]:
        return [product for layer in self.layers for product in layer.products()]

    def __call__(
        self, tokens: Tensor, positions: Tensor, masks: Masks, slots: Sequence[Slots]
    ) -> Tensor:
        """Ids and positions [B, n] to hidden states [B, n, d], after the last norm. A mask
        [B, 1, n, L] says what is seen, or is added to the scores; where layers are of several
        kinds, there is one for each.
        """
        x = self.embed(tokens)
        cos, sin = self.rotary(x, positions)
        half = cos.shape[-1] // 2
        turn = cos[:, :, None], torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, :, None]
        if isinstance(masks, Tensor):
            by_kind = dict.fromkeys(self.kinds, _added(masks, x.dtype, self.sharing))
        else:
            by_kind = {kind: _added(masks[kind], x.dtype, self.sharing) for kind in self.kinds}
        queries = tokens.shape[1] * self.sharing
        rest = queries % QUERIES
        narrow = x.device.type == "cpu" and x.dtype.itemsize == 2 and 0 < rest < FEW
        more = FEW - rest if narrow else 0
        if more:
            by_kind = {kind: F.pad(mask, (0, 0, 0, more)) for kind, mask in by_kind.items()}
        for layer, layer_slots in zip(self.layers, slots, strict=True):
            x = x + layer.out(
                _attend(layer, layer.qkv(layer.before(x)), turn, by_kind[layer.kind], layer_slots)
            )
            gate, up = layer.gate_up.parts(layer.after(x))
            x = x + layer.down(layer.activation(gate) * up)
        return self.norm(x)


def _added(mask: Tensor, dtype: torch.dtype, sharing: int) -> Tensor:
    """A mask [B, 1, n, L] as it is added to the scores of heads that share keys,
    [B, 1, sharing * n, L].
    """
    if mask.dtype != torch.bool:
        return mask.repeat(1, 1, sharing, 1)
    batch, _, rows, slots = mask.shape
    added = torch.zeros((batch, sharing, rows, slots), dtype=dtype, device=mask.device)
    return added.masked_fill_(~mask, torch.finfo(dtype).min).view(batch, 1, -1, slots)


def _attend(
    layer: _Layer, qkv: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, slots: Slots
) -> Tensor:
    """[B, n, (heads + 2 kv heads) * D] to [B, n, heads * D]. The mask is repeated for heads that
    share keys: [B, 1, heads / kv heads * n, L]; what it has more, queries are filled up to.
    """
    heads, kv_heads = layer.heads
    batch, new, _ = qkv.shape
    qkv = qkv.view(batch, new, heads + 2 * kv_heads, -1)
    turned = qkv[:, :, : heads + kv_heads]
    if layer.head_norms is not None:
        q_norm, k_norm = layer.head_norms
        turned = torch.cat((q_norm(turned[:, :, :heads]), k_norm(turned[:, :, heads:])), 2)
    cos, sin = turn
    turned = torch.addcmul(turned * cos, turned.roll(cos.shape[-1] // 2, -1), sin)
    keys, values = slots.write(turned[:, :, heads:], qkv[:, :, heads + kv_heads :])
    # Heads that share keys are further queries of one head, so that the slots are read once.
    queries = turned[:, :, :heads].transpose(1, 2).reshape(batch, kv_heads, -1, keys.shape[-1])
    count = queries.shape[2]
    if more := mask.shape[2] - count:
        queries = F.pad(queries, (0, 0, 0, more))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=layer.scaling)
    if more:
        out = out[:, :, :count]
    return out.reshape(batch, heads, new, -1).transpose(1, 2).flatten(2)


def llama_body(model: Any) -> LlamaBody | None:
    """The body of a model whose layers are known here, else None. Layers of a listed family that
    have come to compute something else are left to Transformers, with a warning.
    """
    config = model.config.get_text_config()
    base = model.base_model
    if (
        not type(base).__module__.startswith("transformers.models.")
        or config.model_type not in FAMILIES
        or config._attn_implementation != "sdpa"
        or any(_adapted(module) for module in base.modules())
    ):
        return None
    rounding = torch.finfo(base.dtype).eps * len(base.layers) ** 0.5
    half = base.dtype.itemsize < 4
    with torch.inference_mode():
        body = _agreeing(base, 0.02 + 4 * rounding if half else TOLERANCE)
        # In half precision rounding hides small differences: layers are then seen in float32, too.
        if half and body is not None:
            spread = torch.linspace(0, len(base.layers) - 1, EXCERPTS).long().unique().tolist()
            if any(_agreeing(_excerpt(base, index), TOLERANCE) is None for index in spread):
                body = None
    if body is None:
        warnings.warn(
            f"the layers of {config.model_type} are not what they were in the versions of "
            "Transformers this was tested with; its own pass is taken, which is slower",
            stacklevel=2,
        )
        return None
    return body


def _agreeing(base: Any, tolerance: float) -> LlamaBody | None:
    """The body of a text model, or None where it computes something else: states at positions
    spread over all that the model has, through a window that is shorter than the text.
    """
    config, device, count = base.config, base.device, 8
    tokens = torch.arange(count, device=device)[None] % base.embed_tokens.weight.shape[0]
    last = max(max_positions(config), count) - 1
    positions = torch.tensor([[i * last // (count - 1) for i in range(count)]], device=device)
    places = torch.arange(count, device=device)
    seen = places <= places[:, None]
    slides = seen & (places > places[:, None] - WINDOW)
    window = getattr(config, "sliding_window", None)
    everywhere = window and not getattr(config, "layer_types", None)
    masks = {
        kind: torch.zeros(1, 1, count, count, dtype=base.dtype, device=device).masked_fill_(
            ~mask, -torch.inf
        )
        for kind, mask in (
            ("full_attention", slides if everywhere else seen),
            ("sliding_attention", slides),
        )
    }
    if window:
        config.sliding_window = WINDOW
    try:
        expected = base(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=torch.ones_like(tokens),  # or a step in positions begins another text
            use_cache=False,
        ).last_hidden_state.float()
        body = LlamaBody(base)
        states = body(tokens, positions, masks, [_NoSlots()] * len(body.layers)).float()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    finally:
        if window:
            config.sliding_window = window
    return body if (states - expected).norm() <= tolerance * expected.norm() else None


def _excerpt(base: Any, index: int) -> Any:
    """One layer of a text model with the little that is around it, in float32."""
    part = copy.copy(base)
    part.config = copy.deepcopy(base.config)
    part.config.num_hidden_layers = 1
    if kinds := getattr(base.config, "layer_types", None):
        part.config.layer_types = [kinds[index]]
    embedding = nn.Embedding.from_pretrained(base.embed_tokens.weight[:64].float())
    modules = {
        "embed_tokens": embedding,
        "layers": nn.ModuleList([copy.deepcopy(base.layers[index]).float()]),
        "norm": copy.deepcopy(base.norm).float(),
    }
    part._modules = {**base._modules, **modules}
    return part


class _NoSlots:
    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys.transpose(1, 2), values.transpose(1, 2)


def _adapted(module: nn.Module) -> bool:
    """Whether its weight alone does not say what a linear layer computes."""
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear
