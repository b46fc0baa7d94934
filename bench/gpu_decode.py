"""Distil and score, end to end on this device, on a pair with random weights made on the spot.

It proves the mechanics: generation, fused loss, training, the round loop, CUDA graphs, greedy
identity. The text of random weights is noise, so its acceptance and its speed say nothing about a
real pair.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gpu_session import Session
from specdistill.decoding import Generation, ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.drafts.making import make_draft
from specdistill.models import LanguageModel
from specdistill_kernels import Head, TargetStates, fused_divergence

NOTE = "random weights: mechanics only; acceptance and speed say nothing about a real pair"


@dataclass(frozen=True)
class Sizes:
    vocab: int
    width: int
    layers: int
    spread: float  # standard deviation of the weights
    inner: float  # what the inner layers' outputs are scaled by
    texts: int  # to distil on
    tokens: int  # of each text, half of them the prompt's
    steps: int
    new_tokens: int  # to decode
    batches: tuple[int, ...]


FULL = Sizes(32_000, 512, 12, 0.12, 0.05, 64, 128, 60, 128, (1, 8))
SMOKE = Sizes(64, 32, 4, 0.3, 0.5, 4, 16, 12, 8, (1, 2))


def run(session: Session) -> None:
    sizes = SMOKE if session.smoke else FULL
    session.report |= {"note": NOTE, "sizes": vars(sizes)}
    target = random_target(session, sizes)
    draft = make_draft(target, [0, sizes.layers - 1])
    distil(session, target, draft, sizes)
    session.case("greedy identity", partial(check_identity, session, target, draft, sizes))
    for batch in sizes.batches:
        for temperature in (0.0, 1.0):
            for graphs in (False, True):
                what = f"B={batch}, T={temperature:g}{', CUDA graphs' if graphs else ''}"
                if graphs and session.device.type != "cuda":
                    session.add("left_out", what=f"{what}: no CUDA device")
                else:
                    case = (sizes, batch, temperature, graphs)
                    session.case(what, partial(score, session, target, draft, *case))


def random_target(session: Session, sizes: Sizes) -> LanguageModel:
    """Its inner layers add little, so that a draft of the outer two comes near: proposals should be
    both accepted and rejected.
    """
    torch.manual_seed(session.report["seed"])
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 16,
        num_key_value_heads=sizes.width // 32,
        max_position_embeddings=1024,
        initializer_range=sizes.spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers[1:-1]:
        layer.self_attn.o_proj.weight *= sizes.inner
        layer.mlp.down_proj.weight *= sizes.inner
    model.to(session.device, dtype)
    return LanguageModel("random", Path(), model, None)  # type: ignore[arg-type]


def prompts(session: Session, sizes: Sizes, count: int) -> list[list[int]]:
    found: list[list[int]] = session.integers(sizes.vocab, count, sizes.tokens // 2).tolist()
    return found


def distil(session: Session, target: LanguageModel, draft: LanguageModel, sizes: Sizes) -> None:
    """Forward KL on texts the target sampled: a plain loop, the fused loss, float32 weights."""
    start = time.perf_counter()
    asked = prompts(session, sizes, sizes.texts)
    decoder = SpeculativeDecoder(target, batch_size=sizes.texts)
    answers = decoder.generate(
        asked, max_new_tokens=sizes.tokens // 2, sampling=Sampling(1.0), seed=1
    ).outputs
    texts = torch.tensor(
        [prompt + answer.tokens for prompt, answer in zip(asked, answers, strict=True)],
        device=session.device,
    )
    generated = time.perf_counter() - start

    dtype, model = draft.dtype, cast("Any", draft.model)
    model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    head_of_target = Head(target.head.weight.float())
    losses: list[Tensor] = []
    start = time.perf_counter()
    for step in range(sizes.steps):
        quarter = texts[step % 4 :: 4]
        with torch.no_grad():
            states = TargetStates(target.hidden(quarter).flatten(0, 1).float(), head_of_target)
        loss = fused_divergence(
            draft.hidden(quarter).flatten(0, 1),
            Head(draft.head.weight),
            states,
            loss="fkl",
            backend="triton" if session.triton else "auto",
        )
        loss = loss / quarter.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    curve = torch.stack(losses).tolist()
    trained = time.perf_counter() - start
    model.to(dtype).requires_grad_(False)
    session.report["distil"] = {
        "texts": len(texts),
        "generate_seconds": generated,
        "train_seconds": trained,
        "fkl": curve,
    }
    first, last = sum(curve[:4]) / 4, sum(curve[-4:]) / 4  # over all the texts
    session.check("distil: the loss fell", last < first, first=first, last=last)


def decoder_for(
    target: LanguageModel,
    draft: LanguageModel | None,
    batch: int,
    graphs: bool = False,
    **options: Any,
) -> SpeculativeDecoder:
    if draft is not None:
        drafter = ModelDrafter(draft, target.vocab_size, cuda_graphs=graphs)
        options |= {"drafter": drafter, "num_draft_tokens": 4}
    return SpeculativeDecoder(target, batch_size=batch, cuda_graphs=graphs, **options)


def check_identity(
    session: Session, target: LanguageModel, draft: LanguageModel, sizes: Sizes
) -> None:
    """Greedy texts with a draft, or from CUDA graphs, are those without, but where rounding decides
    a tie.
    """
    batch = sizes.batches[-1]
    asked = prompts(session, sizes, batch)
    decoder = decoder_for(target, None, batch, keep_hidden=True)
    plain = decoder.generate(asked, max_new_tokens=sizes.new_tokens)
    others = {"speculative": decoder_for(target, draft, batch)}
    if session.device.type == "cuda":
        others["plain, CUDA graphs"] = decoder_for(target, None, batch, graphs=True)
        others["speculative, CUDA graphs"] = decoder_for(target, draft, batch, graphs=True)
    for name, decoder in others.items():
        found = decoder.generate(asked, max_new_tokens=sizes.new_tokens)
        ties: list[dict[str, float]] = []
        for prompt, one, other in zip(asked, plain.outputs, found.outputs, strict=True):
            if one.tokens != other.tokens:
                hidden = torch.cat([r.hidden for r in one.rounds if r.hidden is not None])
                ties.append(explain(target, prompt, one.tokens, other.tokens, hidden))
        session.check(
            f"greedy identity, {name}",
            all(tie["gap"] <= 2 * tie["rounding"] for tie in ties),
            identical=batch - len(ties),
            of=batch,
            ties=ties,
        )


@torch.inference_mode()
def explain(
    target: LanguageModel, prompt: list[int], plain: list[int], other: list[int], hidden: Tensor
) -> dict[str, float]:
    """Where two greedy texts part: the gap between the target's top two logits there, and how far
    one pass over the text rounds from the passes over one token, whose states are `hidden`.
    """
    pairs = enumerate(zip(plain, other, strict=True))
    at = next(i for i, (a, b) in pairs if a != b)
    text = torch.tensor([prompt + plain[:at]], device=target.device)
    one_by_one = target.logits(hidden[: at + 1])
    at_once = target.logits(target.hidden(text)[0, len(prompt) - 1 :])
    top = one_by_one[-1].topk(2).values
    rounding = (at_once - one_by_one).abs().max()
    return {"position": at, "gap": float(top[0] - top[1]), "rounding": float(rounding)}


def score(
    session: Session,
    target: LanguageModel,
    draft: LanguageModel,
    sizes: Sizes,
    batch: int,
    temperature: float,
    graphs: bool,
) -> None:
    """Plain against speculative decoding of the same prompts; a first, untimed run of each."""
    asked = prompts(session, sizes, batch)
    sampling = Sampling(temperature)

    def timed(small: LanguageModel | None) -> tuple[Generation, float]:
        decoder = decoder_for(target, small, batch, graphs)
        go: Callable[[], Generation] = lambda: decoder.generate(  # noqa: E731
            asked, max_new_tokens=sizes.new_tokens, sampling=sampling, seed=2
        )
        go()
        start = time.perf_counter()
        generation = go()
        return generation, time.perf_counter() - start

    (plain, plain_seconds), (fast, seconds) = timed(None), timed(draft)
    rows = [row for output in fast.outputs for row in output.rounds]
    tokens = sum(len(output.tokens) for output in fast.outputs)
    accepted, tested = (sum(getattr(row, name) for row in rows) for name in ("accepted", "tested"))
    entry = {
        "plain_tokens_per_second": sum(len(o.tokens) for o in plain.outputs) / plain_seconds,
        "tokens_per_second": tokens / seconds,
        "acceptance": accepted / tested if tested else None,
        "accepted": accepted,
        "tested": tested,
        "block_efficiency": tokens / len(rows),
        "seconds": fast.seconds,
        "plain_seconds": plain.seconds,
    }
    session.add("scores", batch=batch, temperature=temperature, cuda_graphs=graphs, **entry)
    whole = all(len(o.tokens) == sizes.new_tokens for o in (*plain.outputs, *fast.outputs))
    session.check(f"decoded B={batch}, T={temperature:g}, graphs={graphs}", whole)
    print(f"  B={batch}, T={temperature:g}: {entry['tokens_per_second']:.0f} tokens/s", flush=True)
