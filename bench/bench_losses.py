"""`fused_divergence` against plain autograd over all logits at once, forward and backward.

    python -m pytest bench/bench_losses.py      pytest-benchmark's table
    python -m bench.bench_losses                the same, and last a line of JSON, in milliseconds

Each case asserts first that value and gradients are those of plain autograd.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdistill_kernels.divergences import divergence, fused_divergence
from specdistill_kernels.divergences.targets import Head, TargetStates

SHAPES = [(512, 256, 8_192, 128), (128, 576, 49_152, 64)]  # rows, hidden width, vocabulary, chunk


@pytest.mark.parametrize("how", ["plain", "chunked"])
@pytest.mark.parametrize("loss", ["fkl", "rkl", "lk_hybrid"])
@pytest.mark.parametrize(("rows", "width", "vocab", "chunk"), SHAPES)
def test_losses(  # type: ignore[no-untyped-def]
    benchmark, rows: int, width: int, vocab: int, chunk: int, loss: str, how: str
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(vocab, width) * 2 / width**0.5).requires_grad_()
    near = weight.detach() + torch.randn(vocab, width) / width**0.5
    target = TargetStates(hidden.detach().clone(), Head(near))

    def plain() -> Tensor:
        with torch.no_grad():
            logits = target.head.logits(target.hidden)
        return divergence(Head(weight).logits(hidden), logits, loss=loss).sum()

    def chunked() -> Tensor:
        return fused_divergence(hidden, Head(weight), target, loss=loss, chunk=chunk)

    def step(forward: Callable[[], Tensor]) -> list[Tensor]:
        value = forward()
        return [value.detach(), *torch.autograd.grad(value, [hidden, weight])]

    for a, b in zip(step(chunked), step(plain), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    benchmark(step, {"plain": plain, "chunked": chunked}[how])


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        status = pytest.main([__file__, "-q", f"--benchmark-json={path}", *sys.argv[1:]])
        if status == 0:
            found = json.loads(path.read_text())["benchmarks"]
            medians = {case["param"]: 1e3 * case["stats"]["median"] for case in found}
            print(json.dumps({"torch": torch.__version__, "median_ms": medians}))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
