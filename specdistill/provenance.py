"""What every result file says about where it came from."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (
        "specdistill",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "numpy",
        "triton",
    ):
        if has := installed(name):
            found[name] = has
    return found


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
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=folder,
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() if tracked.returncode == 0 else None
