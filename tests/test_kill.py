"""kill -9 at every stage of the work: what is run again ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from servers import Reply, completion, serving
from small_runs import run, settings
from test_vllm_answers import stand_in, started

from specdistill import models
from specdistill.data.text_store import read_answers
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.drafts.making import make_draft, save_draft
from specdistill.files import UNFINISHED

pytestmark = pytest.mark.slow

SEED = 20261122
TIMES = ("seconds", "tokens_per_second")


def specdistill(folder: Path, place: str, number: float, *arguments: object) -> int:
    """The exit code of a command that is killed below `folder` at a place, see `killed`."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *filter(None, sys.path)])
    command = [sys.executable, str(tests / "killed.py"), str(folder), place, str(number)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def questions(folder: Path, count: int) -> Path:
    file = folder / "prompts.txt"
    file.write_text("".join(f"w{5 + i % 40} w{9 + i // 40}\n" for i in range(count)))
    return file


def trimmed_draft(folder: Path, target: Path) -> str:
    model = models.load(str(target), dtype="float32")
    save_draft(make_draft(model, [0, 1], torch.arange(0, 64, 2)), folder / "draft")
    return str(folder / "draft")


def answers(folder: Path, signal: bool) -> dict[str, Example]:
    """Each of those stored, by its prompt's id; none is there twice."""
    ids = [id_ for part in read_manifest(folder).parts for id_ in part["ids"]]
    assert sorted(ids) == sorted(set(ids))
    return {example.id: example for example in read_examples(folder, signal=signal)}


def test_no_answer_is_lost_or_doubled(tmp_path: Path, tiny_folder: Path) -> None:
    prompts = questions(tmp_path, 200)
    # What a batch rounds differently in float32 may decide a near tie, and a kill parts batches.
    asked = ["generate", "--target", tiny_folder, "--prompts", prompts, "--dtype", "float64"]
    asked += ["--max-new-tokens", 12, "--temperature", "0,1", "--batch-size", 16, "--out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert specdistill(whole, "", 0, *asked, whole) == 0
    rng = random.Random(SEED)
    kills = [
        ("open .*/manifest", 1),
        ("open .*/part.*parquet", 1),
        ("rename .*/manifest", 2),
        ("open .*/manifest", 2),
        ("open .*/part.*parquet", 2),
        ("seconds", rng.random()),  # last: how much it leaves to do depends on the machine
    ]
    for place, number in kills:
        code = specdistill(broken, place, number, *asked, broken)
        assert code == -signal.SIGKILL or place == "seconds", (place, number)
    assert specdistill(broken, "", 0, *asked, broken) == 0
    ours, expected = (answers(folder, signal=True) for folder in (broken, whole))
    assert ours.keys() == expected.keys()
    assert len(ours) == 200
    for id_, example in expected.items():
        assert ours[id_].response_tokens == example.response_tokens
        for name, tensor in example.signal.tensors().items():
            assert torch.allclose(ours[id_].signal.tensors()[name], tensor, atol=1e-5), (id_, name)

    draft = trimmed_draft(tmp_path, tiny_folder)
    for data in (whole, broken):  # what is learnt from both is the same, to the bit
        world = {"target": str(tiny_folder), "draft": draft, "data": str(data)}
        run(settings(world, tmp_path / f"{data.name}-run", signal="live"))
    a, b = (tmp_path / f"{data.name}-run/draft/model.safetensors" for data in (whole, broken))
    assert a.read_bytes() == b.read_bytes()


def test_no_answer_of_a_server_is_lost_or_paid_for_twice(tmp_path: Path) -> None:
    """But those that were under way when the process died."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"question {i}\n" for i in range(60)))

    def echo(body: dict, before: int) -> Reply:
        return completion(f"answer to {body['messages'][-1]['content']}")

    folder, rng = tmp_path / "data", random.Random(SEED)
    kills = [
        ("open .*/manifest", 1),
        ("open replies.jsonl", rng.randint(5, 15)),
        ("open replies.jsonl", rng.randint(5, 15)),  # half a line is cut off first
        ("truncate replies.jsonl", 1),
        ("rename .*/manifest", 1),
        ("open replies.jsonl", rng.randint(5, 15)),
        ("rename .*/answers.jsonl", 1),
    ]
    with serving(echo) as (url, fake):
        asked = ["ask", "--base-url", url, "--target", "big"]
        asked += ["--prompts", prompts, "--concurrency", 2, "--out", folder]
        for place, number in kills:
            assert specdistill(folder, place, number, *asked) == -signal.SIGKILL, place
        assert specdistill(folder, "", 0, *asked) == 0
        assert len(fake.asked) <= 60 + 2 * len(kills)
    found = [a.prompt for a in read_answers(folder)]
    assert {p.response for p in found} == {f"answer to question {i}" for i in range(60)}
    assert len(found) == 60


def test_no_answer_of_vllm_is_lost_or_doubled(tmp_path: Path, tiny_folder: Path) -> None:
    """Whichever process dies: its engines die now and then, and this one at each place."""
    python = stand_in(tmp_path)
    asked = ["generate", "--target", tiny_folder, "--prompts", questions(tmp_path, 200)]
    asked += ["--signal", "none"]
    asked += ["--engine", "vllm", "--engine-python", python, "--workers", 2, "--temperature", "0,1"]
    asked += ["--max-new-tokens", 6, "--batch-size", 4, "--engine-options", '{"die_at": 30}']
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert specdistill(whole, "", 0, *asked, "--out", whole) == 0
    for place, number in [
        ("open .*/part.*parquet", 1),
        ("rename .*/manifest", 2),
        ("open .*/part.*parquet", 2),
    ]:
        code = specdistill(broken, place, number, *asked, "--out", broken)
        assert code == -signal.SIGKILL, (place, number)
    assert specdistill(broken, "", 0, *asked, "--out", broken) == 0
    ours, expected = (answers(folder, signal=False) for folder in (broken, whole))
    assert ours == expected
    assert len(ours) == 200
    deadline = time.monotonic() + 10
    while alive := [pid for pid in map(int, started(python)) if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"nobody is there any more to hear {alive}"
        time.sleep(0.05)


def test_a_distillation_ends_with_the_same_bits(tmp_path: Path, tiny_folder: Path) -> None:
    """On-policy, so that samples are made, too; at least ten kills, and one in every stage."""
    asked = ["generate", "--target", tiny_folder, "--prompts", questions(tmp_path, 40)]
    asked += [
        "--dtype",
        "float32",
        "--max-new-tokens",
        12,
        "--signal",
        "none",
        "--out",
        tmp_path / "data",
    ]
    assert specdistill(tmp_path / "data", "", 0, *asked) == 0
    config = {
        "target": str(tiny_folder),
        "draft": trimmed_draft(tmp_path, tiny_folder),
        "data": str(tmp_path / "data"),
        "signal": "live",
        "policy": {"name": "draft", "refresh_every": 4, "prompts": 12, "max_new_tokens": 10},
        "heldout": 8,
        "decode": {"prompts": 3, "max_new_tokens": 8},
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "dtype": "float32",
        "training": {"max_steps": 14, "batch_tokens": 100, "learning_rate": 5e-3, "accumulate": 2},
    }
    for name in ("whole", "broken"):
        text = yaml.safe_dump({**config, "run_dir": str(tmp_path / name)})
        (tmp_path / f"{name}.yaml").write_text(text)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert specdistill(whole, "", 0, "distill", tmp_path / "whole.yaml") == 0
    rng = random.Random(SEED)
    kills: list[tuple[str, float]] = [
        ("open .*/config.yaml", 1),
        ("rename .*/config.yaml", 1),
        ("open metrics.jsonl$", rng.randint(2, 4)),
        ("samples.*unfinished-", 1),
        ("rename samples.*unfinished-", 1),
        ("unfinished-.*/checkpoints", rng.randint(1, 3)),
        ("rename checkpoints$", 1),
        ("rename .*unfinished-.*/checkpoints$", 2),
        ("remove checkpoints.old|rmdir checkpoints.old", rng.randint(1, 4)),
        ("open .*unfinished-.*/metrics.jsonl", 1),
        ("open metrics.jsonl$", rng.randint(2, 5)),
        ("seconds", rng.uniform(0.1, 0.6)),  # what comes after it comes in every run
        ("open .*unfinished-.*/draft/", rng.randint(1, 3)),
        ("rename .*unfinished-.*/draft$", 1),
        ("rmtree .*unfinished-", 1),
    ]
    for place, number in kills:
        code = specdistill(broken, place, number, "distill", tmp_path / "broken.yaml", "--resume")
        assert code == -signal.SIGKILL or place == "seconds", (place, number)
    assert specdistill(broken, "", 0, "distill", tmp_path / "broken.yaml", "--resume") == 0
    assert _rows(broken) == _rows(whole)
    for name in ("model.safetensors", "draft_vocab.safetensors", "config.json"):
        assert (broken / "draft" / name).read_bytes() == (whole / "draft" / name).read_bytes()
    for file in (whole / "samples").iterdir():
        assert (broken / "samples" / file.name).read_bytes() == file.read_bytes()
    assert _names(broken) == _names(whole)


def test_a_quickstart_goes_on_after_every_stage(tmp_path: Path, tiny_folder: Path) -> None:
    """Nothing that was finished is made again, and the run ends with all of its files."""
    prompts = questions(tmp_path, 24)
    task = {"target": str(tiny_folder), **dict.fromkeys(("prompts", "heldout"), str(prompts))}
    plan = {
        **{"answers": 24, "batch_size": 8, "vocab_size": 32},
        **{"max_new_tokens": 8, "score_tokens": 8, "score_prompts": 2, "before_prompts": 2},
        **{"num_draft_tokens": [2], "before_num_draft_tokens": [2], "train_seconds": 0.3},
        "drafting": "autoregressive",
    }
    asked = ("plan", json.dumps(task), json.dumps(plan))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert specdistill(whole, "", 0, *asked) == 0
    kills = [
        ("open .*unfinished-.*/plan.json", 1),
        ("open data/.*part.*parquet", 1),
        ("rename data/.*/manifest", 2),
        ("open .*unfinished-.*/undistilled/", 2),
        ("rename .*unfinished-.*/undistilled$", 1),
        ("open .*unfinished-.*/scorecard_before.json", 1),
        ("rename .*unfinished-.*/scorecard_before.json", 1),
        ("open metrics.jsonl", 1),
        ("open .*unfinished-.*/draft/", 2),
        ("rename .*unfinished-.*/draft$", 1),
        ("open .*unfinished-.*/scorecard.json", 1),
        ("open plots/.*unfinished-", 1),
        ("open .*unfinished-.*/report.html", 1),
        ("open .*unfinished-.*/report.md", 1),
    ]
    finished: dict[str, int] = {}
    for place, number in kills:
        assert specdistill(broken, place, number, *asked) == -signal.SIGKILL, place
        for name in ("scorecard_before.json", "undistilled/config.json", "draft/config.json"):
            if (file := broken / name).exists():
                assert finished.setdefault(name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
    assert specdistill(broken, "", 0, *asked) == 0
    assert _files(broken) == _files(whole)
    found, expected = (read_examples(run / "data", signal=True) for run in (broken, whole))
    assert sorted(e.id for e in found) == sorted(e.id for e in expected)
    models.load(str(broken / "draft"))


def test_an_export_is_there_whole_or_not_at_all(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "served"
    asked = ["export", "--draft", trimmed_draft(tmp_path, tiny_folder), "--for", "vllm"]
    asked += ["--out", out]
    kills = (
        "open .*tokenizer_config",
        "open .*unfinished-.*/served/config.json",
        "open .*README.md",
        "rename .*unfinished-[^/]*/served$",
    )
    for place in kills:
        assert specdistill(tmp_path, place, 1, *asked) == -signal.SIGKILL, place
        assert not out.exists() or not any(out.iterdir()), place  # it is held by then
    assert specdistill(tmp_path, "", 0, *asked) == 0
    assert {"config.json", "README.md", "model.safetensors"} <= {f.name for f in out.iterdir()}
    assert _names(tmp_path) == {"draft", "served"}


def _names(folder: Path) -> set[str]:
    """What a kill leaves half written is in nobody's way."""
    return {f.name for f in folder.iterdir() if not f.name.startswith(UNFINISHED)}


def _files(run: Path) -> set[str]:
    found = (f.relative_to(run) for f in run.rglob("*"))
    parts = (f for f in found if "checkpoints" not in f.parts)
    return {str(f) for f in parts if UNFINISHED not in str(f)}


def _rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
