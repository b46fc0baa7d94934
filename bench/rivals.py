"""Other projects' kernels behind one interface, each where its package is importable; vLLM's also
where there are its source files alone, see `vllm_sources.py`.

A rival is a call, or None with the reason: a package that is missing, or a function that is not
what this file was written for (vLLM 0.32 and 0.33, FlashInfer 0.7.2, SGLang 0.5.23, Liger-Kernel
0.8.5). A call's `scope` says what its time includes. Where probabilities are its input, those of
the draft are made outside: they exist once the draft has sampled, as our stored logsumexp does.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import vllm_sources
from specdistill_kernels import probabilities


@dataclass(frozen=True)
class Batch:
    """What there is to verify; every row has the same settings. draft_tokens: [B, G];
    draft_logits: [B, G, V]; target_logits: [B, G+1, V]. temperature 0 is greedy.
    """

    draft_tokens: Tensor
    draft_logits: Tensor
    target_logits: Tensor
    temperature: float
    top_k: int | None = None
    top_p: float | None = None

    @property
    def filtered(self) -> bool:
        return self.top_k is not None or self.top_p is not None


@dataclass(frozen=True)
class Rival:
    """`call` returns the number of accepted proposals in each row, [B]."""

    name: str
    call: Callable[[], Tensor] | None
    scope: str = ""
    reason: str = ""


class Unavailable(Exception):
    pass


def verifiers(batch: Batch) -> list[Rival]:
    return [
        _try("vLLM MRv2", _vllm, batch),
        _try("FlashInfer", _flashinfer, batch),
        _try("SGLang", _sglang, batch),
    ]


def _try(name: str, adapter: Callable[..., tuple[Callable, str]], *arguments: Any) -> Rival:
    try:
        call, scope = adapter(*arguments)
    except Unavailable as error:
        return Rival(name, None, reason=str(error))
    except Exception as error:  # while it made its inputs
        return Rival(name, None, reason=f"{type(error).__name__}: {error}")
    return Rival(name, call, scope)


def _function(module: str, name: str, *parameters: str) -> Callable[..., Any]:
    """A function that takes these parameters and needs no others; else `Unavailable`."""
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Unavailable(f"cannot import {module}: {error}") from error
    except AttributeError as error:
        raise Unavailable(f"{module} has no {name}") from error
    except Exception as error:  # a package that breaks on import, in whatever way
        raise Unavailable(f"{module} breaks: {type(error).__name__}: {error}") from error
    found = inspect.signature(function).parameters
    lacking = [p for p in parameters if p not in found]
    surplus = [
        p.name
        for p in found.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in parameters
    ]
    if lacking or surplus:
        raise Unavailable(f"{module}.{name} lacks {lacking} and also needs {surplus}")
    return function


def _vllm(batch: Batch) -> tuple[Callable[[], Tensor], str]:
    """The sampler of vLLM's model runner v2: its own preparation of the target's logits, then its
    kernels. Its draft is never filtered.
    """
    try:
        vllm_sources.provide()
    except ImportError as error:
        raise Unavailable(str(error)) from error
    sample = _function(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils",
        "rejection_sample",
        "target_logits",
        "draft_logits",
        "draft_sampled",
        "cu_num_logits",
        "pos",
        "idx_mapping",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "temperature",
        "seed",
        "num_speculative_steps",
    )
    gumbel = "vllm.v1.worker.gpu.sample.gumbel"
    rows = ("logits", "expanded_idx_mapping", "temperature")
    scale = _function(gumbel, "apply_temperature", *rows)
    filters = "vllm.v1.sample.ops.topk_topp_triton"
    cut = None
    if batch.filtered:
        cut = _function(filters, "apply_top_k_top_p_triton", "logits", "k", "p")
    device = batch.draft_tokens.device
    size, num = batch.draft_tokens.shape
    logits = batch.target_logits.flatten(0, 1)
    request = torch.arange(size, dtype=torch.int32, device=device)
    place = torch.arange(num + 1, dtype=torch.int32, device=device)
    arguments: dict[str, Any] = {
        "draft_logits": batch.draft_logits,
        # one entry a row of logits: the last token of the text, then the proposals
        "draft_sampled": torch.nn.functional.pad(batch.draft_tokens, (1, 0)).flatten(),
        "cu_num_logits": torch.arange(size + 1, dtype=torch.int32, device=device) * (num + 1),
        "pos": torch.arange(size * (num + 1), device=device),
        "idx_mapping": request,
        "expanded_idx_mapping": request.repeat_interleave(num + 1),
        "expanded_local_pos": place.repeat(size),
        "temperature": torch.full((size,), batch.temperature, device=device),
        "seed": torch.arange(size, device=device),
        "num_speculative_steps": num,
    }
    k = p = None
    if batch.top_k is not None:
        k = torch.full((len(logits),), batch.top_k, dtype=torch.int32, device=device)
    if batch.top_p is not None:
        p = torch.full((len(logits),), batch.top_p, device=device)
    processed = batch.temperature not in (0, 1) or batch.filtered

    def call() -> Tensor:
        ready = logits
        if processed:
            ready = logits.to(torch.float32, copy=True)
            scale(ready, arguments["expanded_idx_mapping"], arguments["temperature"])
        if cut is not None:
            ready = cut(ready, k, p)
        return sample(target_logits=ready, **arguments)[1] - 1

    scope = "float32 copy, temperature and filters" if processed else "raw logits"
    return call, f"{scope}, then rejection_sample; draft unfiltered"


def _draft_probabilities(batch: Batch) -> Tensor:
    size = len(batch.draft_tokens)

    def column(value: float | None) -> Tensor | None:
        if value is None:
            return None
        return torch.full((size,), value, device=batch.draft_tokens.device)

    temperature = torch.full((size,), batch.temperature, device=batch.draft_tokens.device)
    return probabilities(batch.draft_logits, temperature, column(batch.top_k), column(batch.top_p))


def _renormalisers(batch: Batch) -> list[Callable[[Tensor], Tensor]]:
    """FlashInfer's filters of probabilities, top-k first; SGLang calls them too."""
    found: list[Callable[[Tensor], Tensor]] = []
    for name, value in (("top_k", batch.top_k), ("top_p", batch.top_p)):
        if value is not None:
            renorm = _function("flashinfer.sampling", f"{name}_renorm_probs", "probs", name)
            found.append(partial(renorm, **{name: value}))
    return found


def _flashinfer(batch: Batch) -> tuple[Callable[[], Tensor], str]:
    if batch.temperature == 0:
        raise Unavailable("it verifies probabilities; there is no greedy path")
    chain = _function(
        "flashinfer.sampling",
        "chain_speculative_sampling",
        "draft_probs",
        "draft_token_ids",
        "target_probs",
    )
    softmax = _function("flashinfer.sampling", "softmax", "logits")
    renormalise = _renormalisers(batch)
    shape = batch.target_logits.shape
    logits = batch.target_logits.flatten(0, 1)
    q = _draft_probabilities(batch)
    tokens = batch.draft_tokens.int()
    state = torch.zeros(1, dtype=torch.int64, device=logits.device)

    def call() -> Tensor:
        p = softmax(logits.float(), batch.temperature)
        for step in renormalise:
            p = step(p)
        return chain(q, tokens, p.view(shape), seed=state, offset=state)[2]

    if not {"seed", "offset"} <= set(inspect.signature(chain).parameters):
        raise Unavailable("chain_speculative_sampling takes no seed tensor: no CUDA graph")
    return call, "float32 copy, softmax of the target, its filters, chain_speculative_sampling"


def _sglang(batch: Batch) -> tuple[Callable[[], Tensor], str]:
    if batch.temperature == 0:
        raise Unavailable("it verifies probabilities; there is no greedy path")
    names = (
        "predicts",
        "accept_index",
        "accept_token_num",
        "candidates",
        "retrive_index",
        "retrive_next_token",
        "retrive_next_sibling",
        "uniform_samples",
        "uniform_samples_for_final_sampling",
        "target_probs",
        "draft_probs",
        "threshold_single",
        "threshold_acc",
        "deterministic",
    )
    chain = _function(
        "sglang.kernels.ops.speculative.reject_sampling",
        "chain_speculative_sampling_triton",
        *names,
    )
    renormalise = _renormalisers(batch)
    size, num = batch.draft_tokens.shape
    device = batch.draft_tokens.device
    q = _draft_probabilities(batch)
    index = torch.arange(size * (num + 1), device=device).view(size, num + 1)
    candidates = torch.nn.functional.pad(batch.draft_tokens, (1, 0))
    coins = torch.rand(size, num + 2, device=device)  # drawn outside: not what is compared
    predicts = torch.zeros(size * (num + 1), dtype=torch.int32, device=device)
    accept_index = torch.full((size, num + 1), -1, dtype=torch.int32, device=device)
    accepted = torch.zeros(size, dtype=torch.int32, device=device)

    def call() -> Tensor:
        p = torch.softmax(batch.target_logits.float() / batch.temperature, -1)
        for step in renormalise:
            p = step(p.flatten(0, 1)).view(p.shape)
        values: list[Any] = [predicts, accept_index, accepted, candidates, index, None, None]
        values += [coins[:, : num + 1], coins[:, num + 1], p, q, 1.0, 1.0, True]
        chain(**dict(zip(names, values, strict=True)))
        return accepted

    return call, "float32 copy, softmax of the target, its filters, chain_speculative_sampling"


def trl_forward_kl() -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """TRL's loss of knowledge distillation as the mean over rows of the forward KL of raw logits
    [N, V] of draft and target; or None and why it is missing.
    """
    try:
        trainer = getattr(importlib.import_module("trl.experimental.gkd"), "GKDTrainer")  # noqa: B009
        loss = trainer.generalized_jsd_loss
    except Exception as error:  # a package that is missing or breaks on import, in whatever way
        return None, f"{type(error).__name__}: {error}"
    return lambda draft, target: loss(draft[None], target[None], beta=0.0), ""


def liger_forward_kl(
    hidden: Tensor, weight: Tensor, hidden_of_target: Tensor, weight_of_target: Tensor
) -> Rival:
    """Liger-Kernel's fused head and divergence, as the sum over rows of the forward KL; `call`
    returns it, differentiable in the first two.
    """
    return _try("Liger", _liger, hidden, weight, hidden_of_target, weight_of_target)


def _liger(
    hidden: Tensor, weight: Tensor, hidden_of_target: Tensor, weight_of_target: Tensor
) -> tuple[Callable[[], Tensor], str]:
    make = _function(
        "liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD", "jsd_beta"
    )
    loss = make(jsd_beta=0.0)  # its forward KL

    def call() -> Tensor:
        return loss(hidden, weight, hidden_of_target, weight_of_target, None) * len(hidden)

    return call, "LigerFusedLinearJSD, jsd_beta 0"
