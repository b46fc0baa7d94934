"""What the commands share: the terminal, checks before long work, the JSON at the end."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from specdistill import limits
from specdistill.errors import InputError
from specdistill.files import writing
from specdistill.quoting import shortened, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from specdistill.data.chat import EncodedPrompt
    from specdistill.data.prompts import Prompt
    from specdistill.data.token_store import Example
    from specdistill.decoding.parallel import Way
    from specdistill.models import LanguageModel
    from specdistill.progress import Progress

LONGEST_EXAMPLE = 400  # characters of the example that is shown
TABLE_WIDTH = 80  # the least; a narrower terminal breaks lines, which loses no figure


class Screen(Console):
    """Shows text as it is: no markup or emoji in it is read, and no order to the terminal gets
    through, in tables and their titles neither.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **look: Any) -> Text:
        return super().render_str(visible(text, keep="\n"), **look)

    def print(self, *objects: Any, **look: Any) -> None:
        if self.width < TABLE_WIDTH and any(isinstance(each, Table) for each in objects):
            wide = Screen(stderr=self.stderr)
            wide.file, wide.width = self.file, TABLE_WIDTH
            wide.print(*objects, **look)
        else:
            super().print(*objects, **look)


err = Screen(stderr=True)


def setup(threads: int | None) -> None:
    """Threads are explicit; transformers' own progress and warnings would drown ours."""
    import torch
    import transformers

    torch.set_num_threads(threads or torch.get_num_threads())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def must_be_free(file: Path, overwrite: bool) -> None:
    """Asked before long work whose result is one file at its end."""
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists; pass --overwrite to replace it, or name another file")
    folder = file.parent
    with writing(f"to {folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal that can draw them; elsewhere a line whenever a stage begins, ends, or ten
    seconds have passed.
    """
    if err.is_terminal and not err.is_dumb_terminal:
        columns = (
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        with Bars(*columns, console=err) as bars:
            tasks: dict[str, Any] = {}

            def draw(stage: str, done: float, total: float, detail: str = "") -> None:
                detail = visible(detail)
                if stage not in tasks or bars.tasks[tasks[stage]].finished:
                    tasks[stage] = bars.add_task(stage, total=total, detail=detail)
                bars.update(tasks[stage], completed=done, total=total, detail=detail)

            yield draw
        return
    shown: dict[str, float] = {}
    begin = time.perf_counter()

    def write(stage: str, done: float, total: float, detail: str = "") -> None:
        now = time.perf_counter()
        if done >= total or now - shown.get(stage, 0) >= 10:
            shown[stage] = now
            note(f"[{now - begin:5.0f} s] {stage} {100 * done / max(total, 1e-9):.0f}% {detail}")

    yield write


def loader(
    name: str,
    dtype: limits.Dtype,
    device: str,
    decoding: bool = True,
    *,
    head_only: bool = False,
) -> Callable[[], LanguageModel]:
    """What loads a model, or its head alone, and says how it runs, where the work asks for it."""

    def load() -> LanguageModel:
        from specdistill import models
        from specdistill.models.head_only import load_head

        model = (load_head if head_only else models.load)(name, dtype=dtype, device=device)
        note_models(model, decoding=decoding)
        return model

    return load


def load_pair(
    target: str, draft: str, dtype: limits.Dtype, device: str
) -> tuple[LanguageModel, LanguageModel]:
    """Both models, which fit together."""
    from specdistill import models

    big = models.load(target, dtype=dtype, device=device)
    small = models.load(draft, dtype=dtype, device=device)
    models.check_pair(big, small)
    note_models(big, small)
    return big, small


def outline(name: str, dtype: limits.Dtype) -> LanguageModel:
    """A model of which another program has the weights, in the dtype of this machine's device."""
    from specdistill.models.head_only import load_outline

    return load_outline(name, dtype=dtype)


def encoded(
    target: LanguageModel, asked: Sequence[Prompt], draft: LanguageModel | None = None
) -> Sequence[EncodedPrompt]:
    """Prompts as the target's tokens, put as in the draft's training, and without copies."""
    from specdistill.data import chat
    from specdistill.data.rewriting import rewriting
    from specdistill.scoring.template_settings import as_trained

    put = asked if draft is None else as_trained(asked, draft, note)
    if words := rewriting(target.tokenizer, put):
        note(words)
    prompts = chat.encoded(target.tokenizer, put)
    if copies := len(asked) - len(prompts):
        note(
            f"{copies} of {len(asked)} prompts are copies of others, and are left out: "
            f"{len(prompts)} are scored"
        )
    return prompts


def note_drafting(
    draft: LanguageModel, way: Way, num_draft_tokens: list[int], least_reach: float = 0.0
) -> None:
    """What a parallel draft's user should know. Raises `InputError` where it cannot draft so."""
    from specdistill.decoding.parallel import Drafting, untrained_places

    if Drafting(way, least_reach).in_parallel(draft) and (
        words := untrained_places(draft, num_draft_tokens)
    ):
        note(words)


def dtype_of_device(dtype: limits.Dtype) -> limits.Dtype:
    """What "auto" is on the device that models would be loaded to."""
    import torch

    from specdistill.models import choose_device, choose_dtype

    kind = choose_dtype(dtype, torch.device(choose_device("auto")))
    return cast("limits.Dtype", str(kind).removeprefix("torch."))


def note_models(target: LanguageModel, *drafts: LanguageModel, decoding: bool = True) -> None:
    """How the models run; where they decode, what of the target's own settings does not apply."""
    from specdistill.data.templates import DATE, tells_date
    from specdistill.decoding.sampling import unsupported_settings

    for model in (target, *drafts):
        where = "in the engine" if model.device.type == "meta" else f"on {model.device}"
        note(f"{model.name}: {model.dtype} {where}")
    if decoding and (ignored := unsupported_settings(target.model.generation_config)):
        note(f"{target.name}: its generation config's {', '.join(ignored)} is not applied")
    if tells_date(target.tokenizer):
        note(f"{target.name}: its chat template tells the date, and is told {DATE:%d %B %Y} always")


def note_example(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """What is trained on and what is merely given, markers and all, so that a wrong template or
    mask is seen at once. The middle of long texts is left out.
    """
    given, trained = len(example.prompt_tokens), len(example.response_tokens)
    note(f"the first example: {given} tokens are given, {trained} trained on (between the bars)")
    before, after = (
        shortened(visible(str(tokenizer.decode(tokens)), keep="\n"), LONGEST_EXAMPLE)
        for tokens in (example.prompt_tokens, example.response_tokens)
    )
    err.print(Text.assemble((before, "dim"), "|", (after, "green"), "|"), soft_wrap=True)


def print_lines(screen: Console, lines: list[str]) -> None:
    for line in lines:
        screen.print(line, soft_wrap=True)


def note(line: str) -> None:
    err.print(line, soft_wrap=True)


def screen_for(as_json: bool) -> Console:
    """Where tables go: stdout, or stderr when stdout ends in a JSON document."""
    return err if as_json else Screen()


def finish(as_json: bool, document: dict[str, Any]) -> None:
    if as_json:
        from specdistill.scoring.scorecard import nullable

        print(json.dumps(nullable(document)))
