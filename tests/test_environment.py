"""What `env` tells."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_cli import run

from specdistill import provenance


def test_env_tells_versions_devices_and_threads() -> None:
    done = run("env", "--json")
    assert done.code == 0
    found = done.document
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert "dtype auto is" in found["devices"]["cpu"]
    assert found["memory_bytes"] > 1e8
    shown = run("env").out
    for name in ("transformers", "system", "cores, threads", "memory"):
        assert name in shown


def test_what_is_missing_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ("kernels", "torch", "pip install torch")
    monkeypatch.setattr(provenance, "OPTIONAL", (there, ("x", "no-such-package", "do this")))
    here, gone = provenance.environment().optional
    assert here.version == torch.__version__
    assert (gone.version, gone.remedy) == (None, "do this")
    assert "no-such-package missing: do this" in run("env").out


def test_every_cuda_device_is_named() -> None:
    with (
        mock.patch("torch.cuda.device_count", return_value=2),
        mock.patch("torch.cuda.get_device_name", side_effect=lambda d: f"GPU {d.index}"),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        devices = provenance.environment().devices
    assert devices["cuda:1"] == "GPU 1, dtype auto is bfloat16"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    environ = {"_SPECDISTILL_COMPLETE": f"complete_{shell}"}
    words = "specdistill sc"
    environ |= {"COMP_WORDS": words, "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": words}
    environ |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = Path(sys.executable).with_name("specdistill")
    done = subprocess.run([command], env=environ, capture_output=True, text=True, timeout=120)
    assert "score" in done.stdout, done.stderr
