"""The command line as a user runs it: what it prints, what it leaves behind, how it refuses."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from conftest import full_disk
from transformers import AutoModelForCausalLM

import specdistill
from specdistill import cli, models
from specdistill.cli import console
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.errors import InputError
from specdistill.scoring.scorecard import Scorecard
from specdistill_kernels import Verdict
from specdistill_kernels.verification import reference


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What a program reads: the one line on stdout."""
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()
        return json.loads(line)


def run(*arguments: object) -> Done:
    """`specdistill ARGUMENTS` in this process. Any exception but the exit is a traceback."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["specdistill", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`python -m specdistill ARGUMENTS` in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    command = [sys.executable, "-m", "specdistill", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes, **options)


def run_alone(*arguments: object) -> Done:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


def files(*folders: Path) -> dict[Path, str]:
    """Every file below and its hash."""
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file()
    }


class World(NamedTuple):
    """What one user made with every command in turn, and what the commands said."""

    folder: Path
    target: Path
    prompts: Path
    said: dict[str, Done]

    @property
    def pair(self) -> list[object]:
        """The options that name both models, in float32."""
        models = {"--target": self.target, "--draft": self.places["draft"], "--dtype": "float32"}
        return [word for option in models.items() for word in option]

    @property
    def places(self) -> dict[str, Path]:
        run_dir = self.folder / "run"
        return {
            "target": self.target,
            "prompts": self.prompts,
            "data": self.folder / "data",
            "undistilled": self.folder / "undistilled",
            "run": run_dir,
            "draft": run_dir / "draft",
            "card": run_dir / "scorecard.json",
            "config": self.folder / "run.yaml",
        }


CONFIG = """\
target: {target}
draft: {undistilled}
data: {data}
run_dir: {run}
heldout: 10
evaluate_every: 4
dtype: float32
training:
  max_steps: 9
  batch_tokens: 200
  learning_rate: 0.001
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"w{5 + i % 40} w{9 + i * 7 % 50}"}) for i in range(30)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = World(folder, tiny_folder, prompts, {})
    at = made.places
    at["config"].write_text(CONFIG.format(**at), encoding="utf-8")
    asked = ["--target", at["target"], "--prompts", prompts, "--dtype", "float32"]
    trim = ["--vocab-size", 40, "--vocab-from", at["data"], "--dtype", "float32"]
    settings = ["--num-draft-tokens", "1,3", "--temperature", "0,1", "--max-new-tokens", 12]
    settings += ["--limit", 4, "--keep-text"]
    for arguments in (
        ["generate", *asked, "--out", at["data"], "--max-new-tokens", 12, "--temperature", "0,1"],
        ["init", "--target", at["target"], "--out", at["undistilled"], "--layers", "0,2", *trim],
        ["distill", at["config"], "seed=5"],
        ["score", *made.pair, "--prompts", prompts, "--out", at["card"], *settings],
        ["check", *made.pair, "--prompts", prompts, "--limit", 2, "--max-new-tokens", 12],
        ["plot", at["run"]],
        ["export", "--draft", at["draft"], "--out", folder / "wide", "--for", "vllm"],
    ):
        made.said[arguments[0]] = run(*arguments, "--json")
    return made


# One command after the other


def test_generate_tells_what_top_k_costs_and_what_was_removed(world: World, tmp_path: Path) -> None:
    at = world.places
    arguments = ["generate", "--target", at["target"], "--prompts", at["prompts"]]
    arguments += ["--out", tmp_path / "data", "--max-new-tokens", 5, "--temperature", 1]
    done = run(*arguments, "--signal", "top-k:8", "--drop-truncated", "--retries", 1, "--json")
    document = done.document
    assert 0 < document["alpha_cost"] < document["tail_mass"] < 1
    assert document["removed"]["truncated"] >= document["dropped"]
    assert document["answers"] + document["dropped"] == 30
    assert "of the target's probability" in done.err
    assert f"removed: {document['removed']['truncated']} truncated" in done.err


def test_generate_answers_every_prompt(world: World) -> None:
    data = world.places["data"]
    document = world.said["generate"].document
    assert document == {
        "out": str(data),
        "answers": 30,
        "parts": len(read_manifest(data).parts),
        **{"removed": {}, "regenerated": 0, "dropped": 0},
    }
    assert len(read_examples(data, signal=True)) == 30
    err = world.said["generate"].err
    size = 30 * 12 * (32 * 4 + 4)
    assert f"the signal of 30 answers takes at most {size:,} bytes" in err
    assert err.index("at most") < err.index("generate 100%"), "said beforehand"


def test_dtype_and_device_are_told(world: World) -> None:
    for command, names in (
        ("generate", ["target"]),
        ("distill", ["target", "undistilled"]),
        ("score", ["target", "draft"]),
        ("check", ["target", "draft"]),
    ):
        for name in names:
            line = f"{world.places[name]}: torch.float32 on cpu"
            assert line in world.said[command].err.splitlines()


def test_init_makes_a_draft_and_says_what_it_costs(world: World) -> None:
    document = world.said["init"].document
    draft = models.load(str(world.places["undistilled"]), dtype="float32")
    assert document["layers"] == [0, 2]
    assert draft.num_layers == 2
    assert draft.vocab_size == 40
    assert document["parameters"] == draft.parameters()
    assert document["bytes_per_token"] == draft.weight_bytes()
    target = models.load(str(world.target), dtype="float32")
    ratio = draft.weight_bytes() / target.weight_bytes()
    assert document["cost_ratio_bytes"] == pytest.approx(ratio)
    assert 0.6 < document["coverage"] <= 1
    for part in (f"{draft.parameters():,}", f"{draft.weight_bytes():,}", f"{ratio:.3f}"):
        assert part in world.said["init"].err
    assert f"{document['coverage']:.2%}" in world.said["init"].err


@pytest.mark.parametrize(
    ("changes", "whole"),
    [(["decode=null"], False), (["decode=null", "signal=live"], True), ([], True)],
    ids=["head", "live", "decode"],
)
def test_distill_reads_the_targets_body_where_it_is_needed(
    world: World, tmp_path: Path, changes: list[str], whole: bool
) -> None:
    with mock.patch("specdistill.models.load", wraps=models.load) as load:
        done = run("distill", world.places["config"], f"run_dir={tmp_path}", *changes)
    assert done.code == 0, done.err
    read = [call.args[0] for call in load.call_args_list]
    assert read == [str(world.target)] * whole + [str(world.places["undistilled"])]


def test_distill_trains_and_leaves_a_draft(world: World) -> None:
    document = world.said["distill"].document
    assert document["draft"] == str(world.places["draft"])
    assert document["step"] == 9
    assert 0 < document["expected_alpha"] <= 1
    lines = (world.places["run"] / "metrics.jsonl").read_text().splitlines()
    assert {k: v for k, v in document.items() if k != "draft"} == json.loads(lines[-1])
    before = models.load(str(world.places["undistilled"]), dtype="float32").head.weight
    assert not torch.equal(
        models.load(str(world.places["draft"]), dtype="float32").head.weight, before
    )


def test_a_card_and_a_served_draft_name_the_run_behind_them(world: World) -> None:
    card = Scorecard.read(world.places["card"])
    made = card.provenance["draft_origin"]
    config = (world.places["run"] / "config.yaml").read_text()
    assert f"config_sha256: {made['config_sha256']}" in config
    assert made["step"] == world.said["distill"].document["kept_step"]
    served = json.loads((world.folder / "wide" / "config.json").read_text())
    assert served["specdistill"] == made


def test_distill_shows_the_first_example_and_what_of_it_is_trained_on(world: World) -> None:
    err = world.said["distill"].err
    line = (
        r"first example: (\d+) tokens are given, (\d+) trained on .*\n(.*<\|assistant\|>)\|(.*)\|\n"
    )
    shown = re.search(line, err)
    assert shown is not None
    given, trained, before, after = shown.groups()
    assert (len(before.split()), len(after.split())) == (int(given), int(trained))
    tokenizer = models.load(str(world.target), dtype="float32").tokenizer
    texts = {
        (tokenizer.decode(e.prompt_tokens), tokenizer.decode(e.response_tokens))
        for e in read_examples(world.places["data"], signal=False)
    }
    assert (before, after) in texts


def test_the_middle_of_a_long_example_is_left_out(world: World) -> None:
    tokenizer = models.load(str(world.target), dtype="float32").tokenizer
    with redirect_stderr(io.StringIO()) as err:
        console.note_example(tokenizer, Example("a", [7] * 500, [9] * 4 + [0]))
    _, text = err.getvalue().strip().split("\n")
    assert len(text) < 450
    assert " [...] " in text
    assert text.endswith("|w9 w9 w9 w9 <|end|>|")
    with redirect_stderr(io.StringIO()) as err:
        said = mock.Mock(decode=lambda tokens: "\x1b]0;new title\x07[red]a\r\nb\u200b é[/red]")
        console.note_example(said, Example("a", [7], [9]))
    text = r"\x1b]0;new title\x07[red]a\r" + "\nb\\u200b é[/red]"
    assert err.getvalue().endswith(f"\n{text}|{text}|\n"), "no order to a terminal"


def test_score_writes_the_card_it_prints(world: World) -> None:
    document = world.said["score"].document
    assert document == json.loads(world.places["card"].read_text())
    card = Scorecard.read(world.places["card"])
    settings = [(row.temperature, row.num_draft_tokens) for row in card.rows]
    assert settings == [(0.0, 1), (0.0, 3), (1.0, 1), (1.0, 3)]
    assert card.lossless.greedy_identical == (8, 8)
    assert card.draft.vocab_size == 40
    err = world.said["score"].err
    assert "greedy outputs token-identical: 8 of 8" in err
    assert card.verdict.reason in err


def test_what_the_cache_takes_is_told_beforehand(world: World) -> None:
    """Two models (the draft has two layers of the target's four), a bucket of 64 slots a row."""
    a_row = 64 * 2 * (2 * 8) * 4  # of one layer, in bytes
    for command, layers, rows, tokens in (
        ("generate", 30 * 4, 30, 5 + 12 + 1),
        ("score", 4 + 2 * (4 + 2), 3, 5 + 12 + 3 + 1),
        ("check", 2 * (4 + 4), 2, 5 + 12 + 4 + 1),
    ):
        megabytes = f"{layers * a_row / 1e6:.1f}"
        line = f"cache: {megabytes} MB for {rows} rows of up to {tokens} tokens"
        lines = world.said[command].err.splitlines()
        at = next((i for i, said in enumerate(lines) if said.startswith(line)), len(lines))
        assert at < min(i for i, said in enumerate(lines) if "100%" in said), lines


def test_check_passes_on_a_sound_pair(world: World, tmp_path: Path) -> None:
    document = world.said["check"].document
    assert document["passed"] is True
    names = [check["name"] for check in document["checks"]]
    assert names[:3] == ["target as its own draft", "greedy text", "acceptance rate"]
    assert len(names) == 6
    assert document["checks"][1]["figures"]["compared"] == 2
    err = world.said["check"].err
    assert "lossless, as far as was checked" in err
    assert "fewer than 1 of 10,000 sound runs" in err
    for name in ("greedy text", "2 of 2 identical", "Σ min(p, q) ="):
        assert name in err
    with mock.patch("specdistill.scoring.check.run_checks", return_value=[]) as run_checks:
        done = run("check", *world.pair, "--limit", 3)
    assert done.code == 0
    pair = run_checks.call_args.args[0]
    ids = [p.id for p in pair.prompts]
    assert ids == ["1", "2"], "built in; to this tokenizer the third is the second"


def test_check_exits_1_where_the_output_would_change(world: World) -> None:
    def accept_all(
        draft_tokens: torch.Tensor, target_logits: torch.Tensor, offered: torch.Tensor
    ) -> reference.Verdict:
        count = offered.sum(-1)
        final = target_logits.argmax(-1).gather(-1, count[:, None])[:, 0]
        return reference._assemble(draft_tokens, count, final)

    command = ["check", *world.pair, "--prompts", world.prompts]
    command += ["--limit", 2, "--max-new-tokens", 12]
    with (
        mock.patch("specdistill_kernels.verification.reference._verify_greedy", accept_all),
        mock.patch("specdistill.scoring.sampled_texts.distribution_p_value", return_value=0.5),
    ):
        done = run(*command, "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert document["passed"] is False
    assert [c["name"] for c in document["checks"] if not c["passed"]] == ["greedy text"]
    difference = document["checks"][1]["figures"]["differences"][0]
    assert f"prompt {difference['prompt_id']}, new token {difference['position'] + 1}:" in done.err
    assert "NOT explained by rounding" in done.err
    assert "FAILED" in done.err
    assert "NOT lossless" in done.err


@pytest.fixture
def penalised(world: World, tmp_path: Path) -> Path:
    """The target, asking for what the engine does not do."""
    folder = shutil.copytree(world.target, tmp_path / "penalised")
    file = folder / "generation_config.json"
    config = json.loads(file.read_text()) | {"repetition_penalty": 1.05, "min_new_tokens": 3}
    file.write_text(json.dumps(config))
    return folder


def test_settings_of_the_target_that_are_not_applied_are_told(
    world: World, penalised: Path, tmp_path: Path
) -> None:
    at = world.places
    pair = ["--target", penalised, "--prompts", at["prompts"], "--limit", 1]
    draft = ["--draft", at["draft"], "--max-new-tokens", 3]
    score = ["--num-draft-tokens", 1, "--temperature", 0, "--out", tmp_path / "card.json"]
    line = (
        f"{penalised}: its generation config's repetition_penalty=1.05, min_new_tokens=3 is not "
        "applied"
    )
    with mock.patch("specdistill.scoring.check.run_checks", return_value=[]):
        for command in (
            ["generate", *pair, "--out", tmp_path / "data", "--max-new-tokens", 3],
            ["score", *pair, *draft, *score],
            ["check", *pair, *draft],
        ):
            assert line in run(*command).err.splitlines()
    assert "not applied" not in world.said["score"].err


@pytest.mark.parametrize(
    ("options", "mode", "lenience", "label"),
    [
        (["--verification", "block"], "block", None, "block verification"),
        (["--lenience", "exp:.8"], "token", "exp:0.8", "LOSSY, lenience exp:0.8"),
    ],
)
def test_score_verifies_as_it_is_told(
    world: World, tmp_path: Path, options: list[str], mode: str, lenience: str | None, label: str
) -> None:
    score = ["score", *world.pair, "--prompts", world.prompts, "--out", tmp_path / "card.json"]
    score += ["--limit", 2, "--max-new-tokens", 8]
    done = run(*score, "--num-draft-tokens", 2, "--temperature", 1, *options, "--json")
    lossy = lenience is not None
    recorded = {"mode": mode, "lenience": lenience, "lossy": lossy}
    assert done.document["verification"] == recorded
    assert f"speculative decoding ({label})" in done.err
    assert (f"{label}: the text does not follow the target's distribution" in done.err) == lossy
    assert ("distribution test p =" in done.err) != lossy
    assert ("LOSSY" in done.document["verdict"]["reason"]) == lossy
    assert (done.document["rows"][0]["acceptance_rate_expected"] is None) == (mode == "block")
    assert "nan" not in done.err


def test_plot_draws_the_training_of_a_run_that_was_not_scored(world: World, tmp_path: Path) -> None:
    shutil.copy(world.places["run"] / "metrics.jsonl", tmp_path)
    done = run("plot", tmp_path, "--json")
    assert done.document["files"] == [str(tmp_path / "plots" / "training.png")]
    assert "has no scorecard.json yet: its training alone is drawn, no report" in done.err
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "plots"}


def test_plot_draws_the_run_folder_and_writes_its_report(world: World) -> None:
    *pictures, report, page = (Path(file) for file in world.said["plot"].document["files"])
    assert (report, page) == (
        world.places["run"] / "report.md",
        world.places["run"] / "report.html",
    )
    text = report.read_text(encoding="utf-8")
    assert f"# A draft for {world.target}" in text
    assert all(f"plots/{file.name}" in text for file in pictures)
    assert "data:image/png;base64" in page.read_text(encoding="utf-8")
    names = {"acceptance.png", "survival.png", "speedup.png", "time.png", "training.png"}
    assert {file.name for file in pictures} == {*names, "text.png"}
    for file in pictures:
        assert file.parent == world.places["run"] / "plots"
        assert file.read_bytes().startswith(b"\x89PNG")


def test_an_engine_that_is_not_lossless_ends_with_exit_code_1(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is there and says it."""

    def gullible(draft_tokens, draft_logits, target_logits, rows, *, lengths, **rest):
        bonus = target_logits[:, -1].argmax(-1, keepdim=True)
        return Verdict(torch.cat([draft_tokens, bonus], 1), lengths)

    monkeypatch.setattr("specdistill.decoding.engine.verify", gullible)
    card = tmp_path / "card.json"
    done = run(
        *("score", *world.pair, "--prompts", world.prompts, "--out", card, "--json"),
        *("--num-draft-tokens", 2, "--temperature", 0, "--max-new-tokens", 12, "--limit", 3),
    )
    assert done.code == 1
    said = json.loads(done.out)["verdict"]
    assert not said["pays"]
    assert said["reason"].startswith("FAILED, not lossless: ")
    assert said["reason"] in done.err
    assert Scorecard.read(card).failures


def test_score_tells_categories_and_lengths_apart(world: World, tmp_path: Path) -> None:
    rows = [
        {"prompt": " ".join([f"w{7 + i} w9"] * (1 + 9 * (i % 2))), "category": f"kind [{i // 4}]"}
        for i in range(8)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    score = ["score", *world.pair, "--num-draft-tokens", "1,2", "--temperature", 0]
    score += ["--max-new-tokens", 6]
    done = run(*score, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "card.json")
    best = Scorecard.read(tmp_path / "card.json").verdict.best.num_draft_tokens
    for what, names in {
        "category": ("kind [0]", "kind [1]"),
        "length": ("4–7 tokens", "16–31 tokens"),
    }.items():
        assert f"by {what} of prompts, T = 0, γ = {best}" in done.out
        for name in names:
            assert re.search(rf"{re.escape(name)} +4 +\S+ +\d\.\d\d +\d", done.out)
    done = run(*score, "--prompts", world.prompts, "--limit", 3, "--out", tmp_path / "alike.json")
    assert "of prompts, T = 0" not in done.out, "nothing to tell apart"


def test_plot_draws_scorecards_and_several_runs_into_a_folder(world: World, tmp_path: Path) -> None:
    at = world.places
    done = run("plot", at["run"], at["card"], "--out", tmp_path / "two", "--json")
    names = [Path(file).name for file in done.document["files"]]
    assert names == ["survival.png", "places.png", "runs.png"]
    assert f"{at['card']} is no run with a metrics.jsonl" in done.err
    assert f"{at['run']} is no run" not in done.err
    done = run("plot", at["run"], "--out", tmp_path / "one", "--json")
    assert {Path(file).parent for file in done.document["files"]} == {tmp_path / "one"}
    refused = run("plot", at["run"], at["card"])
    assert refused.code == 2
    assert "need --out" in refused.err


def test_the_text_of_an_answer_is_kept_only_where_it_is_wanted(world: World) -> None:
    card = Scorecard.read(world.places["card"])
    assert card.example is not None
    best = card.verdict.best
    setting = (best.temperature, best.num_draft_tokens)
    assert (card.example.temperature, card.example.num_draft_tokens) == setting
    row = next(
        p
        for p in card.per_prompt
        if (p.prompt_id, p.temperature, p.num_draft_tokens) == (card.example.prompt_id, *setting)
    )
    kinds = [kind for _, kind in card.example.pieces]
    assert len(kinds) == row.emitted
    assert kinds.count("accepted") == row.accepted
    assert kinds.count("residual") + kinds.count("bonus") in (row.rounds - 1, row.rounds)


def test_export_writes_what_transformers_loads(world: World) -> None:
    document = world.said["export"].document
    assert (document["out"], document["vocab_size"]) == (str(world.folder / "wide"), 64)
    assert document["out"] in document["serve"]
    assert document["serve"] in world.said["export"].err
    assert document["scorecard"] == str(world.places["card"])
    assert (world.folder / "wide" / "README.md").exists()
    stock = AutoModelForCausalLM.from_pretrained(world.folder / "wide", dtype=torch.float32)
    assert stock(torch.tensor([[7, 9, 30]])).logits.shape[-1] == 64


def test_without_json_the_tables_are_on_stdout(world: World, tmp_path: Path) -> None:
    done = run("init", "--target", world.target, "--out", tmp_path / "d", "--layers", 2)
    assert done.code == 0
    assert "parameters" in done.out
    assert "cost ratio by bytes" in done.out
    assert "{" not in done.out
    assert not done.err


def test_a_text_file_of_prompts_and_a_draft_of_full_vocabulary(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("w7 w8\n\nw9 w10 w11\n")
    card = tmp_path / "cards" / "card.json"
    done = run(
        *("score", "--target", world.target, "--draft", world.target, "--out", card, "--json"),
        *("--prompts", tmp_path / "p.txt", "--num-draft-tokens", 2, "--temperature", 0),
        *("--max-new-tokens", 9, "--dtype", "float64"),
    )
    (row,) = done.document["rows"]
    assert row["acceptance_rate"] == 1
    assert card.exists()


# In a process of its own


def test_without_arguments_it_shows_the_commands() -> None:
    done = run_alone()
    said = done.out + done.err
    assert "Usage: " in said
    commands = ("quickstart", "init", "generate", "distill", "score", "check", "plot", "export")
    for command in (*commands, "compare"):
        assert command in said
    assert "Traceback" not in said


def test_version_and_help_are_told_and_end_well() -> None:
    done = run_alone("--version")
    assert (done.code, done.out) == (0, f"specdistill {specdistill.__version__}\n")
    for command in ("--help", "quickstart", "init", "generate", "distill", "score", "check"):
        arguments = [command] if command == "--help" else [command, "--help"]
        assert run(*arguments).code == 0


def test_an_error_is_one_line_and_debug_shows_where() -> None:
    bad = ["score", "--target", "T", "--draft", "D", "--prompts", "P", "--out", "O"]
    bad += ["--num-draft-tokens", "0"]
    done = run_alone(*bad)
    assert done.code == 2
    assert done.out == ""
    assert done.err == "error: --num-draft-tokens must be 1 to 64; got '0'\n"
    for place in ([*bad, "--debug"], ["--debug", *bad]):
        debugged = run_alone(*place)
        assert debugged.code != 0
        assert "Traceback" in debugged.err
        assert "InputError" in debugged.err


def test_an_interrupted_generation_goes_on(world: World, tmp_path: Path) -> None:
    prompts = tmp_path / "many.txt"
    prompts.write_text("".join(f"w{5 + i % 50} w{5 + i % 43}\n" for i in range(40)))

    def command(out: Path, batch_size: int) -> list[object]:
        return [
            *("generate", "--target", world.target, "--prompts", prompts, "--out", out),
            *("--max-new-tokens", 24, "--temperature", 1, "--dtype", "float64"),
            *("--batch-size", batch_size),
        ]

    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # an ignored one is inherited
    try:
        process = start(*command(tmp_path / "data", 1))
    finally:
        signal.signal(signal.SIGINT, old)
    assert process.stderr is not None
    seen = next((line for line in process.stderr if " generate " in line), "")
    assert seen, "no progress was shown"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted; the same command goes on where it stopped" in err
    assert "Traceback" not in err
    kept = read_manifest(tmp_path / "data").parts
    assert sum(len(part["ids"]) for part in kept) < 40
    assert run(*command(tmp_path / "data", 32), "--json").document["answers"] == 40
    assert read_manifest(tmp_path / "data").parts[: len(kept)] == kept
    run(*command(tmp_path / "whole", 32))
    texts = [
        {e.id: e.response_tokens for e in read_examples(tmp_path / name, signal=True)}
        for name in ("data", "whole")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("command", "place", "told"),
    [
        ("quickstart", "quickstart.quickstart", "the same command goes on where it stopped"),
        ("generate", "data.generation.generate", "the same command goes on where it stopped"),
        ("distill", "training.run.train", "with --resume the same command goes on"),
        ("score", "scoring.measure.score", "interrupted\n"),
        ("check", "scoring.check.run_checks", "interrupted\n"),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    world: World, tmp_path: Path, command: str, place: str, told: str
) -> None:
    at = world.places
    arguments: dict[str, list[object]] = {
        "quickstart": ["--run-dir", tmp_path / "run"],
        "generate": ["--target", at["target"], "--prompts", at["prompts"], "--out", tmp_path / "d"],
        "distill": [at["config"], f"run_dir={tmp_path / 'run'}"],
        "score": [*world.pair, "--prompts", at["prompts"], "--out", tmp_path / "card.json"],
        "check": world.pair,
    }
    with mock.patch(f"specdistill.{place}", side_effect=KeyboardInterrupt):
        done = run(command, *arguments[command])
    assert done.code == 130
    assert told in done.err
    assert "Traceback" not in done.err


# Files that are there, and what is refused


def test_a_card_that_cannot_be_written_is_refused_before_the_work(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    score = ["score", *world.pair, "--prompts", world.prompts]
    score += ["--out", tmp_path / "file" / "card.json"]
    with mock.patch("specdistill.scoring.measure.score", side_effect=AssertionError):
        assert run(*score).code == 2


def test_a_bad_answer_to_generate_leaves_the_folder_usable(world: World, tmp_path: Path) -> None:
    """An error before the first answer must not tie the folder to the settings that failed."""
    pair = ["generate", "--target", world.target, "--prompts", world.prompts]
    out = ["--out", tmp_path / "data", "--limit", 3, "--json"]
    assert run(*pair, *out, "--max-new-tokens", 600).code == 2
    assert run(*pair, *out, "--max-new-tokens", 5).document["answers"] == 3


def test_overwrite_replaces_a_card(world: World, tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    card.write_text("old")
    score = ["score", *world.pair, "--prompts", world.prompts, "--out", card]
    score += ["--num-draft-tokens", 1, "--temperature", 0, "--max-new-tokens", 4]
    assert run(*score, "--limit", 2).code == 2
    assert card.read_text() == "old"
    assert run(*score, "--limit", 2, "--overwrite").code == 0
    assert len(Scorecard.read(card).rows) == 1


def test_resume_ends_a_run_with_the_same_draft(world: World, tmp_path: Path) -> None:
    """A finished run, resumed: nothing is trained twice and the draft stays."""
    config = [world.places["config"], f"run_dir={tmp_path / 'run'}", "checkpoint_every=3"]
    assert run("distill", *config).code == 0
    draft = files(tmp_path / "run" / "draft")
    refused = run("distill", *config)
    assert refused.code == 2
    assert "--resume" in refused.err
    resumed = run("distill", *config, "--resume", "--json")
    assert resumed.document["step"] == 9
    assert "first example" not in resumed.err
    assert files(tmp_path / "run" / "draft") == draft


# A disk that is full


def test_a_full_disk_is_told_and_leaves_no_half_draft(world: World, tmp_path: Path) -> None:
    init = ["init", "--target", world.target, "--out", tmp_path / "draft", "--layers", 2]
    with full_disk(20_000):
        done = run(*init)
    assert done.code == 2
    assert "error: cannot write the draft to" in done.err
    assert "free space" in done.err
    assert not list(tmp_path.rglob("config.json"))
    assert run(*init).code == 0, "the same command works once there is room"


@pytest.mark.parametrize(
    ("limit", "checkpoint_every"), [(900, 100), (5000, 2)], ids=["metrics", "checkpoint"]
)
def test_a_full_disk_ends_a_distillation_with_a_message(
    world: World, tmp_path: Path, limit: int, checkpoint_every: int
) -> None:
    config = [world.places["config"], f"run_dir={tmp_path / 'run'}"]
    config.append(f"checkpoint_every={checkpoint_every}")
    with full_disk(limit):
        done = run("distill", *config)
    assert done.code == 2
    assert "error: cannot write" in done.err
    assert "free space" in done.err
    assert not (tmp_path / "run" / "draft" / "config.json").exists()
    resumed = run("distill", *config, "--resume", "--json")
    assert resumed.document["step"] == 9


def test_our_own_errors_are_told_and_others_are_called_faults_of_ours() -> None:
    def done(error: Exception, *more: str) -> Done:
        with mock.patch("specdistill.drafts.making.must_be_new", side_effect=error):
            return run("init", "--target", "t", "--out", "o", *more)

    told = done(InputError("[no] markup: /x"))
    assert (told.code, told.err) == (2, "error: [no] markup: /x\n")
    assert done(ZeroDivisionError()).err.startswith("error: ZeroDivisionError")
    debugged = done(ZeroDivisionError(), "--debug")
    assert debugged.code == 70
    assert "Traceback" in debugged.err
