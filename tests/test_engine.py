"""The decoding engine: token-identical to plain greedy decoding, right in distribution, independent
of the batch.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import nn

from specdistill.decoding import ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.decoding.cache import CachedModel
from specdistill.drafts import make_draft
from specdistill.errors import DecodingError, InputError
from specdistill.models import LanguageModel

Tiny = Callable[..., LanguageModel]
PROMPTS = [[7, 8, 9], [5], list(range(5, 45)), [11, 12], [9] * 17]


def opposite(target: LanguageModel) -> LanguageModel:
    """A draft whose logits are the negatives of the target's."""
    model = copy.deepcopy(target.model)
    head = nn.Linear(target.head.in_features, target.vocab_size, bias=False).to(target.dtype)
    head.weight = nn.Parameter(-target.head.weight.detach(), requires_grad=False)
    model.set_output_embeddings(head)
    return LanguageModel("opposite", target.path, model, target.tokenizer)


def drafts(tiny: Tiny, target: LanguageModel) -> dict[str, LanguageModel]:
    return {
        "itself": target,
        "half": make_draft(target, [0, 1]),
        "trimmed": make_draft(target, [0, 1, 2], torch.arange(0, 64, 2)),
        "stranger": tiny(99, dtype=target.dtype),
        "opposite": opposite(target),
    }


def naive_greedy(target: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """No cache, no engine: one full forward pass of the stock model a token."""
    tokens = list(prompt)
    for _ in range(count):
        logits = target.model(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 0:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_that_of_the_stock_model(
    tiny: Tiny, dtype: torch.dtype, batch_size: int
) -> None:
    target = tiny(1, layers=4, dtype=dtype)
    expected = [naive_greedy(target, p, 24) for p in PROMPTS]
    assert any(len(text) < 24 for text in expected), "an answer should end by EOS"
    assert any(len(text) == 24 for text in expected), "an answer should end by length"
    plain = SpeculativeDecoder(target, batch_size=batch_size).generate(PROMPTS, max_new_tokens=24)
    assert [o.tokens for o in plain.outputs] == expected
    for name, draft in drafts(tiny, target).items():
        for num in (1, 5):
            decoder = SpeculativeDecoder(
                target,
                ModelDrafter(draft, target.vocab_size),
                num_draft_tokens=num,
                batch_size=batch_size,
            )
            out = decoder.generate(PROMPTS, max_new_tokens=24)
            assert [o.tokens for o in out.outputs] == expected, (name, num)


def test_identity_accepts_everything_and_emits_gamma_plus_one(tiny: Tiny) -> None:
    target = tiny(2, layers=3, dtype=torch.float64, eos_token_id=None)
    target.tokenizer.eos_token = None
    for temperature in (0.0, 1.0):
        decoder = SpeculativeDecoder(
            target, ModelDrafter(target, 64), num_draft_tokens=3, batch_size=2
        )
        out = decoder.generate(PROMPTS, max_new_tokens=24, sampling=Sampling(temperature))
        rounds = [r for o in out.outputs for r in o.rounds]
        assert all(r.accepted == r.tested == r.proposed for r in rounds)
        assert all(len(r.tokens) == 4 for o in out.outputs for r in o.rounds)
        assert [len(o.tokens) for o in out.outputs] == [24] * len(PROMPTS)
    target.tokenizer.eos_token = "<|end|>"


@pytest.mark.parametrize("draft_name", ["half", "opposite"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=6), Sampling(1.2, top_p=0.85, min_p=0.02)],
    ids=str,
)
def test_sampled_text_follows_the_target(tiny: Tiny, draft_name: str, sampling: Sampling) -> None:
    """First two tokens of many answers, jointly, against the exact distribution of a vocabulary of
    16.
    """
    target = tiny(3, vocab=16, layers=2, eos_token_id=None, initializer_range=0.15)
    target.tokenizer.eos_token = None
    draft = make_draft(target, [0]) if draft_name == "half" else opposite(target)
    n, prompt = 6000, [3, 9, 4]
    decoder = SpeculativeDecoder(
        target, ModelDrafter(draft, 16), num_draft_tokens=2, batch_size=500
    )
    out = decoder.generate([prompt] * n, max_new_tokens=2, sampling=sampling, seed=11)
    target.tokenizer.eos_token = "<|end|>"
    pairs = torch.tensor([o.tokens for o in out.outputs])

    from specdistill_kernels import probabilities

    def exact(contexts: list[list[int]]) -> torch.Tensor:
        logits = target.model(torch.tensor(contexts)).logits[:, -1]
        full = torch.full((len(contexts),), 1.0)
        s = sampling
        return probabilities(
            logits,
            full * s.temperature,
            torch.full((len(contexts),), s.top_k),
            full * s.top_p,
            full * s.min_p,
        ).double()

    first = exact([prompt])[0]
    joint = (first[:, None] * exact([[*prompt, x] for x in range(16)])).flatten()
    counts = torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256).double()
    assert counts[joint == 0].sum() == 0
    expected = joint * n
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    assert (
        stats.chisquare(
            observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()
        ).pvalue
        > 1e-4
    )


def test_acceptance_is_the_overlap_of_p_and_q(tiny: Tiny) -> None:
    from specdistill.scoring.measure import expected_acceptance

    target = tiny(4, layers=3)
    draft = make_draft(target, [0, 1])
    decoder = SpeculativeDecoder(target, ModelDrafter(draft, 64), num_draft_tokens=4, batch_size=50)
    out = decoder.generate(PROMPTS * 60, max_new_tokens=30, sampling=Sampling(1.0), seed=3)
    accepted = sum(r.accepted for o in out.outputs for r in o.rounds)
    totals = [
        expected_acceptance(target, draft, PROMPTS[i % len(PROMPTS)], o, 1.0)
        for i, o in enumerate(out.outputs)
    ]
    tested = sum(n for _, n in totals)
    assert tested == sum(r.tested for o in out.outputs for r in o.rounds)
    expected = sum(s for s, _ in totals) / tested
    assert 0.1 < expected < 0.9
    assert accepted / tested == pytest.approx(expected, abs=4 * 0.5 / tested**0.5)


def test_a_seed_gives_the_same_text_alone_in_any_batch_and_order(tiny: Tiny) -> None:
    target = tiny(5, layers=3, dtype=torch.float64)
    draft = make_draft(target, [0])
    samplings = [
        Sampling(1.0),
        Sampling(0.0),
        Sampling(0.8, top_k=9),
        Sampling(1.0, top_p=0.9),
        Sampling(1.3),
    ]
    requests = [
        Request(f"r{i}", p, 25, s, seed=8)
        for i, (p, s) in enumerate(zip(PROMPTS, samplings, strict=True))
    ]

    def texts(order: list[Request], batch_size: int) -> dict[str, list[int]]:
        decoder = SpeculativeDecoder(
            target, ModelDrafter(draft, 64), num_draft_tokens=3, batch_size=batch_size
        )
        return {o.request_id: o.tokens for o in decoder.run(order).outputs}

    alone = {r.id: texts([r], 1)[r.id] for r in requests}
    assert len({tuple(t) for t in alone.values()}) == len(requests)
    for batch_size in (2, 5):
        assert texts(requests, batch_size) == alone
        assert texts(requests[::-1], batch_size) == alone
    other = SpeculativeDecoder(target, ModelDrafter(draft, 64), num_draft_tokens=3).run(
        [Request("r0", PROMPTS[0], 25, Sampling(1.0), seed=9)]
    )
    assert other.outputs[0].tokens != alone["r0"]


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
        assert torch.allclose(hidden[row], expected, atol=1e-12)


def test_a_shared_prefix_is_computed_once_and_changes_nothing(tiny: Tiny) -> None:
    target = tiny(12, layers=3, dtype=torch.float64)
    prefix = torch.randint(5, 60, (20,)).tolist()
    texts = [[*prefix, 7, 8, 9], [*prefix, 7], [*prefix, 11, 12], prefix]
    seen: list[tuple[int, ...]] = []
    together = CachedModel(target, 5, 40)
    run = together.run
    together.run = lambda tokens, *rest: (seen.append(tuple(tokens.shape)), run(tokens, *rest))[1]
    together.prefill(torch.tensor([4, 0, 2, 1]), texts)
    assert seen == [(1, 20), (4, 3)]
    lengths = torch.tensor([21, 20, 22, 0, 23])[:, None]
    hidden = run(torch.full((5, 1), 6), lengths, 24)
    for row, text in zip([4, 0, 2, 1], texts, strict=True):
        assert torch.allclose(
            hidden[row, 0], target.hidden(torch.tensor([[*text, 6]]))[0, -1], atol=1e-12
        )


def test_prompts_longer_than_a_prefill_chunk(tiny: Tiny) -> None:
    target = tiny(7, layers=2, dtype=torch.float64)
    texts = [torch.randint(5, 60, (n,)).tolist() for n in (37, 1, 64)]
    whole, chunks = CachedModel(target, 3, 80), CachedModel(target, 3, 80)
    whole.prefill(torch.arange(3), texts)
    chunks.prefill(torch.arange(3), texts, chunk=10)
    last = torch.tensor([len(t) for t in texts])[:, None]
    token = torch.full((3, 1), 6)
    assert torch.allclose(whole.run(token, last, 65), chunks.run(token, last, 65), atol=1e-12)


def test_kept_hidden_states_give_back_the_logits_that_chose_each_token(tiny: Tiny) -> None:
    target = tiny(8, layers=3, dtype=torch.float64)
    decoder = SpeculativeDecoder(target, batch_size=2, keep_hidden=True)
    for prompt, out in zip(
        PROMPTS, decoder.generate(PROMPTS, max_new_tokens=12).outputs, strict=True
    ):
        hidden = torch.cat([r.hidden for r in out.rounds])
        logits = target.logits(hidden)
        assert logits.argmax(-1).tolist() == out.tokens
        full = target.model(torch.tensor([prompt + out.tokens])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(logits, full, atol=1e-10)
        assert torch.allclose(
            torch.cat([r.logsumexp for r in out.rounds]), full.logsumexp(-1), atol=1e-10
        )


def test_rounds_add_up(tiny: Tiny) -> None:
    target = tiny(9, layers=3)
    decoder = SpeculativeDecoder(
        target, ModelDrafter(make_draft(target, [0, 1]), 64), num_draft_tokens=4, batch_size=2
    )
    out = decoder.generate(PROMPTS, max_new_tokens=30)
    for o in out.outputs:
        assert [t for r in o.rounds for t in r.tokens] == o.tokens
        assert [r.finished for r in o.rounds] == [False] * (len(o.rounds) - 1) + [True]
        assert len(o.tokens) == 30 or o.tokens[-1] == 0
        assert 0 not in o.tokens[:-1]
        for r in o.rounds:
            assert r.accepted <= r.tested <= r.proposed <= 4
            assert r.tested == r.accepted or r.tested == r.accepted + 1


def test_bad_requests_are_refused_before_any_work(tiny: Tiny) -> None:
    target = tiny(10)
    with pytest.raises(InputError, match="no tokens"):
        SpeculativeDecoder(target).generate([[1, 2], []], max_new_tokens=3)
    with pytest.raises(InputError, match="max_new_tokens"):
        SpeculativeDecoder(target).generate([[1]], max_new_tokens=0)
    with pytest.raises(InputError, match="512 positions"):
        SpeculativeDecoder(target).generate([[1] * 500], max_new_tokens=20)
    with pytest.raises(InputError, match="1 to 64"):
        SpeculativeDecoder(target, ModelDrafter(target, 64), num_draft_tokens=10_000)
    with pytest.raises(InputError, match="without a drafter"):
        SpeculativeDecoder(target, ModelDrafter(target, 64), num_draft_tokens=0)
    for bad in (
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(InputError):
            Sampling(**bad)


def test_nan_logits_name_row_and_step(tiny: Tiny) -> None:
    target = tiny(11)
    target.head.weight[:] = float("nan")
    with pytest.raises(DecodingError, match="request 0, round 0"):
        SpeculativeDecoder(target).generate([[7, 8]], max_new_tokens=4)
