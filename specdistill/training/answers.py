"""The answers that a run learns from: read, checked against the models, and split from those that
are held out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from specdistill.config import DistillConfig
from specdistill.data.chat import encode_example
from specdistill.data.prompts import load_prompts
from specdistill.data.rewriting import LOOKED_AT, rewriting
from specdistill.data.settings import distinct, settings_of
from specdistill.data.signal import NONE, States, TopK, kept_tokens
from specdistill.data.sources import TokenAnswers, open_answers
from specdistill.data.token_store import Example, tokenizer_sha256
from specdistill.errors import InputError, StorageError
from specdistill.models import LanguageModel, check_positions, check_tokens
from specdistill.training.hints import map_layers


def heldout_and_training(
    config: DistillConfig, target: LanguageModel | None, draft: LanguageModel
) -> tuple[list[Example], list[Example]]:
    """`read_given`, split. Raises `InputError` too where none would be left to train on, or a
    model has too few positions for them.
    """
    answers = open_answers(config.data)
    if target is not None and config.signal == "kept" and isinstance(answers, TokenAnswers):
        _check_signal(config, answers, draft, target)
    examples = read_given(config, target or draft, draft)
    if len(examples) < 2:
        raise InputError(
            f"{config.data} has {len(examples) or 'no'} answer, and one must be held out of "
            "training for the metrics; generate more"
        )
    if len(examples) <= config.heldout:
        raise InputError(
            f"{config.data} has {len(examples)} answers; heldout: {config.heldout}, kept out for "
            f"the metrics, leaves none to train on; set heldout={max(len(examples) // 5, 1)}, or "
            "generate more"
        )
    readers = [model for model in (target, draft) if model is not None]
    new = config.policy.max_new_tokens or 0  # sampled after a prompt
    lengths = (len(e.prompt_tokens) + max(len(e.response_tokens), new) for e in examples)
    check_positions(readers, zip((repr(e.id) for e in examples), lengths, strict=True))
    return split(examples, config.heldout)


def split(examples: list[Example], heldout: int) -> tuple[list[Example], list[Example]]:
    """The answers that are held out and those trained on, in an order by lot that is the same in
    every run: in a folder they come a task at a time, and otherwise after an interrupt. Answers to
    equal prompts and those of one conversation, which hold each other's text, stay together where
    that is possible with up to twice as many held out, or fewer.
    """
    leaders: dict[Hashable, str] = {}  # by prompt or conversation, the id of a first one
    first: dict[str, str] = {}  # of each first one an earlier one of its group, or itself

    def leader(id_: str) -> str:
        while first[id_] != id_:
            first[id_] = id_ = first[first[id_]]
        return id_

    for example in sorted(examples, key=lambda example: example.id):
        first[example.id] = example.id
        shared: list[Hashable] = [tuple(example.prompt_tokens)]
        shared += [] if example.conversation is None else [example.conversation]
        for key in shared:
            low, high = sorted((leader(leaders.setdefault(key, example.id)), leader(example.id)))
            first[high] = low

    def lot(example: Example) -> tuple[bytes, str]:
        return sha256(leader(example.id).encode()).digest(), example.id

    lots = sorted(examples, key=lot)
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(lots)) if leader(a.id) != leader(b.id)]
    more = [end for end in ends if heldout <= end <= 2 * heldout]
    fewer = [end for end in ends if end < heldout]
    end = min(more, default=max(fewer, default=heldout))
    return lots[:end], lots[end:]


def examples_sha256(examples: Sequence[Example]) -> str:
    """Hash of the answers' tokens."""
    answers = sha256()
    for e in examples:
        answers.update(repr((e.id, e.prompt_tokens, e.response_tokens)).encode())
    return answers.hexdigest()


def read_given(
    config: DistillConfig, reader: LanguageModel, draft: LanguageModel | None = None
) -> list[Example]:
    """The answers in `config.data`: a folder of `generate`, or prompts with responses of their own.
    Text becomes the tokens of `reader`: the target, or the draft where only text is learnt from.
    Raises `InputError` where the policy wants the other kind, the tokens are another model's, or
    `reader` or `draft` has too few positions for a text.
    """
    answers, name = open_answers(config.data), config.policy.name
    if name == ("fixed" if answers.generated else "target"):
        here = (
            "answers of the target" if answers.generated else "no answers of `specdistill generate`"
        )
        other = "target" if answers.generated else "fixed"
        raise InputError(f"policy {name!r}: {config.data} holds {here}; take policy {other!r}")
    if config.turns != "last" and answers.generated:
        raise InputError(
            f"turns: {config.turns} has no effect on {config.data}, whose answers were generated; "
            "leave it out, and have each turn answered by `specdistill generate --turns all`"
        )
    if config.chat_template_kwargs and isinstance(answers, TokenAnswers):
        raise InputError(
            f"chat_template_kwargs has no effect on {config.data}, whose prompts are tokens "
            "already; leave it out, and give `specdistill generate` --chat-template-kwargs"
        )
    if isinstance(answers, TokenAnswers):
        made_by = answers.manifest
        if made_by.tokenizer_sha256 != tokenizer_sha256(reader):
            raise InputError(
                f"{config.data} holds tokens of {made_by.target}, whose tokenizer or chat template "
                f"differs from {reader.name}'s; generate answers of this target, or learn across "
                "tokenizers from text: have a server answer (`specdistill ask`), or give .jsonl "
                "with prompts and responses"
            )
        learnt = config.signal != "none" and name in ("target", "mixed")
        if learnt and not reader.has_sha256(made_by.target_sha256):
            raise InputError(
                f"{config.data} holds answers of {made_by.target}, another model than "
                f"{reader.name} is now, by its weights or its config.json; generate answers of "
                "this target, or take a policy that makes its own (fresh_target, draft, skd)"
            )
        examples = answers.examples(signal=config.signal == "kept")
        check_examples(examples, reader, config.data, "remove the folder and generate again")
        return [e for e in examples if e.response_tokens]
    if config.signal == "kept":
        raise InputError(
            f"{config.data} holds text, and nothing is kept with it of the target's signal; set "
            "signal: none to learn from the text (loss: ce), or live"
        )
    examples = []
    shortest = reader if draft is None else min(reader, draft, key=lambda model: model.max_length)
    for text in answers.answers(config.turns, config.chat_template_kwargs):
        prompt = text.prompt
        what = prompt.named if prompt.where else f"{config.data}: {prompt.named}"
        response = prompt.one_response()
        if response is None:
            raise InputError(
                f"{what} has no response to learn from; give one to each, or let the target "
                "answer with `specdistill generate`"
            )
        tokens, mask = encode_example(
            reader.tokenizer, prompt, response, ended=text.ended, ends=reader.eos_ids
        )
        check_tokens(reader, tokens, what)
        if len(tokens) > shortest.max_length:
            raise InputError(
                f"{what} comes to {len(tokens)} tokens with its response, and {shortest.name} "
                f"reads {shortest.max_length} positions; take shorter texts, or a model that reads "
                "more"
            )
        start = mask.index(True)
        example = Example(prompt.id, tokens[:start], tokens[start:], prompt.category)
        example.conversation = prompt.conversation
        examples.append(example)
    return examples


def check_examples(
    examples: Sequence[Example], reader: LanguageModel, where: str | Path, advice: str
) -> None:
    """Raises `StorageError` for ids that the model has not, states of another width, and a signal
    that is no number.
    """
    known = max(reader.vocab_size, reader.full_vocab_size)
    width = reader.head.weight.shape[1]
    for example in examples:
        ids = [example.prompt_tokens, example.response_tokens]
        largest = max(map(max, filter(None, ids)), default=0)
        if isinstance(example.signal, TopK) and example.signal.tokens.numel():
            lowest, highest = example.signal.tokens.aminmax()
            largest = max(largest, int(highest)) if lowest >= 0 else int(lowest)
        if not 0 <= largest < known:
            raise StorageError(
                f"{where} has the token {largest} in {example.id!r}, and {reader.name} has 0 to "
                f"{known - 1}; {advice}"
            )
        if isinstance(example.signal, States) and (d := example.signal.hidden.shape[1]) != width:
            raise StorageError(
                f"{where} keeps states of {d} values, and those of {reader.name} have {width}; "
                f"{advice}"
            )
        for name, values in ({} if example.signal is None else example.signal.tensors()).items():
            if not (values.exp() if name.startswith("log_") else values).isfinite().all():
                raise StorageError(
                    f"{where} keeps {name} of {example.id!r} that are no numbers; {advice}"
                )


def _check_signal(
    config: DistillConfig, answers: TokenAnswers, draft: LanguageModel, target: LanguageModel
) -> None:
    """The states kept are those of this target's last layer alone; top-k are no states, and belong
    to temperature 1.
    """
    manifest = answers.manifest
    if not target.has_sha256(manifest.target_sha256):
        raise InputError(
            f"the signal in {config.data} was kept from {manifest.target}, another model than "
            f"{target.name} is now, by its weights or its config.json; generate anew"
        )
    signal = manifest.signal
    if signal == NONE:
        return  # reading it says so
    top_k = kept_tokens(signal) is not None
    if config.hints is not None:
        inner = {layer for _, layer in map_layers(config.hints.layers, draft, target)}
        if top_k or inner != {target.num_layers}:
            raise InputError(
                f"hints ask for the target's layers {sorted(inner)}, and {config.data} keeps "
                f"{signal!r}: {'no layer' if top_k else f'the last alone, {target.num_layers}'}; "
                "distil with signal: live, or map to a layer that is kept"
            )
    if top_k:
        for name in ("temperature", "decoding_temperature"):
            if getattr(config, name) != 1:
                raise InputError(
                    f"{name} is {getattr(config, name)}, and {config.data} keeps {signal!r} of the "
                    "target at temperature 1, which gives no other; keep 'states', or distil with "
                    "signal: live"
                )


def template_settings(config: DistillConfig) -> list[dict[str, Any]]:
    """What the chat template was told for the data's prompts, each different set of it once; none
    where nobody knows.
    """
    answers = open_answers(config.data)
    if isinstance(answers, TokenAnswers):
        return answers.manifest.chat_template_kwargs
    known = answers.answers(config.turns, config.chat_template_kwargs)
    return distinct(settings_of(answer.prompt) for answer in known)


def rewritten_turns(config: DistillConfig, reader: LanguageModel) -> str:
    """What to say where the chat template shows earlier turns in another way."""
    if config.turns == "last":
        return ""
    prompts = load_prompts(
        config.data,
        turns=config.turns,
        limit=LOOKED_AT,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    words = rewriting(reader.tokenizer, prompts)
    return f"; {words}" if words else ""


def smaller_writer(config: DistillConfig, draft: LanguageModel) -> str:
    """Compute-matched answers may come from a model below the draft itself (2408.16737): a word of
    it then.
    """
    answers = open_answers(config.data)
    if not isinstance(answers, TokenAnswers):
        return ""
    manifest = answers.manifest
    parameters = manifest.writer_parameters
    if parameters is None or parameters >= draft.parameters():
        return ""
    return f", written by {manifest.settings['writer'][0]}, which is smaller than the draft"
