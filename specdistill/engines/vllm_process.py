"""A Python program in vLLM's environment, which the user names, and what became of it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import IO, Any

from specdistill.errors import InputError

OLDEST = (0, 32)  # the first version that this is known to work with
LINES = 3  # of a log, that an error quotes
_OUT_OF_MEMORY = ("out of memory", "No available memory for the cache", "less than desired GPU")


def environment(threads: int | None) -> dict[str, str]:
    """Of a process that runs one engine within itself, on the processors that this one may use."""
    found = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found.pop("PYTHONPATH", None)  # it is another environment
    if threads is not None:
        processors = sorted(os.sched_getaffinity(0))[:threads]
        found["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, processors))
    return found


def run(
    python: Path, source: str, errors: IO[str], folder: str, environment: dict[str, str], **how: Any
) -> subprocess.Popen[Any]:
    """By its source, not its path: beside it lie modules called as vLLM and Transformers are.
    Raises `InputError` where there is no such interpreter.
    """
    check_interpreter(python)
    try:
        return subprocess.Popen(
            [str(python), "-c", source],
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
    """How a process ended, in its own words, on one line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n")]
    said = [line for line in lines if line][-LINES:]
    return " | ".join(said) or "it said nothing"


def is_out_of_memory(said: str) -> bool:
    return any(words in said for words in _OUT_OF_MEMORY)


def check_version(version: str) -> None:
    """Raises `InputError` for a vLLM from before `OLDEST`; one without a number passes."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise InputError(
            f"vLLM {version} is too old: {least} and later are known here; install one of them in "
            "an environment, and name its python in --engine-python"
        )
