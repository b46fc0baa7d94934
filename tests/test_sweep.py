"""A grid of runs: what is asked for, what fails, what is gone on with, what is compared."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import yaml
from cards import simulate
from rich.console import Console
from small_runs import make_world, padded_target
from test_cli import run

from specdistill.cli.tables import sweep_table
from specdistill.errors import InputError
from specdistill.models import load
from specdistill.progress import unsaid
from specdistill.scoring.measure import score
from specdistill.scoring.scorecard import Scorecard
from specdistill.sweep import Result, _draw, heat_map, load_sweep, run_sweep, short_labels
from specdistill.training.run import train


@pytest.fixture
def file(world: dict[str, str], tmp_path: Path) -> Path:
    prompts = tmp_path / "heldout.txt"
    prompts.write_text("".join(f"w{7 + i} w{9 + i}\n" for i in range(4)))
    raw = {
        **world,
        "run_dir": str(tmp_path / "sweep"),
        "signal": "live",
        "heldout": 8,
        "dtype": "float32",
        "decode": {"prompts": 2, "max_new_tokens": 4},
        "training": {"max_steps": 2, "batch_tokens": 120},
        "grid": {
            "loss": ["fkl", {"ce": 0.5, "tvd": 0.5}],
            "policy": ["target", {"name": "draft", "prompts": 4, "max_new_tokens": 6}],
        },
        "score": {"prompts": str(prompts), "num_draft_tokens": [2], "max_new_tokens": 8},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


NAMES = [
    "fkl_target",
    "fkl_draft-prompts-4-max_new_tokens-6",
    "ce-0.5-tvd-0.5_target",
    "ce-0.5-tvd-0.5_draft-prompts-4-max_new_tokens-6",
]


def test_every_point_of_the_grid_is_a_run_of_its_own(file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(file, ["grid.training.learning_rate=[0.1,0.2]", "grid.seed=[3]"])
    assert len(sweep.configs) == 8
    config = sweep.configs["ce-0.5-tvd-0.5_target_0.2_3"]
    assert config.loss == {"ce": 0.5, "tvd": 0.5}
    assert (config.policy.name, config.training.learning_rate, config.seed) == ("target", 0.2, 3)
    assert config.training.max_steps == 2
    assert config.run_dir == str(tmp_path / "sweep" / "ce-0.5-tvd-0.5_target_0.2_3")
    assert list(load_sweep(file).configs) == NAMES


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid={}", "grid must map keys of a run to lists"),
        ("grid.loss=fkl", "grid must map keys of a run to lists"),
        ("grid.loss=[fkl, nonsense]", "run nonsense_target: unknown loss 'nonsense'"),
        ("grid.sede=[1]", "the unknown key 'sede': did you mean 'seed'"),
        ("grid.seed=[1, 1]", "two runs of the grid would be called 'fkl_target_1'"),
        ("grid.run_dir=[a]", "run_dir names the folder of all runs"),
        ("signal=kept", "run fkl_draft.*nothing of the target is kept"),
        ("score=null", "score must say how to score"),
        ("score.prompt=x", r"section score: prompt: Extra inputs .* it has prompts, num_draft"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_whole(file: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_sweep(file, [override])


def test_a_value_may_set_several_keys(file: Path) -> None:
    """Some losses need a setting that others refuse."""
    values = "[fkl, {loss: e2e_tv, num_draft_tokens: 3}, {loss: jsd, beta: 0.9}, {tvd: 1}]"
    sweep = load_sweep(file, [f"grid.loss={values}", "grid.policy=[target]"])
    found = {n: (c.loss, c.num_draft_tokens, c.beta) for n, c in sweep.configs.items()}
    assert found == {
        "fkl_target": ({"fkl": 1.0}, None, None),
        "e2e_tv-num_draft_tokens-3_target": ({"e2e_tv": 1.0}, 3, None),
        "jsd-beta-0.9_target": ({"jsd": 1.0}, None, 0.9),
        "tvd-1_target": ({"tvd": 1.0}, None, None),
    }


def test_precisions_are_compared_and_no_kind_of_failure_ends_a_sweep(file: Path) -> None:
    def broken(config, *arguments, **options):
        if config.seed == 1:
            raise OSError("no file")
        return train(config, *arguments, **options)

    sweep = load_sweep(
        file,
        ["grid={training.precision: [fp32, bf16], seed: [0, 1]}", "loss=fkl"],
    )
    with mock.patch("specdistill.sweep.train", side_effect=broken):
        result = run_sweep(sweep)
    assert list(result.cards) == ["fp32_0", "bf16_0"]
    assert result.failed == {"fp32_1": "OSError: no file", "bf16_1": "OSError: no file"}
    kept = json.loads((sweep.folder / "sweep.json").read_text())["runs"]["fp32_1"]["traceback"]
    assert kept.startswith("Traceback")
    assert 'raise OSError("no file")' in kept


def test_a_run_that_is_not_lossless_is_not_ranked(file: Path, tmp_path: Path) -> None:
    """It is named with the reason, and the exit code is 1."""
    good = simulate({(0.0, 2): 0.5}, draft="a")
    wrong = replace(good, lossless=replace(good.lossless, distribution_p_value=1e-9))
    made = iter([good, wrong, simulate({(0.0, 2): 0.5}, draft="b"), good])
    with mock.patch("specdistill.sweep._run", side_effect=lambda *_: next(made)):
        done = run("sweep", file, "--json")
    assert done.code == 1
    document = json.loads(done.out)
    failed = {name: r["failed"] for name, r in document["runs"].items() if r["failed"]}
    assert list(failed) == [NAMES[1]]
    assert failed[NAMES[1]].startswith("FAILED, not lossless: ")
    assert f"{NAMES[1]} failed: FAILED, not lossless" in done.err
    standings = document["comparison"]["standings"]
    assert {s["card"] for s in standings} == {NAMES[0], NAMES[2], NAMES[3]}


def test_debug_shows_where_a_run_failed(file: Path) -> None:
    with mock.patch("specdistill.sweep._run", side_effect=RuntimeError("here")):
        plain, debug = (run("sweep", file, *more) for more in ([], ["--debug"]))
    assert "Traceback" not in plain.out
    assert "Traceback" in debug.out


def test_a_failed_run_is_reported_and_done_again_alone(file: Path, tmp_path: Path) -> None:
    """The third run fails; started again, the sweep trains it alone and compares them all."""

    def broken(config, *arguments, **options):
        trained.append(Path(config.run_dir).name)
        if len(trained) == 3:
            raise RuntimeError("no memory [left]")
        return train(config, *arguments, **options)

    trained: list[str] = []
    folder = tmp_path / "sweep"
    raw = yaml.safe_load(file.read_text())
    original = raw["data"]
    raw["data"] = str(shutil.copytree(original, tmp_path / "data"))
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    with mock.patch("specdistill.sweep.train", side_effect=broken):
        first = run("sweep", file)
    assert (first.code, trained) == (1, NAMES)
    assert "no memory [left]" in first.out
    document = json.loads((folder / "sweep.json").read_text())
    failures = {name: r["failed"] for name, r in document["runs"].items() if r["failed"]}
    assert failures == {NAMES[2]: "RuntimeError: no memory [left]"}
    assert all(len(r["rows"]) == 1 for n, r in document["runs"].items() if n not in failures)

    with mock.patch("specdistill.sweep.train", side_effect=broken):
        second = run("sweep", file, "--json")
    assert trained == [*NAMES, NAMES[2]]
    runs = second.document["runs"]
    assert not any(r["failed"] for r in runs.values())
    assert runs[NAMES[3]]["settings"]["loss"] == {"ce": 0.5, "tvd": 0.5}
    for name in NAMES:
        assert (folder / name / "draft" / "config.json").is_file()
        assert (folder / name / "scorecard.json").is_file()
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    compared = second.document["comparison"]
    assert compared["comparable"]
    assert {s["card"] for s in compared["standings"]} == set(NAMES)

    refused = run("sweep", file, "score.max_new_tokens=9")
    assert refused.code == 2
    assert "holds runs scored with" in refused.err
    other = run("sweep", file, f"data={original}", "training.batch_tokens=100", "--json")
    assert other.code == 1, "runs of another configuration are not gone on with"
    with (tmp_path / "data" / "manifest.json").open("a") as manifest:
        manifest.write(" ")
    done = folder / NAMES[0]
    for name in NAMES[1:]:
        shutil.rmtree(folder / name)
    refused = run("sweep", file)
    assert refused.code == 2
    assert "data, which has changed since; put back what was there" in refused.err
    shutil.rmtree(done)  # nothing is trained on it any more
    corrected = load_sweep(file)
    with mock.patch("specdistill.sweep._run", side_effect=RuntimeError("here")):
        assert set(run_sweep(corrected).failed.values()) == {"RuntimeError: here"}


def test_the_heat_map_is_the_mean_over_the_other_keys(file: Path) -> None:
    sweep = load_sweep(file, ["grid.seed=[0, 1]", "grid.policy=[target]"])
    with (
        mock.patch("specdistill.sweep._run", side_effect=RuntimeError),
        mock.patch("specdistill.sweep.models.load"),
    ):
        result = run_sweep(sweep)
    assert list(result.failed) == list(sweep.configs)
    for number, name in enumerate(["fkl_target_0", "fkl_target_1", "ce-0.5-tvd-0.5_target_0"]):
        row = mock.Mock(temperature=0.0, num_draft_tokens=2, block_efficiency=1.5 + number)
        result.cards[name] = mock.Mock(rows=[row])
    rows = heat_map(sweep, result)
    assert rows[0] == ("fkl", "target", 2.0)
    assert rows[1][:2] == ("ce-0.5-tvd-0.5", "target")
    assert rows[1][2] != rows[1][2], "one of its runs is missing"


def test_the_picture_names_only_what_it_is_a_mean_over(file: Path) -> None:
    for seeds, words in (([0], "τ at T = 0, γ = 2"), ([0, 1], "τ at T = 0, γ = 2, mean over seed")):
        sweep = load_sweep(file, [f"grid.seed={seeds}"])
        with (
            mock.patch("specdistill.sweep.figure_sweep") as drawn,
            mock.patch("specdistill.report.plots.save"),
        ):
            _draw(sweep, Result(), unsaid)
        assert drawn.call_args.args[1] == words
    said: list[str] = []
    with mock.patch("specdistill.sweep.figure_sweep", side_effect=ValueError("too wide")):
        _draw(sweep, Result(), said.append)
    assert said == ["sweep.png could not be drawn: ValueError: too wide"]


def test_settings_are_left_out_of_a_picture_where_names_suffice() -> None:
    jsd, skd = {"loss": "jsd", "beta": 0.9}, {"name": "skd", "top_k": 9}
    assert short_labels("loss", ["fkl", jsd, "fkl"]) == ["fkl", "jsd", "fkl"]
    assert short_labels("loss", ["jsd", jsd]) == ["jsd", "jsd-beta-0.9"]
    assert short_labels("policy", ["target", skd]) == ["target", "skd"]
    assert short_labels("policy", [skd, {**skd, "top_k": 3}]) == ["skd-top_k-9", "skd-top_k-3"]


def test_a_sweep_on_text_alone_trains_as_distill_does(file: Path, tmp_path: Path) -> None:
    """Without a word of the target: it is there for the score."""
    answers = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"w{5 + i}", "response": f"w{7 + i} w{9 + i}"} for i in range(20)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"data={answers}", "signal=none", "decode=null", "loss=ce", "policy=fixed"]
    done = run("sweep", file, *more, "grid={seed: [0]}", "--json")
    assert (done.code, list(done.document["runs"])) == (0, ["0"])
    assert "no comparison" not in done.err
    last = json.loads((tmp_path / "sweep/0/metrics.jsonl").read_text().splitlines()[-1])
    assert "token_match" in last
    assert "expected_alpha" not in last


def test_ordinary_and_parallel_drafts_are_swept_together(file: Path, tmp_path: Path) -> None:
    """Each is trained in its own way, and scored by its own drafting."""
    raw = yaml.safe_load(file.read_text()) | {
        **make_world(tmp_path, padded_target(tmp_path / "padded")),
        "grid": {"parallel": [None, {"num_draft_tokens": 3}, {}]},
    }
    file.write_text(yaml.safe_dump(raw))
    done = run("sweep", file, "--json")
    assert done.code == 0, done.err
    cards = {
        name: Scorecard.read(tmp_path / "sweep" / name / "scorecard.json")
        for name in done.document["runs"]
    }
    assert {n: (c.drafting, c.provenance["trained_draft_tokens"]) for n, c in cards.items()} == {
        "None": ("autoregressive", None),
        "num_draft_tokens-3": ("parallel", 3),
        "defaults": ("parallel", 8),
    }
    assert "no comparison" not in done.err
    before = load(str(tmp_path / "draft")).mask_token
    assert before is None, "no run has changed the draft that all began with"


def test_what_hinders_a_comparison_comes_with_what_to_do(file: Path, tmp_path: Path) -> None:
    only = ["grid.policy=[target]", "--json"]
    reasons = ["the plain steps of fkl_target were slowed down"]
    with mock.patch("specdistill.scoring.compare.obstacles", return_value=reasons):
        first = run("sweep", file, *only)
    assert (first.code, first.document["comparison"]["reasons"]) == (0, reasons)
    assert "to score a run again, delete its scorecard.json" in first.err
    card = tmp_path / "sweep" / "fkl_target" / "scorecard.json"
    before = card.read_text()
    card.unlink()
    with mock.patch("specdistill.sweep.score", wraps=score) as scored:
        run("sweep", file, *only)
    assert scored.call_count == 1
    assert json.loads(card.read_text())["draft"] == json.loads(before)["draft"]


def test_a_long_name_is_shown_whole_and_once() -> None:
    name = "draft-refresh_every-25-prompts-24-max_new_tokens-48_lk_hybrid_0"
    console = Console(width=80, record=True, file=StringIO())
    console.print(sweep_table({name: simulate({(0.0, 2): 0.5, (1.0, 2): 0.4})}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert "".join(line[0] for line in lines if line).count(name) == 1
