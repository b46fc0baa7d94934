"""`sample` and `verify` on this device: `python -m pytest bench/bench_verify.py`.

Each case asserts first that the emitted tokens are those of a one-row-at-a-time computation, and on
a GPU that Triton and the reference emit the same.
"""

from typing import Any

import pytest
import torch

from specdistill_kernels import RowSettings, sample, verify

V, VD = 49_152, 3_072
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference"] if DEVICE == "cpu" else ["reference", "triton"]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T=1": {},
    "block": {"mode": "block"},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
}


def case(batch: int, num: int, settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    seeds = torch.arange(batch, device=DEVICE)
    columns = {
        name: torch.full((batch,), value, device=DEVICE)
        for name, value in {"temperature": 1.0, **settings}.items()
        if name != "mode"
    }
    rows = RowSettings(seeds=seeds, step=torch.zeros_like(seeds), **columns)
    vocab = torch.arange(VD, device=DEVICE) * 16
    target = torch.randn(batch, num + 1, V, device=DEVICE) * 3
    draft = target[:, :num, vocab] + torch.randn(batch, num, VD, device=DEVICE)
    proposals = [vocab[sample(draft[:, i], rows, position=i).tokens] for i in range(num)]
    return {
        "draft_tokens": torch.stack(proposals, 1),
        "draft_logits": draft,
        "target_logits": target,
        "lengths": torch.full((batch,), num, device=DEVICE),
        "draft_vocab": vocab,
        "mode": settings.get("mode", "token"),
        "rows": rows,
    }


def only(arguments: dict[str, Any], b: int) -> dict[str, Any]:
    one, shared = slice(b, b + 1), ("draft_vocab", "mode", "rows")
    alone = {k: v if k in shared else v[one] for k, v in arguments.items()}
    return alone | {"rows": arguments["rows"].of(one)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("num", [3, 5])
@pytest.mark.parametrize("batch", [1, 8])
def test_verify(benchmark, batch: int, num: int, setting: str, backend: str) -> None:
    arguments = case(batch, num, SETTINGS[setting])
    together = verify(**arguments, backend=backend).tokens
    assert torch.equal(together, verify(**arguments, backend="reference").tokens)
    for b in range(batch):
        assert torch.equal(verify(**only(arguments, b), backend=backend).tokens[0], together[b])
    benchmark(timed(verify), **arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", ["greedy", "T=1", "top-p"])
@pytest.mark.parametrize("batch", [1, 8])
def test_sample(benchmark, batch: int, setting: str, backend: str) -> None:
    arguments = case(batch, 1, SETTINGS[setting])
    rows: RowSettings = arguments["rows"]
    logits = arguments["target_logits"][:, 0]
    together = sample(logits, rows, position=0, backend=backend).tokens
    assert torch.equal(together, sample(logits, rows, position=0, backend="reference").tokens)
    for b in range(batch):
        alone = sample(logits[b : b + 1], rows.of(slice(b, b + 1)), position=0, backend=backend)
        assert torch.equal(alone.tokens[0], together[b])
    benchmark(timed(sample), logits, rows, position=0, backend=backend)


def timed(op):
    """The op until its result is there."""

    def run(*arguments: Any, **options: Any) -> None:
        op(*arguments, **options)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
