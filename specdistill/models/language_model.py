"""A causal language model as its hidden states and its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from specdistill.errors import ModelError
from specdistill.limits import shown
from specdistill.models.attention import of_shared_heads
from specdistill.models.hashes import hashes_of, model_sha256, tensors_sha256
from specdistill.models.llama import LlamaBody, Slots, llama_body
from specdistill.models.packed_linear import Joined, Version, linear_of, version
from specdistill.models.parallel import NUM_DRAFT_TOKENS, ORIGIN, PARD_TOKEN, trained_draft_tokens
from specdistill.models.rope import max_positions
from specdistill.models.support import active_experts, is_of_experts
from specdistill_kernels import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class LanguageModel:
    """A causal language model split into body and head, so that hidden states can be kept and
    logits stay float32.

    `vocab` is None, or [Vd] sorted target ids of the head's rows when the output vocabulary is
    trimmed.
    """

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab: Tensor | None = None

    def __post_init__(self) -> None:
        self.config = self.model.config.get_text_config()
        self.head = cast("nn.Linear", self.model.get_output_embeddings())
        self._wide: tuple[Version, Tensor] | None = None  # see `readout`
        self._head_product: tuple[Tensor, Joined] | None = None

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.head.weight.shape[0]

    @property
    def full_vocab_size(self) -> int:
        """Ids the model can read: the width of the embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return int(embedding.get_parameter("weight").shape[0])

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def token_slots(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and values [1, H, 1, D] that each layer keeps of one token, as meta tensors: a
        pass over one token tells them, since families name, share and compress heads differently.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self.hidden(token, position_ids=token, past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        return [(layer.keys.to("meta"), layer.values.to("meta")) for layer in layers]

    @property
    def max_length(self) -> int:
        """Positions the model has, see `max_positions`."""
        return max_positions(self.config)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer, by the generation config, the config and the tokenizer."""
        ends: set[int] = set()
        for source in (self.model.generation_config, self.config, self.tokenizer):
            ids = getattr(source, "eos_token_id", None)
            ends.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(ends)

    @property
    def mask_token(self) -> int | None:
        """The token that a parallel draft reads in the place of one it cannot know yet; None for a
        model that does not draft in parallel. Raises `ModelError` for what is no id.
        """
        value = getattr(self.model.config, PARD_TOKEN, None)
        rows = self.full_vocab_size
        if value is None or (type(value) is int and 0 <= value < rows):
            return value
        raise ModelError(
            f"the config.json of {self.name} has {PARD_TOKEN}: {shown(value)}, the token that a "
            f"parallel draft reads as a mask; it must be an id of 0 to {rows - 1}"
        )

    @cached_property
    def body(self) -> LlamaBody | None:
        """A leaner pass over the layers than Transformers' own, where the family is known."""
        return llama_body(self.model)

    def hidden(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """[B, n] ids to the final hidden states [B, n, d], after the last norm: what the head
        consumes. Arguments are those of Transformers; where the cache's layers are `Slots`, the
        pass is the lean one of families that have it.
        """
        layers = getattr(kwargs.get("past_key_values"), "layers", ())
        if not layers or not isinstance(layers[0], Slots):
            return self.model.base_model(input_ids=tokens, **kwargs).last_hidden_state
        if self.body is not None:
            return self.body(tokens, kwargs["position_ids"], kwargs["attention_mask"], layers)
        with of_shared_heads(self.model):
            return self.model.base_model(input_ids=tokens, **kwargs).last_hidden_state

    def hidden_after(self, tokens: Tensor, layers: Sequence[int], **kwargs: Any) -> list[Tensor]:
        """The hidden states [B, n, d] after each of `layers`, counted from 1; after the last one
        they are those of `hidden`.
        """
        out = self.model.base_model(input_ids=tokens, output_hidden_states=True, **kwargs)
        return [out.hidden_states[layer] for layer in layers]

    def logits(self, hidden: Tensor, *, packed: bool = False) -> Tensor:
        """[..., d] to float32 logits [..., vocab_size] (float64 for a float64 model).

        The product is added up in float32 whatever the model's dtype: bfloat16 logits are full of
        exact ties, and a tie decided differently by two passes looks like a decoding error. A GPU
        reads the head as it is for that; elsewhere a copy of it in float32 is kept. By the
        `packed` weight, where there is one, the last bits are others: decoding asks for it, while
        what is trained on must not depend on whether something was decoded before.
        """
        weight: Tensor = self.head.weight
        if hidden.dtype == weight.dtype and multiplies_wide(weight):
            return self.scale_logits(wide_product(hidden, weight, self.head.bias))
        head = self.readout()
        hidden = hidden.to(head.weight.dtype)  # kept states may be of another
        if packed and (product := self._product_of(head)).serves(1):
            return self.scale_logits(product(hidden))
        return self.scale_logits(nn.functional.linear(hidden, head.weight, head.bias))

    def readout(self) -> Head:
        """The head as `logits` and the losses take it, in float32 at least, with gradients if it
        has any. Of a head in half precision a copy is kept until its weight changes.
        """
        weight: Tensor = self.head.weight
        bias: Tensor | None = self.head.bias
        if weight.dtype.itemsize < 4:
            now = version(weight)
            if self._wide is None or self._wide[0] != now or weight.requires_grad:
                with torch.inference_mode(False):  # or training could not read it
                    self._wide = now, weight.float()
            weight = self._wide[1]
            bias = None if bias is None else bias.float()
        return Head(weight, bias, self.logit_scale, self.logit_softcap)

    def head_product(self) -> Joined:
        """The product with `readout()`, which `packing` packs."""
        return self._product_of(self.readout())

    def unpack_head(self) -> None:
        """Drop its packed copy, if there is one."""
        self._head_product = None

    def _product_of(self, head: Head) -> Joined:
        if self._head_product is None or self._head_product[0] is not head.weight:
            self._head_product = head.weight, Joined(linear_of(head.weight, head.bias))
        return self._head_product[1]

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What some families do after the head: multiplier (Cohere), divisor (Granite), soft cap
        (Gemma 2).
        """
        scale, cap = self.logit_scale, self.logit_softcap
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def logit_scale(self) -> float:
        scale = getattr(self.config, "logit_scale", None) or 1.0
        if (other := getattr(self.config, "logits_scaling", None)) is not None:
            scale = scale * other if self.config.model_type == "hyperclovax" else scale / other
        return float(scale)

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)

    def parameters(self) -> int:
        """Number of distinct parameters (a tied head counts once)."""
        return sum(p.numel() for p in self.model.parameters())

    def weight_bytes(self) -> int:
        """Bytes of weights read for one token: all but embeddings that are only looked up, and of a
        mixture's experts the share that a token is sent to (`num_experts_per_tok` of them; shared
        ones are read by every token). A batch reads more of them, up to all.
        """
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        looked_up = {id(table) for table in tables} - {id(self.head.weight)}
        share = active_experts(self.config)
        return round(
            sum(
                p.numel() * p.element_size() * (share if is_of_experts(name, p, self.config) else 1)
                for name, p in self.model.named_parameters()
                if id(p) not in looked_up
            )
        )

    def sha256(self) -> str:
        """Hash of the weights and of what the config makes of them, by the files; by the tensors of
        a model that was made here and lies in no folder yet.
        """
        if self.path != Path():
            return model_sha256(self.path)
        return tensors_sha256(self.model.state_dict(), self.config.to_dict())

    def has_sha256(self, recorded: str) -> bool:
        """Whether a hash that was written down is this model's, by an earlier version too."""
        known = {self.sha256()} if self.path == Path() else hashes_of(self.path)
        return recorded in known


def multiplies_wide(weight: Tensor) -> bool:
    """Whether products with a weight in half precision can be had in float32 without a copy of it.
    No gradient goes through them.
    """
    return (
        weight.is_cuda
        and torch.version.hip is None
        and weight.dtype.itemsize == 2
        and not torch.is_grad_enabled()
    )


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., d] and [V, d] of one dtype to float32 [..., V], added up in float32."""
    out = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32)
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1)


def set_origin(
    draft: LanguageModel,
    config_sha256: str,
    step: int,
    target: LanguageModel | None = None,
    chat_template_kwargs: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Say in the draft's config.json which run's weights it has, of which step, how many rows for
    tokens its target has, and what the chat template was told of the texts it has learnt. What it
    was trained to propose in parallel stays.
    """
    facts: dict[str, Any] = {"config_sha256": config_sha256, "step": step}
    if target is not None:
        facts["target_vocab_size"] = target.full_vocab_size
    if (block := trained_draft_tokens(draft)) is not None:
        facts[NUM_DRAFT_TOKENS] = block
    if chat_template_kwargs:
        facts["chat_template_kwargs"] = list(chat_template_kwargs)
    setattr(draft.model.config, ORIGIN, facts)


def origin(draft: LanguageModel) -> dict[str, Any] | None:
    """What `set_origin` said; None for a draft that no run has made."""
    return getattr(draft.model.config, ORIGIN, None)
