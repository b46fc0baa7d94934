"""A tokenizer's chat template, run so that the same messages always become the same text."""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import Environment, meta, nodes
from jinja2.exceptions import TemplateError

from specdistill.data.prompts import Prompt
from specdistill.data.rows import TEMPLATE_SETTINGS, VARIABLES
from specdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template that tells the date is told: else the tokens of one file change overnight.
DATE = datetime.datetime(2026, 1, 1)
PROBE = {"an argument of no function": True}
MOST_STEPS = 1_000_000  # that a template may count in one rendering


def template_of(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """The template that is used, which may be one for tools among several."""
    try:
        return str(tokenizer.get_chat_template(tools=prompt.variables.get("tools")))
    except ValueError as error:
        names = ", ".join(tokenizer.chat_template)
        raise InputError(
            f"the tokenizer has the chat templates {names}, and none of them is 'default'; name "
            "one so in its folder"
        ) from error


@lru_cache
def variables_read(template: str) -> frozenset[str]:
    """The variables that a template reads. Raises `InputError` for one that is not always the same,
    or none at all.
    """
    # The tag is Transformers' own, and marks what is written without changing it.
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(source)
    except (TemplateError, RecursionError) as error:
        raise InputError(
            f"the tokenizer's chat template cannot be read: {error}; correct it"
        ) from error
    reads = meta.find_undeclared_variables(tree)
    if "lipsum" in reads or any(node.name == "random" for node in tree.find_all(nodes.Filter)):
        raise InputError(
            "the tokenizer's chat template writes something by chance, so no prompt would be asked "
            "twice alike; correct it"
        )
    return frozenset(reads)


def tells_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the date, which is always `DATE`."""
    templates = tokenizer.chat_template or ""
    every = templates.values() if isinstance(templates, dict) else [templates]
    return any("strftime_now" in template for template in every)


class _Steps:
    """`range`, until a rendering has counted to `MOST_STEPS`: no template goes on for ever."""

    def __init__(self) -> None:
        self.left = MOST_STEPS

    def __call__(self, *bounds: int) -> range:
        steps = range(*bounds)
        self.left -= len(steps)
        if self.left < 0:
            raise OverflowError(f"it counts further than {MOST_STEPS:,}")
        return steps


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: Sequence[Mapping[str, Any]],
    *,
    header: bool,
) -> str:
    """The text of the messages. Arguments of tool calls are objects; templates that cannot write
    those, or write them as Python would, get the text of their JSON. Raises `InputError` where the
    template fails on them.
    """

    def written(form: Callable[[Mapping[str, Any]], Any]) -> str:
        return _rendered(tokenizer, prompt, [_calling(m, form) for m in messages], header)

    def as_text(arguments: Mapping[str, Any]) -> str:
        return json.dumps(arguments, ensure_ascii=False)

    def by_python() -> bool:
        """Known arguments show how any are written: JSON has no True."""
        try:
            return repr(PROBE) in written(lambda arguments: PROBE)
        except InputError:  # it reads what these have not
            return False

    calls = any(message.get("tool_calls") for message in messages)
    try:
        text = written(dict)
    except InputError as fault:
        if not calls:
            raise
        try:
            return written(as_text)
        except InputError:
            raise fault from fault.__cause__  # of the usual form
    return written(as_text) if calls and by_python() else text


def _calling(
    message: Mapping[str, Any], form: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """A message with the arguments of its tool calls in another form."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        function = {**function, "arguments": form(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else dict(message)


@lru_cache
def _arguments() -> frozenset[str]:
    """What Transformers takes for itself where a template is told variables."""
    from transformers import PreTrainedTokenizerBase

    known = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.values()
    named = {each.name for each in known if each.kind != each.VAR_KEYWORD}
    return frozenset(named | {"messages", "conversations"}) - {*VARIABLES}


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: list[dict[str, Any]],
    header: bool,
) -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = template_of(tokenizer, prompt)
    variables_read(template)
    if names := sorted(_arguments() & prompt.variables.keys()):
        raise InputError(
            f"{prompt.named}: {names[0]!r} among the {TEMPLATE_SETTINGS} is Transformers' own "
            "argument, not a variable of the template; leave it out"
        )
    try:
        # It is compiled once; without this the clock and the loops would be the machine's.
        known = _compile_jinja_template(template).environment.globals
        known |= {"strftime_now": DATE.strftime, "range": _Steps()}
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=header,
            **prompt.variables,
        )
    except Exception as error:  # a template is a program of somebody else's
        reason = str(error) or type(error).__name__
        if not isinstance(error, (TemplateError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(
            f"{prompt.named}: the tokenizer's chat template refuses these messages: {reason}"
        ) from error
    return cast("str", text)
