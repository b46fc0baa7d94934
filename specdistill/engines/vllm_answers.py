"""Answers from vLLM, with the target's signal, by processes in an environment the user names.

Each process has an engine of its own and `vllm_answerer.py`, is handed requests one by one, and
answers them in the order in which they end. Only this process writes anything. What a process that
died was asked is asked again.
"""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from specdistill.decoding import Request, Round, RowRound, SpeculativeDecoder
from specdistill.decoding.sampling import row_seed
from specdistill.engines import vllm_answerer
from specdistill.engines.vllm_process import (
    Deployment,
    check_version,
    environment,
    is_out_of_memory,
    last_lines,
    out_of_memory,
    run,
)
from specdistill.errors import DecodingError
from specdistill.models import LanguageModel
from specdistill_kernels import TargetTopK

DEATHS = 3  # of a process in a row, without an answer between them, that end the run
GRACE_SECONDS = 10

Heard = tuple["_Process", dict[str, Any] | None, bytes]


class _Process:
    """A process and what it is at work on; what it says goes into `heard`, None once it has ended.
    So many `deaths` of processes before it came in a row, without an answer between them.
    """

    def __init__(
        self,
        deployment: Deployment,
        worker: int,
        deaths: int,
        begin: dict[str, Any],
        heard: queue.Queue[Heard],
    ) -> None:
        self.worker, self.deaths, self.begin = worker, deaths, begin
        self.under_way: dict[str, Request] = {}
        self.memory_bytes: int | None = None
        self.ready = False
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        self.log = folder / "log"
        source = Path(vllm_answerer.__file__).read_text(encoding="utf-8")
        (folder / f"{vllm_answerer.MODULE}.py").write_text(source, encoding="utf-8")
        variables = environment(deployment.threads, deployment.tensor_parallel, worker)
        variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if (devices := deployment.devices(worker)) is not None:
            variables["CUDA_VISIBLE_DEVICES"] = devices
        with self.log.open("w", encoding="utf-8") as errors:
            # A group of its own: an interrupt at the terminal is this process's, which ends it.
            self.process = run(
                deployment.python, source, errors, str(folder), variables, process_group=0
            )
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: queue.Queue[Heard]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                document = dict(json.loads(line))
                body = self.process.stdout.read(document["bytes"])
            except (ValueError, TypeError, KeyError):  # half a line
                break
            if len(body) < document["bytes"]:
                break
            heard.put((self, document, body))
        heard.put((self, None, b""))

    def tell(self, document: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(document).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended, and will be heard to have
            return

    def end(self) -> None:
        """Its input ends, so it does."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


class Answers(AbstractContextManager["Answers"]):
    """Answers of `target`, of which the tokenizer and the head are enough, in the shape of
    `SpeculativeDecoder.stream`: each is one round, with its row's signal. The processes are started
    by the first requests and ended with the context.
    """

    def __init__(
        self,
        deployment: Deployment,
        target: LanguageModel,
        batch_size: int,
        signal: str,
        *,
        scored: bool,
    ) -> None:
        """`signal` as it is kept, see `data.signal`; `scored` asks for log-probabilities, too."""
        from specdistill.data.signal import NONE, kept_tokens

        self.deployment, self.target, self.batch_size = deployment, target, batch_size
        self.keep, self.top_k = signal != NONE, kept_tokens(signal)
        self.scored = scored
        self.facts: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        self.processes: dict[int, _Process] = {}
        self.heard: queue.Queue[Heard] = queue.Queue()
        self.longest = 0

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for process in self.processes.values():
                stack.callback(process.end)
        self.processes = {}

    def stream(self, requests: Iterable[Request]) -> Iterator[Round]:
        """A round without rows for each engine that has started, too. Raises `InputError` as
        `SpeculativeDecoder.stream`, and where there is no such engine, `DecodingError` where it
        does not start or ends again and again.
        """
        waiting = deque(requests)
        if not waiting:
            return
        SpeculativeDecoder(self.target).check(waiting)
        longest = max(len(r.tokens) + r.max_new_tokens for r in waiting)
        if longest > self.longest:
            self.__exit__()
            self.longest = longest
        for worker in range(self.deployment.workers):
            if worker not in self.processes:
                self._start(worker, deaths=0)
        open_ = len(waiting)
        try:
            while open_:
                for round_ in self._hear(waiting):
                    open_ -= len(round_.rows)
                    yield round_
        finally:
            if open_:  # nobody is to hear of what is under way
                self.__exit__()

    def _hear(self, waiting: deque[Request]) -> Iterator[Round]:
        """What comes next: an answer, an engine that has started, or nothing to tell."""
        for process in self.processes.values():
            self._feed(process, waiting)
        process, document, body = self.heard.get()
        if process is not self.processes.get(process.worker):
            return  # its last words, after another took its place
        if document is None:
            waiting.extendleft(reversed(process.under_way.values()))
            self._replace(process)
        elif "id" not in document:
            self._hear_start(process, document)
            if process.ready:
                yield Round([], {}, 0)
        else:
            process.deaths = 0
            request = process.under_way.pop(document["id"])
            yield Round([self._row(request, document, load(body) if body else {})], {}, 0)

    def _start(self, worker: int, deaths: int) -> None:
        self.deployment.check_length(self.longest)
        options = dict(self.deployment.options)
        begin = {
            "keep": self.keep,
            "top_k": self.top_k,
            "engine": {
                "model": str(self.target.path.absolute()),  # it works in a folder of its own
                "dtype": str(self.target.dtype).removeprefix("torch."),
                "max_model_len": self.longest,
                "max_num_seqs": self.batch_size,
                "tensor_parallel_size": self.deployment.tensor_parallel,
                "generation_config": "vllm",  # no settings of the checkpoint's own
                "async_scheduling": False,  # a step after the last would leave rows behind
                "seed": 0,
                **options,
            },
        }
        self.processes[worker] = _Process(self.deployment, worker, deaths, begin, self.heard)

    def _hear_start(self, process: _Process, document: dict[str, Any]) -> None:
        if "memory_bytes" in document:
            check_version(document["version"])
            process.memory_bytes = document["memory_bytes"]
            process.tell(process.begin)
            return
        process.ready = True
        del document["bytes"]
        self.facts = document

    def _replace(self, process: _Process) -> None:
        """Start another process for one that has died. Raises `DecodingError` where that has not
        helped, or cannot.
        """
        code = process.process.wait()
        ending = last_lines(process.log)
        process.end()
        del self.processes[process.worker]
        if is_out_of_memory(ending):
            weights = self.target.parameters() * self.target.dtype.itemsize
            memory, settings = process.memory_bytes, process.begin["engine"]
            raise out_of_memory(weights, memory, settings, "--batch-size", f"It said: {ending}")
        if not process.ready:
            raise DecodingError(f"vLLM does not start (exit code {code}). It said: {ending}")
        if process.deaths + 1 == DEATHS:
            raise DecodingError(
                f"vLLM ended {DEATHS} times in a row (exit code {code}); what was answered is "
                f"kept, run the same command again to go on. It said: {ending}"
            )
        self._start(process.worker, process.deaths + 1)

    def _feed(self, process: _Process, waiting: deque[Request]) -> None:
        """As much as it decodes at a time, and as much again, so that it never waits."""
        while process.ready and waiting and len(process.under_way) < 2 * self.batch_size:
            request = waiting.popleft()
            process.under_way[request.id] = request
            process.tell(
                {
                    "id": request.id,
                    "prompt": list(request.tokens),
                    "sampling": {
                        **asdict(request.sampling),
                        "max_tokens": request.max_new_tokens,
                        "stop_token_ids": sorted(self.target.eos_ids),
                        "seed": row_seed(request.seed, request.id) % 2**31,
                        **({"logprobs": 0} if self.scored else {}),
                    },
                }
            )

    def _row(
        self, request: Request, document: dict[str, Any], signal: dict[str, torch.Tensor]
    ) -> RowRound:
        tokens = document["tokens"]
        if unknown := [token for token in tokens if not 0 <= token < self.target.vocab_size]:
            raise DecodingError(
                f"request {request.id}: vLLM answered with token {unknown[0]}, which the tokenizer "
                f"of {self.target.name} does not know; it must serve that target"
            )
        row = RowRound(request.id, tokens, 0, 0, 0, finished=True, log_prob=document["log_prob"])
        if any(len(tensor) != len(tokens) for tensor in signal.values()):
            raise DecodingError(
                f"request {request.id}: vLLM kept other positions than those of the "
                f"{len(tokens)} tokens it answered"
            )
        if self.top_k is not None:
            row.alpha_cost = signal["alpha_cost"].sum().item()
            row.top = TargetTopK(signal["tokens"], signal["log_probs"], signal["log_tail"])
        elif self.keep:
            row.hidden = signal["hidden"].to(self.target.device)
            row.logsumexp = self.target.logits(row.hidden).logsumexp(-1)
        return row
