"""From prompts and answers to token ids, and the mask of the tokens that are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from specdistill.data.messages import BESIDE_TEXT
from specdistill.data.prompts import Prompt, named
from specdistill.data.rows import REASONING, VARIABLES
from specdistill.data.settings import settings_of
from specdistill.data.templates import rendered, template_of, variables_read
from specdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "An answer that no template takes for anything else."


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids up to where the response starts: what the engine decodes from.

    With a chat template these are the rendered messages and the generation header. Without one
    they are the text of the single user message and what the tokenizer puts before it (BOS), never
    what it puts after it (EOS).

    Raises:
        InputError: the template refuses or fails on the messages, or leaves out some of what the
            prompt holds; several messages, or tools, and no template; no tokens.
    """
    if tokenizer.chat_template:
        ids = _ids(tokenizer, _opening(tokenizer, prompt))
    else:
        encoding = tokenizer(_bare_text(prompt), return_special_tokens_mask=True)
        ids = cast("list[int]", encoding["input_ids"])
        added = cast("list[int]", encoding["special_tokens_mask"])
        while ids and added[len(ids) - 1]:
            ids.pop()
    if not ids:
        raise InputError(f"{prompt.named} encodes to no tokens; give it text or remove it")
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    *,
    ended: bool = True,
    ends: Collection[int] = (),
) -> tuple[list[int], list[bool]]:
    """Token ids of prompt, response and end-of-turn marker [T], and the response-only mask [T].
    A response that was cut has not `ended` and gets no marker. `ends` are the ids that end an
    answer of the model. With the response goes what `prompt.answer` has beside it.

    The ids start with exactly `encode_prompt`'s. The mask is True for the response and the marker
    and False for the rest: the prompt, its header, and text that the template puts before the
    response on its own (an empty think block). What a template writes after the marker is left
    out. Where nothing closes the turn, the next turn's first marker does if it is one of `ends`,
    and else the tokenizer's EOS, as that is where decoding stops.
    `pad` plays no part, so pad = eos is safe, and the mask is never all False or all True.

    Raises:
        InputError: as `encode_prompt`; an empty response; a template whose rendering of the answer
            does not continue the prompt or changes the answer; nothing that ends the turn, or a
            response that holds what does.
    """
    if not response.strip() and not prompt.answer:
        raise InputError(f"{prompt.named} has an empty response; there is nothing to learn")
    prompt_ids = encode_prompt(tokenizer, prompt)
    if tokenizer.chat_template:
        opening, scaffold, spoken, marker = _render_example(tokenizer, prompt, response, ends)
    else:
        if prompt.answer:
            raise _without_template(prompt, list(prompt.answer))
        opening, scaffold, spoken, marker = _bare_text(prompt), "", response, _eos(tokenizer)
    _refuse_ends(tokenizer, prompt, spoken, ends)
    spoken += marker if ended else ""
    scaffold_ids = _continuation_ids(tokenizer, opening, scaffold)
    spoken_ids = _continuation_ids(tokenizer, opening + scaffold, spoken)
    if not spoken_ids:
        raise InputError(f"the response to {prompt.named} encodes to no tokens")
    num_given = len(prompt_ids) + len(scaffold_ids)
    mask = [False] * num_given + [True] * len(spoken_ids)
    return prompt_ids + scaffold_ids + spoken_ids, mask


def _refuse_ends(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, spoken: str, ends: Collection[int]
) -> None:
    """Decoding stops at such a token, so what follows it could only be learnt wrong."""
    stops = {*ends, tokenizer.eos_token_id}
    if (end := next((id_ for id_ in _ids(tokenizer, spoken) if id_ in stops), None)) is not None:
        raise InputError(
            f"the response to {prompt.named} holds {tokenizer.convert_ids_to_tokens(end)!r}, "
            "which ends an answer wherever it stands; take it out of the text: the end of a turn "
            "is written by the chat template, or by the tokenizer"
        )


def _render_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, ends: Collection[int]
) -> tuple[str, str, str, str]:
    """Render (prompt with header, text the template adds before the answer, answer, marker)."""

    def after_opening(answer: str, beside: Mapping[str, Any], *more: Mapping[str, Any]) -> str:
        turns = [*prompt.messages, {"role": "assistant", "content": answer, **beside}, *more]
        full = rendered(tokenizer, prompt, turns, header=False)
        if not full.startswith(opening):
            raise InputError(
                f"{prompt.named}: the chat template renders the prompt in another way once "
                f"an answer follows: {_difference(opening, full)}. Training would not see what "
                "decoding sees; train on the target's own generations instead, which need no "
                "rendering of answers, or correct the template"
            )
        return full.removeprefix(opening)

    opening = rendered(tokenizer, prompt, prompt.messages, header=True)
    # A known answer shows what the template writes around any answer; searching for the real one
    # could find it inside a marker.
    scaffold, probe, closing = after_opening(PROBE, {}).partition(PROBE)
    rest = after_opening(response, prompt.answer)
    if not probe or not rest.endswith(closing):
        raise InputError(f"{prompt.named}: the chat template does not write answers as given")
    if scaffold.strip() and opening == rendered(tokenizer, prompt, prompt.messages, header=False):
        raise InputError(
            f"the chat template has no generation prompt: it writes {scaffold!r} before an answer, "
            "but not for add_generation_prompt=True, so decoding would start without it; correct "
            "the template"
        )

    def following() -> str:
        """What the template writes between an answer and the next question."""
        asked = {"role": "user", "content": PROBE}
        return after_opening(PROBE, {}, asked).split(PROBE)[1]

    marker = _end_of_turn(tokenizer, closing, ends, following)
    # The answer may hold reasoning of its own, which then stands in the scaffold's place. White
    # space around the answer is the model's to write, whether the template adds it or strips it.
    body = rest.removesuffix(closing)
    for key in prompt.answer:
        others = {name: value for name, value in prompt.answer.items() if name != key}
        if after_opening(response, others) == rest:
            raise _left_out(prompt, f"the answer's {key!r}")
    if prompt.answer and response.strip() in body:
        given = (
            "" if REASONING & prompt.answer.keys() or not body.startswith(scaffold) else scaffold
        )
        return opening, given, body.removeprefix(given), marker
    for given in ("", scaffold):
        spoken = body.removeprefix(given)
        if body.startswith(given) and spoken.strip() == response.strip():
            return opening, given, spoken, marker
    raise InputError(
        f"{prompt.named}: the chat template rewrites the response (templates may drop its "
        f"reasoning): {_difference(response.strip(), body.strip())}. Train on the target's own "
        "generations instead, or give the response without that part"
    )


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase,
    closing: str,
    ends: Collection[int],
    following: Callable[[], str],
) -> str:
    """Cut what the template writes after an answer behind the marker that ends the turn: its first
    one, with those that stand right behind it up to one of `ends`.
    """
    added = tokenizer.added_tokens_decoder
    stops = {str(added[id_].content) for id_ in ends if id_ in added}
    any_marker = [re.escape(token.content) for token in added.values() if token.content.strip()]
    # Of markers that begin alike the longest.
    pattern = re.compile("|".join(sorted(any_marker, key=len, reverse=True)) or r"(?!)")
    if first := pattern.search(closing):
        end = first.end()
        marker: re.Match[str] | None = first
        while marker and marker[0] not in stops:
            marker = pattern.match(closing, marker.end())
        return closing[: marker.end() if marker else end]
    if closing.strip():
        return closing.rstrip()
    if stops:  # some models end their turn by the marker of the next
        between = following()
        first = pattern.search(between)
        if first and first[0] in stops and not between[: first.start()].strip():
            return between[: first.end()]
    return _eos(tokenizer)


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no EOS token, so nothing can end a response; set one")
    return str(tokenizer.eos_token)


def _opening(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The prompt, rendered with its header. Raises `InputError` where the template leaves out some
    of it.
    """

    def changed_text(changed: Prompt) -> str | None:
        try:
            return rendered(tokenizer, changed, changed.messages, header=True)
        except InputError:  # it saw the change
            return None

    template = template_of(tokenizer, prompt)
    reads = variables_read(template)
    text = rendered(tokenizer, prompt, prompt.messages, header=True)
    contents = [turn["content"].strip() for turn in prompt.messages]
    for number, (turn, content) in enumerate(zip(prompt.messages, contents, strict=True)):
        if content and text.count(content) < sum(other.count(content) for other in contents):
            turns = list(prompt.messages)
            # All of it, or its end: the reasoning that it begins with is rightly left out.
            for other in (PROBE, f"{content} {PROBE}"):
                turns[number] = {**turn, "content": other}
                if changed_text(replace(prompt, messages=tuple(turns))) == text:
                    raise _left_out(prompt, f"message {number + 1}, of role {turn['role']!r}")
        for key in BESIDE_TEXT:
            known = REASONING if key in REASONING else (key,)  # Transformers passes all three
            if key in turn and not any(re.search(rf"\b{name}\b", template) for name in known):
                raise _left_out(prompt, f"{key!r} of message {number + 1}")
    for name in prompt.variables:
        others = {key: value for key, value in prompt.variables.items() if key != name}
        if name not in reads or (
            name in VARIABLES and changed_text(replace(prompt, variables=others)) == text
        ):
            raise _left_out(prompt, f"{name!r}")
    if missed := sorted(prompt.unread & reads):
        raise InputError(
            f"{prompt.named}: the chat template reads {missed[0]!r}, which the row has, but "
            "not where templates are given it; write it in the row's 'chat_template_kwargs', as in "
            f'{{"chat_template_kwargs": {{"{missed[0]}": ...}}}}, or rename it'
        )
    return text


def _left_out(prompt: Prompt, part: str) -> InputError:
    return InputError(
        f"{prompt.named}: the tokenizer's chat template leaves out {part}, so the models "
        "would not see it; remove it from the row, or take a tokenizer whose template writes it"
    )


def _without_template(prompt: Prompt, parts: Sequence[str]) -> InputError:
    return InputError(
        f"{prompt.named} has {', '.join(map(repr, parts))}, and the tokenizer has no chat "
        "template to write that; remove it, or take a tokenizer with a chat template"
    )


def _bare_text(prompt: Prompt) -> str:
    if prompt.beside_text:
        raise _without_template(prompt, prompt.beside_text)
    if len(prompt.messages) > 1:
        raise InputError(
            f"{prompt.named} has {len(prompt.messages)} messages, but the tokenizer has no "
            "chat template to join them; give prompts of one user message, or a tokenizer with a "
            "chat template"
        )
    return str(prompt.messages[0]["content"])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Ids of `text` where it continues `before`, whose ids stay as they are.

    Encoding both at once is right unless a token spans the boundary. Then a line break stands for
    `before`, as some tokenizers put a space before text that stands alone.
    """
    for start in (before, "\n"):
        start_ids = _ids(tokenizer, start)
        ids = _ids(tokenizer, start + text)
        if ids[: len(start_ids)] == start_ids:
            return ids[len(start_ids) :]
    return _ids(tokenizer, text)


def _difference(expected: str, got: str) -> str:
    """Quote both texts from shortly before they part."""
    same = next(
        (i for i, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(got)),
    )
    start = max(0, same - 10)
    return f"{expected[start : same + 30]!r} becomes {got[start : same + 30]!r}"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the models read it."""

    id: str
    tokens: list[int]
    category: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    conversation: str | None = None  # of whose turns it is one
    where: str = ""  # as `Prompt.where`

    @property
    def named(self) -> str:
        """As `Prompt.named`."""
        return named(self.id, self.where)


def encoded(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[EncodedPrompt]:
    """The prompts behind the tokenizer's chat template, each of them once: copies say nothing new,
    and would make an interval over prompts narrower than what is known.
    """
    distinct: dict[tuple[int, ...], EncodedPrompt] = {}
    for p in prompts:
        tokens, settings = encode_prompt(tokenizer, p), settings_of(p)
        prompt = EncodedPrompt(p.id, tokens, p.category, settings, p.conversation, p.where)
        distinct.setdefault(tuple(tokens), prompt)
    return list(distinct.values())
