"""`examples/qwen3_two_servers.yaml`, dry: its own commands, with a tiny target behind two stand-ins
for vLLM and two processes on this machine.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("openai", reason="the extra 'openai' is not installed")

from servers import Reply, failure, serving
from test_openai_top_k import Served
from test_server import Vllm

from specdistill import models
from specdistill.data.token_store import read_examples
from specdistill.drafts.making import make_draft, save_draft
from specdistill.scoring.scorecard import Scorecard

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "qwen3_two_servers.yaml"
SMALLER = {
    "max_steps": 6,
    "batch_tokens": 120,
    "accumulate": 2,
    "learning_rate": 5.0e-3,
    "precision": "fp32",
}


def commands() -> dict[str, list[str]]:
    """Those of the comment that begins the example, by name; servers are not ours to start."""
    comment = "\n".join(re.findall(r"^#   (.*)", EXAMPLE.read_text(encoding="utf-8"), re.M))
    lines = [shlex.split(line) for line in comment.replace("\\\n", " ").splitlines()]
    ours = [words for words in lines if words[0] != "vllm"]
    return {words[words.index("specdistill") + 1]: words for words in ours}


@pytest.mark.slow
def test_the_example_of_two_servers_runs(tiny_folder: Path, tmp_path: Path) -> None:
    target = models.load(str(tiny_folder), dtype="float32")
    save_draft(make_draft(target, [0, 1]), tmp_path / "small")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").mkdir()
    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert config["signal"] == "kept"
    config |= {"target": str(tiny_folder), "draft": "small", "heldout": 8}
    config |= {"evaluate_every": 3, "training": config["training"] | SMALLER}
    (tmp_path / "examples" / EXAMPLE.name).write_text(yaml.safe_dump(config))
    for name, count in {"prompts": 40, "heldout": 4}.items():
        rows = [{"prompt": f"w{5 + i} w{9 + i} w{11}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    chat, drafting, plain, chats = Served(target), Vllm(num=4), Vllm(), []

    def behind(vllm: Vllm) -> Any:
        def reply(body: dict[str, Any], before: int) -> Reply:
            if "messages" not in body:
                return vllm(body, before)
            chats.append(vllm)
            if vllm is plain and chats.count(plain) > 5:
                at_once = {"Retry-After": "0.01"}
                return failure(500, "out of order", **at_once)  # the other answers the rest
            return chat(body, before)

        return reply

    with (
        serving(behind(drafting), drafting.get) as (first, one),
        serving(behind(plain), plain.get) as (second, other),
    ):
        put = {"http://gpu1:8000/v1": first, "http://gpu2:8000/v1": second}
        put |= {"Qwen/Qwen3-8B": str(tiny_folder), "512": "8"}
        for name, words in commands().items():
            line = [put.get(word, word) for word in words]
            if name == "distill":
                assert line[:2] == ["accelerate", "launch"]
                line[:2] = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
            else:
                assert line[0] == "specdistill"
                line[0:1] = ["-m", "specdistill"]
            run(line, tmp_path)
    assert chats.count(plain) > 5
    assert len(one.asked) > 40 - 5
    assert other.asked
    answers = read_examples(tmp_path / "data", signal=True)
    assert len(answers) == 40
    assert {example.signal.tokens.shape[1] for example in answers} == {20}
    folder = tmp_path / "runs" / "qwen3-servers"
    assert "# processes: 2\n" in (folder / "config.yaml").read_text()
    card = Scorecard.read(folder / "scorecard.json")
    assert card.draft.name == "served"
    assert card.rows[0].num_draft_tokens == 4
    assert card.lossless.greedy_identical == (4, 4)
    assert [row.concurrency for row in card.load.drafted if row.temperature == 0] == [1, 4, 16]


def run(command: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
