"""Compiles every Triton kernel for GPUs that need not be here, and shows what it takes of them.

    python -m specdistill_kernels.aot [sm_80 sm_90 ...]

prints registers, bytes a thread spills to memory, and bytes of shared memory of each configuration
that can be launched, and exits with 1 if one spills or does not compile. The interpreter accepts
things that the compiler refuses, and cannot see spills, so the tests need both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
}
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MODULES = ("verification", "divergences")


class Configuration(NamedTuple):
    """One compiled form that a launch can ask for. Pointers are aligned to 16 bytes, as the JIT
    takes those of torch's allocations."""

    kernel: Any
    signature: dict[str, str]  # of the arguments that are not constants
    constexprs: dict[str, Any]
    num_warps: int
    divisible_by_16: tuple[str, ...]  # integer arguments


class Usage(NamedTuple):
    """What one compiled kernel takes: registers a thread, bytes it spills of them to memory, and
    bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def compiled(configuration: Configuration, target: str) -> Any:
    """The kernel in this form, compiled for one of `TARGETS`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constexprs, num_warps, divisible = configuration
    types = {
        name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attributes)
    return triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options={"num_warps": num_warps}
    )


def usage(kernel: Any, target: str) -> Usage:
    """Read from the assembler's own report, or from the AMD kernel's metadata."""
    shared = kernel.metadata.shared
    if "ptx" not in kernel.asm:
        metadata = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return int(_number(rf"\.{name}:\s+(\d+)", metadata))

        # Scalar registers parked in lanes of vector registers (sgpr_spill_count) go to no memory.
        spilled = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
        return Usage(field("vgpr_count"), spilled, shared)

    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    architecture = _number(r"\.target\s+([^\s,]+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        command = [get_ptxas(TARGETS[target][1]).path, "-v", f"--gpu-name={architecture}"]
        command += [path, "-o", os.path.join(folder, "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return Usage(int(_number(r"Used (\d+) registers", report)), spilled, shared)


def _number(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report has no {pattern!r}; got:\n{text[:2000]}")
    return match.group(1)


def configurations() -> Iterator[Configuration]:
    """Those of all kernel modules."""
    for module in MODULES:
        yield from import_module(f"specdistill_kernels.{module}.triton_backend").configurations()


def table(found: Iterable[Configuration], targets: Iterable[str]) -> Iterator[tuple[str, int]]:
    """A line of text for each configuration and target, and how much it spills (1 if it does not
    compile)."""
    yield f"{'target':7} {'kernel':20} {'registers':>9} {'spilled':>7} {'shared':>6}  ", 0
    for configuration in found:
        kernel, signature, constexprs, num_warps, divisible = configuration
        logits = [kind[1:] for name, kind in signature.items() if kind[1:] in _FLOATS]
        what = " ".join(
            [
                "/".join(dict.fromkeys(logits)),
                *(f"{name}={value}" for name, value in constexprs.items()),
                f"warps={num_warps}",
                *(f"16|{name}" for name in divisible),
            ]
        )
        for target in targets:
            start = time.perf_counter()
            name = f"{target:7} {kernel.__name__:20}"
            try:
                use = usage(compiled(configuration, target), target)
            except Exception as error:  # the compiler's errors have no common base
                yield f"{name} {_reason(error)}  {what}", 1
                continue
            seconds = time.perf_counter() - start
            yield (
                f"{name} {use.registers:9} {use.spilled:7} {use.shared:6}  {what} {seconds:.1f}s",
                use.spilled,
            )


_FLOATS = ("fp32", "bf16", "fp16")


def _reason(error: BaseException) -> str:
    """In one line, what is at the bottom of a chain of "at line ..." errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def main(arguments: list[str]) -> int:
    unknown = [target for target in arguments if target not in TARGETS]
    if unknown:
        sys.stderr.write(f"error: no target {unknown[0]!r}; choose among {', '.join(TARGETS)}\n")
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.stderr.write("error: unset TRITON_INTERPRET; interpreted kernels do not compile\n")
        return 2
    failures = 0
    for line, spilled in table(configurations(), arguments or DEFAULT_TARGETS):
        sys.stdout.write(line.rstrip() + "\n")
        sys.stdout.flush()
        failures += spilled > 0
    if failures:
        sys.stderr.write(f"error: {failures} of them spill registers or do not compile\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
