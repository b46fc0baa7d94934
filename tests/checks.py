"""Checks that the lossless suite runs at length and the mutation suite runs on broken code. Each
raises AssertionError with what it saw.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from chains import (
    ALPHA,
    SIGMAS,
    TABLE,
    WARM,
    Lengths,
    Setting,
    V,
    acceptance_errors,
    chain,
    expected_overlap,
    independence,
    p_value,
    positions,
    seeded,
    stream,
    texts_of,
    transitions,
    unpacked,
    warped,
)
from conftest import tiny_model
from dispatch import EagerCapture, eager_capture
from torch import Tensor, nn

from specdistill.decoding import (
    GREEDY,
    CombinedDrafter,
    Drafter,
    Generation,
    ModelDrafter,
    NgramDrafter,
    ParallelDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
    graphs,
)
from specdistill.decoding.drafters import Context, Draft, DraftStream, NgramStream
from specdistill.decoding.rounds import RowState
from specdistill.decoding.sampling import row_seed
from specdistill.drafts.making import make_draft
from specdistill.limits import MAX_DRAFT_TOKENS
from specdistill.models import LanguageModel
from specdistill.models.parallel import set_parallel
from specdistill_kernels import (
    Lenience,
    Mode,
    RowSettings,
    counter_noise,
    probabilities,
    sample,
    verify,
)
from specdistill_kernels.verification.noise import COIN, DRAFT, FINAL

PROMPTS = [[7, 8, 9], [5], list(range(5, 45)), [11, 12], [9, 7] * 8]
ADAPTIVE: Lengths = (5, 0.2)
MIXED = [
    Sampling(1.0),
    Sampling(0.0),
    Sampling(0.8, top_k=9),
    Sampling(1.0, top_p=0.9),
    Sampling(1.3, min_p=0.02),
]


# --- Models and drafters ------------------------------------------------------------------------


@cache
def transformer(dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A random Llama whose greedy answers to PROMPTS end by EOS and by length."""
    return tiny_model(1, layers=4, dtype=dtype)


@cache
def endless() -> LanguageModel:
    """A transformer that knows no end of an answer."""
    target = tiny_model(2, layers=3, dtype=torch.float64, eos_token_id=None)
    target.tokenizer.eos_token = None
    return target


def opposite(target: LanguageModel) -> LanguageModel:
    """A draft whose logits are the negatives of the target's."""
    model = copy.deepcopy(target.model)
    head = nn.Linear(target.head.in_features, target.vocab_size, bias=False).to(target.dtype)
    head.weight = nn.Parameter(-target.head.weight.detach(), requires_grad=False)
    model.set_output_embeddings(head)
    return LanguageModel("opposite", target.path, model, target.tokenizer)


MASKS = {"parallel": 63, "parallel trimmed": 33, "parallel inside": 32}  # 32 is among the kept ones


def drafter_for(target: LanguageModel, kind: str, least_reach: float = 0.0) -> Drafter | None:
    """For a transformer: none, or a good, bad or adversarial one."""
    if kind in MASKS:
        kept = None if kind == "parallel" else torch.arange(0, 64, 2)
        draft = make_draft(target, [0, 1], kept)
        set_parallel(draft, MASKS[kind], 4)
        return ParallelDrafter(draft, target.vocab_size)
    if kind == "look-up":
        return NgramDrafter(shortest=1)
    if kind == "none":
        return None
    models = {
        "itself": lambda: target,
        "half": lambda: make_draft(target, [0, 1]),
        "trimmed": lambda: make_draft(target, [0, 1, 2], torch.arange(0, 64, 2)),
        "stranger": lambda: tiny_model(99, dtype=target.dtype),
        "opposite": lambda: opposite(target),
        "both": lambda: make_draft(target, [0, 1]),
    }
    model = ModelDrafter(models[kind](), target.vocab_size, least_reach=least_reach)
    return CombinedDrafter(NgramDrafter(shortest=1), model) if kind == "both" else model


# --- Text and distribution ----------------------------------------------------------------------


def check_stream(setting: Setting, rows: int, length: int, seed: int = 0) -> None:
    """The texts follow the target jointly; at single tokens, acceptance is the overlap."""
    generation = stream(setting, rows, length, seed)
    texts, p = texts_of(generation), warped(TABLE, setting.sampling)
    evidence = {"transitions": transitions(texts, p)}
    evidence.update(positions(texts, p, [0, 1, 2, 3, 4, length // 2, length - 1]))
    evidence.update(independence(texts, p, lags=6))
    worst = min(evidence, key=lambda name: evidence[name])
    assert evidence[worst] > ALPHA, f"{worst}: p-value {evidence[worst]:.1e}"
    if setting.mode == "token" and setting.draft not in ("look-up", "both"):
        error, again = acceptance_errors(generation, expected_overlap(setting))
        assert abs(error) < SIGMAS, f"acceptance is {error:+.1f} sigma from the overlap"
        assert abs(again) < SIGMAS, f"coins of two rounds correlate by {again:+.1f} sigma"
    check_accounts(generation, length)


def check_accounts(generation: Generation, length: int, most: int = 64, eos: int = -1) -> None:
    """Rounds add up to answers, which end where they must."""
    for output in generation.outputs:
        rounds = output.rounds
        assert [t for r in rounds for t in r.tokens] == output.tokens, "rounds are not the text"
        assert [r.finished for r in rounds] == [False] * (len(rounds) - 1) + [True]
        assert len(output.tokens) == length or output.tokens[-1] == eos, "an answer's length"
        assert eos not in output.tokens[:-1], "the answer goes on after its end"
        for r in rounds:
            assert r.accepted <= r.tested <= r.proposed <= most, "accepted, tested, proposed"
            whole = r.tested == r.proposed == r.accepted
            assert whole or r.tested in (r.accepted, r.accepted + 1), "tested"
            cut = bool(r.tokens) and r.tokens[-1] == eos
            assert cut or len(r.tokens) == r.accepted + 1, "a round's final token"


# --- Single checks ------------------------------------------------------------------------------


def stock_greedy(target: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """No cache, no engine: one full forward pass of the stock model a token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and tokens[-1] not in target.eos_ids:
        tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@cache
def greedy_answers(dtype: torch.dtype) -> list[list[int]]:
    answers = [stock_greedy(transformer(dtype), prompt, 24) for prompt in PROMPTS]
    assert {len(answer) == 24 for answer in answers} == {True, False}, "by EOS and by length"
    return answers


def check_greedy(
    kind: str,
    mode: Mode = "token",
    lengths: Lengths = 4,
    batch_size: int = 3,
    dtype: torch.dtype = torch.float64,
    filters: Sampling = GREEDY,
) -> None:
    """Token-identical to the stock model, whatever the draft."""
    target = transformer(dtype)
    most, least_reach = unpacked(lengths)
    decoder = SpeculativeDecoder(
        target,
        drafter_for(target, kind, least_reach),
        num_draft_tokens=most,
        batch_size=batch_size,
        mode=mode,
    )
    generation = decoder.generate(PROMPTS, max_new_tokens=24, sampling=filters)
    for output, expected in zip(generation.outputs, greedy_answers(dtype), strict=True):
        assert output.tokens == expected, f"prompt {output.request_id} differs"
    check_accounts(generation, 24, most, eos=0)


def check_identity(mode: Mode, temperature: float) -> None:
    """The target as its own draft: everything is accepted, and a round emits γ + 1 tokens."""
    target = endless()
    decoder = SpeculativeDecoder(
        target, ModelDrafter(target, 64), num_draft_tokens=3, batch_size=3, mode=mode
    )
    out = decoder.generate(PROMPTS, max_new_tokens=24, sampling=Sampling(temperature))
    rounds = [r for o in out.outputs for r in o.rounds]
    assert all(r.accepted == r.tested == r.proposed == 3 for r in rounds), "a rejection"
    assert all(len(r.tokens) == 4 for r in rounds), "a round that is not γ + 1 long"


class Recorder:
    """A drafter that notes what its streams saw and what they said."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.notes: list[tuple[list[list[int]], Draft]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def open(self, batch: int, capacity: int) -> DraftStream:
        stream = self.drafter.open(batch, capacity)
        propose = stream.propose

        def noted(context: Context, num_tokens: int) -> Draft:
            draft = propose(context, num_tokens)
            self.notes.append(([list(row) for row in context.tokens], draft))
            return draft

        stream.propose = noted
        return stream


class Oracle(NgramDrafter):
    """A look-up that knows how greedy texts go on; silent in every third place of a text."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.texts = texts

    def open(self, batch: int, capacity: int) -> NgramStream:
        stream = super().open(batch, capacity)
        stream.look_up = self.look_up
        return stream

    def look_up(self, context: Context, num_tokens: int) -> list[list[int]]:
        def follow(text: list[int]) -> list[int]:
            whole = next((t for t in self.texts if t[: len(text)] == text), [])
            return whole[len(text) :][:num_tokens] if len(text) % 3 else []

        return [follow(text) for text in context.tokens]


def check_draft_cache(kind: str) -> None:
    """The draft's logits are those of a fresh pass over the text: after full acceptance, after
    rejections and, for "both", after rounds in which a look-up spoke in its place."""
    target = endless()
    drafter = drafter_for(target, kind)
    if isinstance(drafter, CombinedDrafter):
        drafter.ngram = Oracle([p + stock_greedy(target, p, 24) for p in PROMPTS])
    recorder = Recorder(drafter)
    decoder = SpeculativeDecoder(target, recorder, num_draft_tokens=3, batch_size=2)
    sampling = GREEDY if kind == "both" else WARM
    decoder.generate(PROMPTS, max_new_tokens=24, sampling=sampling, seed=2)
    model: LanguageModel = getattr(drafter, "model", drafter).draft
    mask = getattr(drafter, "mask_token", None)
    compared = 0
    for texts, draft in recorder.notes:
        for row, text in enumerate(texts):
            certain = draft.point_mass is not None and bool(draft.point_mass[row])
            if draft.logits is None or certain or text == [0]:
                continue
            read = draft.tokens[row, :-1].tolist()
            if mask is not None:
                read = [mask] * len(read)
            fresh = model.logits(model.hidden(torch.tensor([text + read])))[0, len(text) - 1 :]
            if mask is not None:
                ids = torch.arange(64) if model.vocab is None else model.vocab
                fresh[:, ids == mask] = -torch.inf
            assert torch.allclose(draft.logits[row], fresh, atol=1e-5), "the draft's cache is stale"
            compared += 1
    assert compared > 10, f"{compared} rows were drawn by the model"


def check_target_cache(kind: str) -> None:
    """The hidden states that chose the tokens are those of a fresh pass of the target."""
    target = endless()
    decoder = SpeculativeDecoder(
        target, drafter_for(target, kind), num_draft_tokens=3, batch_size=2, keep_hidden=True
    )
    out = decoder.generate(PROMPTS, max_new_tokens=20, sampling=Sampling(1.0), seed=3)
    for prompt, output in zip(PROMPTS, out.outputs, strict=True):
        kept = torch.cat([r.hidden for r in output.rounds if r.hidden is not None])
        fresh = target.hidden(torch.tensor([prompt + output.tokens]))[0, len(prompt) - 1 : -1]
        assert torch.allclose(kept, fresh, atol=1e-5), "the target's cache is stale"


def check_invariance(
    kind: str, mode: Mode = "token", lengths: Lengths = 3, batches: int = 3
) -> None:
    """The same seed gives the same text alone and in a batch, in any order, beside longer prompts,
    with requests that all want something else."""
    target = transformer()
    most, least_reach = unpacked(lengths)
    drafter = drafter_for(target, kind, least_reach)
    requests = [
        Request(f"r{i}", prompt, 16, sampling, seed=8)
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, MIXED, strict=True))
    ]

    def texts(order: list[Request], batch_size: int) -> dict[str, list[int]]:
        decoder = SpeculativeDecoder(
            target, drafter, num_draft_tokens=most, batch_size=batch_size, mode=mode
        )
        return {output.request_id: output.tokens for output in decoder.run(order).outputs}

    alone = texts(requests, 1)
    assert len({tuple(text) for text in alone.values()}) == len(requests)
    orders = [(requests, 5), (requests[::-1], 2), (requests[2:] + requests[:2], 3)]
    for order, batch_size in orders[:batches]:
        assert texts(order, batch_size) == alone, f"another text in a batch of {batch_size}"


def check_captured(
    kind: str = "half",
    num: int = 3,
    batch_size: int = 3,
    samplings: Sequence[Sampling] = MIXED,
    **options: Any,
) -> None:
    """Rounds as they are captured give what the eager ones give, token for token and count for
    count: ragged rows, ends by EOS and by length, requests that wait, rows that leave.
    """
    target = transformer()
    drafter = drafter_for(target, kind)
    requests = [
        Request(f"r{i}", prompt, 5 + 4 * i, samplings[i % len(samplings)], seed=8)
        for i, prompt in enumerate([*PROMPTS, [9, 8] * 56, [7, 8], [31, 30], PROMPTS[0]])
    ]

    def outputs(cuda_graphs: bool) -> Generation:
        decoder = SpeculativeDecoder(
            target,
            drafter,
            num_draft_tokens=num,
            batch_size=batch_size,
            cuda_graphs=cuda_graphs,
            **options,
        )
        return decoder.run(requests)

    eager = outputs(False)
    with eager_capture() as capture:
        captured = outputs(True)
    for ours, expected in zip(captured.outputs, eager.outputs, strict=True):
        assert ours.tokens == expected.tokens, f"request {ours.request_id} differs"
        for one, other in zip(ours.rounds, expected.rounds, strict=True):
            for name in ("hidden", "logsumexp"):
                states, others = getattr(one, name), getattr(other, name)
                if others is not None:
                    assert torch.allclose(states, others, atol=1e-9), name
            kept = {"hidden": None, "logsumexp": None}
            assert replace(one, **kept) == replace(other, **kept)
    assert captured.captures == capture.captures
    assert capture.replays >= captured.rounds * (1 if kind == "none" else 2)


def check_rows_on_the_device() -> None:
    """What a round leaves of rows: accepted tokens and one more, an end by one of two tokens inside
    and at the end of them, an end by length, a row that was done, a target without a distribution.
    """
    cpu = torch.device("cpu")
    texts, left = [[7, 8, 9], [5], [6, 4], [3, 3], [8, 8], [2, 1]], [9, 9, 9, 2, 5, 9]
    state = RowState.of(texts, left, [GREEDY] * 6, [0] * 6, cpu)
    state.done[4] = True
    emitted = [[11, 12, 13, 14], [11, 1, 2, -1], [0, -1, -1, -1], [21, 22, -1, -1]]
    emitted += [[31, 32, -1, -1], [41, -1, -1, -1]]
    accepted = torch.tensor([3, 2, 0, 1, 1, 1])
    after = state.advanced(torch.tensor(emitted), accepted, torch.tensor([0, 1]))
    assert after.tail.tolist() == [[13, 14], [11, 1], [4, 0], [21, 22], [8, 8], [41, 0]]
    assert after.lengths.tolist() == [6, 2, 2, 3, 1, 3]
    assert after.left.tolist() == [5, 7, 8, 0, 5, 7]
    assert after.done.tolist() == [False, True, True, True, True, True]
    assert after.step.tolist() == [1, 1, 1, 1, 0, 1]


def check_captured_again() -> None:
    """A second stream in the rows of the first one, with other texts that begin alike."""
    target = endless()
    decoder = SpeculativeDecoder(
        target, drafter_for(target, "half"), num_draft_tokens=3, batch_size=2, cuda_graphs=True
    )
    eager = replace(decoder, cuda_graphs=False)
    with eager_capture():
        for prompts in (PROMPTS, [[7, 8, 9, 5], [*PROMPTS[2][:20], 6], [7]]):
            expected = eager.generate(prompts, max_new_tokens=30).outputs
            assert decoder.generate(prompts, max_new_tokens=30).outputs == expected


def check_capture_that_fails(kind: str = "half", captures: int = 2, batch_size: int = 2) -> None:
    """After so many, as where a wider view of the slots takes more memory than there is: eager
    rounds go on, which is said once, and a later stream does not try again.
    """
    target = endless()
    decoder = SpeculativeDecoder(
        target,
        drafter_for(target, kind),
        num_draft_tokens=3 * (kind != "none"),
        batch_size=batch_size,
        keep_proposals=True,
        cuda_graphs=True,
    )
    lengths = [30, 90, 90, 90, 90]  # with 40 tokens before them, more than 128
    requests = [Request(f"r{i}", p, lengths[i], MIXED[i]) for i, p in enumerate(PROMPTS)]
    expected = replace(decoder, cuda_graphs=False).run(requests).outputs
    run = EagerCapture.__call__

    def refuse(self: EagerCapture, *step: Any) -> Any:
        if EagerCapture.captures == captures:
            raise graphs.CannotCaptureError("out of memory")
        return run(self, *step)

    graphs.warn_of_eager_rounds.cache_clear()
    with (
        eager_capture() as capture,
        mock.patch.object(EagerCapture, "__call__", refuse),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        assert decoder.run(requests).outputs == expected
        assert decoder.run(requests[:1]).outputs == expected[:1]
    assert capture.captures == captures
    assert ["out of memory" in str(warning.message) for warning in told] == [True]
    assert not decoder._spaces


def check_same_prompt_other_text() -> None:
    """Requests with one prompt and one seed draw on their own."""
    out = stream(Setting(), rows=20, length=20)
    assert len({tuple(o.tokens) for o in out.outputs}) == 20, "rows share their draws"


def settings_of(rows: int, **more: float) -> RowSettings:
    """Of independent requests at temperature 1."""
    columns = {
        name: torch.full((rows,), value, dtype=torch.int64 if name == "top_k" else torch.float64)
        for name, value in {"temperature": 1.0, **more}.items()
    }
    zeros = torch.zeros(rows, dtype=torch.int64)
    return RowSettings(seeds=torch.arange(rows), step=zeros, **columns)


def fixed_coin(value: int) -> Callable[..., Tensor]:
    """The engine's noise with every coin at value / 2**32."""

    def noise(seeds: Tensor, step: Tensor, position: Tensor, domain: int, tokens: Tensor) -> Tensor:
        bits = counter_noise(seeds, step, position, domain, tokens)
        return torch.full_like(bits, value) if domain == COIN else bits

    return noise


def check_rounds(mode: Mode, rows: int = 40_000, draft: str = "near", **setting: float) -> None:
    """Many single rounds through `sample` and `verify`, each completed by tokens of the target's
    own: the first four tokens are distributed jointly as the target's."""
    p_logits = 1.5 * seeded(4, V, seed=7)
    q_logits = p_logits[:3] + seeded(3, V, seed=8) if draft == "near" else -p_logits[:3]
    args = settings_of(rows, **setting)
    q = q_logits.expand(rows, -1, -1)
    drawn = [sample(q[:, i], rows=args, position=i) for i in range(3)]
    out = verify(
        torch.stack([d.tokens for d in drawn], 1),
        q,
        p_logits.expand(rows, -1, -1),
        lengths=torch.full((rows,), 3),
        draft_lse=torch.stack([d.logsumexp for d in drawn], 1),
        mode=mode,
        rows=args,
    )
    p = warped(p_logits, Sampling(**{"temperature": 1.0, **setting}))
    rng = np.random.default_rng(1)
    own = np.stack([rng.choice(V, rows, p=law) for law in p], 1)
    texts = np.where(out.tokens.numpy() >= 0, out.tokens.numpy(), own)
    for i, j in ((0, 1), (1, 2), (0, 2), (2, 3)):
        counts = np.bincount(texts[:, i] * V + texts[:, j], minlength=V * V)
        value = p_value(counts, rows * np.outer(p[i], p[j]).ravel())
        assert value > ALPHA, f"tokens {i} and {j}: p-value {value:.1e}"
    if mode == "token":
        overlap = np.minimum(p[:3], warped(q_logits, Sampling(**{"temperature": 1.0, **setting})))
        kept = np.cumprod(overlap.sum(-1)).sum() * rows
        error = (out.num_accepted.sum().item() - kept) / rows**0.5
        assert abs(error) < SIGMAS * 1.5, f"accepted {error:+.1f} sigma off"


def check_coin_ends(mode: Mode) -> None:
    """A coin of exactly 0 keeps no token of probability 0; the largest coin still keeps p = q."""
    impossible = torch.tensor([0.0, 0.5, 0.5]).log().expand(1, 3, 3)
    certain = torch.tensor([1.0, 0.0, 0.0]).log().expand(1, 2, 3)
    out = verify(
        torch.tensor([[0, 0]]),
        certain,
        impossible,
        lengths=torch.tensor([2]),
        mode=mode,
        noise=fixed_coin(0),
        rows=settings_of(1),
    )
    assert out.num_accepted.item() == 0, "a token of probability 0 was accepted"
    assert out.tokens[0, 0] in (1, 2)
    same = seeded(1, 4, 8, seed=4).double()
    out = verify(
        torch.tensor([[5, 1, 2]]),
        same[:, :3],
        same,
        lengths=torch.tensor([3]),
        mode=mode,
        noise=fixed_coin(2**32 - 1),
        rows=settings_of(1),
    )
    assert out.num_accepted.item() == 3, "p = q was rejected"


def check_ties() -> None:
    """All tokens tied at a filter's threshold stay, whatever their order."""
    logits = torch.tensor([[2.0, 0.0, 2.0, -1.0, 2.0]])
    for name, value in (("top_k", 2), ("top_p", 0.4), ("min_p", 1.0)):
        setting = {name: getattr(settings_of(1, **{name: value}), name)}
        p = probabilities(logits, torch.ones(1), **setting)
        assert torch.allclose(p, torch.tensor([[1 / 3, 0, 1 / 3, 0, 1 / 3]])), f"{name}: {p}"


def check_certain() -> None:
    """A token of probability 1 is drawn whatever its noise."""

    def noise(*place: Tensor) -> Tensor:
        return torch.full((1, 3), 2**32 - 1)

    logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
    drawn = sample(logits, rows=settings_of(1), position=0, noise=noise).tokens
    assert drawn.tolist() == [1], f"drew {drawn.tolist()}"


def check_filter_edge() -> None:
    """Where rounding decides which tokens a filter keeps, it decides alike when the draft draws and
    when its q is computed: a coin of 0 keeps whatever can have been drawn."""
    rows = 4000
    shift = 7.3 * seeded(rows, 1, seed=6)
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + shift
    for setting in ({"top_p": 0.75}, {"top_p": 0.5}, {"top_p": 0.875}, {"min_p": 0.25}):
        args = settings_of(rows, **setting)
        drawn = sample(logits, rows=args, position=0)
        for logsumexp in (None, drawn.logsumexp[:, None]):
            out = verify(
                drawn.tokens[:, None],
                logits[:, None],
                torch.zeros(rows, 2, 4),
                lengths=torch.ones(rows, dtype=torch.int64),
                draft_lse=logsumexp,
                noise=fixed_coin(0),
                rows=args,
            )
            assert (out.num_accepted == 1).all(), f"{setting}: a token was drawn that q lacks"


def check_look_up() -> None:
    """The latest place of the longest match; nothing that the text does not hold."""
    drafter = NgramDrafter(longest=3, shortest=1)
    stream = drafter.open(1, 64)
    stream.prefill(torch.tensor([0]), [[1, 2, 3]])
    for text, expected in (
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 4, 2, 3], [4, 2, 3]),
        ([1, 2, 3, 4, 2, 3, 9], []),
        ([1, 2, 3, 4, 2, 3, 9, 2, 3], [9, 2, 3]),
        ([1, 2, 3, 4, 2, 3, 9, 2, 3, 4], [2, 3, 9]),
        ([1, 2, 3, 4, 2, 3, 9, 2, 3, 4, 7, 1], [2, 3, 4]),
    ):
        found = stream.seen[0].follow(text, 3)
        assert found == expected, f"{found} after {text}"


def check_tail(gap: float) -> None:
    """The exact chance, over all 2**32 values of its noise, that a token `gap` nats below the top
    wins the draw."""
    values, tops = 2 ** math.ceil(math.log2(24 * 2**32 * math.exp(-gap))), 512
    stride = 2**32 // tops
    seeds = torch.arange(tops * values)

    def noise(seeds: Tensor, *_: object) -> Tensor:
        return torch.stack([seeds // values * stride + stride // 2, seeds % values], -1)

    args = settings_of(len(seeds))._replace(seeds=seeds)
    logits = torch.tensor([0.0, -gap]).expand(len(seeds), 2)
    wins = sample(logits, rows=args, position=0, noise=noise).tokens.sum().item()
    chance, exact = wins / tops / 2**32, math.exp(-gap) / (1 + math.exp(-gap))
    assert abs(chance / exact - 1) < 0.02, f"{chance:.3e} for {exact:.3e}"


def toy(p: list[float], q: list[float], num: int, mode: Mode, rows: int, length: int) -> Generation:
    """Streams over two tokens that do not depend on what came before."""
    tables = [torch.tensor(law).log().expand(2, 2, 2).contiguous() for law in (p, q)]
    target, draft = map(chain, tables)
    decoder = SpeculativeDecoder(
        target, ModelDrafter(draft, 2), num_draft_tokens=num, batch_size=rows, mode=mode
    )
    out = decoder.generate([[0, 1]] * rows, max_new_tokens=length, sampling=WARM)
    check_accounts(out, length, num)
    return out


def check_toy_example(rows: int = 300, length: int = 40) -> None:
    """2403.10444, section 2: of p = [1/3, 2/3] and q = [2/3, 1/3] with γ = 2, 10/9 tokens are
    accepted by the token rule and 11/9 by block verification."""
    modes: tuple[tuple[Mode, float], ...] = (("token", 10 / 9), ("block", 11 / 9))
    for mode, expected in modes:
        out = toy([1 / 3, 2 / 3], [2 / 3, 1 / 3], 2, mode, rows, length)
        kept = np.array([r.accepted for o in out.outputs for r in o.rounds if r.proposed == 2])
        error = SIGMAS * kept.std() / len(kept) ** 0.5
        assert abs(kept.mean() - expected) < error, f"{mode}: {kept.mean():.3f} for {expected:.3f}"


def check_coins_are_spent(rows: int = 400, length: int = 60) -> None:
    """Block verification looks at coins beyond what it emits; used again they bias the text, which
    p = [1/2, 1/2] and q = [9/10, 1/10] show best."""
    out = toy([0.5, 0.5], [0.9, 0.1], 6, "block", rows, length)
    texts = texts_of(out, (0, 1))[:, 2:]
    for width in (1, 2, 3, 4):
        whole = texts[:, : length // width * width].reshape(-1, width)
        counts = np.bincount(whole @ 2 ** np.arange(width), minlength=2**width)
        value = p_value(counts, np.full(2**width, len(whole) / 2**width))
        assert value > ALPHA, f"groups of {width} tokens: p-value {value:.1e}"


def check_lenience(lenience: Lenience, rows: int, length: int) -> float:
    """Accepted / tested is Σ min(f(p), q), and more than without; returns it."""
    setting = Setting(lenience=lenience)
    out = stream(setting, rows, length)
    error, _ = acceptance_errors(out, expected_overlap(setting))
    assert abs(error) < SIGMAS, f"{lenience}: acceptance is {error:+.1f} sigma off"
    rounds = [r for o in out.outputs for r in o.rounds]
    return sum(r.accepted for r in rounds) / sum(r.tested for r in rounds)


def check_noise() -> None:
    """Seeds that differ in one bit, the places of a round and of those after it, the three domains
    and the tokens of a wide vocabulary: no stream of numbers comes twice.
    """
    zero, tokens = torch.zeros(1, dtype=torch.int64), torch.arange(4)

    def streams(*places: tuple[int, int, int, int]) -> int:
        """How many different ones there are."""
        found = set()
        for domain in sorted({domain for *_, domain in places}):
            these = torch.tensor([p[:3] for p in places if p[3] == domain])
            bits = counter_noise(these[:, 0], these[:, 1], these[:, 2], domain, tokens)
            found |= {tuple(row) for row in bits.tolist()}
        return len(found)

    seeds = [(0, 0, 0, DRAFT), *((1 << bit, 0, 0, DRAFT) for bit in range(63))]
    assert streams(*seeds) == len(seeds)
    widest = MAX_DRAFT_TOKENS + 1
    rounds = [
        (7, step, position, domain)
        for step in range(4)
        for position in range(widest)
        for domain in (DRAFT, COIN, FINAL)
    ]
    assert streams(*rounds) == len(rounds)
    wide = counter_noise(zero, zero, zero, FINAL, torch.arange(200_000))
    assert len(wide.unique()) > 200_000 - 60, "of 2**32 numbers about 5 come twice by chance"
    rows = [row_seed(seed, f"prompt {i}") for seed in range(4) for i in range(1_000)]
    assert len({seed & 0xFFFFFFFF for seed in rows}) > len(rows) - 3
    assert len({seed >> 32 for seed in rows}) > len(rows) - 3
