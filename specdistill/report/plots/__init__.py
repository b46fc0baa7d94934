"""The pictures of runs, at print size. matplotlib lives here alone, without pyplot's global state.

`figure_*` draw and return a `Figure`, `save` writes it as PNG, `plot_all` serves a run folder. A
NaN leaves a gap; an empty panel says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from specdistill.errors import SpecDistillError
from specdistill.progress import Note, unsaid
from specdistill.report.plots.acceptance import (
    figure_acceptance,
    figure_places,
    figure_survival,
    figure_text,
)
from specdistill.report.plots.load import figure_load
from specdistill.report.plots.speed import figure_speedup, figure_time
from specdistill.report.plots.style import save
from specdistill.report.plots.training import figure_runs, figure_sweep, figure_training
from specdistill.run_folder import RunFolder, read_metrics
from specdistill.scoring.comparable import card_file, obstacles
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.trust import sound_card

__all__ = [
    "figure_acceptance",
    "figure_load",
    "figure_places",
    "figure_runs",
    "figure_speedup",
    "figure_survival",
    "figure_sweep",
    "figure_text",
    "figure_time",
    "figure_training",
    "plot_all",
    "plot_together",
    "read_metrics",
    "save",
    "save_each",
]


def plot_all(run_dir: Path, out: Path | None = None, note: Note = unsaid) -> list[Path]:
    """Draw what the files of `run_dir` allow into `out` (`run_dir/plots`); returns the pictures'
    paths. `note` is told of each that could not be drawn; the others are.

    Either `scorecard.json` or `metrics.jsonl` must be there; `scorecard_before.json` need not.
    Raises `InputError` or `StorageError` for a file that cannot be read or written.
    """
    run = RunFolder(run_dir)
    scored = run.scorecard.exists() or not run.metrics.exists()
    figures: dict[str, Callable[[], Figure]] = {}
    if scored:
        card = sound_card(run.scorecard)
        before = sound_card(run.scorecard_before) if run.scorecard_before.exists() else None
        drafts = {"before distillation": before} if before else {}
        figures["acceptance.png"] = partial(figure_acceptance, card, before)
        figures["survival.png"] = partial(figure_survival, {"this draft": card, **drafts})
        if card.baseline:
            figures["speedup.png"] = partial(figure_speedup, card)
            figures["time.png"] = partial(figure_time, card)
        if card.load.plain:
            figures["load.png"] = partial(figure_load, card)
        if card.example is not None:
            early = card.verdict_row().least_reach > 0  # whose answer it is
            figures["text.png"] = partial(figure_text, card.example, early)
    if run.metrics.exists():
        figures["training.png"] = partial(figure_training, read_metrics(run.metrics))
    return save_each(figures, out or run.plots, note)


def plot_together(sources: Sequence[Path], out: Path, note: Note = unsaid) -> list[Path]:
    """Several drafts in one picture, into `out`: their survival curves and acceptance by position,
    and what training bought where run folders tell. Sources are scorecards or run folders, of which
    one that is not scored yet has its training drawn alone. `note` is told of that, and why the
    cards could not be compared. Raises as `plot_all`.
    """
    cards: dict[str, Scorecard] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        metrics = RunFolder(source).metrics
        if metrics.exists():
            runs[str(source)] = read_metrics(metrics)
        if metrics.exists() and not card_file(source).exists():
            note(f"{source} has no scorecard.json yet: its training alone is drawn")
        else:
            cards[str(source)] = sound_card(card_file(source))
    figures: dict[str, Callable[[], Figure]] = {}
    if cards:
        figures["survival.png"] = partial(figure_survival, cards)
        figures["places.png"] = partial(figure_places, cards)
    if runs:
        figures["runs.png"] = partial(figure_runs, runs)
    for why in obstacles(cards) if len(cards) > 1 else ():
        note(f"to be compared with care: {why}")
    return save_each(figures, out, note)


def save_each(figures: Mapping[str, Callable[[], Figure]], folder: Path, note: Note) -> list[Path]:
    """Draw and save by file name what can be drawn; `note` is told of the others. Returns the
    files. Raises `StorageError` where one cannot be written.
    """
    saved = []
    for name, draw in figures.items():
        try:
            save(draw(), folder / name)
        except SpecDistillError:
            raise
        except Exception as error:  # of matplotlib's many kinds: what is finished goes before it
            (folder / name).unlink(missing_ok=True)  # an earlier one would be taken for this
            note(f"{name} could not be drawn: {type(error).__name__}: {error}")
        else:
            saved.append(folder / name)
    return saved
