"""Drafters and when they stop."""

import pytest
import torch
from chains import WARM
from checks import (
    PROMPTS,
    Oracle,
    Recorder,
    check_draft_cache,
    check_look_up,
    drafter_for,
    endless,
    stock_greedy,
    transformer,
)
from conftest import texts, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from specdistill.decoding import (
    CombinedDrafter,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    SpeculativeDecoder,
)
from specdistill.decoding.drafters import Context, _NgramIndex
from specdistill.decoding.sampling import row_settings
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError

CPU = torch.device("cpu")

# --- Look-up ------------------------------------------------------------------------------------


def test_a_look_up_takes_the_latest_place_of_the_longest_match() -> None:
    check_look_up()


def searched(text: list[int], sizes: range, count: int) -> list[int]:
    """The same by its definition: all places, every time."""
    for size in sizes:
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:] and len(text) >= size:
                return text[end : end + count]
    return []


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    longest=st.integers(1, 4),
    data=st.data(),
)
def test_a_growing_text_is_looked_up_as_a_whole_one(
    pieces: list[list[int]], longest: int, data: st.DataObject
) -> None:
    shortest, count = data.draw(st.integers(1, longest)), data.draw(st.integers(1, 5))
    sizes = range(longest, shortest - 1, -1)
    index, text = _NgramIndex(sizes), list[int]()
    for piece in pieces:
        text += piece
        assert index.follow(text, count) == searched(text, sizes, count)


def test_a_look_up_reads_each_token_once() -> None:
    class Counting(list):
        reads = 0

        def __getitem__(self, key: object) -> object:
            found = super().__getitem__(key)
            Counting.reads += len(found) if isinstance(key, slice) else 1
            return found

    index, text = _NgramIndex(range(3, 1, -1)), Counting(range(400))
    index.follow(text, 4)
    first = Counting.reads
    for token in range(20):
        text.append(token)
        index.follow(text, 4)
    assert Counting.reads - first < first / 4


def test_a_new_request_does_not_see_the_text_of_the_last() -> None:
    stream = NgramDrafter(shortest=1).open(2, 64)
    stream.prefill(torch.tensor([0, 1]), [[1, 2], [5]])
    assert stream.seen[0].follow([1, 2, 1], 2) == [2, 1]
    stream.prefill(torch.tensor([0]), [[9]])
    assert stream.seen[0].follow([9, 1], 2) == []
    stream.keep([1])
    assert len(stream.seen) == 1


@pytest.mark.parametrize("sizes", [(0, 0), (2, 3), (3, 0)])
def test_impossible_sizes_of_n_grams_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="1 <= shortest <= longest"):
        NgramDrafter(*sizes)


def test_look_up_proposes_with_certainty_and_runs_no_model() -> None:
    target = endless()
    recorder = Recorder(Oracle([p + stock_greedy(target, p, 16) for p in PROMPTS]))
    decoder = SpeculativeDecoder(target, recorder, num_draft_tokens=3, batch_size=5)
    out = decoder.generate(PROMPTS, max_new_tokens=16)
    assert out.draft_steps == 0
    rounds = [r for o in out.outputs for r in o.rounds]
    assert sum(r.proposed for r in rounds) > 30
    assert all(r.accepted == r.tested == r.proposed for r in rounds)
    assert all(draft.logits is None for _, draft in recorder.notes)


# --- A model, alone and beside a look-up --------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["half", "trimmed", "both", "parallel", "parallel trimmed", "parallel inside"]
)
def test_the_drafts_cache_holds_what_a_fresh_pass_would(kind: str) -> None:
    check_draft_cache(kind)


def test_the_model_sleeps_while_every_row_is_looked_up_and_catches_up_after() -> None:
    target = endless()
    texts = [p + stock_greedy(target, p, 24) for p in PROMPTS]

    class Half(Oracle):
        """Silent from the twelfth new token on."""

        def look_up(self, context, num_tokens):
            starts = {tuple(text[: len(text) - 24]): len(text) - 12 for text in self.texts}
            found = super().look_up(context, num_tokens)
            late = [
                any(tuple(text[: len(s)]) == s and len(text) >= end for s, end in starts.items())
                for text in context.tokens
            ]
            return [[] if is_late else f for f, is_late in zip(found, late, strict=True)]

    drafter = CombinedDrafter(Half(texts), drafter_for(target, "itself"))
    out = SpeculativeDecoder(target, drafter, num_draft_tokens=4).generate(
        [PROMPTS[2]], max_new_tokens=24
    )
    rounds = out.outputs[0].rounds
    assert out.outputs[0].tokens == texts[2][-24:]
    assert all(r.accepted == r.proposed for r in rounds), "the target as its own draft"
    assert 0 < out.draft_steps < 24


def test_a_draft_reads_ids_that_only_pad_the_targets_embedding() -> None:
    target, draft = tiny_model(1, vocab=70), tiny_model(3, vocab=64, layers=1)
    prompts = [[7, 66, 9], [69]]
    drafter = ModelDrafter(draft, target.vocab_size)
    decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=2, batch_size=2)
    assert texts(decoder, prompts, 8) == texts(SpeculativeDecoder(target), prompts, 8)


def test_a_trimmed_draft_proposes_only_its_tokens() -> None:
    target = transformer()
    ids = torch.arange(1, 64, 3)
    recorder = Recorder(ModelDrafter(make_draft(target, [0, 1], ids), 64))
    decoder = SpeculativeDecoder(target, recorder, num_draft_tokens=4, batch_size=5)
    decoder.generate(PROMPTS, max_new_tokens=12, sampling=WARM)
    proposed = torch.cat([draft.tokens.flatten() for _, draft in recorder.notes])
    assert len(proposed) > 40
    assert set(proposed.tolist()) <= set(ids.tolist())


# --- Stopping early -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_row_stops_after_the_token_that_leaves_too_small_a_chance(temperature: float) -> None:
    """Every row by itself, by the draft's own probabilities without filters."""
    drafter = drafter_for(endless(), "half", least_reach=0.1)
    assert isinstance(drafter, ModelDrafter)
    texts = [[7, 8, 9], [5, 6], list(range(5, 45))]
    stream = drafter.open(3, 64)
    stream.prefill(torch.arange(3), [text[:-1] for text in texts])
    settings = row_settings([Sampling(temperature, top_k=40)] * 3, [1, 2, 3], CPU)
    lengths = torch.tensor([len(text) - 1 for text in texts])
    counts = set()
    for step in range(12):
        context = Context(texts, lengths, 39, settings._replace(step=torch.full((3,), step)))
        draft = stream.propose(context, 4)
        q = (draft.logits / (temperature or 1.0)).softmax(-1)
        reach = q.gather(-1, draft.tokens[..., None])[..., 0].cumprod(-1).tolist()
        for chances, count in zip(reach, draft.counts, strict=True):
            assert all(chance >= 0.1 for chance in chances[: count - 1])
            assert count == 4 or chances[count - 1] < 0.1
            counts.add(count)
        assert draft.steps == draft.tokens.shape[1] == max(draft.counts)
    assert len(counts) > 1, f"always {counts} proposals"


def test_a_row_that_has_stopped_costs_no_step() -> None:
    target = endless()
    drafter = drafter_for(target, "opposite", least_reach=0.99)
    out = SpeculativeDecoder(target, drafter, num_draft_tokens=5).generate(
        PROMPTS, max_new_tokens=12, sampling=WARM
    )
    proposed = [r.proposed for o in out.outputs for r in o.rounds]
    assert max(proposed) == 1
    assert out.draft_steps == sum(proposed)


@pytest.mark.parametrize("least_reach", [-0.1, 1.0, float("nan")])
def test_an_impossible_reach_is_refused(least_reach: float) -> None:
    with pytest.raises(InputError, match="least_reach must be"):
        ModelDrafter(endless(), 64, least_reach=least_reach)
