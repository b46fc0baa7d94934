"""Each policy for what it promises: whose tokens they are, how many, and from which weights."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import ALPHA, TABLE, WARM, V, chain, draft_chain, p_value, transitions, warped
from dispatch import eager_capture
from small_runs import digest, interrupted, pair_of, run, settings, untimed

from specdistill.config import Policy, parse_config
from specdistill.data.signal import Signal, States, read_states
from specdistill.data.token_store import Example
from specdistill.decoding import ModelDrafter, SpeculativeDecoder, engine
from specdistill.drafts.making import make_draft
from specdistill.errors import DecodingError, InputError, StorageError
from specdistill.models import LanguageModel
from specdistill.training.answers import read_given
from specdistill.training.batches import Batch, schedule
from specdistill.training.distiller import Distiller
from specdistill.training.policies import (
    POLICIES,
    Source,
    examples_at,
    forget_samples,
    standalone,
    within_top_k,
)
from specdistill_kernels import RowSettings

Tiny = Callable[..., LanguageModel]
Pair = tuple[LanguageModel, LanguageModel]
HALF = torch.arange(0, 64, 2)


def source(target: LanguageModel, draft: LanguageModel, name: str, **more: object) -> Source:
    texts = [Example(f"e{i}", [1, 5 + i % 50, 7 + i % 31, 2], [9, 8, 0], "odd") for i in range(30)]
    settings = {"max_new_tokens": 8, "prompts": 12} if name not in ("target", "fixed") else {}
    return Source(texts, target, draft, Policy(name=name, **(settings | more)), seed=3)


@pytest.fixture
def pair(tiny: Tiny) -> Pair:
    """A target and a draft of half its layers and tokens, which disagree now and then."""
    target = tiny(layers=4)
    return target, make_draft(target, [0, 3], HALF)


def greedy(model: LanguageModel, prompt: list[int], number: int, eos: bool = True) -> list[int]:
    """By stock forward passes, in target ids."""
    text = list(prompt)
    for _ in range(number):
        best = int(model.logits(model.hidden(torch.tensor([text])))[0, -1].argmax())
        text.append(best if model.vocab is None else int(model.vocab[best]))
        if eos and text[-1] in model.eos_ids:
            break
    return text[len(prompt) :]


def test_given_answers_stay_as_they_are(pair: Pair) -> None:
    for name in ("target", "fixed"):
        ours = source(*pair, name)
        assert POLICIES[name](ours, 0) == list(ours.given) == POLICIES[name](ours, 700)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_captured_for_one_step(
    pair: Pair, name: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(engine, "CAPTURING", "cpu")
    with eager_capture() as capture:
        POLICIES[name](source(*pair, name), 0)
    assert capture.captures == 0
    assert not recwarn


def test_draft_samples_follow_the_drafts_current_weights(pair: Pair) -> None:
    target, draft = pair
    ours = source(target, draft, "draft", sample_temperature=0.0)
    before = POLICIES["draft"](ours, 0)
    assert len(before) == 12
    assert {e.category for e in before} == {"odd"}
    for example in before:
        assert example.response_tokens == greedy(draft, example.prompt_tokens, 8)
    draft.model.requires_grad_(True)
    with torch.no_grad():
        for p in draft.model.parameters():
            p += 0.1 * torch.randn_like(p)
    after = POLICIES["draft"](ours, 0)
    assert [e.response_tokens for e in after] != [e.response_tokens for e in before]
    for example in after:
        assert example.response_tokens == greedy(draft, example.prompt_tokens, 8)


def test_draft_samples_are_fresh_at_each_refresh_and_the_same_at_one_step(pair: Pair) -> None:
    ours = source(*pair, "draft", prompts=30)
    texts = [{e.id: e.response_tokens for e in POLICIES["draft"](ours, s)} for s in (0, 0, 100)]
    assert texts[0] == texts[1]
    assert texts[0].keys() == texts[2].keys()
    assert sum(texts[0][i] != texts[2][i] for i in texts[0]) > 15
    known = set(HALF.tolist())
    assert all(set(tokens) <= known for text in texts for tokens in text.values())


def test_a_draft_alone_has_its_own_distribution(pair: Pair) -> None:
    _, draft = pair
    alone = standalone(draft, pair[0])
    hidden = torch.randn(3, 32)
    q = alone.logits(hidden).softmax(-1)
    assert torch.allclose(q[:, HALF], draft.logits(hidden).softmax(-1), atol=1e-6)
    assert q.sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert alone.model is draft.model


def test_mixed_takes_the_drafts_samples_in_their_share(pair: Pair) -> None:
    counts = []
    for step in range(0, 4000, 100):
        ours = source(*pair, "mixed", share=0.3, prompts=30, max_new_tokens=1)
        given = {e.id: e for e in ours.given}
        mix = POLICIES["mixed"](ours, step)
        assert [e.id for e in mix] == [e.id for e in ours.chosen(step)]
        counts.append(sum(e is not given[e.id] for e in mix))
    assert sum(counts) / 1200 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 1200) ** 0.5)
    assert len(set(counts)) > 3, "a coin for each prompt, not a fixed part"


def test_mixed_between_its_ends(pair: Pair) -> None:
    sampled = source(*pair, "draft", sample_temperature=0.0)
    ends = [
        POLICIES["mixed"](source(*pair, "mixed", share=share, sample_temperature=0.0), 0)
        for share in (0.0, 1.0)
    ]
    assert ends[0] == sampled.chosen(0)
    assert ends[1] == POLICIES["draft"](sampled, 0)


def test_skd_replaces_what_the_target_would_not_say() -> None:
    """On a Markov chain the law is exact: q within the target's top K, and p with the rest of q's
    mass, at every place of an answer and for rounds of any length.
    """
    top_k = 5
    p = warped(TABLE, WARM)
    q = warped(draft_chain("near").model.table.weight.reshape(V, V, V), WARM)
    top = p >= np.sort(p)[..., [-top_k]]
    law = q * top + (1 - (q * top).sum(-1, keepdims=True)) * p

    def texts(rows: int, length: int) -> np.ndarray:
        examples = [Example(f"e{i}", [3, 5], [1]) for i in range(rows)]
        settings = {"max_new_tokens": length, "prompts": rows, "block": 3, "top_k": top_k}
        policy = Policy(name="skd", **settings)
        ours = Source(examples, chain(TABLE), draft_chain("near"), policy, seed=1)
        return np.array([e.prompt_tokens + e.response_tokens for e in POLICIES["skd"](ours, 0)])

    long, short = texts(64, 300), texts(3000, 1)
    assert (long.shape, short.shape) == ((64, 302), (3000, 3))
    assert transitions(long, law) > ALPHA
    for other in (p, q):
        assert transitions(long, other) < ALPHA, "neither model's own text"
    counts = np.bincount(short[:, 2], minlength=V)  # an answer's last token is like the others
    assert p_value(counts, 3000 * law[3, 5]) > ALPHA
    assert p_value(counts, 3000 * p[3, 5]) < ALPHA


def test_skd_at_its_ends_is_the_drafts_or_the_targets_text(pair: Pair) -> None:
    for top_k, model in ((64, pair[1]), (1, pair[0])):
        ours = source(*pair, "skd", top_k=top_k, block=3, sample_temperature=0.0)
        for example in POLICIES["skd"](ours, 0):
            assert example.response_tokens == greedy(model, example.prompt_tokens, 8)


def test_the_rule_of_skd_by_hand() -> None:
    """Six tokens, K = 2, the target's best are 4 and 5: a rejection in the middle, a whole block,
    a row that proposes fewer, one that proposes nothing.
    """
    logits = torch.full((4, 4, 6), -50.0)
    logits[..., 4], logits[..., 5] = 1.0, 0.0
    proposals = torch.tensor([[4, 1, 5], [5, 4, 5], [5, -1, -1], [-1, -1, -1]])
    verdict = within_top_k(2)(
        proposals,
        None,
        logits,
        RowSettings(torch.zeros(4).double(), torch.arange(4), torch.zeros(4).long()),
        lengths=torch.tensor([3, 3, 1, 0]),
    )
    assert verdict.tokens.tolist() == [
        [4, 4, -1, -1],
        [5, 4, 5, -1],
        [5, -1, -1, -1],
        [4, -1, -1, -1],
    ]
    assert verdict.num_accepted.tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf], ids=["nan", "no maximum"])
def test_the_rule_of_skd_draws_nothing_from_a_row_that_is_no_distribution(bad: float) -> None:
    """The second row at the first place, the third after one proposal; the bonus row is not read,
    and in the first row it is all there is.
    """
    logits = torch.full((3, 3, 6), -50.0)
    logits[..., 4], logits[..., 5] = 1.0, 0.0
    logits[0, 2], logits[1, 0], logits[2, 1] = bad, bad, bad
    verdict = within_top_k(2)(
        torch.tensor([[4, 5], [4, 5], [4, 4]]),
        None,
        logits,
        RowSettings(torch.ones(3).double(), torch.arange(3), torch.zeros(3).long()),
        lengths=torch.tensor([2, 2, 2]),
    )
    assert verdict.tokens.tolist() == [[4, 5, -1], [-1, -1, -1], [4, -1, -1]]
    assert verdict.num_accepted.tolist() == [1, 0, 1]


def test_skd_names_the_request_of_a_target_without_numbers(tiny: Tiny) -> None:
    target, draft = tiny(layers=2), tiny(layers=1, seed=3)
    with torch.no_grad():
        target.head.weight[:] = torch.nan
    with pytest.raises(DecodingError, match=r"request .* the target's logits are"):
        POLICIES["skd"](source(target, draft, "skd", top_k=2, block=3), 0)


def test_induced_states_are_the_drafts_proposals_in_rejected_rounds(pair: Pair) -> None:
    target, draft = pair
    ours = source(target, draft, "induced", block=3, sample_temperature=0.0)
    induced = POLICIES["induced"](ours, 0)
    requests = ours.requests(0)
    decoder = SpeculativeDecoder(
        target, ModelDrafter(draft, target.vocab_size), num_draft_tokens=3, batch_size=5
    )
    rejected = {
        (o.request_id, sum(len(r.tokens) for r in o.rounds[:i]))
        for o in decoder.run(requests).outputs
        for i, r in enumerate(o.rounds)
        if r.accepted < r.tested
    }
    assert len(induced) == len(rejected) > 5
    answers = {r.id: greedy(target, list(r.tokens), 8) for r in requests}
    prompts = {r.id: list(r.tokens) for r in requests}
    for example in induced:
        name, _, length = example.id.partition("@")
        done = int(length) - len(prompts[name])
        assert (name, done) in rejected
        assert example.prompt_tokens == prompts[name] + answers[name][:done]
        assert 1 <= len(example.response_tokens) <= 3
        wanted = greedy(draft, example.prompt_tokens, 3)[: len(example.response_tokens)]
        assert example.response_tokens == wanted


def test_fresh_answers_are_the_targets_own(tiny: Tiny) -> None:
    target = tiny(layers=4)
    ours = source(target, make_draft(target, [0]), "fresh_target", sample_temperature=0.0)
    answers = POLICIES["fresh_target"](ours, 0)
    assert [e.id for e in answers] == [e.id for e in ours.chosen(0)]
    for example in answers:
        assert example.response_tokens == greedy(target, example.prompt_tokens, 8)


def test_fresh_answers_are_sampled_from_the_targets_distribution() -> None:
    draft = draft_chain("near")
    p, q = warped(TABLE, WARM), warped(draft.model.table.weight.reshape(V, V, V), WARM)
    examples = [Example(f"e{i}", [3, 5], [1]) for i in range(64)]
    policy = Policy(name="fresh_target", max_new_tokens=300, prompts=64)
    answers = POLICIES["fresh_target"](Source(examples, chain(TABLE), draft, policy, seed=1), 0)
    texts = np.array([e.prompt_tokens + e.response_tokens for e in answers])
    assert transitions(texts, p) > ALPHA
    assert transitions(texts, q) < ALPHA


def test_a_draft_that_is_never_rejected_learns_from_what_is_accepted(tiny: Tiny) -> None:
    target = tiny(layers=2)
    ours = source(target, target, "induced", block=3, sample_temperature=0.0)
    accepted = POLICIES["induced"](ours, 40)
    assert accepted
    for example in accepted:
        num = len(example.response_tokens)
        assert example.response_tokens == greedy(target, example.prompt_tokens, num)


def test_answers_of_one_token_have_no_induced_states(tiny: Tiny) -> None:
    target = tiny(layers=2)
    ours = source(target, target, "induced", max_new_tokens=1, sample_temperature=0.0)
    with pytest.raises(InputError, match="met no proposal at step 40"):
        POLICIES["induced"](ours, 40)


# Schedule and run


def test_samples_are_asked_for_at_every_refresh() -> None:
    asked: list[int] = []

    def examples(step: int) -> list[Example]:
        asked.append(step)
        return [Example(f"{step}-{i}", [1, 2], [3] * 4) for i in range(6)]

    raw = {"target": "t", "draft": "d", "data": "x", "run_dir": "r", "signal": "live"}
    training = {"max_steps": 9, "batch_tokens": 12}
    policy = {"name": "draft", "refresh_every": 4}
    config = parse_config({**raw, "policy": policy, "training": training})
    stream = schedule(examples, config, 0)
    first = [next(stream) for _ in range(10)]
    assert asked == [0, 4, 8]
    assert [u[0][0].id.partition("-")[0] for u in first] == ["0"] * 4 + ["4"] * 4 + ["8"] * 2
    asked.clear()
    later = schedule(examples, config, 6)
    assert [next(later) for _ in range(4)] == first[6:]
    assert asked == [4, 8]


SAMPLED = [name for name in POLICIES if name not in ("target", "fixed")]
SHORT = {"refresh_every": 3, "prompts": 6, "max_new_tokens": 6}


@pytest.mark.parametrize("name", SAMPLED)
def test_a_run_under_each_policy_learns_and_resumes_to_the_bit(
    world: dict[str, str], tmp_path: Path, name: str
) -> None:
    """Interrupted after a refresh that follows the last checkpoint, and between two."""
    policy = {"name": name, **SHORT}
    whole = run(settings(world, tmp_path / "whole", policy=policy, decode=None))
    assert whole[-2]["expected_alpha"] != whole[0]["expected_alpha"]
    samples = sorted(f.name for f in (tmp_path / "whole" / "samples").iterdir())
    assert samples == [f"step-{i:08d}.jsonl" for i in (0, 3, 6, 9)]
    config = settings(world, tmp_path / "broken", policy=policy, decode=None)
    interrupted(config, 7)
    assert untimed(run(config, resume=True)) == untimed(whole)
    assert digest(tmp_path / "broken") == digest(tmp_path / "whole")


@pytest.mark.parametrize("name", SAMPLED)
def test_the_target_reads_samples_once_and_no_loss_is_another(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Against a live pass at every step, which is what an example without a signal takes."""
    policy, real = {"name": name, **SHORT}, Distiller.signal
    live: list[bool] = []

    def counted(distiller: Distiller, batch: Batch) -> Signal | None:
        live.append(batch.signal is None)
        return real(distiller, batch)

    monkeypatch.setattr(Distiller, "signal", counted)
    once = run(settings(world, tmp_path / "once", policy=policy, decode=None))
    assert sum(live[-10:]) == 0
    monkeypatch.setattr("specdistill.training.run.read_states", lambda *_: None)
    always = run(settings(world, tmp_path / "live", policy=policy, decode=None))
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (once, always)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert sum(live) >= len(losses[1])


@pytest.mark.parametrize("name", ["draft", "induced"])
def test_the_target_reads_no_sample_that_is_not_trained_on(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A short run of many samples ends long before all of them are met."""
    met: list[list[int]] = []

    def counted(target: LanguageModel, prompt: list[int], response: list[int]) -> States:
        met.append(prompt + response)
        return read_states(target, prompt, response)

    monkeypatch.setattr("specdistill.training.run.read_states", counted)
    policy = {"name": name, "prompts": 30, "max_new_tokens": 8}
    training = {"max_steps": 2, "batch_tokens": 40}
    run(settings(world, tmp_path / "run", policy=policy, training=training, decode=None))
    samples = (tmp_path / "run" / "samples" / "step-00000000.jsonl").read_text().splitlines()
    assert 2 <= len(met) <= len(samples) // 3


def test_samples_of_weights_that_were_lost_are_forgotten(tmp_path: Path) -> None:
    for step in (0, 3, 6):
        (tmp_path / f"step-{step:08d}.jsonl").write_text("")
    forget_samples(tmp_path, 3)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000000.jsonl"]


def test_kept_samples_are_read_again_and_damaged_ones_refused(pair: Pair, tmp_path: Path) -> None:
    ours = source(*pair, "draft")
    first = examples_at(ours, 0, tmp_path)
    with torch.no_grad():
        pair[1].head.weight.zero_()
    again = examples_at(ours, 0, tmp_path)
    assert [replace(e, category=None) for e in first] == again
    file = tmp_path / "step-00000000.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(StorageError, match=r"step-00000000.jsonl, line 12 is damaged"):
        examples_at(ours, 0, tmp_path)


def test_fixed_trains_on_the_data_sets_own_responses(world: dict[str, str], tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"prompt": f"w{5 + i} w9", "response": f"w{rng.randrange(5, 60)} w8"} for i in range(20)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings(world | {"data": str(data)}, tmp_path / "run", policy="fixed", loss="ce")
    target, _ = pair_of(world)
    examples = read_given(config, target)
    tokenizer = target.tokenizer
    for example, row in zip(examples, rows, strict=True):
        spoken = tokenizer.decode(example.response_tokens)
        assert spoken.split() == [*row["response"].split(), "<|end|>"]
        assert example.response_tokens[-1] == 0
        assert row["prompt"] in tokenizer.decode(example.prompt_tokens)
    losses = [row["loss"] for row in run(config) if "loss" in row]
    assert losses[-1] < losses[0]
    data.write_text('{"prompt": "w5"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"prompt '1' .* has no response"):
        read_given(config, target)


def test_policy_and_data_of_different_kinds_are_refused(
    world: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds answers of the target; take policy 'target'"):
        run(settings(world, tmp_path / "run", policy="fixed"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5", "response": "w6"}\n', encoding="utf-8")
    other = world | {"data": str(tmp_path / "p.jsonl")}
    with pytest.raises(InputError, match="no answers of `specdistill generate`; take policy 'f"):
        run(settings(other, tmp_path / "run", policy="target"))
