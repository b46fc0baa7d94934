"""What a server with OpenAI's protocol says: its replies read, its errors on one line, and the key,
which it may quote, in neither.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from math import isfinite, nan
from statistics import StatisticsError, fmean
from typing import Any
from urllib.parse import quote, quote_plus

from specdistill.data.text_store import Reply
from specdistill.errors import InputError

KEY = "OPENAI_API_KEY"


class NoAnswer(Exception):
    """A reply that holds none."""


def api_key() -> str:
    """The user's, or none. Raises `InputError` for one no header may hold, without quoting it."""
    key = os.environ.get(KEY, "").strip()
    if re.search(r"[^!-~]", key):
        raise InputError(
            f"the environment variable {KEY} holds a space, a control character or a letter that "
            "is not ASCII's: no key does; set it to the key alone"
        )
    return key


def read_reply(reply: Any, id_: str, attempt: int, scored: bool) -> Reply:
    """The answer of a reply, whose fields the client does not check."""
    try:
        choice = reply.choices[0]
        text, reason = choice.message.content, choice.finish_reason
        message = choice.message
    except (AttributeError, IndexError, TypeError) as error:
        raise NoAnswer(f"no choices in {redacted(str(reply))[:200]!r}") from error
    if not isinstance(text, str):
        raise NoAnswer(f"no text, finish reason {reason!r}")
    text.encode()  # half of a surrogate pair is a ValueError
    apart = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if apart is not None and not isinstance(apart, str):
        raise NoAnswer(f"reasoning that is no text but {type(apart).__name__}")
    if apart is not None:
        apart.encode()
    mean = _log_probability(choice) if scored and text.strip() else None
    return Reply(
        id_,
        attempt,
        redacted(text),
        reason == "stop",
        None if apart is None else redacted(apart),
        mean,
    )


def _log_probability(choice: Any) -> float:
    """The mean of the answer's tokens'."""
    try:
        mean = fmean(token.logprob for token in choice.logprobs.content)
    except (AttributeError, TypeError, ValueError, OverflowError, StatisticsError):
        mean = nan
    if not isfinite(mean):
        raise NoAnswer(
            "no log-probabilities, which the scorer 'log-probability' needs; choose another scorer"
        )
    return mean


def said_by(error: BaseException) -> str:
    """What the server or the connection said, on one line, without the key it may have quoted."""
    text = str(error)
    if " - " not in text and hasattr(error, "response"):  # not where the client looks for it
        text += f" - {error.response.text}"
    return one_line(text)[:300] or type(error).__name__


def one_line(text: str) -> str:
    """On one line, without the key and without what a terminal would obey."""
    line = " ".join(redacted(text).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def redacted(text: str) -> str:
    """Without the key, however it was quoted."""
    key = os.environ.get(KEY, "")
    forms = set()
    for form in {key, key.strip()} - {""}:
        quoted = {quote(form), quote(form, safe=""), quote_plus(form), html.escape(form)}
        forms |= quoted | {form, repr(form)[1:-1], json.dumps(form)[1:-1]}
        forms |= {json.dumps(form)[1:-1].replace("/", "\\/"), *map(str.lower, quoted)}
        forms.add(base64.b64encode(form.encode()).decode())
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text
