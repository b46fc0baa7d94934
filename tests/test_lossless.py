"""The proof that decoding is lossless: greedy text is the target's own, sampled text follows the
target's distribution jointly over long streams, and the same seed gives the same text in any batch.
"""

import pytest
import torch
from chains import WARM, Lengths, Setting, stream
from checks import (
    ADAPTIVE,
    check_certain,
    check_coin_ends,
    check_coins_are_spent,
    check_filter_edge,
    check_greedy,
    check_identity,
    check_invariance,
    check_lenience,
    check_rounds,
    check_same_prompt_other_text,
    check_stream,
    check_tail,
    check_target_cache,
    check_ties,
    check_toy_example,
    transformer,
)

from specdistill.decoding import GREEDY, ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.errors import InputError
from specdistill_kernels import Lenience, Mode

# --- Greedy -------------------------------------------------------------------------------------

FILTERS = Sampling(0.0, top_k=3, top_p=0.5, min_p=0.4)


@pytest.mark.parametrize(
    ("kind", "mode", "lengths", "batch_size", "filters", "dtype"),
    [
        ("none", "token", 0, 1, GREEDY, torch.float32),
        ("none", "token", 0, 3, FILTERS, torch.float64),
        ("itself", "token", 1, 5, GREEDY, torch.float32),
        ("itself", "block", 5, 3, FILTERS, torch.float64),
        ("half", "token", 5, 1, GREEDY, torch.float32),
        ("half", "block", ADAPTIVE, 3, FILTERS, torch.float32),
        ("half", "token", 5, 3, GREEDY, torch.float64),
        ("trimmed", "block", 4, 5, GREEDY, torch.float32),
        ("trimmed", "token", ADAPTIVE, 3, GREEDY, torch.float64),
        ("stranger", "token", ADAPTIVE, 5, FILTERS, torch.float64),
        ("opposite", "token", 5, 5, GREEDY, torch.float32),
        ("opposite", "block", 1, 5, FILTERS, torch.float64),
        ("look-up", "token", 4, 1, GREEDY, torch.float64),
        ("look-up", "block", ADAPTIVE, 5, FILTERS, torch.float32),
        ("parallel", "token", 5, 3, GREEDY, torch.float32),
        ("parallel", "block", 2, 1, FILTERS, torch.float64),
        ("parallel trimmed", "block", 4, 5, GREEDY, torch.float32),
        ("parallel inside", "token", 1, 5, FILTERS, torch.float64),
        ("both", "token", 4, 3, FILTERS, torch.float32),
        ("both", "block", ADAPTIVE, 5, GREEDY, torch.float64),
    ],
    ids=str,
)
def test_greedy_text_is_that_of_the_stock_model(
    kind: str,
    mode: Mode,
    lengths: Lengths,
    batch_size: int,
    filters: Sampling,
    dtype: torch.dtype,
) -> None:
    check_greedy(kind, mode, lengths, batch_size, dtype, filters)


# --- Distribution -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "draft", "setting"),
    [
        ("token", "near", {}),
        ("token", "opposite", {"temperature": 0.6}),
        ("token", "near", {"top_k": 5}),
        ("token", "opposite", {"top_p": 0.8}),
        ("token", "near", {"min_p": 0.1}),
        ("token", "near", {"temperature": 1.5, "top_k": 7, "top_p": 0.9}),
        ("block", "near", {"temperature": 0.6}),
        ("block", "opposite", {}),
        ("block", "opposite", {"temperature": 2.0, "top_k": 9}),
        ("block", "near", {"temperature": 1.5, "top_p": 0.9, "min_p": 0.02}),
    ],
    ids=str,
)
def test_single_rounds_follow_the_target_jointly(
    mode: Mode, draft: str, setting: dict[str, float]
) -> None:
    check_rounds(mode, 100_000, draft, **setting)


STREAMS = [
    Setting(WARM, "near"),
    Setting(WARM, "opposite", lengths=2),
    Setting(Sampling(0.8, top_k=6), "near", lengths=4),
    Setting(WARM, "near", "block", 5),
    Setting(Sampling(1.6, top_p=0.95), "opposite", "block"),
    Setting(Sampling(0.7, min_p=0.05), "near", "block", ADAPTIVE),
    Setting(Sampling(1.2, top_k=9, top_p=0.9, min_p=0.02), "trimmed"),
    Setting(WARM, "both", "token", ADAPTIVE),
    Setting(Sampling(0.6), "look-up", "block", 2),
    Setting(WARM, "parallel", lengths=4),
    Setting(Sampling(1.4, top_p=0.95), "parallel inside", "block"),
    Setting(Sampling(0.8, top_k=6), "parallel trimmed", lengths=5),
]
MORE_STREAMS = [
    Setting(WARM, "itself", lengths=4),
    Setting(Sampling(0.6), "near", lengths=5),
    Setting(Sampling(1.5, top_p=0.9), "opposite"),
    Setting(Sampling(1.6), "opposite", "block", 4),
    Setting(Sampling(1.3, top_k=8), "trimmed", "block"),
    Setting(WARM, "near", "token", ADAPTIVE),
    Setting(WARM, "opposite", "token", ADAPTIVE),
    Setting(WARM, "look-up", "token", 4),
    Setting(Sampling(0.9, top_p=0.95), "both", "block"),
    Setting(WARM, "parallel", "block", 5),
    Setting(Sampling(0.7, min_p=0.05), "parallel", lengths=2),
    Setting(WARM, "parallel trimmed", "block", 4),
]


@pytest.mark.parametrize(
    "setting",
    [*STREAMS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_STREAMS)],
    ids=str,
)
def test_streams_of_200_000_tokens_follow_the_target(setting: Setting) -> None:
    check_stream(setting, rows=2000, length=100, seed=[*STREAMS, *MORE_STREAMS].index(setting))


def test_no_coin_is_used_twice() -> None:
    check_coins_are_spent(rows=500, length=120)


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_as_its_own_draft_accepts_everything(mode: Mode, temperature: float) -> None:
    check_identity(mode, temperature)


def test_block_verification_of_the_papers_example() -> None:
    check_toy_example(rows=500, length=80)


def test_block_verification_accepts_at_least_as_many() -> None:
    def accepted(mode: Mode, setting: Setting) -> tuple[float, float]:
        out = stream(Setting(setting.sampling, setting.draft, mode, 4), rows=300, length=50)
        kept = torch.tensor(
            [r.accepted for o in out.outputs for r in o.rounds if r.proposed == 4]
        ).double()
        return kept.mean().item(), kept.std().item() / len(kept) ** 0.5

    for setting in (Setting(draft="near"), Setting(Sampling(2.0), draft="opposite")):
        (token, error), (block, _) = accepted("token", setting), accepted("block", setting)
        assert block > token + error, (setting, token, block)


@pytest.mark.parametrize("mode", ["token", "block"])
def test_the_coin_at_its_ends(mode: Mode) -> None:
    check_coin_ends(mode)


@pytest.mark.parametrize("gap", [18.0, 20.0])
def test_tokens_far_below_the_top_are_drawn_as_often_as_they_should(gap: float) -> None:
    check_tail(gap)


def test_a_token_of_probability_1_is_drawn_whatever_its_noise() -> None:
    check_certain()


def test_ties_at_a_filters_threshold_all_stay() -> None:
    check_ties()


def test_rounding_at_a_filters_edge_is_the_same_in_draft_and_verification() -> None:
    check_filter_edge()


# --- Lenience -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lenience", [Lenience("lin", 0.8), Lenience("sq", 0.9), Lenience("exp", 0.7)], ids=str
)
def test_lenience_accepts_more_by_exactly_its_formula(lenience: Lenience) -> None:
    exact = check_lenience(Lenience(lenience.kind, 1.0), rows=400, length=60)
    assert check_lenience(lenience, rows=400, length=60) > exact + 0.02


@pytest.mark.parametrize("kind", ["lin", "sq", "exp"])
def test_lenience_1_is_the_exact_rule(kind: str) -> None:
    exact = stream(Setting(), rows=50, length=40)
    lenient = stream(Setting(lenience=Lenience(kind, 1.0)), rows=50, length=40)
    assert [o.tokens for o in lenient.outputs] == [o.tokens for o in exact.outputs]
    assert exact.lossy is None
    assert lenient.lossy == Lenience(kind, 1.0)


def test_lenience_is_refused_where_it_does_nothing() -> None:
    target = transformer()
    lenient = SpeculativeDecoder(
        target, ModelDrafter(target, 64), num_draft_tokens=2, lenience=Lenience("lin", 0.5)
    )
    with pytest.raises(InputError, match="temperature 0"):
        lenient.generate([[7, 8]], max_new_tokens=4)


# --- The caches and the batch -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["itself", "opposite", "look-up", "parallel"])
def test_the_targets_cache_holds_what_a_fresh_pass_would(kind: str) -> None:
    check_target_cache(kind)


@pytest.mark.parametrize(
    ("kind", "mode", "lengths"),
    [
        ("half", "token", 3),
        ("half", "block", ADAPTIVE),
        ("trimmed", "block", 4),
        ("look-up", "token", ADAPTIVE),
        ("look-up", "block", 3),
        ("both", "token", ADAPTIVE),
        ("both", "block", 3),
        ("parallel", "token", 4),
        ("parallel inside", "block", 3),
    ],
    ids=str,
)
def test_a_seed_gives_the_same_text_alone_and_in_any_batch(
    kind: str, mode: Mode, lengths: Lengths
) -> None:
    check_invariance(kind, mode, lengths)


def test_requests_with_one_prompt_and_one_seed_draw_on_their_own() -> None:
    check_same_prompt_other_text()


def test_another_seed_gives_another_text() -> None:
    first, second = (stream(Setting(), rows=10, length=20, seed=seed) for seed in (1, 2))
    pairs = zip(first.outputs, second.outputs, strict=True)
    assert all(a.tokens != b.tokens for a, b in pairs)
