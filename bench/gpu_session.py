"""What a section of the GPU suite is given: a device, a seed, a deadline, and a report that is on
disk after each entry.
"""

import datetime
import json
import math
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdistill.provenance import device_name, git_commit, versions


@dataclass
class Session:
    """`triton` says whether the Triton kernels run: on a CUDA device always, elsewhere where
    TRITON_INTERPRET=1 asks for the interpreter. Without them the suite runs what `backend="auto"`
    takes, and its report says so.
    """

    file: Path
    device: torch.device
    smoke: bool
    triton: bool
    generator: torch.Generator
    start: float
    deadline: float  # on time.monotonic()'s clock
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, file: Path, smoke: bool, seed: int, seconds: float) -> "Session":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        start = time.monotonic()
        session = cls(
            file,
            device,
            smoke,
            triton,
            torch.Generator(device).manual_seed(seed),
            start,
            start + seconds,
            {"status": "running", "seed": seed, "backend": "triton" if triton else "auto"},
        )
        session.save()
        return session

    @property
    def backend(self) -> Any:
        return "triton" if self.triton else "auto"

    @property
    def interpreted(self) -> bool:
        """Whether a kernel takes seconds."""
        return self.triton and self.device.type != "cuda"

    @property
    def sound(self) -> bool:
        return all(check["passed"] for check in self.report.get("checks", []))

    def add(self, kind: str, **entry: Any) -> None:
        """One more entry of the report's list `kind`."""
        self.report.setdefault(kind, []).append(entry)
        self.save()

    def check(self, name: str, passed: bool, **details: Any) -> None:
        self.add("checks", name=name, passed=bool(passed), **details)
        if not passed:
            print(f"  FAILED {name}: {details}", flush=True)

    def out_of_time(self, what: str, share: float = 1.0) -> bool:
        """Whether `what` must be left out, since this share of the time is spent; the report then
        lists it.
        """
        late = time.monotonic() > self.start + share * (self.deadline - self.start)
        if late:
            self.add("left_out", what=what)
        return late

    def case(self, what: str, run: Callable[[], None], share: float = 1.0) -> None:
        """Run a case unless its time is up. What it raises is a failed check; others still run."""
        if not self.out_of_time(what, share):
            try:
                run()
            except Exception:
                self.check(what, False, traceback=traceback.format_exc())

    def end(self, status: str, **more: Any) -> None:
        seconds = time.monotonic() - self.start
        self.report |= {"status": status, "seconds": seconds, **more}
        self.save()

    def save(self) -> None:
        write(self.file, self.report)

    # Random inputs, all from the session's seed.

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)


def write(file: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    new.replace(file)


def _finite(value: Any) -> Any:
    """With the numbers that JSON does not have, NaN and the infinities, as words."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe(smoke: bool) -> dict[str, Any]:
    """Where and with what the suite ran."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "schema": 1,
        "smoke": smoke,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions(),
        "git": git_commit(),
        "cuda": torch.version.cuda,
        "driver": _driver() if device.type == "cuda" else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.split("\n")[0].strip()
