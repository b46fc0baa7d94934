"""A Python program in vLLM's environment, which the user names, and what became of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from specdistill.errors import DecodingError, InputError

OLDEST = (0, 32)  # the first version that this is known to work with
LINES = 3  # of a log, that an error quotes
RESERVED = {  # arguments of vLLM's `LLM` that are no business of the user's, and why
    "model": "--target names it",
    "dtype": "--dtype sets it",
    "seed": "--seed is every request's",
    "tensor_parallel_size": "--tensor-parallel sets it",
}
ANSWERING = RESERVED | {
    "max_num_seqs": "--batch-size sets it",
    "async_scheduling": "the signal is that of one step after the other",
    "worker_extension_cls": "the signal is kept by it",
    "speculative_config": "the signal is that of plain decoding",
    "pipeline_parallel_size": "the signal is kept where no layer is apart from the head",
}
SCORING = RESERVED | {
    "max_num_seqs": "--concurrency sets it",
    "speculative_config": "--draft or --speculative-config is for that",
    "enable_prefix_caching": "prompts come again, and must cost the same again",
    "disable_log_stats": "acceptance is read from them",
}
_ABOVE = "root cause"  # is where vLLM says that it is another process's
_ERROR = re.compile(r"(?:^|[\])]:? )((?:\w+\.)*\w+(?:Error|Exception)(?::.*|$))")  # after a prefix
_OUT_OF_MEMORY = ("out of memory", "No available memory for the cache", "less than desired GPU")


@dataclass(frozen=True)
class Deployment:
    """How vLLM runs: by which interpreter, in how many processes, each over how many devices, with
    which other arguments of its `LLM`, on how many threads of a CPU.
    """

    python: Path
    workers: int = 1
    tensor_parallel: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """In the words of vLLM's `LLM`, without what it is by itself."""
        number = self.tensor_parallel
        return ({"tensor_parallel_size": number} if number > 1 else {}) | dict(self.options)

    def check_length(self, tokens: int) -> None:
        """Raises `InputError` where options leave no room for so many of prompt and answer."""
        most = self.options.get("max_model_len")
        if isinstance(most, int) and 0 < most < tokens:
            raise InputError(
                f"--engine-options: max_model_len {most:,} cuts answers off: the longest prompt "
                f"with its answer takes {tokens:,} tokens; raise it, or leave it out"
            )

    def devices(self, worker: int) -> str | None:
        """The accelerators of one process as CUDA_VISIBLE_DEVICES; None: all there are."""
        if self.workers == 1 and self.tensor_parallel == 1:
            return None
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        first = worker * self.tensor_parallel
        places = range(first, first + self.tensor_parallel)
        if not visible:
            return ",".join(map(str, places))
        if places.stop > len(visible):
            raise InputError(
                f"{self.workers} workers of {self.tensor_parallel} devices need "
                f"{self.workers * self.tensor_parallel}; CUDA_VISIBLE_DEVICES names {len(visible)}"
            )
        return ",".join(visible[place] for place in places)


def environment(threads: int | None, ranks: int = 1, worker: int = 0) -> dict[str, str]:
    """Of a process that runs one engine within itself, on so many of the processors that this one
    may use; its ranks share them out, and share one where there are too few. Each `worker` has the
    processors after those of the one before it, from the first again after the last.
    """
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    variables.pop("PYTHONPATH", None)  # it is another environment
    if threads is not None:
        usable = sorted(os.sched_getaffinity(0))
        count = min(threads, len(usable))
        processors = sorted(usable[(worker * count + i) % len(usable)] for i in range(count))
        shares = (processors[rank::ranks] or processors for rank in range(ranks))
        each = (",".join(map(str, share)) for share in shares)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(each)
    return variables


def run(
    python: Path, source: str, errors: IO[str], folder: str, environment: dict[str, str], **how: Any
) -> subprocess.Popen[Any]:
    """By its source, not its path: beside it lie modules called as vLLM and Transformers are.
    Raises `InputError` where there is no such interpreter.
    """
    check_interpreter(python)
    try:
        return subprocess.Popen(
            [str(python.absolute()), "-c", source],  # it is looked for from `folder`
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env=environment,
            **how,
        )
    except OSError as error:
        raise InputError(f"cannot run {python}: {error.strerror}") from error


def check_interpreter(python: Path) -> None:
    """Raises `InputError` where there is none."""
    if not python.is_file():
        raise InputError(f"there is no interpreter {python}; name the python of an environment")


def last_lines(log: Path) -> str:
    """How a process ended, in its own words, on one line. Where that names no error, or points to
    that of another process, the last one above comes first.
    """
    written = map(str.strip, log.read_text(encoding="utf-8", errors="replace").split("\n"))
    lines = [line for line in written if line]
    ending = lines[-LINES:]
    if not any(_ERROR.search(line) and _ABOVE not in line for line in ending):
        others = (line for line in lines if _ABOVE not in line)
        errors = [match[1] for line in others if (match := _ERROR.search(line))]
        ending = errors[-1:] + ending
    return " | ".join(ending) or "it said nothing"


def is_out_of_memory(ending: str) -> bool:
    return any(words in ending for words in _OUT_OF_MEMORY)


def out_of_memory(
    weight_bytes: int, memory_bytes: int | None, settings: Mapping[str, Any], rows: str, ending: str
) -> DecodingError:
    """Where an engine with these arguments of `LLM` ended so; the option `rows` sets how many."""
    has = "" if memory_bytes is None else f" of {memory_bytes / 1e9:.1f} GB each"
    return DecodingError(
        f"vLLM has not enough memory: the weights take {weight_bytes / 1e9:.1f} GB over "
        f"{settings['tensor_parallel_size']} devices{has}, and up to {settings['max_num_seqs']} "
        f"rows of {settings['max_model_len']:,} tokens want a cache; take more devices "
        f"(--tensor-parallel), fewer rows ({rows}) or shorter answers. {ending}"
    )


def check_version(version: str) -> None:
    """Raises `InputError` for a vLLM from before `OLDEST`; one without a number passes."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise InputError(
            f"vLLM {version} is too old: {least} and later are known here; install one of them in "
            "an environment, and name its python in --engine-python"
        )
