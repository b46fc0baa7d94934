"""What the chat template is told in a score: what it was told in training."""

from __future__ import annotations

from collections.abc import Sequence

from specdistill.data.prompts import Prompt
from specdistill.data.settings import in_words, with_settings
from specdistill.models import LanguageModel, origin
from specdistill.progress import Note, unsaid


def as_trained(
    prompts: Sequence[Prompt], draft: LanguageModel, note: Note = unsaid
) -> Sequence[Prompt]:
    """The prompts with the settings of the draft's training, where that knew one set of them alone
    and the prompts have none of these names. `note` is told of it.
    """
    trained = (origin(draft) or {}).get("chat_template_kwargs") or []
    if len(trained) != 1 or not trained[0]:
        return prompts
    put = with_settings(prompts, trained[0])
    if changed := sum(new != old for new, old in zip(put, prompts, strict=True)):
        note(
            f"the chat template is told {in_words(trained[0])} for {changed} of {len(prompts)} "
            "prompts, as in the draft's training"
        )
    return put
