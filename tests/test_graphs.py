"""Captured passes on the CPU: buffers, keys and lifetimes as CUDA graphs have them, but no CUDA."""

from collections.abc import Callable, Iterator

import pytest
import torch
from dispatch import EagerCapture, eager_capture

from specdistill.decoding import Drafting, Sampling, SpeculativeDecoder, drafter_for, graphs
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.parallel import set_parallel

Tiny = Callable[..., LanguageModel]
PROMPTS = [[7, 8, 9], [5], list(range(5, 45)), [11, 12], [9] * 17]


@pytest.fixture
def recorder() -> Iterator[type[EagerCapture]]:
    with eager_capture() as capture:
        yield capture


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("way", ["fixed", "early", "parallel"])
def test_captured_passes_change_no_token(
    tiny: Tiny,
    recorder: type[EagerCapture],
    sampling: Sampling,
    batch_size: int,
    way: str,
) -> None:
    target = tiny(1, layers=3, dtype=torch.float64)
    draft = make_draft(target, [0, 1])
    if way == "parallel":
        set_parallel(draft, 63, 4)
    drafting = Drafting(least_reach=0.2 if way == "early" else 0.0)

    def texts(cuda_graphs: bool) -> list[list[int]]:
        decoder = SpeculativeDecoder(
            target,
            drafter_for(draft, 64, drafting, cuda_graphs=cuda_graphs),
            num_draft_tokens=4,
            batch_size=batch_size,
            keep_hidden=True,
            cuda_graphs=cuda_graphs,
        )
        run = decoder.generate(PROMPTS, max_new_tokens=40, sampling=sampling)
        for output in run.outputs:  # what a caller keeps must survive the next replay
            hidden = torch.cat([r.hidden for r in output.rounds if r.hidden is not None])
            logsumexp = torch.cat([r.logsumexp for r in output.rounds if r.logsumexp is not None])
            assert torch.allclose(target.logits(hidden).logsumexp(-1), logsumexp)
        return [output.tokens for output in run.outputs]

    expected = texts(False)
    assert recorder.captures == 0
    assert texts(True) == expected
    assert recorder.replays > 2 * recorder.captures, "shapes should repeat"


def test_a_graph_sees_new_inputs_and_keeps_its_output_in_place() -> None:
    captured = graphs.Graphs(torch.device("cpu"), EagerCapture())
    one = captured.run("double", lambda x: 2 * x, torch.tensor([1.0, 2.0]))
    assert one.tolist() == [2, 4]
    two = captured.run("double", lambda x: pytest.fail("captured twice"), torch.tensor([3.0, 4.0]))
    assert two is one
    assert one.tolist() == [6, 8]
    captured.clear()
    assert captured.run("double", lambda x: 3 * x, torch.tensor([1.0, 2.0])).tolist() == [3, 6]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_option_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="CUDA device"):
        SpeculativeDecoder(tiny(), cuda_graphs=True).generate([[5, 6]], max_new_tokens=2)
