"""Where a draft's minutes are best spent, on the demo pair: arms of equal time in all.

    python -m bench.minutes --out DIR [--seconds 180] [--only "more answers;reward"] [--seeds 3]

An arm answers prompts for a part of the seconds and trains an ordinary draft for the rest, as
quickstart would but for the arm's options. It is judged by the acceptance of every token of
held-out answers, at temperature 0 and 1, and by the block efficiency that follows: no clock is in
it, but that of the minutes themselves. All arms share the answers, which are made once, and take
what their time would have given. DIR/minutes.json has a row an arm, seed and temperature, so an
interrupted measurement goes on where it stopped; minutes.md is their table. Arms of one machine in
one call can be compared, no others.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bench.methods import append, begun
from specdistill import models
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.data.signal import States, read_states, token_log_probs
from specdistill.data.token_store import Example, Store, read_examples, read_manifest
from specdistill.decoding import Sampling
from specdistill.decoding.sampling import own_sampling
from specdistill.drafts.making import make_draft
from specdistill.drafts.vocabulary import vocabulary_from
from specdistill.models import LanguageModel
from specdistill.quickstart import Plan
from specdistill.quickstart.loop import EVALUATE_EVERY, training_precision
from specdistill.run_folder import read_metrics
from specdistill.training.run import distill
from specdistill_kernels import draft_columns

GAMMAS = (2, 3, 5)
PLAN = Plan()


@dataclass(frozen=True)
class Arm:
    """`answering` is the share of the seconds in which prompts are answered, each of them once at
    every temperature where they are `twice` answered, else at one of them; `options` are those of
    `distill` in place of quickstart's, their seconds of 180.
    """

    name: str
    answering: float = 4 / 9
    twice: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> str:
        """The folder with what arms like this one take their answers from."""
        return "answers-twice" if self.twice else "answers"


ARMS = (
    Arm("quickstart"),
    Arm("fewer answers", answering=2 / 9),
    Arm("more answers", answering=6 / 9),
    Arm("fp32", options={"precision": "fp32"}),
    Arm("twice the rate", options={"learning_rate": 2 * PLAN.learning_rate}),
    Arm("twice the batch", options={"batch_tokens": 2 * PLAN.batch_tokens}),
    Arm("weight decay", options={"weight_decay": 0.1}),
    Arm("weight decay of 1", options={"weight_decay": 1.0}),
    Arm("answered twice", twice=True),
    Arm("8 held out", options={"heldout": 8}),
    # Evaluations are no training time, so what more of them take is left out of it.
    Arm("evaluated often", options={"evaluate_every": 100, "heldout": 32, "max_seconds": 94}),
    Arm("chosen by decoding", options={"evaluate_every": 100, "decode": {}, "max_seconds": 76}),
    Arm("mixed", options={"policy": "mixed"}),
    Arm("induced", options={"policy": "induced"}),
    Arm("reward", options={"policy": "mixed", "reward": {"function": "accepted-length"}}),
)


@dataclass
class Measured:
    """An arm's draft at one temperature. alpha: the mean over held-out tokens of Σ min(p, q), which
    at temperature 0 is whether the most probable tokens agree. block_efficiency: by γ.
    """

    arm: str
    seed: int
    temperature: float
    alpha: float
    block_efficiency: dict[int, float]
    answers: int
    tokens: int
    steps: int
    train_seconds: float


def answered(
    target: LanguageModel,
    folder: Path,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    seconds: float,
) -> float:
    """Answer prompts for so many seconds; the answers a second, also of an earlier call."""
    clock = folder.with_suffix(".seconds")
    if not clock.exists():
        start = time.perf_counter()
        generate(
            target,
            prompts,
            folder,
            max_new_tokens=PLAN.max_new_tokens,
            samplings=[Sampling(t) for t in temperatures],
            batch_size=PLAN.batch_size,
            max_seconds=seconds,
        )
        clock.write_text(str(time.perf_counter() - start))
    return len(read_manifest(folder).ids) / float(clock.read_text())


def at_each_temperature(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once for every temperature of the plan, by an id that `generate` gives it for."""
    samplings = [Sampling(t) for t in PLAN.temperatures]
    copies = []
    for prompt in prompts:
        names = [f"{prompt.id}~{n}" for n in range(64)]
        ids = {own_sampling(samplings, 0, name): name for name in names}
        copies += [replace(prompt, id=ids[sampling]) for sampling in samplings]
    return copies


def first(answers: Path, number: int) -> Path:
    """A folder with the first answers of another, in the order in which they ended."""
    folder = answers.with_name(f"{answers.name}-{number}")
    if not folder.exists():
        manifest = read_manifest(answers)
        examples = read_examples(answers, signal=True)[:number]
        manifest.parts = []
        Store(folder, manifest).append(examples)
    return folder


def acceptance(
    target: LanguageModel, draft: LanguageModel, answer: Example, temperature: float
) -> tuple[Tensor, Tensor]:
    """For each of the n tokens of an answer of the target at temperature 0 or 1, [n]: Σ min(p, q),
    and the chance that this token is accepted where the draft proposes. That is min(1, q/p), as a
    token x is emitted with probability p, and as an accepted proposal with min(p, q).
    """
    assert isinstance(answer.signal, States)
    assert answer.signal.logsumexp is not None
    ids = torch.arange(draft.vocab_size) if draft.vocab is None else draft.vocab
    logits = draft.logits(read_states(draft, answer.prompt_tokens, answer.response_tokens).hidden)
    tokens = torch.tensor(answer.response_tokens)
    if temperature == 0:
        agree = (ids[logits.argmax(-1)] == tokens).double()
        return agree, agree
    log_q = logits.log_softmax(-1)
    log_p = target.logits(answer.signal.hidden)[:, ids] - answer.signal.logsumexp[:, None]
    columns = draft_columns(tokens, len(ids), draft.vocab)
    of_token = log_q.gather(-1, columns.clamp(min=0)[:, None])[:, 0]
    of_token = of_token.where(columns >= 0, -torch.inf)
    ratio = of_token - token_log_probs(target, answer.signal, tokens)
    return torch.minimum(log_p, log_q).exp().sum(-1).double(), ratio.clamp(max=0).exp().double()


def rounds(chances: Sequence[float], num_draft_tokens: int) -> float:
    """The expected number of rounds that emit an answer, from the chances of its tokens to be
    accepted. A round proposes no more than the answer has room for beside the token that ends it.
    """
    begins = [1.0] + [0.0] * len(chances)  # the chance that a round begins at a token
    for place in range(len(chances)):
        most = min(num_draft_tokens, len(chances) - place - 1)
        reached = begins[place]
        for token in range(place, place + most):
            begins[token + 1] += reached * (1 - chances[token])
            reached *= chances[token]
        begins[place + most + 1] += reached
    return sum(begins[:-1])


def measure(
    target: LanguageModel, draft: LanguageModel, heldout: Path, temperature: float
) -> tuple[float, dict[int, float]]:
    """alpha and block efficiency over all held-out answers."""
    alphas, chances = [], []
    for answer in read_examples(heldout, signal=True):
        alpha, chance = acceptance(target, draft, answer, temperature)
        alphas.append(alpha)
        chances.append(chance.tolist())
    tokens = sum(map(len, chances))
    efficiency = {g: tokens / sum(rounds(c, g) for c in chances) for g in GAMMAS}
    return torch.cat(alphas).mean().item(), efficiency


def run(
    arm: Arm, seed: int, target: LanguageModel, out: Path, seconds: float, rate: float
) -> list[Measured]:
    """Train and judge a draft. `rate`: answers a second."""
    number = round(rate * arm.answering * seconds)
    data = first(out / arm.answers, number)
    ids = vocabulary_from(target, PLAN.vocab_size or target.vocab_size, data).ids
    folder = out / f"{arm.name.replace(' ', '-')}-{seed}"
    options: dict[str, Any] = {
        "max_seconds": (1 - arm.answering) * seconds,
        "batch_tokens": PLAN.batch_tokens,
        "learning_rate": PLAN.learning_rate,
        "precision": training_precision(target),
        "heldout": max(1, min(16, number // 4)),
        "evaluate_every": EVALUATE_EVERY,
        "decode": None,
        "seed": seed,
        **arm.options,
    }
    start = time.perf_counter()
    draft = distill(target, make_draft(target, PLAN.layers, ids), data, folder, **options)
    spent = time.perf_counter() - start
    last = max(read_metrics(folder / "metrics.jsonl"), key=lambda row: row["step"])
    return [
        Measured(
            arm.name,
            seed,
            temperature,
            *measure(target, draft, out / f"heldout-{temperature:g}", temperature),
            number,
            last["tokens"],
            last["step"],
            spent,
        )
        for temperature in PLAN.temperatures
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line an arm and temperature, means over its seeds."""
    lines = [
        f"| arm | T | seeds | α | τ at γ = {', '.join(map(str, GAMMAS))} | answers | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, temperature in dict.fromkeys((r["arm"], r["temperature"]) for r in rows):
        same = [r for r in rows if (r["arm"], r["temperature"]) == (arm, temperature)]
        alphas = [r["alpha"] for r in same]
        spread = f" ({min(alphas):.3f} to {max(alphas):.3f})" if len(same) > 1 else ""
        taus = (fmean(dict(r["block_efficiency"])[str(g)] for r in same) for g in GAMMAS)
        lines.append(
            f"| {arm} | {temperature:g} | {len(same)} | {fmean(alphas):.3f}{spread} | "
            f"{' '.join(f'{tau:.3f}' for tau in taus)} | {same[0]['answers']} | "
            f"{fmean(r['steps'] for r in same):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--seconds", type=float, default=180, help="of an arm in all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="arms by name, with semicolons")
    options = parser.parse_args()
    wanted = options.only.split(";") if options.only else [arm.name for arm in ARMS]
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "minutes.json"
    document = begun(file, options.seconds, options.threads)
    done = {(row["arm"], row["seed"]) for row in document["rows"]}
    target = models.load(options.target)
    prompts, rates = load_prompts("demo:train"), {}
    for twice in {arm.twice for arm in ARMS if arm.name in wanted}:
        same = [arm for arm in ARMS if arm.twice == twice]
        asked = at_each_temperature(prompts) if twice else prompts
        longest = options.seconds * max(arm.answering for arm in same)
        folder = options.out / same[0].answers
        rates[twice] = answered(target, folder, asked, PLAN.temperatures, longest)
    for temperature in PLAN.temperatures:
        folder = options.out / f"heldout-{temperature:g}"
        answered(target, folder, load_prompts("demo:heldout"), [temperature], float("inf"))
    for seed in range(options.seeds):
        for arm in ARMS:
            if (arm.name, seed) in done or arm.name not in wanted:
                continue
            rows = run(arm, seed, target, options.out, options.seconds, rates[arm.twice])
            append(file, document, rows, table)
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
