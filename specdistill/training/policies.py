"""Where the training tokens come from: a data set's own answers, the target's, the draft's, or both
models' together. Adding a policy is one function, one entry in `POLICIES` and its settings in
`config.POLICY_SETTINGS`.

A policy is asked for its examples at a step and makes them with the draft's weights of that moment.
All decoding is the project's own batched engine's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from specdistill.config import DistillConfig, Policy
from specdistill.data.questions import answer_id
from specdistill.data.token_store import Example
from specdistill.decoding import Generation, ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.documents import read_json_lines
from specdistill.errors import InputError, StorageError
from specdistill.files import write_whole
from specdistill.models import LanguageModel
from specdistill.training.answers import check_examples
from specdistill.training.reward import Reward, Sample
from specdistill_kernels import Lenience, Mode, RowSettings, Verdict, sample

BATCH = 64  # rows decoded together
# For the requests of one step: what it captured in graphs would be thrown away after them.
_decoder = partial(SpeculativeDecoder, batch_size=BATCH, cuda_graphs=False)


@dataclass(frozen=True)
class Source:
    """What a policy draws on. `given` are the answers of the data, with their prompts."""

    given: Sequence[Example]
    target: LanguageModel
    draft: LanguageModel
    policy: Policy
    seed: int
    reward: Reward | None = None

    def chosen(self, step: int) -> list[Example]:
        """The examples whose prompts are sampled at a step."""
        number = min(self.policy.settings()["prompts"], len(self.given))
        return random.Random(f"{self.seed}-{step}").sample(list(self.given), number)

    def requests(self, step: int, *, more: int = 0) -> list[Request]:
        """`more`: tokens beyond the longest answer."""
        p = self.policy.settings()
        sampling, longest = Sampling(p["sample_temperature"]), p["max_new_tokens"] + more
        seed = random.Random(f"{self.seed}:{step}").getrandbits(60)
        return [Request(e.id, e.prompt_tokens, longest, sampling, seed) for e in self.chosen(step)]


def given(source: Source, step: int) -> list[Example]:
    """fixed and target: the answers of the data, at every step."""
    return list(source.given)


def draft(source: Source, step: int) -> list[Example]:
    """The draft's own samples: on-policy distillation (GKD 2306.13649 with λ = 1)."""
    samples = _drafted(source, source.requests(step))
    return [sample for group in samples.values() for sample in group]


def mixed(source: Source, step: int) -> list[Example]:
    """Each prompt with the draft's samples with probability `share` (GKD's λ), else as given."""
    coins, share = random.Random(f"{source.seed}/{step}"), source.policy.settings()["share"]
    fresh = [request for request in source.requests(step) if coins.random() < share]
    samples = _drafted(source, fresh)
    return [s for e in source.chosen(step) for s in samples.get(e.id, [e])]


def skd(source: Source, step: int) -> list[Example]:
    """The draft proposes, and a token outside the target's `top_k` most probable is replaced by a
    sample of the target's (speculative knowledge distillation 2410.11325).
    """
    p = source.policy.settings()
    decoder = _decoder(
        source.target,
        ModelDrafter(source.draft, source.target.vocab_size),
        num_draft_tokens=p["block"],
        rule=within_top_k(p["top_k"]),
    )
    # The engine proposes nothing for an answer's last token, so one more is asked for than taken.
    requests = source.requests(step, more=1)
    return _answers(decoder.run(requests), requests, source, p["max_new_tokens"])


def induced(source: Source, step: int) -> list[Example]:
    """The states in which speculative decoding asks the draft: of each round with a rejection, the
    text up to it as the prompt and the draft's proposals, at most `block`, as the response. Where
    the target rejects nothing, the rounds it accepts.
    """
    decoder = _decoder(
        source.target,
        ModelDrafter(source.draft, source.target.vocab_size),
        num_draft_tokens=source.policy.settings()["block"],
        keep_proposals=True,
    )
    requests = source.requests(step)
    texts = {request.id: list(request.tokens) for request in requests}
    ends = source.target.eos_ids
    rejected: list[Example] = []
    accepted: list[Example] = []
    for round_ in decoder.stream(requests):
        for row in round_.rows:
            text = texts[row.request_id]
            if row.proposals:
                end = next((i for i, t in enumerate(row.proposals, 1) if t in ends), None)
                name = f"{row.request_id}@{len(text)}"
                example = Example(name, list(text), row.proposals[:end])
                (rejected if row.accepted < row.tested else accepted).append(example)
            text += row.tokens
    if not rejected + accepted:
        raise InputError(
            f"policy 'induced' met no proposal at step {step}: every answer ended with its first "
            "token; take another policy, or prompts with longer answers"
        )
    return rejected or accepted


def fresh_target(source: Source, step: int) -> list[Example]:
    """New answers of the target. A draft in training that proposed them saved no time."""
    requests = source.requests(step)
    return _answers(_decoder(source.target).run(requests), requests, source)


POLICIES: dict[str, Callable[[Source, int], list[Example]]] = {
    "fixed": given,
    "target": given,
    "draft": draft,
    "mixed": mixed,
    "skd": skd,
    "induced": induced,
    "fresh_target": fresh_target,
}


def decoded_rows(config: DistillConfig) -> int:
    """Tokens in the largest pass of the target while a run decodes with it; 0 where none does."""
    decode, policy = config.decode, config.policy
    rows = 0 if decode is None else decode.prompts * (decode.num_draft_tokens + 1)
    if policy.name in ("skd", "induced", "fresh_target"):
        rows = max(rows, min(policy.settings()["prompts"], BATCH) * ((policy.block or 0) + 1))
    return rows


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Sample(BaseModel):
    """A line of a file of samples."""

    model_config = ConfigDict(extra="forbid")
    id: str
    prompt_tokens: Tokens
    response_tokens: Tokens
    reward: Number | None = None
    advantage: Number | None = None
    log_probs: list[Number] | None = None

    @model_validator(mode="after")
    def _a_log_prob_for_each_token(self) -> _Sample:
        if self.log_probs is not None and len(self.log_probs) != len(self.response_tokens):
            raise ValueError(f"{len(self.log_probs)} log_probs of {len(self.response_tokens)}")
        return self

    def example(self) -> Example:
        given = self.model_dump(exclude_none=True)
        return Example(**given) if self.log_probs is None else Sample(**given)


def examples_at(source: Source, step: int, folder: Path) -> list[Example]:
    """What the policy gives at a step. Samples are kept in `folder`, so that a run that resumes
    between two refreshes goes on with those it had. Raises `StorageError` for a damaged file.
    """
    policy = POLICIES[source.policy.name]
    if source.policy.refresh_every is None:
        return policy(source, step)
    file = folder / f"step-{step:08d}.jsonl"
    if file.exists():
        advice = "remove it and resume"
        samples = [sample.example() for sample in read_json_lines(file, _Sample, advice)]
        if not samples:
            raise StorageError(f"{file} is damaged (it is empty); {advice}")
        check_examples(samples, source.target, file, advice)
        return samples
    try:
        examples = policy(source, step)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            json.dumps({n: vars(e)[n] for n in _Sample.model_fields if n in vars(e)})
            for e in examples
        ]
        write_whole(file, "".join(f"{row}\n" for row in rows))
    except OSError as error:
        raise StorageError(f"cannot use {file}: {error.strerror}; free space, resume") from error
    return examples


def forget_samples(folder: Path, step: int) -> None:
    """Remove samples of `step` and later, which weights that were not kept have made."""
    for file in folder.glob("step-*.jsonl"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal() and int(number) >= step:
            file.unlink()


def standalone(draft: LanguageModel, target: LanguageModel) -> LanguageModel:
    """The draft as a model over the target's ids, which decodes without it: tokens it lacks have
    the logit −inf, and so has the mask of a parallel draft. Shares the draft's body; the head is a
    copy of now.
    """
    whole = torch.arange(draft.vocab_size, device=draft.device)
    ids = whole if draft.vocab is None else draft.vocab
    ids = ids[ids < target.vocab_size]
    head, old = nn.Linear(draft.head.in_features, target.vocab_size, device="meta"), draft.head
    weight = old.weight.new_zeros(head.weight.shape)
    bias = old.weight.new_full((target.vocab_size,), -torch.inf)
    with torch.no_grad():
        weight[ids] = old.weight[: len(ids)]
        bias[ids] = 0.0 if old.bias is None else old.bias[: len(ids)]
        if draft.mask_token is not None:
            bias[draft.mask_token] = -torch.inf
    head.weight, head.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
    alone = LanguageModel(draft.name, draft.path, draft.model, draft.tokenizer)
    alone.head = head
    return alone


def within_top_k(most: int) -> Callable[..., Verdict]:
    """The engine's rule for `skd`. A round emits its proposals up to the first that is not among
    the target's `most` likeliest tokens, and a sample of the target in its place. Where all are
    among them it ends with the last proposal, as no token of the target is wanted. A row of the
    target without a finite maximum gives -1, as in `verify`.
    """

    def rule(
        draft_tokens: Tensor,
        draft_logits: Tensor | None,
        target_logits: Tensor,
        rows: RowSettings,
        *,
        lengths: Tensor,
        draft_vocab: Tensor | None = None,  # of these the engine tells every rule; this has no use
        draft_lse: Tensor | None = None,
        point_mass: Tensor | None = None,
        mode: Mode = "token",
        lenience: Lenience | None = None,
    ) -> Verdict:
        num = draft_tokens.shape[1]
        usable = target_logits.amax(-1).isfinite()  # else no token of it means anything
        best = target_logits[:, :num].topk(min(most, target_logits.shape[-1]), -1).indices
        inside = (best == draft_tokens[..., None]).any(-1) & usable[:, :num]
        accepted = inside.long().cumprod(1).sum(1).minimum(lengths)
        row = torch.arange(len(accepted), device=accepted.device)
        # The draft used the places before `num` of this step; the noise of this one is fresh.
        drawn = sample(target_logits[row, accepted], rows, position=num).tokens
        drawn = drawn.where(usable[row, accepted], -1)
        whole = (accepted == lengths) & (lengths > 0)
        last = accepted - whole.long()
        tokens = torch.cat([draft_tokens, draft_tokens.new_full((len(row), 1), -1)], 1)
        tokens = tokens.masked_fill(torch.arange(num + 1, device=row.device) > last[:, None], -1)
        tokens[row, last] = torch.where(whole, tokens[row, last], drawn)
        return Verdict(tokens, last)

    return rule


def _drafted(source: Source, requests: list[Request]) -> dict[str, Sequence[Example]]:
    """The draft's samples by prompt: one, or a group of them where they are rewarded."""
    alone, reward = standalone(source.draft, source.target), source.reward
    number = 1 if reward is None else reward.group
    asked = [replace(r, id=answer_id(r.id, n)) for r in requests for n in range(number)]
    generation = _decoder(alone).run(asked)
    answers = _answers(generation, [r for r in requests for _ in range(number)], source)
    samples = [replace(answer, id=r.id) for answer, r in zip(answers, asked, strict=True)]
    groups = {r.id: samples[i * number :][:number] for i, r in enumerate(requests)}
    if reward is None:
        return dict(groups)
    return {id_: reward.rewarded(group, source.target, alone) for id_, group in groups.items()}


def _answers(
    generation: Generation,
    requests: list[Request],
    source: Source,
    longest: int | None = None,
) -> list[Example]:
    kinds = {e.id: e.category for e in source.given}
    return [
        Example(r.id, list(r.tokens), output.tokens[:longest], kinds[r.id])
        for r, output in zip(requests, generation.outputs, strict=True)
    ]
