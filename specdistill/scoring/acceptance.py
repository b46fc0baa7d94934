"""What the acceptance rate should be: the overlap of the target's and the draft's distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from specdistill.decoding import ModelDrafter
from specdistill.decoding.cache import CachedModel
from specdistill.decoding.records import Output
from specdistill.models import LanguageModel
from specdistill_kernels import Lenience, probabilities


def expected_acceptance(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    output: Output,
    temperature: float,
    lenience: Lenience | None = None,
) -> tuple[float, int]:
    """Σ over the tested positions of `acceptance_chances`, and their number."""
    chances = acceptance_chances(target, draft, prompt, output, temperature, lenience)
    return chances.sum().item(), len(chances)


@torch.inference_mode()
def acceptance_chances(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    output: Output,
    temperature: float,
    lenience: Lenience | None = None,
) -> Tensor:
    """Σ_x min(p(x), q(x)) at each tested position of an answer [n], float64: the chance, before the
    draft's token was drawn, that it would be accepted; with lenience Σ_x min(f(p(x)), q(x)).

    A tested position's context is a prefix of the emitted text, so one pass over the whole text
    gives every p and q. At temperature 0 both are one-hot, and the overlap is 1 exactly where the
    proposal was accepted.
    """
    if temperature == 0:
        kept = [float(i < r.accepted) for r in output.rounds for i in range(r.tested)]
        return torch.tensor(kept, dtype=torch.float64)
    tested: list[int] = []
    start = len(prompt) - 1
    for r in output.rounds:
        tested += range(start, start + r.tested)
        start += len(r.tokens)
    if not tested:
        return torch.zeros(0, dtype=torch.float64)
    tokens = torch.tensor([prompt + output.tokens], device=target.device)
    drafter = ModelDrafter(draft, target.vocab_size)
    hidden_p = target.hidden(tokens)[0, tested]
    hidden_q = draft_states(drafter, tokens)[tested]
    chances = []
    for p_rows, q_rows in zip(hidden_p.split(256), hidden_q.split(256), strict=True):
        warm = torch.full((len(p_rows),), temperature, device=target.device)
        p = probabilities(target.logits(p_rows), warm)
        q = probabilities(draft.logits(q_rows)[:, : drafter.width], warm)
        bar = p if drafter.vocab is None else p[:, drafter.vocab]
        bar = bar if lenience is None else lenience(bar)
        overlap = torch.minimum(bar, q).sum(-1, dtype=torch.float64)
        chances.append(overlap.clamp(max=1.0).cpu())  # where p = q it rounds to either side of 1
    return torch.cat(chances)


def draft_states(drafter: ModelDrafter, tokens: Tensor, chunk: int = 512) -> Tensor:
    """Hidden states [n, d] of the draft over a text [1, n], positions beyond its last read as the
    engine reads them.
    """
    count = tokens.shape[1]
    cached = CachedModel(drafter.draft, 1, count)
    read, places = drafter.readable(tokens), torch.arange(count, device=tokens.device)[None]
    states = [
        cached.run(read[:, i : i + chunk], places[:, i : i + chunk], min(i + chunk, count))
        for i in range(0, count, chunk)
    ]
    return torch.cat(states, 1)[0]
