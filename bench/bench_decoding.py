"""The engine against Transformers, plain and speculative.

    python -m pytest bench/bench_decoding.py                      mechanics, on a tiny random pair
    python -m bench.bench_decoding --target T --draft D           the comparison, on a pair of yours

The comparison decodes the same prompts greedily with every contender in one process, taking turns
prompt by prompt (at a larger batch: by groups of three times the batch), so that drift of the
machine falls on all alike. Speeds are tokens per second of the whole call, prefill included; the
last line is JSON. Transformers assists a single row only, so at larger batches it decodes plainly.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import load_prompts
from specdistill.decoding import ModelDrafter, SpeculativeDecoder
from specdistill.drafts.making import at_full_vocabulary, make_draft
from specdistill.models import LanguageModel, load
from specdistill.provenance import device_name, git_commit, versions
from specdistill.scoring.statistics import speedup_interval

Answers = list[list[int]]
Contender = Callable[[list[list[int]], int], Answers]
ASSISTED = "Transformers assisted"
TRIMMED_REACH, WIDE_REACH = 0.15, 0.25  # 1.5 times the time of a draft step over a plain one


def engine(
    target: LanguageModel,
    draft: LanguageModel | None = None,
    num: int = 0,
    batch: int = 1,
    least_reach: float = 0.0,
) -> Contender:
    drafter = None
    if draft is not None:
        drafter = ModelDrafter(draft, target.vocab_size, least_reach=least_reach)
    decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=num, batch_size=batch)

    def run(prompts: list[list[int]], count: int) -> Answers:
        return [o.tokens for o in decoder.generate(prompts, max_new_tokens=count).outputs]

    return run


def transformers(
    target: LanguageModel,
    assistant: PreTrainedModel | None = None,
    batch: int = 1,
    **settings: object,
) -> Contender:
    """`generate` on the stock model, `batch` prompts a call. `settings` go to the assistant's
    generation config, where Transformers looks for them."""
    model, end = target.model, sorted(target.eos_ids)

    def run(prompts: list[list[int]], count: int) -> Answers:
        groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        return [answer for group in groups for answer in together(group, count)]

    @torch.inference_mode()
    def together(prompts: list[list[int]], count: int) -> Answers:
        longest = max(map(len, prompts))
        pad = end[0] if end else 0
        tokens = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        if assistant is not None:
            for name, value in settings.items():
                setattr(assistant.generation_config, name, value)
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=end or None,
            pad_token_id=pad,
            assistant_model=assistant,
        )
        answers = out[:, longest:].tolist()
        return [cut(answer, end) for answer in answers]

    return run


def cut(answer: list[int], end: list[int]) -> list[int]:
    """Up to and with the first token that ends an answer."""
    return answer[: next((i + 1 for i, t in enumerate(answer) if t in end), len(answer))]


@dataclass
class Runs:
    """One contender: tokens emitted and seconds for each group of prompts."""

    answers: list[Answers] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return sum(self.emitted) / sum(self.seconds)

    def over(self, other: "Runs") -> dict[str, object]:
        low, high = speedup_interval(
            self.emitted, self.seconds, other.emitted, other.seconds, seed=0
        )
        return {"ratio": self.speed / other.speed, "ci95": [low, high]}


def take_turns(
    contenders: dict[str, Contender], groups: list[list[list[int]]], count: int
) -> dict[str, Runs]:
    """Every contender on every group, beginning with another one each time; one untimed call of
    each comes first."""
    names = list(contenders)
    runs = {name: Runs() for name in names}
    for run in contenders.values():
        run(groups[0], 8)
    for i, group in enumerate(groups):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            answers = contenders[name](group, count)
            runs[name].seconds.append(time.perf_counter() - start)
            runs[name].answers.append(answers)
            runs[name].emitted.append(sum(map(len, answers)))
    return runs


@dataclass
class Pair:
    """One pair as each side takes it: the engine packed, with the trimmed and the widened draft;
    Transformers as it comes."""

    target: LanguageModel
    draft: LanguageModel
    wide: LanguageModel
    stock_target: LanguageModel
    stock_wide: LanguageModel


def contenders(pair: Pair, num: int, batch: int) -> dict[str, Contender]:
    found = {
        "engine plain": engine(pair.target, batch=batch),
        "engine speculative": engine(pair.target, pair.draft, num, batch),
        "engine speculative, stopping early": engine(
            pair.target, pair.draft, 2 * num, batch, TRIMMED_REACH
        ),
        "Transformers plain": transformers(pair.stock_target, batch=batch),
    }
    if batch == 1:
        assistant = pair.stock_wide.model
        fixed = {
            "num_assistant_tokens": num,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
        default = {
            "num_assistant_tokens": 20,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.4,
        }
        found |= {
            "engine, full vocabulary": engine(pair.target, pair.wide, num),
            "engine, full vocabulary, stopping early": engine(
                pair.target, pair.wide, 2 * num, 1, WIDE_REACH
            ),
            f"{ASSISTED}, fixed": transformers(pair.stock_target, assistant, **fixed),
            f"{ASSISTED}, default": transformers(pair.stock_target, assistant, **default),
        }
    return found


def tiny(layers: int = 3) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    return LanguageModel("tiny", Path(), model, None)  # type: ignore[arg-type]


def tiny_pair() -> Pair:
    target = tiny()
    draft = make_draft(target, [0, 1], torch.arange(0, 64, 2))
    return Pair(target, draft, at_full_vocabulary(draft), target, at_full_vocabulary(draft))


NAMES = sorted(contenders(tiny_pair(), 3, 1))


@pytest.mark.parametrize("name", NAMES)
def test_decoding(benchmark, name: str) -> None:
    found = contenders(tiny_pair(), 3, 1)
    expected = found["Transformers plain"]([[5, 6, 7]], 16)
    assert found[name]([[5, 6, 7]], 16) == expected
    benchmark(found[name], [[5, 6, 7]], 16)


def test_ragged_batches() -> None:
    prompts = [[5, 6, 7], [9], [8, 9, 10, 11]]
    answers = [run(prompts, 12) for run in contenders(tiny_pair(), 3, 3).values()]
    assert answers[0] == answers[1] == answers[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", default="demo:heldout")
    parser.add_argument("--limit", type=int, default=12, help="prompts at batch 1")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--num-draft-tokens", type=int, nargs="+", default=[5, 3, 2], help="one for each batch"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    if len(given.num_draft_tokens) != len(given.batches):
        parser.error("give as many --num-draft-tokens as --batches")
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()

    target, packed = (load(given.target, dtype=given.dtype) for _ in range(2))
    draft, *others = (load(given.draft, dtype=given.dtype) for _ in range(3))
    wide, stock_wide = map(at_full_vocabulary, others)
    pair = Pair(packed, draft, wide, target, stock_wide)
    prompts = [
        encode_prompt(target.tokenizer, prompt)
        for prompt, _ in zip(load_prompts(given.prompts), range(6 * given.limit), strict=False)
    ]
    document = {
        "device": device_name(target.device),
        "threads": given.threads,
        "dtype": str(target.dtype).removeprefix("torch."),
        "versions": versions(),
        "git": git_commit(),
        "max_new_tokens": given.max_new_tokens,
        "batches": {},
    }
    for batch, num in zip(given.batches, given.num_draft_tokens, strict=True):
        size = 1 if batch == 1 else 3 * batch  # a waiting request takes a finished row's place
        wanted = prompts[: max(given.limit, 2 * size if batch > 1 else 0)]
        groups = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        found = contenders(pair, num, batch)
        runs = take_turns(found, groups, given.max_new_tokens)
        plain = "Transformers plain"
        table = {
            name: {
                "tokens_per_second": run.speed,
                "identical": sum(
                    a == b
                    for ours, theirs in zip(run.answers, runs[plain].answers, strict=True)
                    for a, b in zip(ours, theirs, strict=True)
                ),
                "of": len(wanted),
                "over_plain_transformers": run.over(runs[plain]),
            }
            for name, run in runs.items()
        }
        assisted = [name for name in runs if name.startswith(ASSISTED)]
        if assisted:
            best = max(assisted, key=lambda name: runs[name].speed)
            for name, run in runs.items():
                table[name]["over_best_assisted"] = run.over(runs[best])
        document["batches"][batch] = {"num_draft_tokens": num, "contenders": table}
        print(f"\nbatch {batch}, {num} draft tokens")
        for name, row in sorted(table.items(), key=lambda item: -item[1]["tokens_per_second"]):
            line = f"  {name:42} {row['tokens_per_second']:7.1f} tokens/s"
            line += f"  {row['over_plain_transformers']['ratio']:.2f} x plain Transformers"
            if "over_best_assisted" in row:
                line += f", {row['over_best_assisted']['ratio']:.2f} x its best assisted"
            print(line + f"; {row['identical']} of {row['of']} texts identical")
    line = json.dumps(document)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(line)


if __name__ == "__main__":
    main()
