"""One engine of vLLM in a process of its own, which runs `vllm_worker.py`."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from specdistill.engines import vllm_worker
from specdistill.engines.vllm_process import (
    Deployment,
    check_version,
    environment,
    is_out_of_memory,
    last_lines,
    out_of_memory,
    run,
)
from specdistill.errors import DecodingError, InputError

GRACE_SECONDS = 60  # for an engine to give its memory back
MEMORY_SHARE = 0.9  # of an accelerator, for an engine
Runner = Literal["V1", "V2"]
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # the environment's word for it
RUNNERS: dict[Runner, str] = {"V1": "0", "V2": "1"}  # and its values


class Engine:
    """A JSON document a line goes in and comes out. `facts` are the engine's versions, device and
    runner; `counted` are its counters when it last told them.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.facts: dict[str, Any] = {}
        self.counted: dict[str, Any] = {}

    def ask(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Raises `DecodingError` where the process has ended, with its last words."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(document) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; `hear` says why
            pass
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code, ending = self.process.wait(), last_lines(self.log)
            if not self.facts:
                raise DecodingError(f"vLLM does not start (exit code {code}). It said: {ending}")
            raise DecodingError(f"the vLLM process ended with exit code {code}. It said: {ending}")
        return dict(json.loads(line))


@contextmanager
def started(
    deployment: Deployment,
    settings: Mapping[str, Any],
    weight_bytes: int,
    runner: Runner | None = None,
    later: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Engine]:
    """An engine with these arguments of `LLM` and those of `deployment`, by this model runner or
    the one that vLLM chooses; ended with the context, whatever happens. Raises `InputError` where
    the interpreter cannot be run, or its vLLM is too old or has no such runner, or the devices'
    memory is too small for the weights, `DecodingError` where the engine does not start, or vLLM
    refuses to propose by one of the `later` speculative configs.
    """
    settings = {
        **settings,
        "tensor_parallel_size": 1,
        **deployment.settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        source = Path(vllm_worker.__file__).read_text(encoding="utf-8")
        variables = environment(deployment.threads, deployment.tensor_parallel)
        variables |= {} if runner is None else {RUNNER: RUNNERS[runner]}
        with log.open("w", encoding="utf-8") as errors:
            process = run(deployment.python, source, errors, folder, variables, text=True)
        engine = Engine(process, log)
        try:
            begun = engine.hear()
            check_version(begun["version"])
            if runner is not None and not begun["runners"]:
                raise InputError(
                    f"--runner both: vLLM {begun['version']} has one model runner; leave it out"
                )
            _check_memory(weight_bytes, begun["memory_bytes"], settings)
            asked = {"engine": settings, "later": list(later)}
            engine.facts = begun | _loaded(engine, asked, weight_bytes, begun, runner)
            yield engine
        except BaseException:
            process.kill()
            raise
        finally:
            _end(process)


def _loaded(
    engine: Engine,
    asked: Mapping[str, Any],
    weight_bytes: int,
    begun: Mapping[str, Any],
    runner: Runner | None,
) -> dict[str, Any]:
    """What an engine says of itself once its models are there."""
    try:
        facts = engine.ask(asked)
    except DecodingError as error:
        if is_out_of_memory(str(error)):
            memory, ending, settings = begun["memory_bytes"], str(error), asked["engine"]
            raise out_of_memory(weight_bytes, memory, settings, "--concurrency", ending) from error
        if runner is not None:
            raise DecodingError(f"--runner both: by its runner {runner} {error}") from error
        raise
    if runner is not None and facts["runner"] != runner:
        raise InputError(
            f"--runner both: vLLM {begun['version']} runs this by its runner {facts['runner']} "
            "whatever it is told; leave it out"
        )
    return facts


def _check_memory(weight_bytes: int, memory_bytes: int | None, settings: Mapping[str, Any]) -> None:
    """Before anything is loaded; None where there is no accelerator. What makes the weights smaller
    or puts them elsewhere is vLLM's to judge.
    """
    if memory_bytes is None or settings.keys() & {"quantization", "cpu_offload_gb"}:
        return
    devices = settings["tensor_parallel_size"] * settings.get("pipeline_parallel_size", 1)
    share = settings.get("gpu_memory_utilization", MEMORY_SHARE)
    if weight_bytes >= share * memory_bytes * devices:
        raise InputError(
            f"the weights take {weight_bytes / 1e9:.1f} GB, and an engine has {share:.0%} of the "
            f"{memory_bytes / 1e9:.1f} GB of each of {devices} devices: it needs larger ones, or "
            "more (--tensor-parallel)"
        )


def _end(process: subprocess.Popen[str]) -> None:
    """Its input ends, so it does."""
    try:
        process.communicate(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
