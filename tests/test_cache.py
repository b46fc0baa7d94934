"""Memory of the cache: known before it is taken, and told with its sizes where there is too little.
The bytes themselves are checked for every family in test_architectures.py.
"""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specdistill.decoding import ModelDrafter, Request, SpeculativeDecoder
from specdistill.decoding import cache as cache_module
from specdistill.decoding.cache import CachedModel, attention_mask, cache_bytes
from specdistill.errors import DecodingError
from specdistill.models import LanguageModel, memory
from specdistill.models.llama import LlamaBody

Tiny = Callable[..., LanguageModel]

# 3 layers x keys and values x 2 heads of 8 numbers of 4 bytes
TOKEN_BYTES = 3 * 2 * 2 * 8 * 4


def test_bytes_are_layers_heads_and_whole_buckets(tiny: Tiny) -> None:
    model = tiny(0, layers=3)
    assert cache_bytes(model, 1, 1) == cache_bytes(model, 1, 64) == 64 * TOKEN_BYTES
    assert cache_bytes(model, 5, 65) == 5 * 128 * TOKEN_BYTES
    assert cache_bytes(tiny(0, layers=3, dtype=torch.bfloat16), 5, 65) == 5 * 64 * TOKEN_BYTES
    assert cache_bytes(tiny(0, layers=3, head_dim=32), 5, 65) == 4 * 5 * 128 * TOKEN_BYTES


def test_every_slot_is_there_from_the_start(tiny: Tiny) -> None:
    cached = CachedModel(tiny(0, layers=3), 2, 100)
    slots = [(layer.keys, layer.values) for layer in cached.layers]
    assert {s.shape for pair in slots for s in pair} == {(2, 128, 2, 8)}
    cached.prefill(torch.arange(2), [[7, 8, 9], [5]])
    for layer, (keys, values) in zip(cached.layers, slots, strict=True):
        assert layer.keys is keys
        assert layer.values is values
    cached.keep([1])
    assert {layer.keys.shape for layer in cached.layers} == {(1, 128, 2, 8)}


def refusal(caught: pytest.ExceptionInfo[DecodingError]) -> str:
    message = str(caught.value)
    assert message.endswith("take a smaller batch, shorter prompts or fewer new tokens")
    return message


def test_a_cache_beyond_the_memory_is_refused_before_it_is_allocated(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's true memory decides: 2^40 slots fit nowhere."""
    model = tiny(0, layers=3)
    assert model.token_slots
    assert model.body is not None  # it is seen to be the model's by a pass of its own
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(DecodingError) as caught:
        CachedModel(model, 2, 2**40)
    told = "keys and values of 2 rows of 1099511627776 slots take 844,424,930.1 MB"
    assert told in refusal(caught)
    assert "on cpu to decode with tiny-0" in str(caught.value)


@pytest.mark.parametrize("room", [-1, 0])
def test_the_limit_is_the_free_memory(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """The engine raises at once, for the target and for the draft, and just enough is enough."""
    target, draft = tiny(0, layers=3), tiny(1, layers=4)
    needed = cache_bytes(draft, 1, 13)  # the larger one
    monkeypatch.setattr(cache_module, "free_bytes", lambda _: needed + room)
    decoder = SpeculativeDecoder(target, ModelDrafter(draft, 64), num_draft_tokens=3)
    if room == 0:
        assert decoder.generate([[7, 8, 9]], max_new_tokens=5).outputs
    else:
        with pytest.raises(DecodingError, match="tiny-1: keys and values of 1 rows of 64 slots"):
            decoder.generate([[7, 8, 9]], max_new_tokens=5)
        assert SpeculativeDecoder(target).generate([[7, 8, 9]], max_new_tokens=5).outputs


def test_free_memory_is_what_linux_or_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    everything = memory.os.sysconf("SC_PHYS_PAGES") * memory.os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.free_bytes(cpu) <= everything
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   300 kB\nHugePages: 0\n")
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "meminfo")
    assert memory.free_bytes(cpu) == 300 * 1024
    (tmp_path / "meminfo").unlink()
    assert memory.free_bytes(cpu) == everything


def test_the_slots_go_with_their_stream(tiny: Tiny) -> None:
    """At once, and not when cycles are next looked for."""
    decoder = SpeculativeDecoder(tiny(0), ModelDrafter(tiny(1), 64), num_draft_tokens=2)
    gc.disable()
    try:
        stream = decoder.stream([Request("a", [7, 8], 20)])
        next(stream)
        slots = [weakref.ref(o) for o in gc.get_objects() if type(o) is CachedModel]
        assert len(slots) >= 2
        del stream
        assert not [ref() for ref in slots if ref() is not None and ref().batch == 1]
    finally:
        gc.enable()


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
def test_running_out_of_memory_names_the_sizes(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """While allocating, in a pass, and when rows leave."""
    model = tiny(0, layers=3)
    cached = CachedModel(model, 2, 100)
    token = torch.zeros((2, 1), dtype=torch.int64)
    for name, act in (
        ("zeros", lambda: CachedModel(model, 2, 100)),
        ("arange", lambda: cached.run(token, token, 1, torch.tensor([0, 1]))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, failing(error))
            with pytest.raises(DecodingError, match=r"2 rows of 128 slots take 0\.1 MB") as caught:
                act()
        refusal(caught)
    monkeypatch.setattr(cached.layers[1], "keep", failing(error))
    with pytest.raises(DecodingError, match="2 rows of 128 slots"):
        cached.keep([0])
    cached = CachedModel(model, 2, 100)
    monkeypatch.setattr(LlamaBody, "__call__", failing(error))
    with pytest.raises(DecodingError, match="tiny-0"):
        cached.prefill(torch.arange(2), [[7, 8], [5]])


def test_other_errors_stay_what_they_are(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = CachedModel(tiny(0), 1, 10)
    monkeypatch.setattr(LlamaBody, "__call__", failing(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cached.prefill(torch.arange(1), [[7, 8]])


def test_masks_by_place_kind_and_attention(tiny: Tiny) -> None:
    """Boolean where attention is fused, added to the scores where it is not."""
    model = tiny(0, dtype=torch.float64)
    slots, positions = torch.arange(6), torch.tensor([[2, 3], [0, 5]])
    full = torch.tensor(
        [[[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], [[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]]
    ).bool()[:, None]
    near = torch.tensor(
        [[[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]], [[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]]
    ).bool()[:, None]
    assert torch.equal(attention_mask(model, slots, positions), full)
    model.config.sliding_window = 2
    assert torch.equal(attention_mask(model, slots, positions), near)
    model.config.layer_types = ["full_attention"] * 2
    assert torch.equal(attention_mask(model, slots, positions), full)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    masks = attention_mask(model, slots, positions)
    assert torch.equal(masks["full_attention"], full)
    assert torch.equal(masks["sliding_attention"], near)
    model.config._attn_implementation = "eager"
    for kind, seen in (("full_attention", full), ("sliding_attention", near)):
        added = attention_mask(model, slots, positions)[kind]
        assert added.dtype == torch.float64
        assert torch.equal(added == 0, seen)
        assert added[~seen].max() < -1e30
