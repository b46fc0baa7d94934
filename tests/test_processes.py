"""Training in two processes: the same run as in one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import ask, make_world, padded_target, settings

from specdistill import models
from specdistill.data.text_store import AnswerStore, Settled, TextAnswer
from specdistill.data.token_store import Example, read_examples
from specdistill.errors import InputError
from specdistill.training.answers import split
from specdistill.training.batches import dealt, idle, length_buckets, make_batch
from specdistill.training.distiller import Distiller
from specdistill.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"


def launch(config: Path, *arguments: str, processes: int) -> None:
    command = ["-m", "specdistill", "distill", str(config), *arguments, "--threads", "1"]
    if processes == 2:
        run_with_accelerate(*command)
    else:
        run_alone(*command)


def run_with_accelerate(*command: str) -> None:
    """In two processes."""
    file = CONFIGS / "multi_gpu.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    run_alone(*launcher, "--main_process_port", "0", *command)


def run_alone(*command: str) -> None:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "kind", ["kept", "on-policy", "parallel", "windows", "parallel windows", "packed"]
)
def test_two_processes_train_as_one_does(
    world: dict[str, str], tmp_path: Path, kind: str, shard: bool
) -> None:
    """The same micro-batches, dealt to two processes that hold the draft whole or cut: the same
    losses but for rounding. The last update of an epoch over kept answers has three micro-batches,
    two for the first process and one for the second.
    """
    examples = read_examples(Path(world["data"]), signal=False)
    _, trained = split([e for e in examples if e.response_tokens], 8)
    assert len(length_buckets(trained, 90, 0, 0)) % 4 == 3
    more: dict[str, object] = {"hints": {"layers": {2: 4}}}
    if kind == "on-policy":
        policy = {"name": "draft", "refresh_every": 4, "prompts": 12, "max_new_tokens": 10}
        more = {"signal": "live", "policy": policy}
    if kind.startswith("parallel"):  # masks of padded rows, and a batch of them without answers
        world = make_world(tmp_path / "world", padded_target(tmp_path / "target"))
        more = {"parallel": {"num_draft_tokens": 3, "keep": 0.5}}
    training = {
        "accumulate": 4,
        "batch_tokens": 12 if kind.endswith("windows") else 90,  # of texts of up to 20
        "packing": kind == "packed",
        "shard": shard,
        "activation_checkpointing": shard,
    }
    rows, drafts = [], []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        config = settings(world, run, training=training, **more)
        file = tmp_path / f"{processes}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump()))
        launch(file, processes=processes)
        assert f"# processes: {processes}\n" in (run / "config.yaml").read_text()
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
        drafts.append(models.load(str(run / "draft"), dtype="float32"))
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == [*range(13), 12]
    for one, two in zip(*rows, strict=True):
        for name in ("loss", "grad_norm", "response_tokens", "missing", "tokens", "expected_alpha"):
            assert (name in one) == (name in two)
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)
    for ours, theirs in zip(*(d.model.parameters() for d in drafts), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)


CUT = """
import sys
from pathlib import Path
from small_runs import settings
from specdistill import models
from specdistill.training.distiller import Distiller
world = dict(zip(("target", "data", "draft"), sys.argv[1:]))
pair = [models.load(world[name], dtype="float32", device="cpu") for name in ("target", "draft")]
distiller = Distiller(*pair, settings(world, Path("x"), training={"accumulate": 2, "shard": True}))
for name, value in distiller.trained.items():
    whole = distiller.parameters[name]
    assert value.shape == whole.shape
    assert value.to_local().numel() == whole.numel() // 2, name  # their first sizes are even
    whole.data.zero_()
distiller.gather()
assert all(value.any() for value in distiller.parameters.values())
distiller.accelerator.end_training()  # else an exit may be aborted
"""


def test_processes_make_equal_numbers_of_passes_over_all_of_an_update() -> None:
    """A pass over a draft that is cut needs all processes: one that makes none hangs the others."""
    groups = [[Example(f"{i}", [5, 6], [7] * (1 + i % 3))] for i in range(9)]
    for count, processes in product(range(1, 10), (1, 2, 3, 4)):
        shares = [
            dealt(groups[:count], i, processes, torch.device("cpu")) for i in range(processes)
        ]
        assert {len(share) for share in shares} == {-(-count // processes)}
        labels = [len(batch.labels) for share in shares for batch in share]
        assert sorted(filter(None, labels)) == sorted(
            len(g[0].response_tokens) for g in groups[:count]
        )


@pytest.mark.slow
def test_each_process_holds_its_part_of_every_weight(world: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    run_with_accelerate(str(script), *(world[n] for n in ("target", "data", "draft")))


@pytest.mark.slow
def test_a_cut_run_resumes_to_the_bit(world: dict[str, str], tmp_path: Path) -> None:
    """From its checkpoint at step 8, which holds whole weights and moments."""
    pytest.importorskip("peft")
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    training = {"accumulate": 2, "shard": True, "lora": {"rank": 4, "alpha": 8}}
    config = settings(world, run, checkpoint_every=8, training=training)
    file.write_text(yaml.safe_dump(config.model_dump()))
    launch(file, processes=2)
    first = (run / "draft" / "model.safetensors").read_bytes()
    (run / "draft" / "model.safetensors").unlink()
    assert json.loads((run / "checkpoints" / "state.json").read_text())["step"] == 8
    launch(file, "--resume", processes=2)
    assert (run / "draft" / "model.safetensors").read_bytes() == first


def test_what_several_processes_cannot_share_is_refused(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    pair = [models.load(world[name], dtype="float32") for name in ("target", "draft")]
    with pytest.raises(InputError, match=r"accumulate is 3, .* make it a multiple of 2"):
        train(settings(world, tmp_path / "run", training={"accumulate": 3}), *pair)
    seconds = {"max_steps": None, "max_seconds": 9.0, "accumulate": 2}
    with pytest.raises(InputError, match="max_seconds would end 2 processes"):
        train(settings(world, tmp_path / "run", training=seconds), *pair)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", [{"fkl": 0.5, "ce": 0.5}, {"e2e_tv": 1.0}])
@pytest.mark.parametrize("hints", [None, {"layers": {2: 4}}])
def test_an_idle_batch_adds_nothing(
    world: dict[str, str], loss: dict[str, float], hints: dict | None
) -> None:
    num = 3 if "e2e_tv" in loss else None
    config = settings(world, Path("x"), loss=loss, num_draft_tokens=num, hints=hints)
    examples = read_examples(Path(world["data"]), signal=True)[:6]
    results = []
    for pause in (False, True):
        pair = [models.load(world[name], dtype="float32") for name in ("target", "draft")]
        distiller = Distiller(*pair, config)
        batch = make_batch(examples, 0, pair[1].device)
        metrics = distiller.step([batch, idle(batch)] if pause else [batch], 1e-3)
        results.append((metrics.loss, metrics.response_tokens, list(pair[1].model.parameters())))
    assert results[0][:2] == results[1][:2]
    for ours, theirs in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_the_example_for_many_gpus_runs_in_two_processes(
    world: dict[str, str], tmp_path: Path
) -> None:
    """As it is but for the models, the data and the sizes; by the command at its top."""
    example = CONFIGS.parent / "examples" / "llama_eight_gpus.yaml"
    command = re.search(r"accelerate launch (.*) \\\n#(.*)\n", example.read_text())
    assert command is not None
    line = " ".join(command.groups()).split()
    assert line[:5] == ["--config_file", "configs/multi_gpu.yaml", "--num_processes", "8", "-m"]
    assert line[5:] == ["specdistill", "distill", "examples/llama_eight_gpus.yaml"]
    store = AnswerStore(tmp_path / "data", {"target": "far away"})
    said = [replace(prompt, response=f"w{9 + i} w7") for i, prompt in enumerate(ask(20))]
    store.keep(Settled([TextAnswer(prompt, ended=True) for prompt in said]))
    changes = [f"draft={world['draft']}", f"data={tmp_path / 'data'}", f"run_dir={tmp_path / 'r'}"]
    changes += ["heldout=4", "training.max_steps=2", "training.accumulate=2"]
    run_with_accelerate(
        "-m", "specdistill", "distill", str(example), *changes, "training.batch_tokens=40"
    )
    rows = [json.loads(row) for row in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert "token_match" in rows[-1]
    models.load(str(tmp_path / "r/draft"), dtype="float32")


@pytest.mark.parametrize("file", sorted(CONFIGS.iterdir()), ids=lambda file: file.name)
def test_accelerate_reads_the_configurations(file: Path) -> None:
    """Its own reader refuses unknown keys; and the command each names at its top parses."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    read = load_config_from_file(str(file))
    assert read.distributed_type.value == "MULTI_GPU"
    (command,) = (line for line in file.read_text().splitlines() if "accelerate launch" in line)
    line = command.partition("accelerate launch ")[2].split()
    line[line.index("--config_file") + 1] = str(file)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert arguments.num_processes == 2
    assert arguments.module
    assert [arguments.training_script, *arguments.training_script_args] == line[-3:]


def test_sharding_is_refused(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    pair = [models.load(world[name], dtype="float32") for name in ("target", "draft")]
    with pytest.raises(InputError, match=r"ACCELERATE_USE_FSDP is set.*training\.shard: true"):
        train(settings(world, tmp_path / "run"), *pair)
