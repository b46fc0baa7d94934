"""What numbers and dtypes may be, in one place: the command line, configuration files and Python
read these bounds, and all of them before a model is loaded. They part what hardware and formats can
take from slips of the pen; none of them is a recommendation.
"""

from __future__ import annotations

from typing import Any, Literal

from annotated_types import Interval

from specdistill.errors import InputError

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]
MAX_DRAFT_TOKENS = 64
DRAFT_TOKENS = Interval(ge=1, le=MAX_DRAFT_TOKENS)
SEED = Interval(ge=0, le=2**63 - 1)  # what the generators of random numbers take
NEW_TOKENS = Interval(ge=1, le=2**20)  # of one answer
LEAST_TOKENS = Interval(ge=0, le=2**20)  # of an answer that a filter lets pass
VOCABULARY = Interval(ge=1, le=2**24)
TOP_K = Interval(ge=0, le=2**24)
TOP_P = Interval(gt=0, le=1)  # 1 is off
MIN_P = Interval(ge=0, lt=1)  # 0 is off
ROWS = Interval(ge=1, le=2**16)  # decoded together
QUESTIONS = Interval(ge=1, le=1024)  # under way at once at a server
WORKERS = Interval(ge=1, le=1024)  # engines at a time, or devices of one
THREADS = Interval(ge=1, le=1024)
COUNT = Interval(ge=1, le=10**9)  # of prompts, steps, tokens in all
ANSWERS = Interval(ge=1, le=1024)  # to one prompt, of which one is kept
RETRIES = Interval(ge=0, le=1000)
SHOTS = Interval(ge=1, le=1000)
LAYERS = Interval(ge=0, le=10**6)
SHARE = Interval(ge=0, le=1)
LEAST_REACH = Interval(ge=0, lt=1)  # 0 never stops early; at 1 no second token is ever drafted
TEMPERATURE = Interval(ge=1e-4, le=1e4)  # 0 is greedy, and no division
PRICES = Interval(gt=1, le=1e6)  # of an answer of the target, in those of a cheaper writer
POSITIVE = Interval(gt=0, le=1e30)  # float32 holds it
RUNS = 1000  # of one sweep
KEYS = 32  # of its grid


def check(name: str, value: Any, allowed: Interval, *, off: float | None = None) -> None:
    """Raises `InputError` for what is no number, or lies outside; `off` is allowed besides."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == off or inside(value, allowed)):
        besides = "" if off is None else f"{off}, or "
        raise InputError(f"{name} must be {besides}{words(allowed)}; got {shown(value)}")


def inside(value: float, allowed: Interval) -> bool:
    above = value >= allowed.ge if allowed.ge is not None else value > allowed.gt  # type: ignore[operator]
    below = value <= allowed.le if allowed.le is not None else value < allowed.lt  # type: ignore[operator]
    return bool(above and below)


def words(allowed: Interval) -> str:
    """ "1 to 64", as errors say it."""
    least = allowed.ge if allowed.ge is not None else f"above {allowed.gt}"
    return f"{least} to {allowed.le if allowed.le is not None else f'below {allowed.lt}'}"


def shown(value: Any, most: int = 200) -> str:
    """A value as an error may repeat it: all of it, or how it begins."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python writes
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
