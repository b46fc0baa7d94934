"""report.md and report.html: what a run did and found, written to be forwarded to people who were
not there.
"""

from __future__ import annotations

from pathlib import Path

from specdistill.documents import parse_yaml
from specdistill.errors import InputError
from specdistill.files import write_whole, writing
from specdistill.report.page import page
from specdistill.report.text import document, title
from specdistill.run_folder import RunFolder, read_metrics
from specdistill.scoring.trust import sound_card


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.md` from the files beside it, and the same as report.html, one file
    with its pictures in it; returns the path of the former.

    `scorecard.json` must be there; `scorecard_before.json`, `metrics.jsonl`, `config.yaml` and
    `plots/` need not. Raises `InputError` for a file that cannot be read or a card without the row
    its verdict names, `StorageError` if a report cannot be written.
    """
    run = RunFolder(run_dir)
    card = sound_card(run.scorecard)
    before = sound_card(run.scorecard_before) if run.scorecard_before.exists() else None
    metrics = read_metrics(run.metrics) if run.metrics.exists() else []
    config, target = _read_config(run.config)
    target = target or card.target.name
    text = document(card, before, metrics, config, target, run_dir)
    html = page(title(card, target), text, card, run_dir)
    # The report last: a run that has it is finished.
    for file, words in ((run.report_page, html), (run.report, text)):
        with writing(file, "is there room?"):
            write_whole(file, words)
    return run.report


def _read_config(path: Path) -> tuple[str, str]:
    """The file's text and the target it names; empty where there is none."""
    if not path.exists():
        return "", ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    config = parse_yaml(text, str(path))
    target = config.get("target") if isinstance(config, dict) else None
    return text, target if isinstance(target, str) else ""
