"""Families of models: the engine's text is that of their own `generate`, and what cannot be decoded
is refused before its weights are read.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import amend, random_model, tiny_model, tiny_tokenizer
from dispatch import Draws
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from specdistill.decoding import ModelDrafter, SpeculativeDecoder
from specdistill.decoding.cache import CachedModel, cache_bytes
from specdistill.drafts import making
from specdistill.drafts.making import decoder_layers, make_draft, save_draft
from specdistill.errors import InputError, ModelError
from specdistill.models import LanguageModel, load
from specdistill.models.randomness import seeded

WINDOW = 8
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
COMPRESSED = {
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
BOTH_ROPES = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 1e4), ("sliding_attention", 1e3))
    }
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 128 / 96,
}

# Family (with a variant after a colon) to what its config adds to COMMON.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "llama:dynamic": {**GATED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "qwen2": GATED,
    "qwen2:sliding": {
        **GATED,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": {**GATED, "head_dim": 16},
    "qwen3_moe": {**GATED, **EXPERTS},
    "gemma": {**GATED, "head_dim": 8},
    "gemma2": {
        **GATED,
        **MIXED,
        "head_dim": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**GATED, **MIXED, **BOTH_ROPES, "head_dim": 8},
    "gemma4_text": {
        **GATED,
        **MIXED,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"intermediate_size": 48, "rotary_pct": 0.5},
    "gptj": {"rotary_dim": 4},
    "gpt_oss": {**GATED, **MIXED, "head_dim": 8, "num_local_experts": 4},
    "mistral": {**GATED, "sliding_window": WINDOW},
    "mixtral": {**GATED, "num_local_experts": 4, "sliding_window": None},
    "ministral": {
        **GATED,
        "layer_types": ["sliding_attention"] * 4,
        "sliding_window": WINDOW,
        "head_dim": 8,
    },
    "phi": {"intermediate_size": 48, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "phi3": {**GATED, "sliding_window": WINDOW},
    "phi3:longrope": {
        **GATED,
        "rope_parameters": LONG_ROPE,
        "original_max_position_embeddings": 96,
    },
    "olmo": {**GATED, "clip_qkv": 2.0},
    "olmo2": GATED,
    "olmo3": {**GATED, **MIXED},
    "granite": {
        **GATED,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    "cohere": {**GATED, "logit_scale": 0.25},
    "cohere2": {**GATED, **MIXED, "logit_scale": 0.25, "head_dim": 8},
    "hyperclovax": {**GATED, "logits_scaling": 3.0},
    "stablelm": {**GATED, "partial_rotary_factor": 0.5},
    "starcoder2": {**GATED, "sliding_window": WINDOW},
    "smollm3": {**GATED, "no_rope_layers": [1, 0, 1, 0]},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon:grouped": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "deepseek_v3": {
        **COMPRESSED,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "minicpm3": {**COMPRESSED, "dim_model_base": 16},
    "moshi": {**GATED, "head_dim": 8},
    "nemotron": {"intermediate_size": 48, "num_key_value_heads": 2},
}

PROMPTS = [
    torch.randint(1, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (2, 70, 23)
]


def family_model(name: str, seed: int = 0) -> LanguageModel:
    """A random model of float64 weights, sharp enough that its choices are not all alike."""
    config = AutoConfig.for_model(name.split(":")[0], **COMMON | FAMILIES[name])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation="eager"
    )
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
        else:  # biases are no zeros, and the weights of norms no ones
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return LanguageModel(name, Path(), model, tiny_tokenizer(64))


def generated(target: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy text of the stock model's own `generate`, alone and without padding."""
    tokens = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    out = target.model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    return out[0, len(prompt) :].tolist()


def texts(
    target: LanguageModel,
    draft: LanguageModel | None,
    prompts: list[list[int]],
    count: int,
    batch_size: int,
) -> list[list[int]]:
    drafter = None if draft is None else ModelDrafter(draft, target.vocab_size)
    decoder = SpeculativeDecoder(
        target, drafter, num_draft_tokens=0 if draft is None else 3, batch_size=batch_size
    )
    return [o.tokens for o in decoder.generate(prompts, max_new_tokens=count).outputs]


# What is decoded


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_generate(name: str) -> None:
    target = family_model(name)
    expected = [generated(target, prompt, 8) for prompt in PROMPTS]
    assert len({token for text in expected for token in text}) > 3, "a dull model shows little"
    drafts = {
        "plain": None,
        "half its layers": make_draft(target, [0, 3]),
        "a stranger": family_model(name, seed=1),
    }
    for kind, draft in drafts.items():
        assert texts(target, draft, PROMPTS, 8, 3) == expected, kind
        assert texts(target, draft, PROMPTS[1:2], 8, 1) == expected[1:2], kind


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_logits_are_those_of_the_stock_model(name: str) -> None:
    """Prefill in chunks smaller and larger than a window, with and without a shared prefix, then
    rows at different positions: every logit equals that of one pass without a cache.
    """
    model = family_model(name)
    text = PROMPTS[1][:60]
    with torch.inference_mode():
        expected = model.model(torch.tensor([text])).logits[0]
        for chunk, lengths in ((5, (20, 3, 1)), (13, (31, 40)), (64, (45,))):
            cached = CachedModel(model, len(lengths), len(text))
            rows = torch.arange(len(lengths))
            cached.prefill(rows, [text[:n] for n in lengths], width=chunk)
            for step in range(0, 12, 3):
                positions = torch.tensor(lengths)[:, None] + torch.arange(step, step + 3)
                hidden = cached.run(torch.tensor(text)[positions], positions, max(lengths) + 15)
                assert close(model.logits(hidden), expected[positions]), (chunk, lengths, step)


@pytest.mark.parametrize("name", [n for n, more in FAMILIES.items() if "kv_lora_rank" not in more])
def test_heads_that_share_keys_get_no_copies_of_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values reach PyTorch's attention as the slots hold them, but in a few families."""
    model = family_model(name)
    cached = CachedModel(model, 2, 20)
    attend, heads = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(query: Tensor, key: Tensor, value: Tensor, *others: Any, **more: Any) -> Tensor:
        heads.update((key.shape[1], value.shape[1]))
        return attend(query, key, value, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.inference_mode():
        for start, stop in ((0, 16), (16, 17), (17, 20)):
            positions = torch.arange(start, stop).expand(2, -1)
            cached.run(positions + 7, positions, stop)
    kept = {part.shape[1] for token in model.token_slots for part in token}
    if name.startswith(("falcon", "stablelm")):  # attention of their own, or no other allowed
        assert not model.model.is_backend_compatible()
    elif name in ("gemma2", "gptj", "gpt_oss"):  # plain products
        assert not heads or model.config._attn_implementation == "sdpa"  # an older Gemma 2
    else:
        assert heads == kept


def close(a: Tensor, b: Tensor) -> bool:
    """Some families compute parts in float32 whatever their weights are."""
    return torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_of_the_cache_are_known_before_it_is_allocated(name: str) -> None:
    model = family_model(name)
    for batch, capacity in ((1, 1), (3, 64), (2, 100)):
        expected = cache_bytes(model, batch, capacity)
        layers = CachedModel(model, batch, capacity).layers
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == expected
    heads, width = {
        "llama": (2, 8),
        "qwen3": (2, 16),
        "gpt2": (4, 8),
        "gpt_bigcode": (1, 8),
        "falcon": (1, 8),
        "falcon:grouped": (4, 8),  # it keeps its keys repeated for every head
    }.get(name, (0, 0))
    if heads:
        assert cache_bytes(model, 3, 65) == 4 * 2 * 3 * heads * width * 128 * 8


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_is_made_without_drawing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, its buffers (those that no checkpoint holds, too) and its logits are those of a
    model that was filled at random first.
    """
    target = family_model(name)
    with monkeypatch.context() as patch, Draws() as filled:
        patch.setattr(making, "Unfilled", lambda: seeded(0))
        expected = make_draft(target, [0, 3])
    with Draws() as draws:
        made = make_draft(target, [0, 3])
    assert filled.names
    assert not draws.names
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(draft.model, kind)()) for draft in (made, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), kind
    assert not {p.data_ptr() for p in made.model.parameters() if p.numel()} & {
        p.data_ptr() for p in target.model.parameters()
    }
    tokens = torch.tensor([PROMPTS[1][:12]])
    assert torch.equal(made.model(tokens).logits, expected.model(tokens).logits)


def test_a_batch_at_the_end_of_learned_positions() -> None:
    """Rows of which one ends at the last position there is, while others still propose; and a draft
    with fewer positions than the texts need.
    """
    target = family_model("gpt2")
    target.model.generation_config.eos_token_id = target.config.eos_token_id = None
    target = replace(target, tokenizer=tiny_tokenizer(64))
    target.tokenizer.eos_token = None
    prompts = [(PROMPTS[1] * 2)[:116], PROMPTS[2]]
    expected = [generated(target, prompt, 12) for prompt in prompts]
    short = family_model("gpt2", seed=1)
    short.model.transformer.wpe.weight = torch.nn.Parameter(
        short.model.transformer.wpe.weight[:32], requires_grad=False
    )
    short.config.n_positions = 32
    for draft in (None, target, make_draft(target, [0]), short):
        assert texts(target, draft, prompts, 12, 2) == expected
    with pytest.raises(InputError, match=r"117 prompt tokens .* exceed the 128 positions of gpt2"):
        texts(target, None, [prompts[0] + [5]], 12, 1)


def test_positions_end_where_rotary_frequencies_would_change() -> None:
    """LongRoPE turns to other frequencies when the longest text of a batch passes its original
    length, so that rows would change each other.
    """
    long, dynamic = family_model("phi3:longrope"), family_model("llama:dynamic")
    assert long.max_length == 96
    assert dynamic.max_length == family_model("llama").max_length == 128
    for model in (long, dynamic):
        prompts = [PROMPTS[0], (PROMPTS[1] * 2)[: model.max_length - 10]]
        expected = [generated(model, prompt, 10) for prompt in prompts]
        assert texts(model, make_draft(model, [0, 1]), prompts, 10, 2) == expected
    with pytest.raises(InputError, match="exceed the 96 positions of phi3:longrope"):
        texts(long, None, [[5] * 87], 10, 1)


def test_ends_of_answers_from_the_generation_config() -> None:
    """A model that lists several ends, as instruct models do."""
    target = family_model("qwen2")
    whole = [generated(target, prompt, 14) for prompt in PROMPTS]
    end = whole[1][5]
    target.model.generation_config.eos_token_id = [0, end]
    expected = [generated(target, prompt, 14) for prompt in PROMPTS]
    assert expected[1] == whole[1][: whole[1].index(end) + 1] != whole[1]
    for draft in (None, make_draft(target, [0, 1])):
        assert texts(target, draft, PROMPTS, 14, 3) == expected


def test_an_image_model_reads_text() -> None:
    """Gemma 3 with its vision tower: the text part alone is decoded."""
    text = AutoConfig.for_model("gemma3_text", **COMMON | FAMILIES["gemma3_text"])
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=63,
    )
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    target = LanguageModel("gemma3", Path(), model, tiny_tokenizer(64))
    prompts = [[token % 63 for token in prompt] for prompt in PROMPTS]
    expected = [generated(target, prompt, 10) for prompt in prompts]
    assert texts(target, target, prompts, 10, 3) == expected
    draft = make_draft(target, [1, 3])  # of the text's layers: the tower has as many
    ours, theirs = (decoder_layers(m) for m in (draft, target))
    for mine, layer in zip(ours, (1, 3), strict=True):
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs[layer].state_dict()[key])
    assert texts(target, draft, prompts, 10, 3) == expected


def test_layers_that_take_keys_and_values_of_others_are_refused() -> None:
    settings = {**GATED, **MIXED, "head_dim": 8, "hidden_size_per_layer_input": 8}
    settings |= {"vocab_size_per_layer_input": 64, "activation_sparsity_pattern": [0.0] * 4}
    settings |= {"num_kv_shared_layers": 2, "laurel_rank": 4}
    target = random_model("gemma3n_text", **COMMON | settings)
    with pytest.raises(ModelError, match=r"layers 2 to 3 of gemma3n_text .* take layers of 0 to 1"):
        make_draft(target, [0, 3])
    with pytest.raises(ModelError, match=r"not alike \(nothing fits .*per_layer"):
        make_draft(target, [0, 1])
    assert make_draft(target, [0, 1], random_seed=1).num_layers == 2


def strayed(name: str, folder: Path, **stray: object) -> LanguageModel:
    """A model as loaded, of a config.json that says more than its family reads."""
    model = family_model(name)
    model.model.float()
    save_draft(model, folder)
    amend(folder / "config.json", **stray)
    return load(str(folder), dtype="float32")


@pytest.mark.parametrize(
    ("name", "stray"),
    [
        ("llama", {"sliding_window": WINDOW}),
        ("llama", MIXED),
        ("llama", {**MIXED, "layer_types": ["sliding_attention"] * 4}),
        ("gemma", {"sliding_window": WINDOW, "use_sliding_window": True}),
        ("granite", MIXED),
        ("mistral", {"layer_types": ["full_attention"] * 4}),
        ("mistral", MIXED),
        ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": False}),
        ("qwen2", {**MIXED, "use_sliding_window": True}),
        ("qwen3_moe", {"sliding_window": WINDOW, "use_sliding_window": False}),
        ("gemma2", {"layer_types": ["full_attention"] * 4}),
        ("moshi", {"sliding_window": WINDOW}),
    ],
    ids=str,
)
def test_a_window_counts_where_the_model_uses_it(
    tmp_path: Path, name: str, stray: dict[str, object]
) -> None:
    """By the model's own pass over the whole text, which has no cache that could take a window."""
    model = strayed(name, tmp_path / "m", **stray)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(8):
            logits = stock(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(logits[0, -1].argmax().item())
            if tokens[-1] in model.eos_ids:
                break
        expected = tokens[len(prompt) :]
        assert texts(model, None, [prompt], 8, 1) == [expected]
        assert generated(model, prompt, 8) == expected
        assert texts(model, make_draft(model, [0, 2]), [prompt], 8, 1) == [expected]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_is_loaded_again(name: str, tmp_path: Path) -> None:
    """Past the checks of what a checkpoint's files and its config say of each other."""
    model = family_model(name)
    save_draft(model, tmp_path / "m")
    loaded = load(str(tmp_path / "m"), dtype="float64")
    tokens = torch.tensor([[5, 9, 30, 2]])
    assert torch.allclose(loaded.hidden(tokens), model.hidden(tokens).double(), atol=1e-4)


def test_positions_are_those_that_rotary_frequencies_are_stretched_for() -> None:
    def positions(most: int, **rope: object) -> int:
        settings = {"max_position_embeddings": most, "rope_parameters": {"rope_theta": 1e4, **rope}}
        return random_model("llama", device="meta", **settings).max_length

    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
    assert positions(64, **yarn, original_max_position_embeddings=64) == 256
    assert positions(256, **yarn, original_max_position_embeddings=64) == 256
    assert positions(64, **yarn) == 256
    assert positions(64, rope_type="linear", factor=2.0) == 128
    linear: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
    assert positions(256, **linear, original_max_position_embeddings=64) == 256  # counted already
    assert positions(64, **linear, original_max_position_embeddings=64) == 256
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
    assert positions(128, **llama3, **bands) == 128
    assert positions(64, rope_type="dynamic", factor=2.0) == 64
    assert positions(64, rope_type="default") == 64
    ropes = copy.deepcopy(BOTH_ROPES)
    ropes["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    by_kind = random_model("gemma3_text", device="meta", **COMMON | GATED | MIXED | ropes)
    assert by_kind.max_length == 128  # of its sliding layers


# What is refused

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
REWOUND = "cannot be rewound"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": (SMALL, REWOUND),
    "mamba2": ({**SMALL, "num_heads": 8, "head_dim": 8}, REWOUND),
    "falcon_mamba": (SMALL, REWOUND),
    "rwkv": (SMALL, REWOUND),
    "xlstm": ({**SMALL, "num_heads": 4}, REWOUND),
    "jamba": ({**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1}, "linear_attention"),
    "bamba": (
        {**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
        "linear_attention",
    ),
    "falcon_h1": (SMALL, "hybrid"),
    "zamba": (SMALL, REWOUND),
    "zamba2": ({}, REWOUND),
    "nemotron_h": ({**SMALL, "hybrid_override_pattern": "M*-M"}, "linear_attention"),
    "granitemoehybrid": (
        {**SMALL, "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8},
        "linear_attention",
    ),
    "recurrent_gemma": (
        {**SMALL, "block_types": ["recurrent", "recurrent", "attention"]},
        "linear_attention",
    ),
    "minimax": (SMALL, "linear_attention"),
    "qwen3_next": (SMALL, "linear_attention"),
    "qwen3_5_text": (SMALL, "linear_attention"),
    "kimi_linear": (SMALL, "linear_attention"),
    "olmo_hybrid": (SMALL, "linear_attention"),
    "lfm2": ({**SMALL, "full_attn_idxs": [1, 3]}, "conv"),
    "lfm2_moe": ({**SMALL, "layer_types": ["conv", "full_attention"] * 2}, "conv"),
    "llama4_text": (SMALL, "chunked_attention"),
    "deepseek_v32": (SMALL, "indexed_attention"),
    "t5": ({"d_model": 16, "num_layers": 1, "num_heads": 2}, "encoder-decoder"),
    "bart": ({"d_model": 16}, "encoder-decoder"),
    "bloom": ({**SMALL, "n_head": 4}, "ALiBi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64}, "ALiBi"),
    "falcon": ({**SMALL, "alibi": True}, "ALiBi"),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["local"], 2]]},
        "masks by place",
    ),
    "gemma3_text": ({**SMALL, "use_bidirectional_attention": True}, "attends to later tokens"),
    "bert": ({**SMALL, "is_decoder": True}, "before the output head"),
    "roberta": ({**SMALL, "is_decoder": True}, "before the output head"),
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 4}, "no cache of keys and values"),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "no cache of keys and values"),
    "vit": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "cannot load"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_is_refused_before_its_weights_are_read(
    name: str, tmp_path: Path
) -> None:
    """The folder holds a config and nothing else."""
    settings, told = REFUSED[name]
    AutoConfig.for_model(name, **settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=told) as caught:
        load(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message
    if told not in ("encoder-decoder", "cannot load"):
        assert f"({name})" in message
        assert "supported are models of full and sliding attention" in message


def test_a_supported_config_without_weights_is_another_error(tmp_path: Path) -> None:
    """So that the refusals above are known to come before the weights are missed."""
    AutoConfig.for_model("llama", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors"):
        load(str(tmp_path))


def test_unknown_steps_after_the_head_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, vocabulary in (("whole", None), ("trimmed", torch.arange(0, 64, 2))):
        save_draft(make_draft(tiny_model(0), [0, 1], vocabulary), tmp_path / name)
    stock: Callable[..., Any] = LlamaForCausalLM.forward

    def scaled(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        out = copy.copy(stock(self, *args, **kwargs))
        out.logits = out.logits * 1.2
        return out

    for name in ("whole", "trimmed"):
        load(str(tmp_path / name))
        with monkeypatch.context() as patch:
            patch.setattr(LlamaForCausalLM, "forward", scaled)
            with pytest.raises(ModelError, match=r"\(llama\) does more to its logits"):
                load(str(tmp_path / name))


def test_keys_and_values_must_be_read_as_they_lie(tmp_path: Path) -> None:
    """Which no configuration tells, and a pass does."""
    config = AutoConfig.for_model("gpt_neox_japanese", **COMMON)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer(64).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(gpt_neox_japanese\) cannot read keys and values"):
        load(str(tmp_path), dtype="float32")
