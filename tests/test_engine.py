"""The decoding engine beyond its losslessness: caches, accounts, streaming, and what it refuses."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import zip_longest

import pytest
import torch
from checks import drafter_for, endless

from specdistill.decoding import (
    GREEDY,
    ModelDrafter,
    NgramDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
)
from specdistill.decoding import watch as watch_module
from specdistill.decoding.cache import CachedModel
from specdistill.drafts.making import make_draft
from specdistill.errors import DecodingError, InputError, ModelError
from specdistill.models import LanguageModel, check_positions
from specdistill.models.llama import LlamaBody
from specdistill.scoring.acceptance import acceptance_chances
from specdistill_kernels import Lenience

Tiny = Callable[..., LanguageModel]
PROMPTS = [[7, 8, 9], [5], list(range(5, 45)), [11, 12], [9] * 17]


def test_acceptance_is_the_overlap_of_p_and_q(tiny: Tiny) -> None:
    target = tiny(4, layers=3)
    draft = make_draft(target, [0, 1])
    decoder = SpeculativeDecoder(
        target, ModelDrafter(draft, 64), num_draft_tokens=4, batch_size=100
    )
    out = decoder.generate(PROMPTS * 20, max_new_tokens=20, sampling=Sampling(1.0), seed=3)
    accepted = sum(r.accepted for o in out.outputs for r in o.rounds)
    chances = [
        acceptance_chances(target, draft, PROMPTS[i % len(PROMPTS)], o, 1.0)
        for i, o in enumerate(out.outputs)
    ]
    tested = sum(map(len, chances))
    assert tested == sum(r.tested for o in out.outputs for r in o.rounds)
    expected = torch.cat(chances).mean().item()
    assert 0.1 < expected < 0.9
    assert accepted / tested == pytest.approx(expected, abs=4 * 0.5 / tested**0.5)


STOCK = 1e-5  # Transformers' norms are of float32 in a model of float64 too


def watched(cached: CachedModel) -> list[tuple[int, ...]]:
    """The shapes of the tokens that its passes will have."""
    shapes: list[tuple[int, ...]] = []
    run = cached.run
    cached.run = lambda tokens, *rest: (shapes.append(tuple(tokens.shape)), run(tokens, *rest))[1]
    return shapes


def check_rows(cached: CachedModel, texts: dict[int, list[int]]) -> None:
    """Each row, by number, holds its text: the state of a next token is that of a fresh pass."""
    lengths = torch.tensor([[len(texts.get(row, []))] for row in range(cached.batch)])
    hidden = cached.run(torch.full((cached.batch, 1), 6), lengths, 24)
    for row, text in texts.items():
        fresh = cached.model.hidden(torch.tensor([[*text, 6]]))[0, -1]
        assert torch.allclose(hidden[row, 0], fresh, atol=STOCK)


def test_ragged_rollback_reproduces_plain_passes(tiny: Tiny) -> None:
    """Overwrite stale slots at different lengths per row; hidden states equal those of a pass
    without a cache.
    """
    target = tiny(6, layers=3, dtype=torch.float64)
    cached = CachedModel(target, 2, 64)
    texts = [[7, 9, 11, 13, 15], [8, 10]]
    cached.prefill(torch.arange(2), texts)
    junk = torch.tensor([[30, 31, 32], [33, 34, 35]])
    lengths = torch.tensor([5, 2])
    offsets = torch.arange(3)
    cached.run(junk, lengths[:, None] + offsets, 8)
    lengths -= torch.tensor([2, 1])  # rewind: three and one tokens stay
    new = torch.tensor([[40, 41, 42], [43, 44, 45]])
    hidden = cached.run(new, lengths[:, None] + offsets, 8)
    for row, text in enumerate(texts):
        whole = torch.tensor([text[: lengths[row]] + new[row].tolist()])
        expected = target.hidden(whole)[0, -3:]
        assert torch.allclose(hidden[row], expected, atol=STOCK)


def test_a_shared_prefix_is_computed_once_and_changes_nothing(tiny: Tiny) -> None:
    target = tiny(12, layers=3, dtype=torch.float64)
    prefix = torch.randint(5, 60, (20,)).tolist()
    texts = [[*prefix, 7, 8, 9], [*prefix, 7], [*prefix, 11, 12], prefix]
    together = CachedModel(target, 5, 40)
    shapes = watched(together)
    together.prefill(torch.tensor([4, 0, 2, 1]), texts)
    assert shapes == [(1, 20), (3, 3)], "a row that lacks nothing does not run"
    check_rows(together, dict(zip([4, 0, 2, 1], texts, strict=True)))


def test_what_a_row_holds_of_a_prompt_is_copied_and_changes_nothing(tiny: Tiny) -> None:
    """From another row, from the row itself, and from two rows at once that both are written."""
    target = tiny(13, layers=3, dtype=torch.float64)
    a, b = (torch.randint(5, 60, (20,)).tolist() for _ in range(2))
    cached = CachedModel(target, 4, 40)
    cached.prefill(torch.tensor([0, 1]), [[*a, 7, 8], [*b, 9]])
    cached.run(torch.full((4, 3), 33), torch.tensor([[22], [21], [0], [0]]) + torch.arange(3), 25)
    shapes = watched(cached)
    texts = [[*b, 10, 11], [*a, 7, 12, 13], [*a[:12], 14], [15]]
    cached.prefill(torch.tensor([0, 1, 2, 3]), texts)
    assert shapes == [(3, 2)], "the text of one token is what another begins with"
    check_rows(cached, dict(enumerate(texts)))


def test_equal_prompts_are_computed_once(tiny: Tiny) -> None:
    target = tiny(13, layers=3, dtype=torch.float64)
    a, b = (torch.randint(5, 60, (20,)).tolist() for _ in range(2))
    texts = [a, a, b, [*b, 7], [*b, 7]]
    cached, seen = CachedModel(target, 5, 40), []
    run = cached.run
    cached.run = lambda tokens, *rest: (seen.append(tuple(tokens.shape)), run(tokens, *rest))[1]
    cached.prefill(torch.tensor([4, 0, 2, 1, 3]), texts)
    assert seen == [(3, 21)]
    hidden = run(torch.full((5, 1), 6), torch.tensor([20, 21, 20, 21, 20])[:, None], 22)
    for row, text in zip([4, 0, 2, 1, 3], texts, strict=True):
        assert torch.allclose(
            hidden[row, 0], target.hidden(torch.tensor([[*text, 6]]))[0, -1], atol=STOCK
        )


def test_prompts_longer_than_a_prefill_chunk(tiny: Tiny) -> None:
    target = tiny(7, layers=2, dtype=torch.float64)
    texts = [torch.randint(5, 60, (n,)).tolist() for n in (37, 1, 64)]
    whole, chunks = CachedModel(target, 3, 80), CachedModel(target, 3, 80)
    whole.prefill(torch.arange(3), texts)
    chunks.prefill(torch.arange(3), texts, width=10)
    last = torch.tensor([len(t) for t in texts])[:, None]
    token = torch.full((3, 1), 6)
    assert torch.allclose(whole.run(token, last, 65), chunks.run(token, last, 65), atol=1e-12)


def test_kept_hidden_states_give_back_the_logits_that_chose_each_token(tiny: Tiny) -> None:
    target = tiny(8, layers=3, dtype=torch.float64)
    decoder = SpeculativeDecoder(target, batch_size=2, keep_hidden=True)
    outputs = decoder.generate(PROMPTS, max_new_tokens=12).outputs
    for prompt, out in zip(PROMPTS, outputs, strict=True):
        logits = target.logits(torch.cat([r.hidden for r in out.rounds]))
        assert logits.argmax(-1).tolist() == out.tokens
        full = target.model(torch.tensor([prompt + out.tokens])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(logits, full, atol=STOCK)
        logsumexp = torch.cat([r.logsumexp for r in out.rounds])
        assert torch.allclose(logsumexp, full.logsumexp(-1), atol=STOCK)


def test_bad_requests_are_refused_before_any_work(tiny: Tiny) -> None:
    decoder = SpeculativeDecoder(tiny(10))
    for prompts, count, message in (
        ([[1, 2], []], 3, "no tokens"),
        ([[1]], 0, "max_new_tokens"),
        ([[1, 64]], 3, "reads 0 to 63"),
        ([[-1, 2]], 3, "reads 0 to 63"),
        ([[1] * 500], 20, "512 positions"),
    ):
        with pytest.raises(InputError, match=message):
            decoder.generate(prompts, max_new_tokens=count)
    with pytest.raises(InputError, match="distinct"):
        next(decoder.stream([Request("a", [1], 3), Request("a", [2], 3)]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", -1.0), ("temperature", float("nan"))),
        *(("top_k", -1), ("top_p", 0), ("min_p", 1)),
        *((name, "0.5") for name in ("temperature", "top_k", "top_p", "min_p")),
    ],
)
def test_impossible_samplings_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        Sampling(**{name: value})


def test_nan_logits_name_row_and_step(tiny: Tiny) -> None:
    target = tiny(11)
    target.head.weight[:] = float("nan")
    with pytest.raises(DecodingError, match="request 0, round 0"):
        SpeculativeDecoder(target).generate([[7, 8]], max_new_tokens=4)


@pytest.mark.parametrize("kind", ["none", "half", "look-up", "both"])
def test_streams_of_one_decoder_do_not_meet(kind: str) -> None:
    """Round by round in turns they say what they say one after the other."""
    target = endless()
    decoder = SpeculativeDecoder(
        target, drafter_for(target, kind), num_draft_tokens=3 * (kind != "none"), batch_size=2
    )
    both = [
        [Request(f"{name}{i}", p, 9 + i, Sampling(t), seed=4) for i, p in enumerate(prompts)]
        for name, prompts, t in (("a", PROMPTS[:3], 1.0), ("b", [[9], [6, 6, 6, 6], [8]], 0.0))
    ]
    alone = [{o.request_id: o.tokens for o in decoder.run(requests).outputs} for requests in both]
    together: list[dict[str, list[int]]] = [{r.id: [] for r in requests} for requests in both]
    for rounds in zip_longest(*map(decoder.stream, both)):
        for texts, round_ in zip(together, rounds, strict=True):
            for row in round_.rows if round_ else []:
                texts[row.request_id] += row.tokens
    assert together == alone


def test_a_decoder_is_settings() -> None:
    decoder = SpeculativeDecoder(endless())
    with pytest.raises(FrozenInstanceError):
        decoder.batch_size = 2


def test_rounds_are_yielded_as_they_happen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round arrives before the second is computed, and a stream may be left early."""
    target = tiny(14, eos_token_id=None)
    passes = 0

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return run(*args, **kwargs)

    assert target.body is not None  # found by passes of its own
    run = LlamaBody.__call__
    monkeypatch.setattr(LlamaBody, "__call__", counted)
    decoder = SpeculativeDecoder(target, NgramDrafter(), num_draft_tokens=2, batch_size=2)
    requests = [Request("a", [7], 6), Request("b", [9], 3), Request("c", [11], 6)]
    rounds = decoder.stream(requests)
    assert passes == 0, "nothing before the first round is asked for"
    texts: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for number, round_ in enumerate(rounds):
        for row in round_.rows:
            texts[row.request_id] += row.tokens
        if number == 0:
            first = passes
            assert [row.request_id for row in round_.rows] == ["a", "b"]
        elif number == 1:
            assert passes == first + 1, "one target pass a round"
    whole = decoder.run(requests)
    assert texts == {output.request_id: output.tokens for output in whole.outputs}
    next(decoder.stream(requests))
    assert decoder.run(requests).outputs == whole.outputs, "a stream left early changes nothing"


@pytest.mark.parametrize(
    ("num", "options", "message"),
    [
        (None, {"mode": "block"}, "need a drafter"),
        (None, {"lenience": Lenience("lin", 0.5)}, "need a drafter"),
        (None, {"num_draft_tokens": 3}, "without a drafter"),
        (None, {"batch_size": 0}, "at least 1"),
        (0, {}, "without a drafter"),
        (10_000, {}, "1 to 64"),
        (2, {"mode": "tree"}, "'token' or 'block'"),
        (2, {"mode": "block", "lenience": Lenience("lin", 0.5)}, "single tokens"),
        (2, {"lenience": Lenience("log", 0.5)}, "lin, sq or exp"),
        (2, {"lenience": Lenience("lin", 0.0)}, "0 < epsilon"),
        (2, {"lenience": Lenience("lin", 1.5)}, "0 < epsilon"),
    ],
    ids=str,
)
def test_options_that_do_nothing_or_do_not_exist_are_refused(
    tiny: Tiny, num: int | None, options: dict[str, object], message: str
) -> None:
    """Without a drafter, and with one that proposes `num` tokens."""
    target = tiny(10)
    drafted = {"drafter": ModelDrafter(target, 64), "num_draft_tokens": num}
    with pytest.raises(InputError, match=message):
        SpeculativeDecoder(target, **({} if num is None else drafted), **options)


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_a_request_may_fill_every_position_and_none_beyond(tiny: Tiny, drafted: bool) -> None:
    target = tiny(layers=2, max_position_embeddings=16)
    with torch.no_grad():
        target.head.weight[0] = 0  # of the end, which then never is the best token
    drafter = ModelDrafter(make_draft(target, [0]), target.vocab_size) if drafted else None
    decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=3 if drafted else 0)
    (output,) = decoder.generate([[5, 9, 7]], max_new_tokens=13, sampling=GREEDY, seed=0).outputs
    assert len(output.tokens) == 13
    with pytest.raises(InputError, match=r"3 prompt tokens .* 14 new ones exceed the 16 positions"):
        decoder.generate([[5, 9, 7]], max_new_tokens=14, sampling=GREEDY, seed=0)
    check_positions([target], [("a text", 16)])
    with pytest.raises(ModelError, match="17"):
        check_positions([target], [("a text", 17)])


def test_on_a_gpu_a_round_is_timed_by_events_and_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0

        def synchronize(self) -> None:
            waits.append(self.at)

        def elapsed_time(self, later: "Event") -> float:
            return float(later.at - self.at)

    class Stream:
        now = 0

        def record_event(self, event: Event) -> None:
            self.now += self.now + 1
            event.at = self.now

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    watch = watch_module.Watch(torch.device("cuda"))
    watch.mark("draft")
    watch.mark("target")
    seconds = watch.seconds()
    assert {part: spent for part, spent in seconds.items() if spent} == {
        "draft": 0.002,
        "target": 0.004,
    }
    assert waits == [7]
