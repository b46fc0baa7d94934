"""Kernels compile for GPUs that are not here, and spill nothing.

Here a few configurations of each kernel; `python -m specdistill_kernels.aot` compiles them all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton: pip install triton")

FEW = """
import sys
from itertools import cycle
from specdistill_kernels import aot

kernels = {}
for configuration in aot.configurations():
    kernels.setdefault(configuration[0].__name__, []).append(configuration)
rotation = cycle(aot.DEFAULT_TARGETS)
wrong = 0
for found in kernels.values():
    jobs = [(found[0], aot.DEFAULT_TARGETS)]
    jobs += [(found[len(found) * i // 3], [next(rotation)]) for i in (1, 2)]
    for configuration, targets in jobs:
        for line, spilled in aot.table([configuration], targets):
            print(line, flush=True)
            wrong += spilled > 0
print(*sorted(kernels))
sys.exit(wrong)
"""

SPILLING = """
from specdistill_kernels import aot
from specdistill_kernels.verification import triton_backend

kernel, signature, constants, warps, aligned = next(
    c for c in triton_backend.configurations() if c[0].__name__ == "tally_kernel"
)
wide = (kernel, signature, {**constants, "BLOCK": 16384}, warps, aligned)
wrong = (kernel, signature, {**constants, "BLOCK": 1000}, warps, aligned)
aot.configurations = lambda: [wide, wrong]
raise SystemExit(aot.main(["sm_90"]))
"""


DIVISIONS = """
from specdistill_kernels import aot
from specdistill_kernels.verification import triton_backend

for kernel, signature, constants, warps, aligned in triton_backend.configurations():
    if "BLOCK" in constants and signature["target"] == "*bf16" and constants["UNIT"] == 16:
        if kernel.__name__ != "cut_kernel":  # of few tokens
            configuration = aot.Configuration(kernel, signature, constants, warps, aligned)
            ptx = aot.compiled(configuration, "sm_90").asm["ptx"]
            slow = max(ptx.count("div.full.f32"), ptx.count("div.rn.f32"))
            slow = max(slow, ptx.count("ex2.approx.f32"), ptx.count("lg2.approx.f32"))
            print(kernel.__name__, slow, constants["BLOCK"] // (32 * warps))
"""


def run(folder: Path, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_every_kernel_compiles_for_every_target_and_spills_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", FEW)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    kernels = lines[-1].split()
    own = (
        "cut_kernel decide_kernel excess_kernel race_kernel sample_kernel stats_kernel tally_kernel"
    )
    assert set(own.split()) <= set(kernels)
    for kernel in kernels:
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert any(line.split()[:2] == [target, kernel] for line in lines)


def test_no_token_costs_a_division_or_a_slow_exponential(tmp_path: Path) -> None:
    """Some are left, for a row or a part of one."""
    done = run(tmp_path, "-c", DIVISIONS)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 5
    assert all(int(slow) < max(int(tokens), 12) for _, slow, tokens in lines), lines


def test_spills_and_kernels_that_do_not_compile_fail(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", SPILLING)
    assert done.returncode == 1
    assert "2 of them spill registers or do not compile" in done.stderr
    assert "arange" in done.stdout or "power of 2" in done.stdout


@pytest.mark.parametrize(
    ("target", "interpret", "message"),
    [("sm_1", False, "no target 'sm_1'; choose among sm_80"), ("sm_90", True, "unset TRITON_IN")],
)
def test_what_cannot_be_compiled_is_said(
    tmp_path: Path, target: str, interpret: bool, message: str
) -> None:
    done = run(tmp_path, "-m", "specdistill_kernels.aot", target, interpret=interpret)
    assert done.returncode == 2
    assert message in done.stderr
