"""Held-out measures while a draft is trained, and which weights a run ends with."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_runs import interrupted, pair_of, run, settings

from specdistill import models
from specdistill.data.token_store import read_examples
from specdistill.decoding import ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.errors import InputError
from specdistill.models.head_only import load_head
from specdistill.training.answers import split
from specdistill.training.evaluation import Evaluation
from specdistill.training.run import train

DECODE = {"prompts": 5, "max_new_tokens": 9, "num_draft_tokens": 3}


@pytest.mark.parametrize(("temperature", "least_reach"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.04)])
def test_the_rows_hold_what_the_engine_measures(
    world: dict[str, str], tmp_path: Path, temperature: float, least_reach: float
) -> None:
    """The untrained draft and the saved one, each decoded by hand, one prompt at a time."""
    decode = DECODE | {"temperature": temperature, "least_reach": least_reach}
    rows = run(settings(world, tmp_path / "run", decode=decode, training={"max_steps": 40}))
    target = models.load(world["target"], dtype="float32")
    answers = read_examples(Path(world["data"]), signal=False)
    heldout, _ = split(answers, 5)
    lengths = set()
    for row, folder in ((rows[0], world["draft"]), (rows[-1], tmp_path / "run" / "draft")):
        draft = models.load(str(folder), dtype="float32")
        emitted = rounds = accepted = tested = 0
        for example in heldout:
            drafter = ModelDrafter(draft, target.vocab_size, least_reach=least_reach)
            decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=3)
            request = Request(example.id, example.prompt_tokens, 9, Sampling(temperature))
            (output,) = decoder.run([request]).outputs
            emitted += len(output.tokens)
            rounds += len(output.rounds)
            accepted += sum(r.accepted for r in output.rounds)
            tested += sum(r.tested for r in output.rounds)
            lengths |= {r.proposed for r in output.rounds[:1]}
        assert row["block_efficiency"] == pytest.approx(emitted / rounds)
        assert row["acceptance_rate"] == pytest.approx(accepted / tested)
        assert row["num_draft_tokens"] == 3
    assert (lengths == {3}) == (least_reach == 0), "it ends some proposals early"
    evaluated = [row for row in rows[:-1] if "expected_alpha" in row]
    assert [row["step"] for row in evaluated] == [0, *range(5, 41, 5)]
    taus = [row["block_efficiency"] for row in evaluated]
    assert rows[-1]["block_efficiency"] == max(taus) > taus[0]
    assert rows[-1]["step"] == 40


def test_the_best_weights_are_kept_and_survive_an_interruption(
    world: dict[str, str], tmp_path: Path
) -> None:
    """Evaluations at steps 0, 5, 10 and 12; τ is best at 5, α and the loss are best at the end."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    steps = iter((0, 5, 10, 12))

    def measures(evaluation: Evaluation) -> dict[str, float]:
        step = next(steps)
        seen[step] = {
            name: value.detach().clone() for name, value in evaluation.distiller.parameters.items()
        }
        tau = {0: 1.0, 5: 2.0, 10: 1.5, 12: 1.9}[step]
        return {"expected_alpha": step / 12, "greedy_match": 0.0, "block_efficiency": tau}

    config = settings(world, tmp_path / "run", decode=DECODE)
    with mock.patch.object(Evaluation, "measure", measures):
        interrupted(config, 9)  # the checkpoint is of step 8
        steps = iter((10, 12))
        rows = run(config, resume=True)
    assert (rows[-1]["kept_step"], rows[-1]["block_efficiency"]) == (5, 2.0)
    assert [row["step"] for row in rows if "kept_step" in row] == [12]
    assert [row["step"] for row in rows if "expected_alpha" in row] == [0, 5, 10, 12, 12]
    saved = models.load(str(tmp_path / "run/draft"), dtype="float32").model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in seen[5].items())
    assert not all(torch.equal(saved[name], value) for name, value in seen[10].items())
    assert run(config, resume=True) == rows, "a finished run, resumed"


def test_without_a_decode_expected_alpha_chooses(world: dict[str, str], tmp_path: Path) -> None:
    alphas: Iterator[float] = iter((0.1, 0.5, 0.5, 0.4))

    def measures(_: Evaluation) -> dict[str, float]:
        return {"expected_alpha": next(alphas), "greedy_match": 0.0}

    with mock.patch.object(Evaluation, "measure", measures):
        rows = run(settings(world, tmp_path / "run", decode=None))
    assert rows[-1]["kept_step"] == 10, "of equals the later one"


def test_a_head_alone_cannot_decode(world: dict[str, str], tmp_path: Path) -> None:
    bare = load_head(world["target"], dtype="float32")
    with pytest.raises(InputError, match=r"its head alone was read.*decode: null"):
        train(settings(world, tmp_path / "run"), bare, pair_of(world)[1])
    assert not (tmp_path / "run").exists()
