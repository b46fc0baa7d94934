"""From prompts and answers to token ids, and the mask of the tokens that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from jinja2.exceptions import TemplateError

from specdistill.data.prompts import Prompt
from specdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "An answer that no template takes for anything else."


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids up to where the response starts: what the engine decodes from.

    With a chat template these are the rendered messages and the generation header. Without one
    they are the text of the single user message and what the tokenizer puts before it (BOS), never
    what it puts after it (EOS).

    Raises:
        InputError: the template refuses the messages; several messages and no template; no tokens.
    """
    if tokenizer.chat_template:
        ids = _ids(tokenizer, _render(tokenizer, prompt, prompt.messages, header=True))
    else:
        encoding = tokenizer(_bare_text(prompt), return_special_tokens_mask=True)
        ids = cast("list[int]", encoding["input_ids"])
        added = cast("list[int]", encoding["special_tokens_mask"])
        while ids and added[len(ids) - 1]:
            ids.pop()
    if not ids:
        raise InputError(f"prompt {prompt.id!r} encodes to no tokens; give it text or remove it")
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str, *, ended: bool = True
) -> tuple[list[int], list[bool]]:
    """Token ids of prompt, response and end-of-turn marker [T], and the response-only mask [T].
    A response that was cut has not `ended` and gets no marker.

    The ids start with exactly `encode_prompt`'s. The mask is True for the response and the marker
    and False for the rest: the prompt, its header, and text that the template puts before the
    response on its own (an empty think block). What a template writes after the marker is left
    out. Where nothing closes the turn, the tokenizer's EOS does, as that is where decoding stops.
    `pad` plays no part, so pad = eos is safe, and the mask is never all False or all True.

    Raises:
        InputError: as `encode_prompt`; an empty response; a template whose rendering of the answer
            does not continue the prompt or changes the answer; nothing that ends the turn.
    """
    if not response.strip():
        raise InputError(f"prompt {prompt.id!r} has an empty response; there is nothing to learn")
    prompt_ids = encode_prompt(tokenizer, prompt)
    if tokenizer.chat_template:
        opening, scaffold, spoken, marker = _render_example(tokenizer, prompt, response)
    else:
        opening, scaffold, spoken, marker = _bare_text(prompt), "", response, _eos(tokenizer)
    spoken += marker if ended else ""
    scaffold_ids = _continuation_ids(tokenizer, opening, scaffold)
    spoken_ids = _continuation_ids(tokenizer, opening + scaffold, spoken)
    if not spoken_ids:
        raise InputError(f"the response to prompt {prompt.id!r} encodes to no tokens")
    num_given = len(prompt_ids) + len(scaffold_ids)
    mask = [False] * num_given + [True] * len(spoken_ids)
    return prompt_ids + scaffold_ids + spoken_ids, mask


def _render_example(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str
) -> tuple[str, str, str, str]:
    """Render (prompt with header, text the template adds before the answer, answer, marker)."""

    def after_opening(answer: str) -> str:
        turns = [*prompt.messages, {"role": "assistant", "content": answer}]
        full = _render(tokenizer, prompt, turns, header=False)
        if not full.startswith(opening):
            raise InputError(
                f"prompt {prompt.id!r}: the chat template renders the prompt in another way once "
                f"an answer follows: {_difference(opening, full)}. Training would not see what "
                "decoding sees; train on the target's own generations instead, which need no "
                "rendering of answers, or correct the template"
            )
        return full.removeprefix(opening)

    opening = _render(tokenizer, prompt, prompt.messages, header=True)
    # A known answer shows what the template writes around any answer; searching for the real one
    # could find it inside a marker.
    scaffold, found, closing = after_opening(_PROBE).partition(_PROBE)
    rest = after_opening(response)
    if not found or not rest.endswith(closing):
        raise InputError(f"prompt {prompt.id!r}: the chat template does not write answers as given")
    if scaffold.strip() and opening == _render(tokenizer, prompt, prompt.messages, header=False):
        raise InputError(
            f"the chat template has no generation prompt: it writes {scaffold!r} before an answer, "
            "but not for add_generation_prompt=True, so decoding would start without it; correct "
            "the template"
        )
    # The answer may hold reasoning of its own, which then stands in the scaffold's place. White
    # space around the answer is the model's to write, whether the template adds it or strips it.
    body = rest.removesuffix(closing)
    for given in ("", scaffold):
        spoken = body.removeprefix(given)
        if body.startswith(given) and spoken.strip() == response.strip():
            return opening, given, spoken, _end_of_turn(tokenizer, closing)
    raise InputError(
        f"prompt {prompt.id!r}: the chat template rewrites the response (templates may drop its "
        f"reasoning): {_difference(response.strip(), body.strip())}. Train on the target's own "
        "generations instead, or give the response without that part"
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, closing: str) -> str:
    """Cut what the template writes after an answer behind the marker that ends the turn."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    markers = [marker for marker in added if marker.strip() and marker in closing]
    if markers:
        first = min(markers, key=lambda marker: (closing.index(marker), -len(marker)))
        return closing[: closing.index(first) + len(first)]
    return closing.rstrip() or _eos(tokenizer)


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no EOS token, so nothing can end a response; set one")
    return str(tokenizer.eos_token)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: Sequence[Mapping[str, str]],
    *,
    header: bool,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=header
        )
    except (TemplateError, ValueError) as error:
        raise InputError(
            f"prompt {prompt.id!r}: the tokenizer's chat template refuses these messages: {error}"
        ) from error
    return cast("str", text)


def _bare_text(prompt: Prompt) -> str:
    if len(prompt.messages) > 1:
        raise InputError(
            f"prompt {prompt.id!r} has {len(prompt.messages)} messages, but the tokenizer has no "
            "chat template to join them; give prompts of one user message, or a tokenizer with a "
            "chat template"
        )
    return prompt.messages[0]["content"]


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
