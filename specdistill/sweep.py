"""A grid of runs, one folder each, every draft scored, and their comparison.

The file is that of a run with two sections more: `grid`, lists of values by key, and `score`. A run
that fails is reported and the others go on; the same call again goes on where it stopped.
"""

from __future__ import annotations

import copy
import itertools
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

from specdistill import limits, models
from specdistill.config import DistillConfig, parse_config
from specdistill.config.sections import (
    Count,
    DraftTokens,
    LocalPath,
    NewTokens,
    Seed,
    Temperature,
)
from specdistill.data.prompts import load_prompts
from specdistill.data.sources import open_answers
from specdistill.documents import assign, read_json, read_yaml_mapping
from specdistill.errors import InputError
from specdistill.files import at_home, held, keep_apart
from specdistill.limits import shown
from specdistill.models import LanguageModel
from specdistill.progress import Note, Progress, silent, unsaid
from specdistill.report.plots import figure_sweep, save_each
from specdistill.run_folder import RunFolder, check_run, flat
from specdistill.scoring.compare import Comparison, Incomparable, compare, refusal
from specdistill.scoring.measure import score
from specdistill.scoring.scorecard import Scorecard, nullable, write_json
from specdistill.training.losses import configured_objective
from specdistill.training.run import train

SCHEMA = "specdistill.sweep/1"
SCORE, DATA, DOCUMENT = "score.json", "data.json", "sweep.json"
PICTURE = "sweep.png"


class Score(BaseModel):
    """How every draft is scored; as the options of `specdistill score`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompts: LocalPath = Field(description="file of the prompts to score with")
    num_draft_tokens: list[DraftTokens] = Field(
        [4], min_length=1, description="tokens the draft proposes a round (γ), each scored"
    )
    temperatures: list[Temperature] = Field(
        [0.0], min_length=1, description="sampling temperatures, each scored; 0 is greedy"
    )
    max_new_tokens: NewTokens = Field(64, description="tokens of each answer, at most")
    limit: Count | None = Field(None, description="prompts to take of the file; all of them")
    seed: Seed = Field(0, description="seed of the samples")


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
    raw = read_yaml_mapping(path, overrides)
    grid, scoring = raw.pop("grid", None), raw.pop("score", None)
    grid = flat(grid) if isinstance(grid, dict) else {}  # a section within is a dotted key
    if not grid or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(
            f"{path}: grid must map keys of a run to lists of values, for instance {{loss: [fkl, "
            f"tvd], seed: [0, 1]}}; got {shown(grid)}"
        )
    if len(grid) > limits.KEYS:
        raise InputError(f"{path}: the grid has {len(grid):,} keys; at most {limits.KEYS} go")
    if (number := math.prod(map(len, grid.values()))) > limits.RUNS:
        raise InputError(f"{path}: the grid has {number:,} runs; at most {limits.RUNS:,} go")
    for key, other in itertools.permutations(grid, 2):
        if other.startswith(f"{key}."):
            raise InputError(f"{path}: {other!r} is part of {key!r}; keep one of them in the grid")
    if "run_dir" in grid or not (isinstance(raw.get("run_dir"), str) and raw["run_dir"]):
        raise InputError(f"{path}: run_dir names the folder of all runs, and is in no grid")
    if not isinstance(scoring, dict):
        raise InputError(f"{path}: score must say how to score, at least its prompts: FILE")
    try:
        settings = Score.model_validate(scoring)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {shown(e['input'])})"
            for e in error.errors()[:8]
        )
        known = ", ".join(Score.model_fields)
        raise InputError(f"{path}: the section score: {problems}; it has {known}") from None
    folder = Path(at_home(raw["run_dir"]))
    points: dict[str, dict[str, Any]] = {}
    called: set[str] = set()
    configs: dict[str, DistillConfig] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "_".join(label(key, value) for key, value in point.items())
        if name.casefold() in called:  # some file systems tell no case apart
            raise InputError(
                f"{path}: two runs of the grid would be called {shown(name)}"
                + ("" if name in points else ", but for capital letters")
            )
        called.add(name.casefold())
        _check_name(name, path)
        merged = copy.deepcopy(raw) | {"run_dir": str(folder / name)}
        given: set[str] = {"run_dir"}
        for key, value in point.items():
            several = isinstance(value, dict) and key in value
            for name_, own_value in (value if several else {key: value}).items():
                if name_ in given:
                    raise InputError(f"{path}, run {name}: {name_!r} is given twice by the grid")
                given.add(name_)
                assign(merged, str(name_), copy.deepcopy(own_value))
        try:
            configs[name] = parse_config(merged)
            configured_objective(configs[name])
        except InputError as error:
            raise InputError(f"{path}, run {name}: {error}") from None
        points[name] = point
    shared = [folder / name for name in (DOCUMENT, SCORE, DATA, PICTURE)]
    for config in configs.values():
        run = Path(config.run_dir)
        written = [*shared, *RunFolder(run).outputs(), RunFolder(run).scorecard]
        keep_apart(written, (path, settings.prompts, config.target, config.draft, config.data))
    return Sweep(folder, settings, points, configs)


def _check_name(name: str, path: Path) -> None:
    """Raises `InputError` for what would be no folder of its own within the sweep's."""
    taken = {RunFolder(Path()).scorecard.name, SCORE, DATA, DOCUMENT, PICTURE}
    if not name.strip("._") or len(name.encode()) > 200 or name.casefold() in taken:
        raise InputError(
            f"{path}: a run of the grid would be called {shown(name)}, after its values, and that "
            "is no folder's name; give values of other, shorter names, or a run of its own"
        )


def label(key: str, value: Any) -> str:
    """A value of the grid as part of a folder's name: {name: skd, top_k: 9} is skd-top_k-9, and a
    section without settings, {}, is defaults.
    """
    if value == {}:
        return "defaults"
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
            card = RunFolder(Path(config.run_dir)).scorecard
            if not card.exists():
                if target is None or read != (config.target, config.dtype, config.device):
                    read = (config.target, config.dtype, config.device)
                    target = models.load(config.target, dtype=config.dtype, device=config.device)
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
    train(config, learnt_from, draft, resume=True, progress=progress)
    trained = str(RunFolder(Path(config.run_dir)).draft)
    return score(
        target,
        models.load(trained, dtype=config.dtype, device=config.device),
        load_prompts(how.prompts, limit=how.limit),
        num_draft_tokens=how.num_draft_tokens,
        temperature=how.temperatures,
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


_ADVICE = "put the file back as it was, or choose another run_dir"


def _check_score(sweep: Sweep) -> None:
    """What was scored in one way cannot be gone on with in another."""
    file, now = sweep.folder / SCORE, sweep.score.model_dump()
    if file.exists() and (first := read_json(file, dict[str, Any], _ADVICE)) != now:
        raise InputError(
            f"{sweep.folder} holds runs scored with {first}, and now score is {now}; go on with "
            "the first, or choose another run_dir"
        )
    write_json(now, file)


def _check_data(sweep: Sweep) -> None:
    """Nor is what was trained on some data comparable with what is on another."""
    file, configs = sweep.folder / DATA, sweep.configs.values()
    first = read_json(file, dict[str, str | None], _ADVICE) if file.exists() else {}
    now = {config.data: open_answers(config.data).sha256() for config in configs}
    begun = {c.data for c in configs if RunFolder(Path(c.run_dir)).metrics.exists()}
    for source in sorted(begun & first.keys()):
        if now[source] != first[source]:
            raise InputError(
                f"{sweep.folder} holds runs trained on {source}, which has changed since; put back "
                "what was there, or choose another run_dir"
            )
    write_json(first | now, file)


def document(sweep: Sweep, result: Result) -> dict[str, Any]:
    """sweep.json: every run with its settings and rows, or why it failed, and the comparison."""
    comparison = result.comparison
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
    compared = comparison.document() if isinstance(comparison, Comparison) else refusal(comparison)
    return dict(nullable({"schema": SCHEMA, "runs": runs, "comparison": compared}))


def _draw(sweep: Sweep, result: Result, note: Note) -> None:
    first, *more = sweep.points.values()
    if {"loss", "policy"} <= first.keys():
        varied = [key for key in first if any(point[key] != first[key] for point in more)]
        how, others = sweep.score, [key for key in varied if key not in ("loss", "policy")]
        mean = f", mean over {', '.join(others)}" if others else ""
        words = f"τ at T = {how.temperatures[0]:g}, γ = {how.num_draft_tokens[0]}{mean}"
        figures = {PICTURE: partial(figure_sweep, heat_map(sweep, result), words)}
        save_each(figures, sweep.folder, note)
