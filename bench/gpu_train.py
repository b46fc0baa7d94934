"""Updates of a draft from kept states, 8,192 tokens each: `Distiller.step`, and beside it the same
update with the loss in plain PyTorch and, where it can be imported, in TRL's.

Random weights in the shape of a real draft; the forward KL; layers in bfloat16, weights and
optimiser in float32. Each is given in tokens a second, as a share of the rate at which the device
multiplies large bfloat16 matrices, measured first, with the memory that an update takes at its peak
beyond weights and optimiser, and the time of an update in which the device had nothing to do.
"""

import gc
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from bench.gpu_session import Session
from bench.gpu_timing import Stopwatch
from bench.rivals import trl_forward_kl
from specdistill.models import LanguageModel

NEEDS = ("accelerate", "pydantic")  # of the trainer, beyond what the other sections take
Step = Callable[[], float]  # an update; returns its loss


@dataclass(frozen=True)
class Shape:
    """A draft, the width of its target's states, and an update's texts."""

    draft: str
    family: type[PretrainedConfig]
    vocab: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool
    target_width: int = 4096
    texts: int = 8
    length: int = 1024

    def config(self, **change: Any) -> PretrainedConfig:
        return self.family(
            **{
                "vocab_size": self.vocab,
                "hidden_size": self.width,
                "intermediate_size": self.inner,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_width,
                "tie_word_embeddings": self.tied,
                "max_position_embeddings": 2 * self.length,
                "bos_token_id": None,
                "eos_token_id": None,
                **change,
            }
        )

    @property
    def positions(self) -> int:
        """That are learnt from: all but the last of each text."""
        return self.texts * (self.length - 1)

    def flops(self) -> int:
        """Of an update's products: three passes of the draft and one of the target's head."""
        heads = self.heads * self.head_width
        layer = 2 * self.width * (heads + self.kv_heads * self.head_width)
        layer += 3 * self.width * self.inner
        body = 6 * self.layers * layer * self.texts * self.length
        attention = 6 * self.layers * self.texts * self.length**2 * heads  # causal: half of it all
        readout = self.positions * self.vocab * (6 * self.width + 2 * self.target_width)
        return body + attention + readout


SHAPES = (
    Shape("Qwen3-0.6B", Qwen3Config, 151_936, 1024, 3072, 28, 16, 8, 128, True),
    Shape("two layers of an 8B model", LlamaConfig, 128_256, 4096, 14_336, 2, 32, 8, 128, False),
)
SMOKE = (
    Shape("Qwen3, tiny", Qwen3Config, 67, 16, 24, 2, 2, 1, 8, True, 12, 2, 10),
    Shape("Llama, tiny", LlamaConfig, 67, 16, 24, 1, 2, 1, 8, False, 12, 2, 10),
)


def run(session: Session) -> None:
    watch = Stopwatch(session)
    side = 64 if session.smoke else 8192
    square = torch.ones(side, side, dtype=torch.bfloat16, device=session.device)
    rate = 2 * side**3 / watch.once(partial(torch.mm, square, square)) * 1e6
    session.report |= {"matmul_flops": rate}
    ways: list[tuple[str, Any]] = [("ours", None), ("torch", kl), ("TRL", trl_forward_kl())]
    for shape in SMOKE if session.smoke else SHAPES:
        given = texts(session, shape)
        for way, loss in ways:
            run_one = partial(measure, session, watch, shape, given, rate, way, loss)
            session.case(f"{shape.draft}, {way}", run_one)
            gc.collect()  # a trainer refers to itself
            if session.device.type == "cuda":
                torch.cuda.empty_cache()
        first = {
            row["way"]: row["losses"][0]
            for row in session.report["steps"]
            if row["draft"] == shape.draft and "losses" in row
        }
        if {"ours", "torch"} <= first.keys():
            close = abs(first["ours"] - first["torch"]) <= 2e-2 * first["torch"]
            session.check(f"{shape.draft}: the loss is plain torch's", close, **first)


def measure(
    session: Session,
    watch: Stopwatch,
    shape: Shape,
    given: tuple[Tensor, Tensor],
    rate: float,
    way: str,
    loss: Any,
) -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    reason = ""
    if way == "ours" and missing:
        reason = f"the trainer needs {' and '.join(missing)}"
    elif isinstance(loss, tuple):
        loss, reason = loss
    if reason:
        session.add("steps", draft=shape.draft, way=way, reason=reason)
        return
    draft, target = models(session, shape)
    tokens, states = given
    try:
        if loss is None:
            step = our_step(session, draft, target, tokens, states)
        else:
            step = plain_step(draft, target, tokens, states, loss)
        first = step()
        peak = watch.peak_bytes(step)
        seconds = watch.once(step) / 1e6
        busy = busy_seconds(session, step)
        last = step()
    except Exception as error:  # a plain loss may not fit; ours must
        if way == "ours":
            raise
        reason = f"{type(error).__name__}: {error}"
        session.add("steps", draft=shape.draft, way=way, reason=reason)
        return
    session.add(
        "steps",
        draft=shape.draft,
        way=way,
        tokens_per_second=shape.texts * shape.length / seconds,
        seconds=seconds,
        share_of_matmul=shape.flops() / seconds / rate,
        peak_bytes=peak,
        device_waits_seconds=None if busy is None else max(0.0, seconds - busy),
        losses=[first, last],
    )
    print(f"  {shape.draft}, {way}: {seconds * 1e3:.0f} ms an update", flush=True)
    session.check(f"{shape.draft}, {way}: the loss falls", last < first, first=first, last=last)


def models(session: Session, shape: Shape) -> tuple[LanguageModel, LanguageModel]:
    """The draft in float32, and of the target all that kept states need: its head. The same ones
    whenever it is asked.
    """
    torch.manual_seed(0)
    half = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    small = shape.config(
        hidden_size=shape.target_width,
        intermediate_size=8,
        num_hidden_layers=1,
        tie_word_embeddings=False,
    )
    made = []
    for config, dtype in ((shape.config(), torch.float32), (small, half)):
        with session.device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False)
        made.append(LanguageModel("random", Path(), model, None))  # type: ignore[arg-type]
    made[1].head.weight.normal_(0, 2 * shape.target_width**-0.5)
    return made[0], made[1]


def texts(session: Session, shape: Shape) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], and the target's states [N, d] at all but the last of each text."""
    tokens = session.integers(shape.vocab, shape.texts, shape.length)
    half = torch.bfloat16 if session.device.type == "cuda" else torch.float32
    return tokens, session.normal(shape.positions, shape.target_width).to(half)


def our_step(
    session: Session, draft: LanguageModel, target: LanguageModel, tokens: Tensor, states: Tensor
) -> Step:
    from specdistill.config import parse_config
    from specdistill.data.signal import States
    from specdistill.training.batches import Batch
    from specdistill.training.distiller import Distiller

    folder = str(session.file.parent / "train")
    config = parse_config(
        {
            "target": "random",
            "draft": "random",
            "data": folder,
            "run_dir": folder,
            "decode": None,
            "device": str(session.device),
            "training": {"max_steps": 1, "precision": "bf16"},
        }
    )
    distiller = Distiller(target, draft, config)
    response = torch.ones_like(tokens, dtype=torch.bool)
    response[:, -1] = False
    labels = tokens[:, 1:].flatten()
    lengths = response.sum(1)
    batch = Batch(tokens, torch.ones_like(tokens), response, lengths, labels, States(states))
    return lambda: distiller.step([batch], 1e-3).loss


def kl(draft: Tensor, target: Tensor) -> Tensor:
    """The forward KL, the mean over rows of raw logits [N, V]."""
    p, q = (logits.float().log_softmax(-1) for logits in (target, draft))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def plain_step(
    draft: LanguageModel,
    target: LanguageModel,
    tokens: Tensor,
    states: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Step:
    """As our own, with all logits at once and without trainer."""
    draft.model.requires_grad_(True)
    trained = list(draft.model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    model: Any = draft.model

    def step() -> float:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            with torch.no_grad():
                said = target.head(states)
        value = loss(logits, said)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def busy_seconds(session: Session, step: Step) -> float | None:
    """In which the device computes during an update; None on a CPU."""
    if session.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    total = sum(getattr(event, "self_device_time_total", 0.0) for event in trace.key_averages())
    return total / 1e6 if math.isfinite(total) else None
