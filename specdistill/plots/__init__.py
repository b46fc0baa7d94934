"""The pictures of runs, at print size. matplotlib lives here alone, without pyplot's global state.

`figure_*` draw and return a `Figure`, `save` writes it as PNG, `plot_all` serves a run folder. A
NaN leaves a gap; an empty panel says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from specdistill.plots.acceptance import figure_acceptance, figure_survival, figure_text
from specdistill.plots.speed import figure_speedup, figure_time
from specdistill.plots.style import save
from specdistill.plots.training import figure_runs, figure_sweep, figure_training, read_metrics
from specdistill.scoring.comparable import card_file
from specdistill.scoring.scorecard import Scorecard

__all__ = [
    "figure_acceptance",
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
]


def plot_all(run_dir: Path, out: Path | None = None) -> list[Path]:
    """Draw what the files of `run_dir` allow into `out` (`run_dir/plots`); returns the pictures'
    paths.

    `scorecard.json` must be there; `scorecard_before.json` and `metrics.jsonl` need not.
    Raises `InputError` for a file that cannot be read, `StorageError` for one not written.
    """
    card = Scorecard.read(run_dir / "scorecard.json")
    before_path, metrics_path = run_dir / "scorecard_before.json", run_dir / "metrics.jsonl"
    before = Scorecard.read(before_path) if before_path.exists() else None
    drafts = {"before distillation": before} if before else {}
    figures: dict[str, Figure] = {
        "acceptance.png": figure_acceptance(card, before),
        "survival.png": figure_survival({"this draft": card, **drafts}),
        "speedup.png": figure_speedup(card),
        "time.png": figure_time(card),
    }
    if metrics_path.exists():
        figures["training.png"] = figure_training(read_metrics(metrics_path))
    if card.example is not None:
        figures["text.png"] = figure_text(card.example)
    return _save_all(figures, out or run_dir / "plots")


def plot_together(sources: Sequence[Path], out: Path) -> list[Path]:
    """Several drafts in one picture, into `out`: their survival curves, and what training bought
    where run folders tell. Sources are scorecards or run folders. Raises as `plot_all`.
    """
    folders = [source for source in sources if source.is_dir()]
    cards = {str(source): Scorecard.read(card_file(source)) for source in sources}
    metrics = [folder / "metrics.jsonl" for folder in folders]
    runs = {str(file.parent): read_metrics(file) for file in metrics if file.exists()}
    figures = {"survival.png": figure_survival(cards)}
    if runs:
        figures["runs.png"] = figure_runs(runs)
    return _save_all(figures, out)


def _save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    for name, figure in figures.items():
        save(figure, folder / name)
    return [folder / name for name in figures]
