"""What the acceptance rate should be: the overlap of the target's and the draft's distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from specdistill.decoding import Drafting, ModelDrafter, ParallelDrafter, drafter_for
from specdistill.decoding.cache import CachedModel, pass_shape
from specdistill.decoding.drafters import Context
from specdistill.decoding.parallel import AUTO
from specdistill.decoding.records import Output
from specdistill.decoding.sampling import GREEDY, row_settings
from specdistill.models import LanguageModel
from specdistill_kernels import Lenience, probabilities


@torch.inference_mode()
def acceptance_chances(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    output: Output,
    temperature: float,
    lenience: Lenience | None = None,
    drafting: Drafting = AUTO,
) -> Tensor:
    """Σ_x min(p(x), q(x)) at each tested position of an answer [n], float64: the chance, before the
    draft's token was drawn, that it would be accepted; with lenience Σ_x min(f(p(x)), q(x)).

    A tested position's context is a prefix of the emitted text, so passes over the text give every
    p, and `draft_states` every q. At temperature 0 both are one-hot, and the overlap is
    1 exactly where the proposal was accepted.
    """
    if temperature == 0:
        accepted = [float(i < r.accepted) for r in output.rounds for i in range(r.tested)]
        return torch.tensor(accepted, dtype=torch.float64)
    tested: list[int] = []
    start = 0
    for r in output.rounds:
        tested += range(start, start + r.tested)
        start += len(r.tokens)
    if not tested:
        return torch.zeros(0, dtype=torch.float64)
    tokens = torch.tensor([prompt + output.tokens], device=target.device)
    drafter = drafter_for(draft, target.vocab_size, drafting)
    hidden_p = _text_states(target, tokens)[len(prompt) - 1 :][tested]
    hidden_q = draft_states(drafter, prompt, output)[tested]
    chances = []
    for p_rows, q_rows in zip(hidden_p.split(256), hidden_q.split(256), strict=True):
        warm = torch.full((len(p_rows),), temperature, device=target.device)
        p = probabilities(target.logits(p_rows), warm)
        q = probabilities(drafter.columns(draft.logits(q_rows)), warm)
        bar = p if drafter.vocab is None else p[:, drafter.vocab]
        bar = bar if lenience is None else lenience(bar)
        overlap = torch.minimum(bar, q).sum(-1, dtype=torch.float64)
        chances.append(overlap.clamp(max=1.0).cpu())  # where p = q it rounds to either side of 1
    return torch.cat(chances)


def draft_states(drafter: ModelDrafter, prompt: list[int], output: Output) -> Tensor:
    """The draft's hidden states [n, d] from which it proposes, or would, each token of an answer:
    for a parallel draft after the round's first token behind masks, round by round.
    """
    if isinstance(drafter, ParallelDrafter):
        return _parallel_states(drafter, prompt, output)
    tokens = torch.tensor([prompt + output.tokens[:-1]], device=drafter.draft.device)
    return _text_states(drafter.draft, drafter.readable(tokens))[len(prompt) - 1 :]


def _parallel_states(drafter: ParallelDrafter, prompt: list[int], output: Output) -> Tensor:
    """By passes of the drafter's own, which draw nothing."""
    device, text = drafter.draft.device, list(prompt)
    widest = max(len(r.tokens) for r in output.rounds)
    stream = drafter.open(1, len(prompt) + len(output.tokens) + widest)
    stream.prefill(torch.tensor([0], device=device), [prompt[:-1]])
    settings = row_settings([GREEDY], [0], device)
    states = []
    for r in output.rounds:
        last = len(text) - 1
        context = Context([text], torch.tensor([last], device=device), last, settings)
        states.append(stream.run(context, len(r.tokens))[0])
        text = text + r.tokens
    return torch.cat(states)


def _text_states(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Hidden states [n, d] over a text [1, n], positions beyond the last read as the engine reads
    them, in passes that take no more memory than the engine's.
    """
    count = tokens.shape[1]
    _, chunk = pass_shape(count, count)
    cached, places = CachedModel(model, 1, count), torch.arange(count, device=tokens.device)[None]
    states = [
        cached.run(tokens[:, i : i + chunk], places[:, i : i + chunk], min(i + chunk, count))
        for i in range(0, count, chunk)
    ]
    return torch.cat(states, 1)[0]
