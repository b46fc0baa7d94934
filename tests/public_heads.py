"""Heads of the kinds that vLLM serves, whose proposals are known: after a token t comes follows[t],
after that the one that follows it, and so on, whatever the target's states are.
"""

import json
import math
from pathlib import Path

import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from specdistill.drafts.making import save_draft
from specdistill.models import LanguageModel

SIZE, WIDTH = 64, 128  # the vocabulary and the width of all targets here
LOWEST = 16  # that `eagle3` can propose
Weights = dict[str, torch.Tensor]


def eagle3(target: LanguageModel, follows: list[int], folder: Path) -> None:
    """Of the target's tokens from `LOWEST` on. Queries and keys find the place itself, whose value
    is the token; the target's states are left out.
    """
    embedding = target.model.get_input_embeddings().weight
    generator, count = torch.Generator().manual_seed(0), SIZE - LOWEST
    tokens = torch.nn.functional.rms_norm(embedding, (WIDTH,), eps=target.config.rms_norm_eps)
    to_keys, to_values = torch.randn(2, SIZE, WIDTH, generator=generator) / WIDTH**0.5
    nothing = torch.zeros(SIZE, WIDTH)
    keys, values = (torch.cat([weight, nothing], -1) for weight in (20 * to_keys, to_values))
    heads = keys.view(2, 1, 32, 2 * WIDTH).expand(2, 2, 32, 2 * WIDTH).reshape(WIDTH, 2 * WIDTH)
    seen = (tokens @ to_values.T).view(SIZE, 2, 1, 32).expand(SIZE, 2, 2, 32)
    seen = seen.reshape(SIZE, WIDTH)
    wanted = torch.nn.functional.one_hot(torch.tensor(follows) - LOWEST, count).float()
    attention = {"q_proj": heads, "k_proj": keys, "v_proj": values, "o_proj": torch.eye(WIDTH)}
    weights = {
        "fc.weight": torch.zeros(WIDTH, 3 * WIDTH),
        **layer("midlayer.", attention, width=count),
        "midlayer.hidden_norm.weight": torch.zeros(WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "lm_head.weight": (torch.linalg.pinv(seen) @ wanted).T,
        "d2t": torch.full((count,), LOWEST),
    }
    config = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    config |= {"draft_vocab_size": count, "norm_before_residual": True}
    write(folder, weights, {**target.config.to_dict(), **config})


def dflash(follows: list[int], folder: Path, mask: int) -> None:
    """All places at once, from masks. One attention head for each place finds the last token there
    by its distance, and no other; the target's states say nothing. Where it is not at that distance
    the masks themselves are nearer, whose values are nothing.
    """
    rotated, constant, tokens = 0, 31, torch.eye(SIZE)  # a fast and a slow pair of the rotation
    keys, values, queries = torch.zeros(64, WIDTH), torch.zeros(64, WIDTH), torch.zeros(256, WIDTH)
    keys[rotated, :SIZE], values[:, :SIZE] = 1, tokens / WIDTH**0.5
    keys[:, mask], values[:, mask] = 0, 0
    keys[constant, mask] = 1
    out = torch.zeros(WIDTH, 256)
    after = list(range(SIZE))
    for head in range(3):
        after, distance, first = [follows[t] for t in after], head + 1, 64 * head
        queries[first + rotated, mask] = 0.8 * math.cos(distance)
        queries[first + rotated + 32, mask] = -0.8 * math.sin(distance)
        queries[first + constant, mask] = 0.6
        out[SIZE:, first : first + 64] = 1000 * tokens[after].T
    attention = {"q_proj": queries, "k_proj": keys, "v_proj": values, "o_proj": out}
    weights = {
        "fc.weight": torch.zeros(WIDTH, 2 * WIDTH),
        **layer("layers.0.", attention, width=SIZE),
        "layers.0.self_attn.q_norm.weight": torch.full((64,), 20.0),
        "layers.0.self_attn.k_norm.weight": torch.ones(64),
        "hidden_norm.weight": torch.ones(WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "embed_tokens.weight": torch.cat([tokens, torch.zeros(SIZE, SIZE)], -1),
        "lm_head.weight": torch.cat([torch.zeros(SIZE, SIZE), tokens], -1),
    }
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": [0, 1]},
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    write(folder, weights, config)


def target_with_mtp(folder: Path) -> LanguageModel:
    """A random GLM-4 MoE of three layers, in `folder`, whose config says that there is one more."""
    target = random_model(
        "glm4_moe",
        hidden_size=WIDTH,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        num_nextn_predict_layers=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    target.model.generation_config.eos_token_id = 0
    return save_draft(target, folder)


def mtp(target: LanguageModel, follows: list[int]) -> None:
    """The layer that `target_with_mtp` speaks of, written beside the others. It is of the last
    token alone: its block is the last layer's, but for what that adds.
    """
    embedding, head = target.model.get_input_embeddings().weight, target.head.weight
    tokens = torch.nn.functional.rms_norm(embedding, (WIDTH,), eps=target.config.rms_norm_eps)
    wanted = torch.linalg.pinv(head)[:, follows]  # what the head makes that token of
    of_token = wanted @ torch.linalg.pinv(tokens).T
    file, last = target.path / "model.safetensors", f"model.layers.{target.num_layers - 1}."
    weights = load_file(file)
    block = {n.removeprefix(last): each for n, each in weights.items() if n.startswith(last)}
    for name in block:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            block[name] = torch.zeros_like(block[name])
    block |= {f"{n}.weight": torch.ones(WIDTH) for n in ("enorm", "hnorm", "shared_head.norm")}
    block["eh_proj.weight"] = torch.cat([of_token, torch.zeros(WIDTH, WIDTH)], -1)
    block |= {"embed_tokens.weight": embedding, "shared_head.head.weight": head}
    more = {f"model.layers.{target.num_layers}.{name}": each for name, each in block.items()}
    weights |= {name: each.clone().contiguous() for name, each in more.items()}
    save_file(weights, file, metadata={"format": "pt"})


def layer(prefix: str, attention: Weights, width: int) -> Weights:
    """A layer with this attention and an MLP of `width` that adds nothing."""
    up = torch.zeros(width, WIDTH)
    weights = {f"self_attn.{name}": each for name, each in attention.items()}
    weights |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up.T}
    weights |= {n: torch.ones(WIDTH) for n in ("input_layernorm", "post_attention_layernorm")}
    return {f"{prefix}{name}.weight": each for name, each in weights.items()}


def write(folder: Path, weights: Weights, config: dict[str, object]) -> None:
    folder.mkdir()
    tensors = {name: each.clone().contiguous() for name, each in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
