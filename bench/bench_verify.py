"""`sample` and `verify` on this device: `python -m pytest bench/bench_verify.py`.

Each case asserts first that the emitted tokens are those of a one-row-at-a-time computation.
"""

import pytest
import torch

from specdistill_kernels import sample, verify

V, VD = 49_152, 3_072


def case(batch: int, num: int, temperature: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows = {
        "temperature": torch.full((batch,), temperature),
        "seeds": torch.arange(batch),
        "step": torch.zeros(batch, dtype=torch.int64),
    }
    vocab = torch.arange(VD) * 16
    target = torch.randn(batch, num + 1, V) * 3
    draft = target[:, :num, vocab] + torch.randn(batch, num, VD)
    proposals = [vocab[sample(draft[:, i], position=i, **rows).tokens] for i in range(num)]
    return {
        "draft_tokens": torch.stack(proposals, 1),
        "draft_logits": draft,
        "target_logits": target,
        "lengths": torch.full((batch,), num),
        "draft_vocab": vocab,
        **rows,
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num", [3, 5])
@pytest.mark.parametrize("batch", [1, 8])
def test_verify(benchmark, batch: int, num: int, temperature: float) -> None:
    arguments = case(batch, num, temperature)
    together = verify(**arguments).tokens
    for b in range(batch):
        row = {k: v if k == "draft_vocab" else v[b : b + 1] for k, v in arguments.items()}
        assert torch.equal(verify(**row).tokens[0], together[b])
    benchmark(verify, **arguments)
