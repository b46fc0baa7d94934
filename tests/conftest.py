"""No test touches the network, none takes more than two threads, and none is scored by how busy the
machine is.
"""

import os

# Read by the Hugging Face libraries when they are imported, here and in child processes.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[variable] = "1"

import torch  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))

import json  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from specdistill.decoding import SpeculativeDecoder  # noqa: E402
from specdistill.models import LanguageModel  # noqa: E402

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>"]


def tiny_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words w5, w6, ... after the special tokens; ids are the numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), size)]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unk|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:4]})
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_model(
    seed: int = 0,
    *,
    vocab: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> LanguageModel:
    """A random Llama of width 32, sharp enough that its choices are not all alike."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = settings["eos_token_id"]
    return LanguageModel(f"tiny-{seed}", Path(), model, tiny_tokenizer(min(vocab, 64)))


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_model(kind: str, *, device: str = "cpu", **settings: object) -> LanguageModel:
    """A random model of any family, of `SIZES` where the settings do not say otherwise."""
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(kind, **SIZES | settings)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LanguageModel(kind, Path(), model, tiny_tokenizer(64))


def texts(decoder: SpeculativeDecoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The tokens of greedy answers."""
    return [o.tokens for o in decoder.generate(prompts, max_new_tokens=count).outputs]


def amend(file: Path, **values: object) -> None:
    """Give a JSON file these values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="session", autouse=True)
def _steady_clock() -> Iterator[None]:
    """What passes cost in a score, all tests long."""
    from clocks import by_layers, clock_of_passes

    with clock_of_passes(by_layers, reading=1e-5):
        yield


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LanguageModel]:
    return tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target as a checkpoint folder."""
    from specdistill.drafts.making import save_draft

    folder = tmp_path_factory.mktemp("tiny") / "target"
    save_draft(tiny_model(layers=4), folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, str]:
    """What a small distillation needs, by the keys of its configuration; nothing writes there."""
    from small_runs import make_world

    return make_world(tmp_path_factory.mktemp("world"), tiny_folder)


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> LanguageModel:
    """The tiny target in float64, so that no batch rounds otherwise than another."""
    from specdistill import models

    return models.load(str(tiny_folder), dtype="float64")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are stored four at a time, so that a few make several parts."""
    from specdistill.data import generation

    monkeypatch.setattr(generation, "PART", 4)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: what a full disk does to a program."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def stop_at(call: int) -> Callable[..., None]:
    """A progress that interrupts at its `call`th report."""
    calls = 0

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    return progress
