"""Rounds that are captured whole, on the CPU: what two replays and one copy to the host do is what
the eager rounds do, and the host neither reads nor makes anything in between.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from unittest import mock

import pytest
import torch
from checks import (
    MIXED,
    PROMPTS,
    check_capture_that_fails,
    check_captured,
    drafter_for,
    endless,
    transformer,
)
from conftest import tiny_model
from dispatch import EagerCapture, NoHost, eager_capture
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from specdistill.decoding import (
    GREEDY,
    ModelDrafter,
    NgramDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
    drafters,
    engine,
    graphs,
    parallel,
    rounds,
)
from specdistill.decoding.captured import Workspace
from specdistill.errors import DecodingError, InputError
from specdistill.models import LanguageModel
from specdistill_kernels import Lenience

WARM = Sampling(1.0)


@pytest.fixture
def capture() -> Iterator[type[EagerCapture]]:
    graphs.warn_of_eager_rounds.cache_clear()
    with eager_capture() as recorder:
        yield recorder


# --- The same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("samplings", [[GREEDY], [WARM], MIXED], ids=["greedy", "warm", "mixed"])
@pytest.mark.parametrize(
    "kind",
    [
        "none",
        "itself",
        "half",
        "opposite",
        "trimmed",
        "stranger",
        "parallel",
        "parallel trimmed",
        "parallel inside",
    ],
)
def test_a_captured_round_is_the_eager_one(kind: str, samplings: list[Sampling]) -> None:
    check_captured(kind, 3 * (kind != "none"), samplings=samplings)


@pytest.mark.parametrize(
    ("batch_size", "num", "options"),
    [
        (1, 1, {}),
        (1, 5, {"mode": "block"}),
        (9, 4, {"mode": "block", "keep_hidden": True}),
        (9, 2, {"keep_hidden": True, "keep_proposals": True}),
        (2, 8, {"keep_proposals": True}),
        (4, 3, {"lenience": Lenience("lin", 0.5), "timed": False}),
    ],
    ids=str,
)
def test_in_batches_of_any_size_with_all_options(
    batch_size: int, num: int, options: dict[str, Any]
) -> None:
    samplings = [WARM] if "lenience" in options else MIXED
    check_captured("half", num, batch_size, samplings, **options)


def test_a_row_without_a_distribution_is_named(capture: type[EagerCapture]) -> None:
    target = tiny_model(11)
    target.head.weight[:] = float("nan")
    decoder = SpeculativeDecoder(target, cuda_graphs=True)
    with pytest.raises(DecodingError, match="request 0, round 0"):
        decoder.generate([[7, 8]], max_new_tokens=4)


# --- What the host does in a round --------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Replays and copies to the host of each round that is decoded from now on, under a mode that
    fails on anything else. Drawing and verifying, which are kernels on a GPU, do as they like.
    """
    counts: list[tuple[int, int]] = []
    launch = Workspace.round

    def watched_round(self: Workspace, visible: int, filters: Any, watch: Any = None) -> Any:
        before = EagerCapture.replays
        key = (self.batch, visible, filters)
        for name in ("draft", "verify"):  # capturing runs a step beside the rounds
            if (name, *key) not in self.graphs.captured and (name == "verify" or self.num):
                return launch(self, visible, filters, watch)
        with NoHost() as mode:
            out = launch(self, visible, filters, watch)
        counts.append((EagerCapture.replays - before, mode.copies))
        return out

    def opaque(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return kernel(*args, **kwargs)

        return run

    monkeypatch.setattr(Workspace, "round", watched_round)
    monkeypatch.setattr(rounds, "verify", opaque(rounds.verify))
    monkeypatch.setattr(drafters, "sample", opaque(drafters.sample))
    monkeypatch.setattr(parallel, "sample_places", opaque(parallel.sample_places))
    return counts


@pytest.mark.parametrize("samplings", [[GREEDY], MIXED], ids=["greedy", "mixed"])
@pytest.mark.parametrize("kind", ["none", "half", "trimmed", "parallel", "parallel inside"])
@pytest.mark.parametrize("options", [{}, {"keep_hidden": True, "keep_proposals": True}], ids=str)
def test_a_round_is_two_replays_and_one_copy_to_the_host(
    monkeypatch: pytest.MonkeyPatch, kind: str, samplings: list[Sampling], options: dict[str, bool]
) -> None:
    counts = watched(monkeypatch)
    check_captured(kind, 3 * (kind != "none"), samplings=samplings, **options)
    assert len(counts) > 10
    assert set(counts) == {(1 if kind == "none" else 2, 1)}


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2]) + 1,
        lambda x: x.unique(),
    ],
)
def test_the_mode_sees_what_it_should(act: Callable[[Tensor], Any]) -> None:
    x = torch.arange(3)
    EagerCapture.in_replay = True
    try:
        with NoHost():
            _ = x + 1
        with pytest.raises(AssertionError), NoHost():
            act(x)
    finally:
        EagerCapture.in_replay = False
    with pytest.raises(AssertionError, match="between replays"), NoHost():
        _ = x + 1


def test_the_kernels_launches_leave_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `verify` and `sample` do around their kernels, with filters, a trimmed vocabulary and
    block verification.
    """
    pytest.importorskip("triton")
    from specdistill_kernels.verification import launch, triton_backend

    launches: list[Any] = []
    monkeypatch.setattr(
        launch.Launcher, "__call__", lambda self, kernel, *_, **__: launches.append(kernel)
    )
    state = rounds.RowState.of([[7]] * 2, [9] * 2, MIXED[2:4], [1, 2], torch.device("cpu"))
    vocab, tokens = torch.arange(0, 64, 2), torch.zeros(2, 3, dtype=torch.int64)
    triton_backend.inverse_of(vocab, 64)  # made once for a draft

    def run() -> None:
        settings = state.settings((True, True, False))
        triton_backend.sample(torch.randn(2, 32), settings, position=1)
        triton_backend.verify(
            tokens,
            torch.randn(2, 3, 32),
            torch.randn(2, 4, 64),
            settings,
            lengths=(state.left - 1).clamp(min=0, max=3),
            draft_vocab=vocab,
            draft_lse=torch.zeros(2, 3),
            point_mass=None,
            mode="block",
            lenience=None,
        )

    EagerCapture.in_replay = True
    try:
        with NoHost():
            run()
    finally:
        EagerCapture.in_replay = False
    assert len(launches) >= 4


# --- What is kept -------------------------------------------------------------------------------


def decoder_of(target: LanguageModel, kind: str = "half", **options: Any) -> SpeculativeDecoder:
    drafter = drafter_for(target, kind)
    return SpeculativeDecoder(
        target, drafter, num_draft_tokens=3, batch_size=2, cuda_graphs=True, **options
    )


def test_graphs_and_caches_serve_later_calls(capture: type[EagerCapture]) -> None:
    decoder = decoder_of(endless())
    first = decoder.generate(PROMPTS, max_new_tokens=20, sampling=WARM)
    assert first.captures == capture.captures > 0
    again = decoder.generate(PROMPTS, max_new_tokens=20, sampling=WARM)
    assert again.captures == 0
    assert again.outputs == first.outputs
    alone = decoder.generate(PROMPTS[:1], max_new_tokens=20, sampling=WARM)
    assert alone.outputs[0].tokens == first.outputs[0].tokens
    assert len(decoder._spaces) == 1, "a narrower stream takes the same rows"
    shorter = decoder.generate([PROMPTS[2]] * 2, max_new_tokens=200)
    assert shorter.captures in (2, 4), "twice as many slots are seen, once or twice"
    assert len(decoder._spaces) == 1


def test_buckets_grow_by_doubling(capture: type[EagerCapture]) -> None:
    decoder = decoder_of(endless())
    out = decoder.generate([[5, 6]] * 2, max_new_tokens=480)
    assert all(len(o.tokens) == 480 for o in out.outputs)
    (space,) = decoder._spaces
    visible = sorted({key[2] for key in space.graphs.captured})
    assert visible == [128, 256, 512]
    assert out.captures <= 2 * 3 * 2, "for two rows and for one"


def test_streams_that_are_open_at_once_do_not_meet(capture: type[EagerCapture]) -> None:
    decoder = decoder_of(endless())
    both = [
        [Request(f"{name}{i}", p, 9 + i, Sampling(t), seed=4) for i, p in enumerate(prompts)]
        for name, prompts, t in (("a", PROMPTS[:3], 1.0), ("b", [[9], [6, 6, 6, 6], [8]], 0.0))
    ]
    alone = [{o.request_id: o.tokens for o in decoder.run(requests).outputs} for requests in both]
    together: list[dict[str, list[int]]] = [{r.id: [] for r in requests} for requests in both]
    for turn in zip_longest(*map(decoder.stream, both)):
        for texts, round_ in zip(together, turn, strict=True):
            for row in round_.rows if round_ else []:
                texts[row.request_id] += row.tokens
    assert together == alone
    abandoned = decoder.stream(both[0])
    next(abandoned)
    abandoned.close()
    assert {o.request_id: o.tokens for o in decoder.run(both[0]).outputs} == alone[0]


def test_a_decoder_takes_its_caches_with_it(capture: type[EagerCapture]) -> None:
    decoder = decoder_of(endless())
    decoder.generate(PROMPTS, max_new_tokens=4)
    slots, it = weakref.ref(decoder._spaces[0].cached.layers[0].keys), weakref.ref(decoder)
    del decoder
    assert it() is None, "memory of a device waits for no collection"
    gc.collect()  # of what stands in for a graph here, which knows its step
    assert slots() is None


def test_time_is_told_where_it_is_asked_for(capture: type[EagerCapture]) -> None:
    told = decoder_of(endless()).generate(PROMPTS, max_new_tokens=9)
    assert {"prefill", "draft", "target", "verify", "other"} == told.seconds.keys()
    assert told.seconds["draft"] > 0
    assert told.seconds["target"] > 0
    silent = decoder_of(endless(), timed=False).generate(PROMPTS, max_new_tokens=9)
    assert silent.seconds == {}
    assert silent.outputs == told.outputs
    eager = SpeculativeDecoder(endless(), timed=False).generate(PROMPTS, max_new_tokens=9)
    assert eager.seconds == {}


# --- What cannot be captured --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("look-up", "what the host knows"), ("both", "what the host knows")],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_so_once(
    capture: type[EagerCapture], recwarn: pytest.WarningsRecorder, kind: str, reason: str
) -> None:
    target = transformer()
    decoder = decoder_of(target, kind)
    expected = SpeculativeDecoder(
        target, drafter_for(target, kind), num_draft_tokens=3, batch_size=2
    ).generate(PROMPTS, max_new_tokens=9)
    for _ in range(2):
        assert decoder.generate(PROMPTS, max_new_tokens=9).outputs == expected.outputs
    told = [str(w.message) for w in recwarn if "not captured" in str(w.message)]
    assert len(told) == 1
    assert reason in told[0]


def test_a_model_that_waits_for_the_device_runs_eagerly(
    capture: type[EagerCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = transformer()
    expected = SpeculativeDecoder(target, batch_size=2).generate(PROMPTS, max_new_tokens=9)

    def refuse(*_: Any) -> Any:
        raise graphs.CannotCaptureError("called a synchronizing operation")

    monkeypatch.setattr(EagerCapture, "__call__", refuse)
    decoder = SpeculativeDecoder(target, batch_size=2, cuda_graphs=True)
    with pytest.warns(RuntimeWarning, match="synchronizing"):
        assert decoder.generate(PROMPTS, max_new_tokens=9).outputs == expected.outputs


@pytest.mark.parametrize(("captures", "batch_size"), [(0, 2), (2, 2), (2, 5)])
@pytest.mark.parametrize("kind", ["none", "half", "parallel"])
def test_nothing_is_lost_where_a_capture_fails_among_rounds(
    kind: str, captures: int, batch_size: int
) -> None:
    """The last has a row that has ended, beside others that see more slots."""
    check_capture_that_fails(kind, captures if kind != "none" else captures // 2, batch_size)


def test_passes_that_cannot_be_captured_run_eagerly(
    capture: type[EagerCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(transformer(), "look-up")
    expected = replace(decoder, cuda_graphs=False).generate(PROMPTS, max_new_tokens=9)

    def refuse(*_: Any) -> Any:
        raise graphs.CannotCaptureError("called a synchronizing operation")

    monkeypatch.setattr(EagerCapture, "__call__", refuse)
    with pytest.warns(RuntimeWarning, match="synchronizing"):
        assert decoder.generate(PROMPTS, max_new_tokens=9).outputs == expected.outputs


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(
    "error", [RuntimeError("not permitted\nwhen capturing"), DecodingError("not enough memory")]
)
def test_whatever_breaks_a_capture_is_told(at: int, error: Exception) -> None:
    """In the passes before it and in itself. Of CUDA there is nothing here but its names."""
    count = iter(range(3))

    def step() -> Tensor:
        if next(count) == at:
            raise error
        return torch.zeros(1)

    with mock.patch.object(torch, "cuda", mock.MagicMock()) as cuda:
        cuda.graph.return_value.__exit__.return_value = False
        cuda.stream.return_value.__exit__.return_value = False
        captured = graphs.Graphs(torch.device("cuda"))
        with pytest.raises(graphs.CannotCaptureError, match=r"^not [a-z ]+$"):
            captured.run("key", step)
        waits = cuda.current_stream.return_value.wait_stream
        waits.assert_called_once_with(cuda.Stream.return_value)  # what is under way may still write
        if at > 0:
            assert cuda.set_sync_debug_mode.call_args == mock.call(cuda.get_sync_debug_mode())
    assert captured.captures == 0


class Cuda:
    """The streams of two devices, the first of them the current one, as `torch.cuda` has them; the
    end of a capture raises and leaves its stream where it `breaks`.
    """

    CUDAGraph = mock.MagicMock
    is_available = staticmethod(lambda: True)
    graph_pool_handle = get_sync_debug_mode = mock.MagicMock()
    told = False  # of the mode, once

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks
        self.defaults = [self.Stream(torch.device("cuda", i)) for i in range(2)]
        self.current = self.defaults[0]

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device
            self.waits: list[Cuda.Stream] = []

        def wait_stream(self, other: "Cuda.Stream") -> None:
            assert other.device == self.device
            self.waits.append(other)

    def set_sync_debug_mode(self, mode: Any) -> None:
        if not self.told:
            warnings.warn("the mode is a prototype", stacklevel=2)
        self.told = True

    def current_stream(self, device: torch.device) -> "Cuda.Stream":
        return self.current if self.current.device == device else self.defaults[device.index]

    @contextmanager
    def stream(self, stream: "Cuda.Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: "Cuda.Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        if self.breaks:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_capture_is_of_the_models_device(
    monkeypatch: pytest.MonkeyPatch, index: int, breaks: bool
) -> None:
    """Whichever is the current one, which it stays."""
    cuda, device = Cuda(breaks), torch.device("cuda", index)
    monkeypatch.setattr(torch, "cuda", cuda)
    capture, seen = graphs.CudaCapture(device), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            try:
                capture(lambda: seen.append(cuda.current), [], lambda _: None)
            except graphs.CannotCaptureError:
                assert breaks
            assert cuda.current is cuda.defaults[0]
    assert seen == [capture.stream] * 6, "one memory pool is one stream's"
    assert capture.stream.device == device
    assert cuda.defaults[index].waits == [capture.stream] * 2


def test_a_model_on_a_cpu_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, too: a graph of it would be empty."""
    monkeypatch.setattr(torch, "cuda", Cuda(breaks=False))
    with pytest.raises(InputError, match="this one is on cpu"):
        graphs.Graphs(torch.device("cpu"))


# --- Where rounds are captured ------------------------------------------------------------------


def test_rounds_are_captured_on_a_gpu_unless_that_is_declined(
    capture: type[EagerCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = endless()
    decoder = SpeculativeDecoder(
        target, drafter_for(target, "half"), num_draft_tokens=3, batch_size=2
    )
    eager = decoder.generate(PROMPTS, max_new_tokens=9, sampling=WARM)
    assert capture.captures == eager.captures == 0
    monkeypatch.setattr(engine, "CAPTURING", "cpu")
    captured = decoder.generate(PROMPTS, max_new_tokens=9, sampling=WARM)
    assert captured.captures == capture.captures > 0
    assert captured.outputs == eager.outputs
    declined = replace(decoder, cuda_graphs=False)
    assert declined.generate(PROMPTS, max_new_tokens=9).captures == 0
    look_up = replace(decoder_of(target, "look-up"), cuda_graphs=None)
    before = capture.captures
    with pytest.warns(RuntimeWarning, match="what the host knows"):
        look_up.generate(PROMPTS, max_new_tokens=9)
    assert capture.captures == before, "passes of many shapes are not captured unasked"


def test_other_weights_are_captured_anew(capture: type[EagerCapture]) -> None:
    target = tiny_model(2, layers=3, dtype=torch.float64)
    drafter = drafter_for(target, "half")
    assert isinstance(drafter, ModelDrafter)
    decoder = SpeculativeDecoder(
        target, drafter, num_draft_tokens=3, batch_size=2, cuda_graphs=True
    )
    decoder.generate(PROMPTS, max_new_tokens=9)
    assert decoder.generate(PROMPTS, max_new_tokens=9).captures == 0
    for model in (target, drafter.draft):
        out = model.model.base_model.layers[0].self_attn.o_proj
        out.weight = torch.nn.Parameter(-out.weight, requires_grad=False)
        eager = replace(decoder, cuda_graphs=False).generate(PROMPTS, max_new_tokens=9)
        again = decoder.generate(PROMPTS, max_new_tokens=9)
        assert again.captures > 0
        assert again.outputs == eager.outputs
        assert len(decoder._spaces) == 1


def test_other_ends_are_captured_anew(capture: type[EagerCapture]) -> None:
    target = tiny_model(1, layers=2, dtype=torch.float64)
    decoder = SpeculativeDecoder(target, batch_size=2, cuda_graphs=True)
    texts = [decoder.generate(PROMPTS, max_new_tokens=9).outputs[0].tokens]
    for ends in ([texts[0][3]], None):
        target.model.generation_config.eos_token_id = ends
        target.config.eos_token_id = ends
        eager = replace(decoder, cuda_graphs=False).generate(PROMPTS, max_new_tokens=9)
        again = decoder.generate(PROMPTS, max_new_tokens=9)
        assert again.outputs == eager.outputs
        texts.append(again.outputs[0].tokens)
    assert len(texts[1]) < len(texts[2])


def test_rules_of_ones_own_are_not_captured(capture: type[EagerCapture]) -> None:
    from specdistill_kernels import verify

    decoder = SpeculativeDecoder(
        transformer(), NgramDrafter(), num_draft_tokens=2, rule=verify, cuda_graphs=True
    )
    with pytest.warns(RuntimeWarning, match="a rule takes the place"):
        decoder.generate(PROMPTS[:1], max_new_tokens=4)
