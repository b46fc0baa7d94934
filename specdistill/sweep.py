"""A grid of runs, one folder each, every draft scored, and their comparison.

The file is that of a run with two sections more: `grid`, lists of values by key, and `score`. A run
that fails is reported and the others go on; the same call again goes on where it stopped.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdistill import models, packing
from specdistill.config import DistillConfig, LocalPath, assign, parse_config, read_yaml
from specdistill.data.prompts import load_prompts
from specdistill.data.texts import source_sha256
from specdistill.distill import distill
from specdistill.distiller import configured_objective
from specdistill.errors import InputError
from specdistill.files import at_home, held, keep_apart
from specdistill.models import LanguageModel
from specdistill.plots import figure_sweep, save_each
from specdistill.progress import Note, Progress, silent, unsaid
from specdistill.run_folder import DRAFT, METRICS, check_run, flat, outputs
from specdistill.scoring.compare import Comparison, Incomparable, compare, refusal
from specdistill.scoring.measure import encoded, score
from specdistill.scoring.scorecard import Scorecard, nullable, write_json

SCHEMA = "specdistill.sweep/1"
CARD, SCORE, DATA, DOCUMENT = "scorecard.json", "score.json", "data.json", "sweep.json"


class Score(BaseModel):
    """How every draft is scored; as the options of `specdistill score`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompts: LocalPath
    num_draft_tokens: list[int] = Field([4], min_length=1)
    temperatures: list[float] = Field([0.0], min_length=1)
    max_new_tokens: int = Field(64, ge=1)
    limit: int | None = Field(None, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Sweep:
    """`points` are the values of the grid's keys by the name of a run, `configs` what they make."""

    folder: Path
    score: Score
    points: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, DistillConfig]


@dataclass
class Result:
    """Scorecards by the name of a run, and why the others have none, or one that is FAILED and
    takes no part; `tracebacks` are of those that an exception ended.
    """

    cards: dict[str, Scorecard] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)

    @cached_property
    def comparison(self) -> Comparison | list[str]:
        """That of `specdistill compare`, or why there is none."""
        try:
            return compare(self.cards)
        except Incomparable as error:
            return error.reasons


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read the file and check every run of the grid. Raises `InputError`, naming the run."""
    raw = read_yaml(path, overrides)
    grid, scoring = raw.pop("grid", None), raw.pop("score", None)
    grid = flat(grid) if isinstance(grid, dict) else {}  # a section within is a dotted key
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(
            f"{path}: grid must map keys of a run to lists of values, for instance {{loss: [fkl, "
            f"tvd], seed: [0, 1]}}; got {grid!r}"
        )
    if "run_dir" in grid or not isinstance(raw.get("run_dir"), str):
        raise InputError(f"{path}: run_dir names the folder of all runs, and is in no grid")
    if not isinstance(scoring, dict):
        raise InputError(f"{path}: score must say how to score, at least its prompts: FILE")
    try:
        settings = Score.model_validate(scoring)
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
        known = ", ".join(Score.model_fields)
        raise InputError(f"{path}: the section score: {problems}; it has {known}") from None
    folder = Path(at_home(raw["run_dir"]))
    points: dict[str, dict[str, Any]] = {}
    configs: dict[str, DistillConfig] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "_".join(label(key, value) for key, value in point.items())
        if name in points:
            raise InputError(f"{path}: two runs of the grid would be called {name!r}")
        own = copy.deepcopy(raw) | {"run_dir": str(folder / name)}
        for key, value in point.items():
            several = isinstance(value, dict) and key in value
            for name_, own_value in (value if several else {key: value}).items():
                assign(own, name_, copy.deepcopy(own_value))
        try:
            configs[name] = parse_config(own)
            configured_objective(configs[name])
        except InputError as error:
            raise InputError(f"{path}, run {name}: {error}") from None
        points[name] = point
    shared = [folder / name for name in (DOCUMENT, SCORE, DATA, "sweep.png")]
    for config in configs.values():
        run = Path(config.run_dir)
        written = [*shared, *outputs(run), run / CARD]
        keep_apart(written, (path, settings.prompts, config.target, config.draft, config.data))
    return Sweep(folder, settings, points, configs)


def label(key: str, value: Any) -> str:
    """A value of the grid as part of a folder's name: {name: skd, top_k: 9} is skd-top_k-9."""
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item if part not in ("name", key)]
    parts = value if isinstance(value, list) else [value]
    return "-".join(re.sub(r"[^\w.+]+", "-", str(part)).strip("-") for part in parts)


def short_labels(key: str, values: Sequence[Any]) -> list[str]:
    """One for each value, without its settings where the names alone tell all of them apart."""
    whole = [label(key, value) for value in values]
    bare = [
        label(key, value.get(key, value.get("name", value)) if isinstance(value, dict) else value)
        for value in values
    ]
    return bare if len(set(bare)) == len(set(whole)) else whole


def run_sweep(sweep: Sweep, progress: Progress = silent, note: Note = unsaid) -> Result:
    """Distil and score every run that is not done, then write sweep.json and, where the grid has
    losses and policies, sweep.png; `note` is told where that cannot be drawn. Raises `InputError`
    where the folder holds runs scored in another way, or on data that has changed since.
    """
    with held(sweep.folder):
        return _run_all(sweep, progress, note)


def _run_all(sweep: Sweep, progress: Progress, note: Note) -> Result:
    _check_score(sweep)
    _check_data(sweep)
    result = Result()
    target: LanguageModel | None = None
    read: tuple[str, ...] = ()
    for name, config in sweep.configs.items():

        def within(
            stage: str, done: float, total: float, detail: str = "", run: str = name
        ) -> None:
            progress(stage, done, total, f"{run}: {detail}")

        try:
            check_run(config, resume=True)
            card = Path(config.run_dir) / CARD
            if not card.exists():
                if target is None or read != (config.target, config.dtype, config.device):
                    read = (config.target, config.dtype, config.device)
                    target = models.load(config.target, dtype=config.dtype, device=config.device)
                    packing.pack(target, 8)
                _run(config, sweep.score, target, within).write(card)
            scored = Scorecard.read(card)
        except Exception as error:  # of whatever kind, the other runs go on
            result.failed[name] = f"{type(error).__name__}: {error}"
            result.tracebacks[name] = traceback.format_exc()
        else:
            if scored.failures:
                result.failed[name] = scored.verdict.reason
            else:
                result.cards[name] = scored
    write_json(document(sweep, result), sweep.folder / DOCUMENT)
    _draw(sweep, result, note)
    return result


def _run(config: DistillConfig, how: Score, target: LanguageModel, progress: Progress) -> Scorecard:
    draft = models.load(config.draft, dtype="float32", device=config.device)
    models.check_pair(target, draft)
    learnt_from = None if config.signal == "none" else target
    distill(config, learnt_from, draft, resume=True, in_place=True, progress=progress)
    trained = str(Path(config.run_dir) / DRAFT)
    return score(
        target,
        packing.pack(models.load(trained, dtype=config.dtype, device=config.device), 8),
        encoded(target.tokenizer, load_prompts(how.prompts, limit=how.limit)),
        num_draft_tokens=how.num_draft_tokens,
        temperatures=how.temperatures,
        max_new_tokens=how.max_new_tokens,
        seed=how.seed,
        progress=progress,
    )


def heat_map(sweep: Sweep, result: Result) -> list[tuple[str, str, float]]:
    """(loss, policy, τ) of the runs at the first temperature and γ, the mean over all other keys of
    the grid; a pair of which a run failed has NaN.
    """
    setting = sweep.score.temperatures[0], sweep.score.num_draft_tokens[0]
    points = sweep.points.values()
    losses, policies = (
        short_labels(key, [point[key] for point in points]) for key in ("loss", "policy")
    )
    cells: dict[tuple[str, str], list[float]] = {}
    for name, pair in zip(sweep.points, zip(losses, policies, strict=True), strict=True):
        taus = [
            row.block_efficiency
            for row in (result.cards[name].rows if name in result.cards else ())
            if (row.temperature, row.num_draft_tokens) == setting
        ]
        cells.setdefault(pair, []).extend(taus or [math.nan])
    return [(loss, policy, fmean(values)) for (loss, policy), values in cells.items()]


def _check_score(sweep: Sweep) -> None:
    """What was scored in one way cannot be gone on with in another."""
    file, now = sweep.folder / SCORE, sweep.score.model_dump()
    if file.exists() and (first := json.loads(file.read_text(encoding="utf-8"))) != now:
        raise InputError(
            f"{sweep.folder} holds runs scored with {first}, and now score is {now}; go on with "
            "the first, or choose another run_dir"
        )
    write_json(now, file)


def _check_data(sweep: Sweep) -> None:
    """Nor is what was trained on some data comparable with what is on another."""
    file, configs = sweep.folder / DATA, sweep.configs.values()
    first = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    now = {config.data: source_sha256(config.data) for config in configs}
    begun = {c.data for c in configs if (Path(c.run_dir) / METRICS).exists()}
    for source in sorted(begun & first.keys()):
        if now[source] != first[source]:
            raise InputError(
                f"{sweep.folder} holds runs trained on {source}, which has changed since; put back "
                "what was there, or choose another run_dir"
            )
    write_json(first | now, file)


def document(sweep: Sweep, result: Result) -> dict[str, Any]:
    """sweep.json: every run with its settings and rows, or why it failed, and the comparison."""
    found = result.comparison
    runs = {
        name: {
            "settings": dict(point),
            "failed": result.failed.get(name),
            "traceback": result.tracebacks.get(name),
            "rows": [asdict(row) for row in result.cards[name].rows]
            if name in result.cards
            else [],
        }
        for name, point in sweep.points.items()
    }
    compared = found.document() if isinstance(found, Comparison) else refusal(found)
    return nullable({"schema": SCHEMA, "runs": runs, "comparison": compared})


def _draw(sweep: Sweep, result: Result, note: Note) -> None:
    first, *more = sweep.points.values()
    if {"loss", "policy"} <= first.keys():
        varied = [key for key in first if any(point[key] != first[key] for point in more)]
        how, others = sweep.score, [key for key in varied if key not in ("loss", "policy")]
        mean = f", mean over {', '.join(others)}" if others else ""
        words = f"τ at T = {how.temperatures[0]:g}, γ = {how.num_draft_tokens[0]}{mean}"
        figures = {"sweep.png": partial(figure_sweep, heat_map(sweep, result), words)}
        save_each(figures, sweep.folder, note)
