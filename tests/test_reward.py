"""What is worth more becomes more probable, and the draft stays near its target."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch
from small_runs import digest, interrupted, run, settings, untimed
from torch import Tensor

from specdistill.config import DistillConfig
from specdistill.data.token_store import Example
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.training.batches import idle, make_batch
from specdistill.training.losses import Positions, objective, total_loss
from specdistill.training.policies import Source, examples_at, standalone
from specdistill.training.reward import (
    CLIP,
    Credit,
    Reward,
    Sample,
    accepted_length,
    configured_reward,
    credit_of,
    policy_loss,
)
from specdistill_kernels import Head, RowSettings, verify

Tiny = Callable[..., LanguageModel]
SAMPLING = {"name": "draft", "prompts": 8, "max_new_tokens": 6, "refresh_every": 3}
VOCABULARIES = [None, torch.tensor([11, 2, 19, 0, 7, 22, 3, 16])]
NUMBERS = itertools.count()


def module(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> str:
    """The name of a function of the user's, in a module of the working directory."""
    name = f"worth{next(NUMBERS)}"
    (folder / f"{name}.py").write_text(f"def worth(prompt, texts):\n    {body}\n")
    monkeypatch.chdir(folder)
    return f"{name}:worth"


def asking(world: dict[str, str], folder: Path, name: str, **more: object) -> DistillConfig:
    reward = {"function": name, "weight": 0.5, "group": 4} | more.pop("reward", {})  # type: ignore[operator]
    policy = SAMPLING | more.pop("policy", {})  # type: ignore[operator]
    return settings(world, folder, policy=policy, reward=reward, decode=None, **more)


def rows_of(n: int, vocab: Tensor | None) -> tuple[Positions, Tensor, Tensor]:
    """Positions of n tokens, the states and the head's weight, both to be differentiated."""
    torch.manual_seed(n)
    width = 23 if vocab is None else len(vocab)
    states = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, 5, dtype=torch.float64, requires_grad=True)
    columns = torch.randint(width, (n,))
    labels = columns if vocab is None else vocab[columns]
    at = Positions(states, Head(weight), lambda t: None, labels, torch.tensor([n]), vocab, chunk=3)
    return at, states, weight


def log_q(states: Tensor, weight: Tensor, at: Positions) -> Tensor:
    columns = at.labels
    if at.draft_vocab is not None:
        columns = (at.draft_vocab == at.labels[:, None]).long().argmax(1)
    return (states @ weight.T).log_softmax(-1).gather(1, columns[:, None])[:, 0]


@pytest.mark.parametrize("vocab", VOCABULARIES, ids=["full", "trimmed"])
def test_the_gradient_of_fresh_samples_is_the_advantage_times_that_of_log_q(
    vocab: Tensor | None,
) -> None:
    at, states, weight = rows_of(8, vocab)
    advantages = torch.tensor([1.5, 1.5, -0.7, -0.7, 0.0, 0.0, 2.0, -2.0], dtype=torch.float64)
    now = log_q(states, weight, at)
    wanted = torch.autograd.grad(-(advantages * now).sum(), (states, weight))
    loss = policy_loss(at, Credit(advantages, now.detach()))
    torch.testing.assert_close(loss, -advantages.sum())
    got = torch.autograd.grad(loss, (states, weight))
    torch.testing.assert_close(got, wanted)
    assert got[0][4:6].count_nonzero() == 0
    columns = at.labels if vocab is None else (vocab == at.labels[:, None]).long().argmax(1)
    q = (states @ weight.T).softmax(-1).detach()
    one = torch.nn.functional.one_hot(columns, q.shape[1])
    by_hand = -(advantages[:, None] * (one - q)) @ weight.detach()
    torch.testing.assert_close(got[0], by_hand)


@pytest.mark.parametrize("vocab", VOCABULARIES, ids=["full", "trimmed"])
def test_the_ratio_is_clipped_where_it_has_moved_as_the_advantage_wants(
    vocab: Tensor | None,
) -> None:
    at, states, weight = rows_of(8, vocab)
    advantages = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    moved = torch.tensor([0.1, 0.1, 0.5, 0.5, -0.5, -0.5, 3.0, -3.0], dtype=torch.float64)
    now = log_q(states, weight, at)
    sampled = now.detach() - moved
    ratio = (now - sampled).exp()
    plain = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).sum()
    wanted = torch.autograd.grad(plain, (states, weight))
    loss = policy_loss(at, Credit(advantages, sampled))
    torch.testing.assert_close(loss, plain)
    got = torch.autograd.grad(loss, (states, weight))
    torch.testing.assert_close(got, wanted)
    still = got[0].abs().sum(1) == 0
    assert still.tolist() == [False, False, True, False, False, True, True, True]


def pair(tiny: Tiny) -> tuple[LanguageModel, LanguageModel]:
    target = tiny(layers=4)
    return target, make_draft(target, [0, 3], torch.arange(0, 64, 2))


def drawn(tiny: Tiny, reward: Reward | None, name: str = "draft", **more: object) -> Source:
    target, draft = pair(tiny)
    texts = [Example(f"e{i}", [1, 5 + i % 50, 7 + i % 31, 2], [9, 8, 0]) for i in range(30)]
    config = settings(
        {"target": "t", "draft": "d", "data": "x"},
        Path("r"),
        policy={"name": name, "prompts": 6, "max_new_tokens": 5, **more},
        decode=None,
    )
    return Source(texts, target, draft, config.policy, 3, reward)


def numbered(samples: list[Example], log_probs: list[Tensor], target: LanguageModel) -> list[float]:
    return [float(sum(s.response_tokens)) for s in samples]


def test_samples_come_in_groups_with_advantages_among_them(tiny: Tiny, tmp_path: Path) -> None:
    source = drawn(tiny, Reward("sum", numbered, 0.1, 3))
    samples = examples_at(source, 0, tmp_path)
    assert len(samples) == 18
    assert len({s.id for s in samples}) == 18
    alone = standalone(source.draft, source.target)
    for start in range(0, 18, 3):
        group = samples[start : start + 3]
        assert all(isinstance(s, Sample) for s in group)
        assert len({tuple(s.prompt_tokens) for s in group}) == 1
        rewards = [float(sum(s.response_tokens)) for s in group]
        assert [s.reward for s in group] == rewards
        if len(set(rewards)) > 1:
            assert len({tuple(s.response_tokens) for s in group}) > 1
            expected = [(r - fmean(rewards)) / pstdev(rewards) for r in rewards]
            assert [s.advantage for s in group] == pytest.approx(expected)
        else:
            assert [s.advantage for s in group] == [0.0] * 3
        for s in group:
            text = torch.tensor([s.prompt_tokens + s.response_tokens])
            logits = alone.logits(alone.hidden(text))[0, len(s.prompt_tokens) - 1 : -1]
            q = logits.double().log_softmax(-1)
            expected = q[torch.arange(len(q)), torch.tensor(s.response_tokens)]
            assert s.log_probs == pytest.approx(expected.tolist(), abs=1e-5, rel=0)
    assert any(s.advantage for s in samples)
    assert examples_at(source, 0, tmp_path) == samples, "read again from the file"
    plain = drawn(tiny, None)
    first = examples_at(plain, 0, tmp_path / "plain")
    assert [s.response_tokens for s in samples[::3]] == [e.response_tokens for e in first]
    assert not any(isinstance(e, Sample) for e in first)


def test_of_a_mixture_the_drafts_own_samples_alone_have_credit(tiny: Tiny, tmp_path: Path) -> None:
    source = drawn(tiny, Reward("sum", numbered, 0.1, 2), "mixed", share=0.5)
    examples = examples_at(source, 0, tmp_path)
    sampled = [e for e in examples if isinstance(e, Sample)]
    given = [e for e in examples if not isinstance(e, Sample)]
    assert given
    assert len(sampled) == 2 * (6 - len(given))
    credit = credit_of([given[0], sampled[0]], torch.device("cpu"))
    assert credit is not None
    lengths = len(given[0].response_tokens), len(sampled[0].response_tokens)
    assert credit.advantages.tolist() == pytest.approx(
        [0.0] * lengths[0] + [sampled[0].advantage] * lengths[1]
    )
    assert credit_of(given, torch.device("cpu")) is None
    batch = idle(make_batch(sampled, 0, torch.device("cpu")))
    assert batch.credit is not None
    assert len(batch.credit.advantages) == len(batch.credit.log_probs) == 0


def test_the_accepted_length_is_what_verification_accepts_on_average(tiny: Tiny) -> None:
    target, draft = pair(tiny)
    alone, draws = standalone(draft, target), 20_000
    prompt, proposal = [1, 8, 11, 2], [10, 6, 12, 8]
    text = torch.tensor([prompt + proposal])
    place = slice(len(prompt) - 1, None)
    p, q = (m.logits(m.hidden(text))[0, place].double() for m in (target, alone))
    ids = torch.tensor(proposal)
    log_probs = q[:-1].log_softmax(-1)[torch.arange(4), ids]
    (expected,) = accepted_length([Example("e", prompt, proposal)], [log_probs], target)
    share, chance = 0.0, 1.0
    for at, token in enumerate(proposal):
        chance *= min(1.0, (p[at].softmax(-1)[token] / q[at].softmax(-1)[token]).item())
        share += chance
    assert expected == pytest.approx(share, rel=1e-4)
    verdict = verify(
        ids.expand(draws, -1),
        q[:-1].float().expand(draws, -1, -1),
        p.float().expand(draws, -1, -1),
        RowSettings(torch.ones(draws), torch.arange(draws), torch.zeros(draws, dtype=torch.long)),
        lengths=torch.full((draws,), 4),
    )
    counts = verdict.num_accepted.double()
    assert abs(counts.mean() - expected) < 5 * counts.std() / draws**0.5


def mean_of(rows: list[dict], name: str, part: slice) -> float:
    return fmean([row[name] for row in rows if name in row][part])


def learnt(
    p: Tensor,
    logits: Tensor,
    reward: Callable[[Tensor, Tensor], Tensor],
    weight: float,
    losses: dict[str, float],
    rate: float = 0.3,
) -> list[Tensor]:
    """One place, where the target has the distribution p: the draft's, from these logits on."""
    generator = torch.Generator().manual_seed(0)
    table = logits[:, None].clone().requires_grad_()
    states, lengths = torch.ones(64, 1, dtype=torch.float64), torch.ones(64, dtype=torch.long)
    course = []
    for _ in range(300):
        q = table[:, 0].detach().softmax(0)
        course.append(q)
        tokens = torch.multinomial(q, 64, replacement=True, generator=generator)
        rewards = reward(tokens, q)
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-12)
        at = Positions(states, Head(table), lambda t: p.log().expand(64, -1), tokens, lengths)  # type: ignore[arg-type,return-value]
        loss = weight * policy_loss(at, Credit(advantages, q.log()[tokens]))
        if losses:
            loss = loss + total_loss(at, objective(losses))
        (gradient,) = torch.autograd.grad(loss / 64, table)
        table.data -= rate * gradient
    return course


def test_on_a_toy_the_reward_rises_and_the_divergence_bounds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(12, generator=generator, dtype=torch.float64).mul(1.5).softmax(0)

    def small(tokens: Tensor, q: Tensor) -> Tensor:
        return (tokens < 3).double()

    def far(q: Tensor) -> float:
        return (p * (p / q).log()).sum().item()

    near, alone, nearer = (
        learnt(p, p.log(), small, weight, losses)[-1]
        for weight, losses in ((0.3, {"fkl": 1.0}), (0.3, {}), (0.03, {"fkl": 1.0}))
    )
    assert p[:3].sum() + 0.1 < near[:3].sum() < alone[:3].sum()
    assert far(near) < 0.3
    assert far(alone) > 5 * far(near)
    assert far(nearer) < far(near) / 5


def test_the_accepted_length_rises() -> None:
    """From a draft that has lost its target: by the reward alone, to where almost all is kept."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    logits = torch.tensor([0.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    course = learnt(p, logits, lambda tokens, q: (p / q).clamp(max=1)[tokens], 1.0, {}, rate=0.1)
    overlaps = [torch.minimum(p, q).sum().item() for q in course]
    assert overlaps[0] < 0.6
    assert fmean(overlaps[-20:]) > 0.85


def test_a_run_learns_what_is_rewarded(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the same run with next to no weight; both stay as near to the target."""
    body = "return [t.split().count('w10') / (len(t.split()) or 1) for t in texts]"
    name = module(monkeypatch, tmp_path, body)
    more = {"training": {"max_steps": 60, "learning_rate": 1e-2, "batch_tokens": 400}}
    rewarded = run(asking(world, tmp_path / "a", name, reward={"weight": 0.5}, **more))
    barely = run(asking(world, tmp_path / "b", name, reward={"weight": 1e-9}, **more))
    first, last = slice(0, 6), slice(-6, None)
    assert mean_of(rewarded, "reward", last) > 2 * mean_of(rewarded, "reward", first)
    assert mean_of(rewarded, "reward", last) > 2 * mean_of(barely, "reward", last)
    near = [mean_of(rows, "expected_alpha", slice(-2, -1)) for rows in (rewarded, barely)]
    assert near[0] > 0.6 * near[1]


def test_a_weight_of_zero_is_the_same_run_to_the_bit(world: dict[str, str], tmp_path: Path) -> None:
    config = asking(world, tmp_path / "zero", "accepted-length", reward={"weight": 0.0})
    zero = run(config)
    without = run(settings(world, tmp_path / "none", policy=SAMPLING, decode=None))
    some = run(asking(world, tmp_path / "some", "accepted-length", reward={"weight": 0.1}))
    assert untimed(zero) == untimed(without) != untimed(some)
    assert digest(tmp_path / "zero") == digest(tmp_path / "none") != digest(tmp_path / "some")


def test_an_interrupted_run_goes_on_to_the_same_bits(world: dict[str, str], tmp_path: Path) -> None:
    """From a checkpoint between two refreshes, with the samples' rewards and log-probabilities."""
    whole = run(asking(world, tmp_path / "whole", "accepted-length", policy={"refresh_every": 6}))
    config = asking(world, tmp_path / "cut", "accepted-length", policy={"refresh_every": 6})
    interrupted(config, 9)
    assert untimed(run(config, resume=True))[-1] == untimed(whole)[-1]
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


BODIES = {
    "raises": ("raise RuntimeError('no')", r"failed on prompt '\d+': RuntimeError: no"),
    "ends the process": ("raise SystemExit(0)", r"failed on prompt '\d+': SystemExit: 0"),
    "a NaN": ("return [float('nan')] * len(texts)", r"gave \[nan, nan, nan, nan\] for the 4 samp"),
    "too few": ("return [1.0]", r"gave \[1.0\] for the 4 samples of prompt '\d+'"),
    "no numbers": ("return ['a'] * len(texts)", "ValueError: could not convert"),
    "nothing": ("return None", "TypeError"),
}


@pytest.mark.parametrize("fault", BODIES)
def test_a_function_that_is_wrong_is_named_and_nothing_is_trained(
    fault: str, world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, reason = BODIES[fault]
    name = module(monkeypatch, tmp_path, body)
    with pytest.raises(InputError, match=f"the reward '{name}'.*{reason}"):
        run(asking(world, tmp_path / "run", name))
    assert not (tmp_path / "run/draft").exists()


def test_a_function_that_fails_late_loses_no_checkpoint(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module(monkeypatch, tmp_path, "return [1.0 / (counts.pop() > 40) for t in texts]")
    file = tmp_path / f"{name.partition(':')[0]}.py"
    file.write_text("counts = list(range(140))\n" + file.read_text())
    config = asking(world, tmp_path / "run", name)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        run(config)
    assert (tmp_path / "run/checkpoints").exists()
    for again in tmp_path.glob("__pycache__/*"):
        again.unlink()
    file.write_text("def worth(prompt, texts):\n    return [1.0] * len(texts)\n")
    monkeypatch.delitem(__import__("sys").modules, name.partition(":")[0])
    assert run(config, resume=True)[-1]["kept_step"] >= 0


def test_a_function_that_is_not_there(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, reason in (
        ("accepted_length", "unknown reward 'accepted_length'; accepted-length is there, or name"),
        ("nowhere:f", "the reward 'nowhere:f' cannot be had: ModuleNotFoundError"),
        ("math:pi", "the reward 'math:pi' is no function but float"),
    ):
        with pytest.raises(InputError, match=reason):
            configured_reward(asking(world, tmp_path / "run", name))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"reward": {"group": 1}},
            "reward: group is 1, and a sample's advantage is over",
        ),
        ({"reward": {"group": 0}}, "reward.group"),
        ({"reward": {"weight": -1}}, "reward.weight"),
        ({"reward": {"weight": float("nan")}}, "reward.weight"),
        ({"policy": {"name": "skd"}}, "a reward is for samples of the draft, and policy 'skd' has"),
        ({"policy": {"sample_temperature": 0.5}}, "at temperature 1; got policy.sample_temp"),
    ],
)
def test_rewards_that_mean_nothing(
    changes: dict, reason: str, world: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        asking(world, tmp_path / "run", "accepted-length", **changes)
    assert reason in str(caught.value)
