"""Answers from vLLM: by a stand-in for it on the other side of the pipe, and by vLLM itself."""

import json
import os
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_vllm import VLLM_PYTHON, needs_vllm, served_target
from servers import environment_with
from test_cli import run

from specdistill.data.filters import Filters
from specdistill.data.generation import generate
from specdistill.data.outside import Outside
from specdistill.data.prompts import Prompt
from specdistill.data.questions import answer_id
from specdistill.data.rereading import LARGEST_DISTANCE, Rereading
from specdistill.data.scorers import BestOf
from specdistill.data.signal import alpha_cost, keep, read_states
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.decoding import Sampling
from specdistill.decoding.sampling import row_seed
from specdistill.engines import vllm_answerer
from specdistill.engines.vllm_answers import Answers
from specdistill.engines.vllm_process import (
    Deployment,
    environment,
    is_out_of_memory,
    last_lines,
)
from specdistill.errors import DecodingError, InputError
from specdistill.models import LanguageModel
from specdistill_kernels import keep_top_k

VLLM = """
import json, os, signal, sys, time
from types import SimpleNamespace as Names
from . import sampling_params
__version__ = "VERSION"
STARTS = os.path.join(os.path.dirname(__file__), "starts")
with open(STARTS, "a") as starts:
    starts.write(f"{os.getpid()}\\n")
class SamplingParams:
    def __init__(self, **given):
        self.given = given
class LLM:
    def __init__(self, **given):
        print("noise on stdout", flush=True)
        if given.get("fail"):
            raise RuntimeError(given["fail"])
        assert given["worker_extension_cls"] == "specdistill_vllm.Signal", given
        assert os.path.isdir(given["model"]), given
        self.llm_engine = self
        model = Names(dtype="torch." + given["dtype"], quantization=given.get("quantization"))
        self.vllm_config = Names(model_config=model)
        self.waiting, self.answered, self.die_at = [], 0, given.get("die_at")
        self.unknown = given.get("unknown")
        while len(open(STARTS).readlines()) < given.get("starts", 0):
            time.sleep(0.01)  # none answers before all are there
    def add_request(self, id, prompt, params):
        self.waiting.append((id, prompt["prompt_token_ids"], params.given))
        return id + "-inside"
    def step(self):
        self.answered += 1
        if self.answered == self.die_at:
            print("its last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        id, prompt, given = self.waiting.pop()  # not in order
        first = (sum(prompt) + (given["seed"] if given["temperature"] else 0)) % 50
        tokens = [5 + (first + i) % 50 for i in range(given["max_tokens"])]
        if self.unknown:
            tokens[-1] = self.unknown
        self.length = len(tokens)
        mean = -0.5 * (first + 1)
        total = mean * len(tokens) if "logprobs" in given else None
        ended = Names(token_ids=tokens, cumulative_logprob=total)
        return [Names(request_id=id, outputs=[ended])]
    def collective_rpc(self, method, args):
        import torch
        if method == "specdistill_keep":
            self.top_k, = args
            return [None, None]
        id, first, number = args
        assert id.endswith("-inside") and number == self.length, args
        rows = first + torch.arange(number)
        if self.top_k is None:
            return [None, [rows[:, None].float().expand(-1, 32).contiguous()]]
        tokens = rows[:, None] % 8 + torch.arange(self.top_k)
        log_probs = torch.full((number, self.top_k), 0.5 / self.top_k).log().half()
        tail = torch.full((number,), 0.5).log()
        return [None, [tokens.int(), log_probs, tail, torch.full((number,), 0.25)]]
"""


def stand_in(folder: Path, version: str = "9.9") -> Path:
    """An interpreter whose `vllm` is `VLLM`."""
    kind = "class RequestOutputKind:\n    FINAL_ONLY = 1\n"
    return environment_with(folder, VLLM.replace("VERSION", version), sampling_params=kind)


def started(python: Path) -> list[str]:
    """The ids of its processes."""
    return (python.parent / "vllm" / "starts").read_text().split()


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"p{i}", [{"role": "user", "content": f"w{5 + i} w{9 + 2 * i % 50}"}])
        for i in range(count)
    ]


def answered(
    target: LanguageModel,
    python: Path,
    out: Path,
    count: int = 20,
    signal: str = "none",
    **how: object,
) -> list[Example]:
    """By the stand-in, which says nothing of the target that could be read again."""
    engine = {k: how.pop(k) for k in ("workers", "options", "tensor_parallel") if k in how}
    with ExitStack() as stack:

        def decoder(model: LanguageModel, batch_size: int) -> Answers:
            scored = getattr(how.get("best_of"), "scorer", "") == "log-probability"
            answers = Answers(
                Deployment(python, **engine), model, batch_size, signal, scored=scored
            )
            return stack.enter_context(answers)

        how = {"max_new_tokens": 6, "batch_size": 2, **how}
        outside = Outside("vllm", decoder)
        generate(target, prompts(count), out, signal=signal, outside=outside, **how)
    return read_examples(out, signal=signal != "none")


def test_every_request_is_answered_once_by_several_workers(
    target: LanguageModel, tmp_path: Path
) -> None:
    python = stand_in(tmp_path)
    both = {"samplings": [Sampling(0.0), Sampling(1.0)]}
    told: list[str] = []
    both["progress"] = lambda stage, done, total, words: told.append(words)
    alone = answered(target, python, tmp_path / "alone", **both)
    several = answered(
        target, python, tmp_path / "several", workers=3, options={"starts": 4}, **both
    )
    assert len(started(python)) == 4
    assert told[0] == "0 tokens", "said once an engine is there"
    texts = [{e.id: e.response_tokens for e in examples} for examples in (alone, several)]
    assert texts[0] == texts[1], "a seed of its own, whoever answers"
    assert texts[0].keys() == {p.id for p in prompts(20)}
    assert len({tuple(tokens) for tokens in texts[0].values()}) > 10
    engine = read_manifest(tmp_path / "alone").engine
    assert engine is not None
    assert {k: engine[k] for k in ("name", "version", "dtype", "quantization")} == {
        "name": "vllm",
        "version": "9.9",
        "dtype": "float64",
        "quantization": None,
    }


def test_target_and_interpreter_are_named_from_where_the_command_runs(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = Path(os.path.relpath(stand_in(tmp_path), target.path.parent))
    monkeypatch.chdir(target.path.parent)
    here = replace(target, path=Path(target.path.name))
    assert len(answered(here, python, tmp_path / "out", 2)) == 2


def test_its_signal_is_kept_as_it_is(target: LanguageModel, tmp_path: Path) -> None:
    python = stand_in(tmp_path)
    for example in answered(target, python, tmp_path / "top", 3, "top-k:4"):
        last = len(example.prompt_tokens) - 1  # the position that predicts the first token
        assert example.signal.tokens[:, 0].tolist() == [(last + i) % 8 for i in range(6)]
        assert example.signal.log_tail.exp().tolist() == pytest.approx([0.5] * 6)
    assert read_manifest(tmp_path / "top").parts[0]["alpha_cost"] == pytest.approx(0.25 * 18)
    for example in answered(target, python, tmp_path / "states", 3, "states"):
        hidden = example.signal.hidden
        last = len(example.prompt_tokens) - 1
        assert hidden[:, 0].tolist() == [last + i for i in range(6)]
        assert torch.allclose(example.signal.logsumexp, target.logits(hidden).logsumexp(-1))


def test_filters_retries_and_the_best_of_several(target: LanguageModel, tmp_path: Path) -> None:
    python = stand_in(tmp_path)
    best = BestOf(3, "log-probability")
    answers = answered(
        target, python, tmp_path / "best", 5, best_of=best, samplings=[Sampling(1.0)]
    )
    for example in answers:  # the stand-in's likeliest answer is the one that begins lowest
        seeds = [row_seed(0, answer_id(example.id, i)) % 2**31 for i in range(3)]
        lowest = min((sum(example.prompt_tokens) + seed) % 50 for seed in seeds)
        assert example.response_tokens[0] == 5 + lowest
    again = answered(
        target,
        python,
        tmp_path / "again",
        30,
        filters=Filters(duplicates=True, retries=4),
        samplings=[Sampling(1.0)],
    )
    assert len({tuple(e.response_tokens) for e in again}) == len(again)
    assert len(read_manifest(tmp_path / "again").removed) > 0


def test_a_worker_that_is_killed_is_started_again_and_nothing_is_lost(
    target: LanguageModel, tmp_path: Path
) -> None:
    python = stand_in(tmp_path)
    whole = answered(target, python, tmp_path / "whole")
    broken = answered(target, python, tmp_path / "broken", workers=2, options={"die_at": 4})
    assert len(started(python)) > 5, "twenty answers, and a process gives three"
    ids = [id_ for part in read_manifest(tmp_path / "broken").parts for id_ in part["ids"]]
    assert sorted(ids) == sorted(p.id for p in prompts(20))
    assert {e.id: e.response_tokens for e in whole} == {e.id: e.response_tokens for e in broken}


def test_an_engine_that_cannot_be_used_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    python, old = stand_in(tmp_path), stand_in(tmp_path / "old", "0.31.2")
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7 w8\n")
    asked = ["generate", "--target", tiny_folder, "--prompts", tmp_path / "prompts.txt"]
    asked += ["--max-new-tokens", 6, "--signal", "none", "--engine", "vllm", "--batch-size", 2]

    numbers = count()

    def refused(words: str, python: Path = python, **options: object) -> None:
        engine = ["--engine-python", python, "--engine-options", json.dumps(options)]
        done = run(*asked, *engine, "--out", tmp_path / f"out {next(numbers)}")
        assert done.code == 2
        assert re.search(words, " ".join(done.err.split())), done.err

    refused("there is no interpreter", tmp_path / "nothing")
    assert not (tmp_path / "out 0").exists(), "before anything is read"
    refused(r"vLLM 0\.31\.2 is too old: 0\.32 and later", old)
    refused(r"does not start \(exit code 1\).*RuntimeError: no such model", fail="no such model")
    sizes = r"weights take .* GB over 1 devices.*2 rows of \d+ tokens.*CUDA out of memory"
    refused(sizes, fail="CUDA out of memory")
    refused("max_model_len 9 cuts answers off", max_model_len=9)
    refused("token 999, which the tokenizer", unknown=999)
    (python.parent / "vllm" / "starts").unlink()
    refused(r"ended 3 times in a row \(exit code -9\).*its last words", die_at=1)
    assert len(started(python)) == 3
    (python.parent / "vllm" / "__init__.py").write_text("raise ImportError('no vllm here')")
    refused("ImportError: no vllm here")


def test_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    engine = Deployment(Path("python"), workers=2, tensor_parallel=2)
    assert [engine.devices(i) for i in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert engine.devices(0) == "4,5"
    with pytest.raises(InputError, match="need 4; CUDA_VISIBLE_DEVICES names 3"):
        engine.devices(1)
    assert Deployment(Path("python")).devices(0) is None


def test_ranks_and_workers_share_the_processors_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 2, 9, 7})
    for threads, ranks, words in [(1, 1, "2"), (3, 1, "2,4,7"), (4, 2, "2,7|4,9"), (1, 2, "2|2")]:
        assert environment(threads, ranks)["VLLM_CPU_OMP_THREADS_BIND"] == words
    shares = [environment(3, worker=worker)["VLLM_CPU_OMP_THREADS_BIND"] for worker in range(3)]
    assert shares == ["2,4,7", "2,4,9", "2,7,9"]
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment(None, 2)


def test_the_error_of_a_rank_is_quoted(tmp_path: Path) -> None:
    """Several processes of one engine: the first one only says that another has failed, or less."""
    where = "(Worker_TP1 pid=71) ERROR 11-29 02:15:11 [multiproc_executor.py:953] "
    words = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    lines = [f"{where}Traceback:", f'{where}    raise ValueError("no")', f"{where}{words}", "done"]
    end = "RuntimeError: Engine core initialization failed. See root cause above."
    log = tmp_path / "log"
    log.write_text("\n".join([*lines, "a", "b", end]))
    assert last_lines(log) == f"{words} | a | b | {end}"
    assert is_out_of_memory(last_lines(log))
    log.write_text("\n".join([*lines, end, "[rank1]: KeyError: 'a'", "x", "y", "UserWarning: z"]))
    assert last_lines(log) == "KeyError: 'a' | x | y | UserWarning: z"
    log.write_text("\n".join([*lines, "a", "b", "ValueError: no such model"]))
    assert last_lines(log) == "a | b | ValueError: no such model"


# What vLLM's own workers learn


class Runner:
    """As much of vLLM's model runner as `Signal` looks at."""

    def __init__(self, width: int) -> None:
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden @ self.head.T)
        self.head = torch.randn(width, 4)
        self.input_batch = SimpleNamespace()
        self.output = torch.zeros(8, 4)  # of every step, as a captured pass leaves it in one place

    def execute_model(self, scheduler_output: SimpleNamespace) -> torch.Tensor:
        done = scheduler_output.done
        self.input_batch.req_ids = list(done)
        self.input_batch.num_reqs = len(done)
        self.input_batch.num_computed_tokens_cpu = list(done.values())
        last = [done[i] + n - 1 for i, n in scheduler_output.num_scheduled_tokens.items()]
        output = self.output[: len(last)]
        output.copy_(torch.tensor(last)[:, None])
        return self.model.compute_logits(output)


@pytest.mark.parametrize("top_k", [None, 3])
def test_rows_are_told_apart_by_request_and_position(
    monkeypatch: pytest.MonkeyPatch, top_k: int | None
) -> None:
    """A prompt in two chunks, requests that come and go, one that is computed again."""
    ranks = SimpleNamespace(get_tensor_model_parallel_rank=lambda: 0)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(distributed=ranks))
    monkeypatch.setitem(sys.modules, "vllm.distributed", ranks)
    monkeypatch.setattr(vllm_answerer, "STEPS", 2)
    worker = vllm_answerer.Signal()
    worker.model_runner = runner = Runner(8)
    worker.specdistill_keep(top_k)

    def step(**chunks: tuple[int, int]) -> None:
        done, number = ({i: c[part] for i, c in chunks.items()} for part in (0, 1))
        runner.execute_model(SimpleNamespace(done=done, num_scheduled_tokens=number))

    step(a=(0, 3))
    step(a=(3, 2), b=(0, 2))  # a's prompt has 5 tokens, b's 2
    step(b=(2, 1), a=(5, 1))
    step(a=(0, 6))  # preempted and computed again
    step(a=(6, 1))
    rows = worker.specdistill_take("a", 4, 3)
    other = worker.specdistill_take("b", 1, 2)
    positions = torch.tensor([4.0, 5.0, 6.0])[:, None].expand(-1, 4)
    if top_k is None:
        assert torch.equal(rows[0], positions)
        assert other[0][:, 0].tolist() == [1.0, 2.0]
    else:
        logits = positions @ runner.head.T
        expected = keep_top_k(logits, 3)
        assert torch.equal(rows[0], expected.tokens.int())
        assert torch.equal(rows[1], expected.log_probs.half())
        torch.testing.assert_close(rows[2], expected.log_tail)
        torch.testing.assert_close(rows[3], alpha_cost(logits, expected.tokens))
    with pytest.raises(RuntimeError, match="in 0 of the 3 steps of 'a'"):
        worker.specdistill_take("a", 4, 3)
    monkeypatch.setattr(ranks, "get_tensor_model_parallel_rank", lambda: 1)
    second = vllm_answerer.Signal()
    second.model_runner = Runner(8)
    second.specdistill_keep(top_k)
    assert second.specdistill_take("a", 4, 3) is None


# Reading again


def example(target: LanguageModel, signal: str, shift: float = 0.0) -> Example:
    prompt, response = [7, 9, 11], [20, 21, 22, 23]
    states = read_states(target, prompt, response)
    states = replace(states, hidden=states.hidden + shift * torch.randn_like(states.hidden))
    kept, cost = keep(target, states, signal)
    return Example("a", prompt, response, None, kept, cost)


@pytest.mark.parametrize("signal", ["states", "top-k:8"])
def test_an_engine_of_another_target_is_refused_with_the_figures(
    target: LanguageModel, signal: str
) -> None:
    loads = []

    def load() -> LanguageModel:
        loads.append(1)
        return target

    reading = Rereading(load, "vllm")
    for _ in range(6):
        reading.see(example(target, signal))
    assert loads == [1]
    figures = reading.figures
    assert figures["answers"] == 4
    assert figures["tokens"] == 16
    assert figures["total_variation"] < 1e-3
    assert figures["top_1_agreement"] == 1
    assert figures["largest_logit_difference"] < 0.01
    other = Rereading(load, "vllm")
    with pytest.raises(DecodingError, match=r"total variation 0\.\d+, top-1.*at most 0\.1"):
        other.see(example(target, signal, shift=3.0))
    assert other.figures["total_variation"] > LARGEST_DISTANCE


# The command


def test_options_that_do_not_go_together(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ["generate", "--target", str(tiny_folder), "--prompts", "demo:train"]
    asked += ["--out", str(tmp_path / "out")]
    python = str(stand_in(tmp_path))
    for more, words in [
        ("--workers 2", "--workers would have no effect with --engine specdistill"),
        ("--engine vllm", "--engine vllm and --engine-python go together"),
        (f"--engine vllm --engine-python {python} --device cpu", "--device cpu has no effect"),
        (f"--engine vllm --engine-python {python} --engine-options [1]", "write an object, as"),
        (f"--engine vllm --engine-python {python} --engine-options {{", "not valid JSON"),
        (
            f"--engine vllm --engine-python {python} --engine-options {{"
            '"speculative_config":{}}',
            "'speculative_config' is not for it",
        ),
    ]:
        result = run(*asked, *more.split())
        assert result.code == 2, result.err
        assert words in " ".join(result.err.split()), result.err


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize(("signal", "ranks"), [("states", 1), ("top-k:8", 1), ("top-k:8", 2)])
def test_vllm_says_of_the_target_what_our_own_pass_says(
    tmp_path: Path, signal: str, ranks: int
) -> None:
    """Greedy answers and their signal are our engine's; chunked prompts and a full batch, by an
    engine of one process, and one whose layers are shared by two.
    """
    served_target(tmp_path)
    words = " ".join(f"w{5 + i % 50}" for i in range(40))
    (tmp_path / "prompts.txt").write_text("".join(f"w{5 + i} {words}\n" for i in range(8)))
    asked = ["generate", "--target", str(tmp_path / "target"), "--dtype", "float32"]
    asked += ["--prompts", str(tmp_path / "prompts.txt"), "--signal", signal]
    asked += ["--max-new-tokens", "12", "--batch-size", "4"]
    small = json.dumps({"max_num_batched_tokens": 24})
    other = ["--engine", "vllm", "--engine-python", VLLM_PYTHON, "--engine-options", small]
    other += ["--tensor-parallel", str(ranks), "--threads", "1"]
    for name, more in (("ours", []), ("theirs", other)):
        result = run(*asked, "--out", str(tmp_path / name), *more)
        assert result.code == 0, result.err
    ours, theirs = (
        {e.id: e for e in read_examples(tmp_path / name, signal=True)}
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for id_, mine in ours.items():
        assert theirs[id_].response_tokens == mine.response_tokens
        for name, tensor in mine.signal.tensors().items():
            other_tensor = theirs[id_].signal.tensors()[name]
            torch.testing.assert_close(other_tensor, tensor, atol=2e-3, rtol=2e-3)
    figures = read_manifest(tmp_path / "theirs").engine
    assert figures["largest_logit_difference"] < 0.01
    assert figures["total_variation"] < 1e-3
