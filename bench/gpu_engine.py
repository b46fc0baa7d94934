"""The engine at the shape of an 8B model, as shares of what reading its weights would take.

Random weights made on the device; the layers above the draft's are scaled down until the draft, the
first two layers under the whole head, guesses a chosen share of greedy tokens. The text is noise,
but the bytes, the launches and the acceptance are those of a real pair. A floor is the bytes of the
weights and of the keys and values that are read over the bandwidth at which a large product with
one row reads its matrix, measured first.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gpu_session import Session
from bench.gpu_timing import Stopwatch
from specdistill.decoding import Generation, ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.decoding.cache import CachedModel
from specdistill.drafts.making import make_draft
from specdistill.models import LanguageModel
from specdistill.models.randomness import Unfilled

GUESSED = 0.8  # of the target's greedy tokens, by the draft


@dataclass(frozen=True)
class Shape:
    """As Llama-3.1-8B."""

    vocab: int = 128_256
    width: int = 4096
    inner: int = 14_336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    spread: float = 0.02  # standard deviation of the weights
    draft_layers: int = 2
    prompt: int = 64
    new_tokens: int = 96
    batches: tuple[int, ...] = (1, 8, 32)
    most_slots: int = 4096
    matrix: tuple[int, int] = (65_536, 8192)  # whose reading tells the bandwidth


SMOKE = Shape(96, 32, 48, 4, 4, 2, 0.3, 2, 6, 8, (1, 2), 256, (64, 32))
# As SmolLM2-135M, and the answers that a run makes for training.
MANY = Shape(49_152, 576, 1536, 30, 9, 3, 0.04, prompt=60, new_tokens=64, batches=(1024,))
MANY_SMOKE = Shape(96, 32, 48, 2, 4, 2, 0.3, prompt=6, new_tokens=8, batches=(4,))
GAMMAS = (4, 2, 6)


@dataclass
class Pair:
    """What all cases share. `floor` is the seconds that reading so many bytes takes."""

    session: Session
    shape: Shape
    target: LanguageModel
    draft: LanguageModel
    bandwidth: float

    def prompts(self, batch: int) -> list[list[int]]:
        tokens = self.session.integers(self.shape.vocab, batch, self.shape.prompt)
        return tokens.tolist()  # type: ignore[no-any-return]

    def floor(self, model: LanguageModel, batch: int) -> float:
        """Of a pass: its weights once, and every row's slots so far, in the middle of an answer."""
        slot = sum(part.nbytes for token in model.token_slots for part in token)
        length = self.shape.prompt + self.shape.new_tokens / 2
        return (model.weight_bytes() + batch * length * slot) / self.bandwidth


def run(session: Session) -> None:
    shape = SMOKE if session.smoke else Shape()
    start = time.perf_counter()
    target = random_target(session, shape)
    match = scale_upper_layers(session, target, shape)
    draft = make_draft(target, shape.draft_layers)
    synchronize(session)
    bandwidth = read_bandwidth(session, shape)
    pair = Pair(session, shape, target, draft, bandwidth)
    session.report |= {
        "shape": vars(shape),
        "made_seconds": time.perf_counter() - start,
        "read_bytes_per_second": bandwidth,
        "target_bytes": target.weight_bytes(),
        "draft_bytes": draft.weight_bytes(),
        "greedy_match": match,
    }
    low, high = (0.02, 1.0) if session.smoke else (GUESSED - 0.1, GUESSED + 0.1)
    session.check("the draft guesses as often as it should", low <= match <= high, match=match)
    first, *wider = shape.batches
    case = session.case
    for gamma in (0, GAMMAS[0]):
        case(f"B={first}, T=0, γ={gamma}", partial(score, pair, first, 0.0, gamma))
    case("profile", partial(profile, pair, GAMMAS[0]))
    case("Transformers, plain", partial(stock, pair, assisted=False))
    case("attention", partial(attention, pair))
    case("many rows", partial(many_rows, session, MANY_SMOKE if session.smoke else MANY, bandwidth))
    todo = [(first, 0.0, gamma) for gamma in GAMMAS[1:]]
    todo += [(batch, 0.0, gamma) for batch in wider for gamma in (0, *GAMMAS)]
    todo += [(batch, 1.0, gamma) for batch in shape.batches for gamma in (0, *GAMMAS)]
    for batch, temperature, gamma in todo:
        what = f"B={batch}, T={temperature:g}, γ={gamma}"
        case(what, partial(score, pair, batch, temperature, gamma))
    case("Transformers, assisted", partial(stock, pair, assisted=True))


def random_target(session: Session, shape: Shape) -> LanguageModel:
    """Filled where it lies."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * shape.most_slots,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    before, dtype = torch.get_default_dtype(), torch.float32
    if session.device.type == "cuda":
        dtype = torch.bfloat16
    torch.set_default_dtype(dtype)
    try:
        with Unfilled(), session.device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, shape.spread, generator=session.generator)
    model.generation_config.eos_token_id = None
    return LanguageModel("random", Path(), model, None)  # type: ignore[arg-type]


@torch.inference_mode()
def scale_upper_layers(session: Session, target: LanguageModel, shape: Shape) -> float:
    """Halves an interval for what the upper layers add to the states; returns the share of greedy
    tokens that the lower layers then guess.
    """
    tokens = session.integers(shape.vocab, 8, 64)
    layers: Any = target.model.model.layers
    outputs = [
        p.weight
        for b in layers[shape.draft_layers :]
        for p in (b.self_attn.o_proj, b.mlp.down_proj)
    ]
    lower = make_draft(target, shape.draft_layers)
    guessed = lower.logits(lower.hidden(tokens, use_cache=False)).argmax(-1)

    def match() -> float:
        said = target.logits(target.hidden(tokens, use_cache=False)).argmax(-1)
        return float((said == guessed).float().mean())

    least, most, scale = 0.0, 1.0, 1.0
    found = match()
    for _ in range(10):
        if abs(found - GUESSED) < 0.02:
            break
        least, most = (least, scale) if found < GUESSED else (scale, most)
        middle = (least + most) / 2
        for weight in outputs:
            weight *= middle / scale
        scale, found = middle, match()
    session.report["upper_layers_scale"] = scale
    return found


def read_bandwidth(session: Session, shape: Shape) -> float:
    """Bytes a second that a product of one row with a large matrix reads."""
    dtype = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    matrix = torch.ones(shape.matrix, dtype=dtype, device=session.device)
    row = torch.ones(1, shape.matrix[1], dtype=dtype, device=session.device)
    watch = Stopwatch(session)
    return matrix.nbytes / watch.once(lambda: row @ matrix.T) * 1e6


def synchronize(session: Session) -> None:
    if session.device.type == "cuda":
        torch.cuda.synchronize()


def decoder(pair: Pair, batch: int, gamma: int) -> SpeculativeDecoder:
    drafter = ModelDrafter(pair.draft, pair.target.vocab_size) if gamma else None
    return SpeculativeDecoder(pair.target, drafter, num_draft_tokens=gamma, batch_size=batch)


def score(pair: Pair, batch: int, temperature: float, gamma: int) -> None:
    """One setting: a first, untimed run captures; the second is timed, and its parts with it."""
    session, shape = pair.session, pair.shape
    asked = pair.prompts(batch)
    engine = decoder(pair, batch, gamma)

    def go(count: int) -> Generation:
        return engine.generate(asked, max_new_tokens=count, sampling=Sampling(temperature), seed=2)

    first = go(shape.new_tokens)
    synchronize(session)
    start = time.perf_counter()
    out = go(shape.new_tokens)
    seconds = time.perf_counter() - start
    rounds = [row for output in out.outputs for row in output.rounds]
    tokens = sum(len(output.tokens) for output in out.outputs)
    tau = tokens / len(rounds)
    step = pair.floor(pair.target, batch)
    pass_floor = step + gamma * pair.floor(pair.draft, batch)
    session.add(
        "scores",
        batch=batch,
        temperature=temperature,
        gamma=gamma,
        tokens_per_second=tokens / seconds,
        block_efficiency=tau,
        floor_tokens_per_second=tau * batch / pass_floor,
        share_of_floor=tokens / seconds * pass_floor / (tau * batch),
        speedup_of_floors=tau * step / pass_floor,
        seconds=out.seconds,
        rounds=out.rounds,
        captures=first.captures,
        captures_again=out.captures,
    )
    whole = all(len(output.tokens) == shape.new_tokens for output in out.outputs)
    name = f"decoded B={batch}, T={temperature:g}, γ={gamma}"
    captured = (first.captures > 0) == (session.device.type == "cuda") and out.captures == 0
    session.check(name, whole and captured, captures=first.captures, captures_again=out.captures)
    print(f"  {name}: {tokens / seconds:.0f} tokens/s", flush=True)


def many_rows(session: Session, shape: Shape, bandwidth: float) -> None:
    """Sampled answers to twice as many prompts as there are rows, which begin alike, prompts
    included; an untimed run of two tokens captures.
    """
    target = random_target(session, shape)
    pair = Pair(session, shape, target, target, bandwidth)
    (rows,) = shape.batches
    (start,) = pair.prompts(1)
    shared = start[: shape.prompt // 3]
    asked = [shared + prompt[len(shared) :] for prompt in pair.prompts(2 * rows)]
    engine = decoder(pair, rows, 0)
    engine.generate(asked[:rows], max_new_tokens=2, sampling=Sampling(1.0))
    synchronize(session)
    begin = time.perf_counter()
    out = engine.generate(asked, max_new_tokens=shape.new_tokens, sampling=Sampling(1.0))
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.tokens) for output in out.outputs)
    session.report["many_rows"] = {
        "shape": vars(shape),
        "tokens_per_second": tokens / seconds,
        "floor_seconds_a_round": pair.floor(target, rows),
        "rounds": out.rounds,
        "seconds": out.seconds,
        "captures_again": out.captures,
    }
    session.check("many rows: decoded whole", tokens == len(asked) * shape.new_tokens)
    print(f"  {rows} rows: {tokens / seconds:.0f} tokens/s", flush=True)


def stock(pair: Pair, assisted: bool) -> None:
    """Transformers' `generate`, greedily, one row; a few tokens, for it is slow."""
    count = max(pair.shape.new_tokens // 3, 4)
    (prompt,) = pair.prompts(1)
    tokens = torch.tensor([prompt], device=pair.session.device)
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    if assisted:
        options["assistant_model"] = pair.draft.model
    model: Any = pair.target.model

    def go() -> Tensor:
        out: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return out

    go()
    synchronize(pair.session)
    start = time.perf_counter()
    made = go().shape[1] - len(prompt)
    synchronize(pair.session)
    speed = made / (time.perf_counter() - start)
    pair.session.add("transformers", assisted=assisted, tokens_per_second=speed)


@torch.inference_mode()
def attention(pair: Pair) -> None:
    """A step of one row that sees few slots and one that sees many, beyond the slots' bytes."""
    session, shape = pair.session, pair.shape
    watch = Stopwatch(session)
    cached = CachedModel(pair.target, 1, shape.most_slots)
    token = torch.zeros((1, 1), dtype=torch.int64, device=session.device)
    few = 128
    times = {
        slots: watch.time(partial(cached.run, token, token + slots - 1, slots))["cold"]
        for slots in (few, shape.most_slots)
    }
    slot = sum(part.nbytes for tokens in pair.target.token_slots for part in tokens)
    reading = (shape.most_slots - few) * slot / pair.bandwidth * 1e6
    session.report["attention"] = {
        "microseconds": times,
        "microseconds_of_slots": reading,
        "times_beyond_slots": (times[shape.most_slots] - reading) / times[few],
    }
    session.save()


def profile(pair: Pair, gamma: int) -> None:
    """Where one round's time goes: kernels, launches and the host."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = pair.session.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    engine = decoder(pair, 1, gamma)
    run: Callable[[], Generation] = partial(
        engine.generate, pair.prompts(1), max_new_tokens=pair.shape.new_tokens
    )
    run()
    with record(activities=activities) as trace:
        rounds = run().rounds
        synchronize(pair.session)
    events = trace.key_averages()
    on_device = [(e.key, e.count, getattr(e, "self_device_time_total", 0.0)) for e in events]
    on_device = [entry for entry in on_device if entry[2]]
    kernels = sorted(on_device, key=lambda entry: -entry[2])[:20]
    host = sorted(events, key=lambda e: -e.self_cpu_time_total)[:20]
    pair.session.report["profile"] = {
        "rounds": rounds,
        "device_microseconds_a_round": sum(time for *_, time in on_device) / rounds,
        "host_microseconds_a_round": sum(e.self_cpu_time_total for e in events) / rounds,
        "graph_launches_a_round": _count(events, "GraphLaunch") / rounds,
        "kernel_launches_a_round": _count(events, "LaunchKernel") / rounds,
        "kernels": [[key, count / rounds, time / rounds] for key, count, time in kernels],
        "host": [[e.key, e.count / rounds, e.self_cpu_time_total / rounds] for e in host],
    }
    pair.session.save()


def _count(events: Any, name: str) -> int:
    return sum(event.count for event in events if name in event.key)
