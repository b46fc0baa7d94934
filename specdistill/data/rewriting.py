"""Whether a chat template shows earlier turns of a conversation in another way than they were
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

from specdistill.data.chat import PROBE
from specdistill.data.prompts import Prompt
from specdistill.data.templates import rendered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 64  # conversations


def rewriting(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> str:
    """A sentence for the first conversations of which the chat template shows an earlier turn in
    another way than it was written; empty where there is none. Raises as `rendered`.
    """
    if not tokenizer.chat_template:
        return ""
    several = (p for p in prompts if p.conversation is not None)
    groups = [list(turns) for _, turns in groupby(several, lambda p: p.conversation)]
    looked_at = [turns for turns in islice(groups, LOOKED_AT) if len(turns) > 1]
    number = sum(
        any(_rewritten(tokenizer, *pair) for pair in pairwise(turns)) for turns in looked_at
    )
    if not number:
        return ""
    return (
        f"the chat template rewrites earlier turns in {number} of {len(looked_at)} conversations "
        "looked at (it may drop their reasoning); each turn is taken with what the template shows "
        "before it, as a server would"
    )


def _rewritten(tokenizer: PreTrainedTokenizerBase, earlier: Prompt, later: Prompt) -> bool:
    """Whether a turn's prompt and text do not stand at the beginning of a later one's prompt."""

    def with_answer(turn: Mapping[str, Any]) -> str:
        return rendered(tokenizer, earlier, [*earlier.messages, turn], header=False)

    answer = later.messages[len(earlier.messages)]
    _, _, closing = with_answer({"role": "assistant", "content": PROBE}).partition(PROBE)
    written, shown = with_answer(answer), rendered(tokenizer, later, later.messages, header=True)
    return not written.endswith(closing) or not shown.startswith(written.removesuffix(closing))
