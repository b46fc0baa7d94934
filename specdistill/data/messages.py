"""Chat messages of a row, checked and in one form, whichever of the usual data sets they come from.

A conversation stands under "messages" (OpenAI's form: role and content), "conversations"
(ShareGPT's: from and value) or "data" (UltraChat's: texts of user and assistant in turn).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specdistill.data.rows import MEDIA, REASONING, parsed
from specdistill.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
BESIDE_TEXT = (*REASONING, "tool_calls")  # what a turn may say besides its content
PROMPT, MESSAGES, SHAREGPT, ULTRACHAT = "prompt", "messages", "conversations", "data"
_OTHERS = (SHAREGPT, ULTRACHAT)
CALL = "function_call"  # who speaks in ShareGPT's form where the value is a call in JSON
# Roles by who speaks in ShareGPT's form.
_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
# What would change what is asked or answered, and is read under another name.
_ELSEWHERE = {
    "functions": "list them under 'tools'",
    "function_call": "write it as 'tool_calls'",
    "history": "write it as earlier turns in 'messages'",
    "instruction": "write it into the prompt",
    "input": "write it into the prompt",
    "context": "write it into the prompt",
    "continue_final_message": "answers begin where a turn does, so leave it out",
    "prefix": "answers begin where a turn does, so leave it out",
}


def in_one_form(row: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """Which form the row has, and the row with its conversation under "messages". A "prompt" beside
    it that is its first question, as in UltraChat 200k, goes. Raises `InputError`.
    """
    own = [name for name in (PROMPT, MESSAGES) if name in row]
    held = [*own[-1:], *(name for name in _OTHERS if isinstance(row.get(name), list))]
    if len(held) > 1:
        raise InputError(f"{where}: got a conversation in {held[0]!r} and in {held[1]!r}; keep one")
    if own:
        turns = row.get(MESSAGES)
        asked = [t for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
        first = next((t.get("content") for t in asked if t.get("role") == "user"), None)
        if first is not None and first == row.get(PROMPT):
            row = {key: value for key, value in row.items() if key != PROMPT}
        return MESSAGES, row
    form = next((name for name in _OTHERS if name in row), None)
    if form is None:
        return MESSAGES, row
    turns = row[form]
    if not isinstance(turns, list):
        raise InputError(f"{where}: {form!r} must be a list of turns; got {type(turns).__name__}")
    if form == ULTRACHAT and all(isinstance(text, str) for text in turns):
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return form, {MESSAGES: turns, **{k: v for k, v in row.items() if k != form}}


def checked_messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Check chat messages. All that a turn says stays with it, for the chat template to see."""
    if not isinstance(value, list):
        raise InputError(f"{where}: 'messages' must be a list; got {type(value).__name__}")
    return tuple(_turn(message, where, number) for number, message in enumerate(value, 1))


def check_order(turns: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises `InputError` for an answer to nothing, a tool's result without a call, and an empty
    turn.
    """
    before: Mapping[str, Any] = {"role": None}
    for number, turn in enumerate(turns, 1):
        role, previous = turn["role"], before["role"]
        behind = f"behind one of role {previous!r}" if previous else "before any other"
        what = f"{where}: message {number} has role {role!r} and stands {behind}"
        if role == "assistant" and previous not in ("user", "tool"):
            raise InputError(f"{what}; an answer follows a user's turn or a tool's result")
        if role == "tool" and previous != "tool" and not before.get("tool_calls"):
            raise InputError(f"{what}; a tool's result follows the assistant's 'tool_calls'")
        if role == "assistant" and not turn["content"].strip() and not said_beside(turn):
            raise InputError(
                f"{where}: message {number} is an empty assistant turn; give it text, or end the "
                "conversation before it"
            )
        before = turn


def said_beside(turn: Mapping[str, Any]) -> dict[str, Any]:
    """What a turn says besides its content."""
    return {key: turn[key] for key in BESIDE_TEXT if key in turn}


def refuse_unreadable(holder: Mapping[str, Any], where: str) -> None:
    """Raises `InputError` for what would be lost though it belongs to what is asked."""
    for key in MEDIA:
        if holder.get(key):
            raise InputError(f"{where} has {key!r}, and only text can be asked; remove the line")
    for key, advice in _ELSEWHERE.items():
        if holder.get(key):
            raise InputError(f"{where} has {key!r}, which is not read; {advice}")


def text_of(value: object, where: str, what: str) -> str:
    """Return `value` if it is text a tokenizer can take."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} must be text; got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may write half of a surrogate pair, as in "\ud83d"
        raise InputError(
            f"{where}: {what} holds half of a surrogate pair at character {error.start + 1}; "
            "write the whole character"
        ) from error
    return value


def _turn(message: object, where: str, number: int) -> Mapping[str, Any]:
    if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
        message = _spoken(message, where, number)
    beside = isinstance(message, dict) and any(message.get(key) for key in BESIDE_TEXT)
    wanted = {"role"} if beside else {"role", "content"}
    if not isinstance(message, dict) or not wanted <= message.keys():
        raise InputError(f"{where}: message {number} must be an object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise InputError(
            f"{where}: message {number} has role {message['role']!r}; it must be one of "
            f"{', '.join(ROLES)}"
        )
    refuse_unreadable(message, f"{where}: message {number}")
    if (weight := message.get("weight")) not in (None, 0, 1):
        raise InputError(
            f"{where}: 'weight' of message {number} is {weight!r}; it must be 0, for a turn that "
            "is not learnt, or 1"
        )
    content = message.get("content")
    content = "" if content is None and beside else _content(content, where, number)
    others = {k: v for k, v in message.items() if v not in (None, "", [], {})}
    turn = {**others, "role": message["role"], "content": content}
    for key in REASONING:
        if key in turn:
            text_of(turn[key], where, f"{key!r} of message {number}")
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"], where, number)
    text = json.dumps(turn, ensure_ascii=False, default=str)  # as of dates in a data set
    turn = json.loads(text_of(text, where, f"message {number}"))
    return turn


def _spoken(message: Mapping[str, Any], where: str, number: int) -> dict[str, Any]:
    """A turn of ShareGPT's form in OpenAI's."""
    speaker, value = message["from"], message["value"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise InputError(
            f"{where}: message {number} is from {speaker!r}; known are {', '.join(_SPEAKERS)}"
        )
    others = {key: message[key] for key in message if key not in ("from", "value")}
    if speaker != CALL:
        return {**others, "role": _SPEAKERS[speaker], "content": value}
    fault = f"the call in message {number} is not valid JSON"
    call = parsed(text_of(value, where, f"message {number}"), where, fault, "write an object")
    calls = call if isinstance(call, list) else [call]
    return {**others, "role": "assistant", "content": None, "tool_calls": calls}


def _content(value: object, where: str, number: int) -> str:
    """The text of a message, which may stand in a list of a single part."""
    what = f"the content of message {number}"
    if isinstance(value, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in value]
        if kinds != ["text"]:
            raise InputError(
                f"{where}: {what} is a list of the parts {', '.join(map(repr, kinds)) or 'none'}; "
                "only text can be asked, in one piece, since templates join parts differently"
            )
        value = value[0].get("text")
    return text_of(value, where, what)


def _calls(value: object, where: str, number: int) -> list[dict[str, Any]]:
    """Tool calls, with arguments as objects: templates write a text of JSON as a quoted text."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise InputError(f"{where}: 'tool_calls' of message {number} must be a list of objects")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: a tool call of message {number} names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            fault = f"'arguments' in message {number} is a text that is not valid JSON"
            arguments = parsed(arguments or "{}", where, fault, "write an object")
        if not isinstance(arguments, dict):
            raise InputError(
                f"{where}: 'arguments' in message {number} must be an object; got "
                f"{type(arguments).__name__}"
            )
        whole = {**function, "arguments": arguments}
        calls.append({**call, "function": whole} if "function" in call else whole)
    return calls
