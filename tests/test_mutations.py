"""Would the lossless suite see a wrong engine? Each test plants one bug, of the kinds that real
engines shipped, and one of the checks must fail. The run ends with a table of what caught what.
"""

import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import checks
import pytest
from chains import WARM, Setting
from evidence_checks import check_failed, check_figures, check_tie
from score_checks import check_choice, check_interval, check_row

from specdistill.decoding.cache import CachedModel, attention_mask
from specdistill.decoding.captured import CapturedStream, Workspace
from specdistill.decoding.drafters import CombinedStream, ModelStream, _NgramIndex
from specdistill.decoding.engine import _Stream
from specdistill.decoding.parallel import ParallelDrafter, ParallelStream
from specdistill.decoding.rounds import RowState, verify_round
from specdistill.decoding.row import Row
from specdistill.decoding.sampling import row_seed
from specdistill.scoring import card_evidence, contradictions, rows, scorecard
from specdistill.scoring.choice import choose
from specdistill.scoring.lossless import explain_difference
from specdistill.scoring.statistics import ratio_of_sums
from specdistill_kernels.verification import noise, reference
from specdistill_kernels.verification.reference import Proposals

STREAMS = {
    "near": Setting(lengths=4),
    "near block": Setting(WARM, "near", "block", 5),
    "trimmed": Setting(WARM, "trimmed"),
    "adaptive": Setting(WARM, "near", "token", checks.ADAPTIVE),
    "both": Setting(WARM, "both", "token", 4),
    "parallel": Setting(WARM, "parallel", lengths=4),
    "parallel block": Setting(WARM, "parallel inside", "block", 4),
}

# In the order of their cost: a mutation is tried on all of them until one fails.
CHECKS: dict[str, Callable[[], None]] = {
    "coin at its ends": partial(checks.check_coin_ends, "token"),
    "coin at its ends, block": partial(checks.check_coin_ends, "block"),
    "ties": checks.check_ties,
    "a certain token": checks.check_certain,
    "a filter's edge": checks.check_filter_edge,
    "look-up": checks.check_look_up,
    "noise": checks.check_noise,
    "a score's row": check_row,
    "a score's interval": check_interval,
    "a score's choice": check_choice,
    "a tie": check_tie,
    "a verdict that failed": check_failed,
    "a card's figures": check_figures,
    "tail mass": partial(checks.check_tail, 20.0),
    "rounds": partial(checks.check_rounds, "token"),
    "rounds, opposite": partial(checks.check_rounds, "token", draft="opposite"),
    "rounds, filtered": partial(checks.check_rounds, "token", temperature=0.7, top_k=6),
    "rounds, block": partial(checks.check_rounds, "block"),
    "rounds, opposite block": partial(
        checks.check_rounds, "block", draft="opposite", temperature=2.0
    ),
    "other texts for other rows": checks.check_same_prompt_other_text,
    "identity": partial(checks.check_identity, "token", 1.0),
    "greedy, itself": partial(checks.check_greedy, "itself"),
    "greedy, half": partial(checks.check_greedy, "half"),
    "greedy, both": partial(checks.check_greedy, "both", "token", checks.ADAPTIVE, 2),
    "draft's cache": partial(checks.check_draft_cache, "half"),
    "draft's cache, both": partial(checks.check_draft_cache, "both"),
    "draft's cache, parallel": partial(checks.check_draft_cache, "parallel"),
    "draft's cache, mask in a trimmed vocabulary": partial(
        checks.check_draft_cache, "parallel inside"
    ),
    "target's cache": partial(checks.check_target_cache, "half"),
    "invariance": partial(checks.check_invariance, "half", batches=1),
    "captured": partial(checks.check_captured, "half"),
    "captured, itself": partial(checks.check_captured, "itself"),
    "captured, wide": partial(checks.check_captured, "half", 3, 9),
    "rows on the device": checks.check_rows_on_the_device,
    "captured twice": checks.check_captured_again,
    "captured until it fails": checks.check_capture_that_fails,
    "captured until it fails, wide": partial(checks.check_capture_that_fails, "half", 2, 5),
    "paper's example": checks.check_toy_example,
    "coins, block": checks.check_coins_are_spent,
    **{
        f"stream, {name}": partial(checks.check_stream, setting, rows=300, length=60)
        for name, setting in STREAMS.items()
    },
}


# In a function, the one place that reads as the first text becomes the second.
Edit = tuple[Callable[..., Any], str, str]

# By the check that should see them, and by name.
MUTATIONS: dict[str, dict[str, list[Edit]]] = {
    "rounds, opposite": {
        "draft, coin and residual share their noise": [(noise._parts, "* 4 + domain", "* 4")],
        "the draft's noise is used again for the residual": [
            (reference._verify_sampled, "num_accepted, FINAL", "num_accepted, 1")
        ],
        "the residual is drawn from p": [
            (reference._verify_sampled, "weights[rejected[some]] = residual[some]", "pass")
        ],
    },
    "rounds": {
        "the coin's noise is used again for the residual": [
            (reference._verify_sampled, "COIN, index", "FINAL, index")
        ],
        "one coin for all positions of a round": [
            (reference._verify_sampled, "index[:num].expand(", "index.new_zeros(num).expand(")
        ],
        "the draft takes its best token, q stays soft": [
            (reference.race, "return torch", "return weights.argmax(-1) if domain == 1 else torch")
        ],
        "the ratio upside down": [
            (reference.token_rule, "coins * q_x.double() < p_x.double()", "coins * p_x < q_x")
        ],
    },
    "stream, near": {
        "the same coins in each round": [
            (reference._verify_sampled, "(seeds, step,", "(seeds, step * 0,")
        ],
        "the step does not advance": [(Row.advance, "self.steps += 1", "self.steps += 0")],
        "a drawn token is withheld where the draft is unsure": [
            (
                ModelStream.propose,
                "        counts,\n",
                (
                    "        (torch.stack(all_logits, 1).softmax(-1)"
                    ".gather(-1, torch.stack(tokens, 1)[..., None])[..., 0] > 0.3)"
                    ".long().cumprod(-1).sum(-1).tolist(),\n"
                ),
            )
        ],
        "tested counts all proposals": [
            (Row.advance, "min(accepted + 1, proposed, len(tokens))", "proposed")
        ],
    },
    "coins, block": {
        "the same coins in each round, block verification": [
            (reference._verify_sampled, "(seeds, step,", '(seeds, step * (mode == "token"),')
        ],
        "block verification's coins belong to places in the text, so that some are seen twice": [
            (noise._parts, "(step * 256 + position)", "(step + position)"),
            (_Stream._context, "row.steps", "row.emitted"),
        ],
    },
    "other texts for other rows": {
        "rows share a seed": [(row_seed, "{seed}:{request_id}", "{seed}")],
    },
    "rounds, filtered": {
        "q from the draft's unwarped logits": [
            (reference.verify, "*settings, pick(draft_lse)", "torch.ones_like(settings[0])")
        ],
        "the draft samples without the filters that q has": [
            (reference.sample, "if rows.filtered:", "if False:")
        ],
        "the residual is warped again": [
            (
                reference._verify_sampled,
                "some = residual",
                "residual = residual ** (1 / 0.7)\n        some = residual",
            )
        ],
    },
    "a filter's edge": {
        "q is rounded otherwise than what the draft samples": [
            (reference.verify, "draft_lse = None", "pass")
        ],
    },
    "coin at its ends": {
        "u q <= p keeps a token of probability 0 at a coin of 0": [
            (reference.token_rule, "< p_x", "<= p_x")
        ],
    },
    "coin at its ends, block": {
        "block verification keeps a token of probability 0 at a coin of 0": [
            (reference.block_rule, "(coins < chance)", "(coins <= chance)")
        ],
    },
    "stream, adaptive": {
        "a row that proposed less than the others counts as rejected": [
            (reference._verify_sampled, "(num_accepted < offered.sum(-1))", "(num_accepted < num)")
        ],
        "the number of proposals depends on whether the target likes them": [
            (
                _Stream.round,
                "lengths=torch.tensor(counts, device=tokens.device),",
                (
                    "lengths=torch.tensor(counts, device=tokens.device).minimum("
                    "(draft.tokens == logits[:, :-1].argmax(-1)).long().cumprod(-1).sum(-1)),"
                ),
            )
        ],
    },
    "rounds, opposite block": {
        "block verification with the token rule's residual": [
            (reference._verify_sampled, "] * joint[:, None].to(p.dtype)", "]")
        ],
    },
    "rounds, block": {
        "block verification with unscaled chances": [
            (reference.block_rule, "joint[:, 1:num, None].to(p.dtype) * p", "1 * p")
        ],
    },
    "paper's example": {
        "block verification as the token rule": [
            (reference._verify_sampled, 'mode == "token"', "True")
        ],
    },
    "ties": {
        "ties at the top-k threshold are cut": [
            (reference.probabilities, "p >= kth,", "p.argsort(-1, True).argsort(-1) < k,")
        ],
    },
    "tail mass": {
        "noise of 24 bits": [(noise.exponential, "bits.float()", "(bits // 256 * 256).float()")],
    },
    "stream, both": {
        "look-up rows count as drawn from q": [
            (_Stream.round, "point_mass=draft.point_mass", "point_mass=None")
        ],
    },
    "stream, trimmed": {
        "a trimmed vocabulary's probabilities one column off": [
            (Proposals.chances, "self.vocab, column)", "self.vocab, column, right=True)")
        ],
        "a trimmed vocabulary's residual in the draft's own ids": [
            (Proposals.residual, "p[..., self.vocab] -= q", "p[..., : len(self.vocab)] -= q")
        ],
    },
    "greedy, both": {
        "the number of proposals is another row's": [
            (_Stream.round, "torch.tensor(counts,", "torch.tensor(counts[::-1],")
        ],
    },
    "greedy, half": {
        "the cached length is another row's": [
            (_Stream._context, "torch.tensor(lengths,", "torch.tensor(lengths[::-1],")
        ],
        "the target's positions one off": [
            (_Stream.round, "positions = start +", "positions = start + 1 +")
        ],
        "a stale slot is seen": [(attention_mask, "slots <= here", "slots <= 1 + here")],
        "rows leave the batch, and the target's cache keeps the wrong ones": [
            (CachedModel.keep, "torch.tensor(rows,", "torch.tensor(rows[::-1],")
        ],
    },
    "identity": {
        "the bonus token is dropped": [
            (_Stream.round, "+ 1]", "+ (not counts[i] or accepted[i] < counts[i])]")
        ],
        "rows leave the batch, and the draft's cache keeps the wrong ones": [
            (ModelStream.keep, "self.cached.keep(rows)", "self.cached.keep(rows[::-1])")
        ],
    },
    "greedy, itself": {
        "EOS inside the accepted prefix is ignored": [
            (Row.advance, "in enumerate(tokens) if", "in [*enumerate(tokens)][-1:] if")
        ],
    },
    "draft's cache": {
        "the draft's cache one off after full acceptance": [
            (ModelStream.propose, "steps - 1 for row", "steps for row"),
            (ModelStream.propose, "max(2, *missing)", "max(1, *missing)"),
        ],
    },
    "draft's cache, both": {
        "the draft forgets to rewind": [(ModelStream.rewind, "[min(pair) for", "[max(pair) for")],
        "the draft takes for read what it proposed beside the look-up": [
            (CombinedStream.propose, "in enumerate(matches):", "in []:")
        ],
    },
    "draft's cache, parallel": {
        "masks' slots are kept, and later text sees masks in the place of accepted tokens": [
            (ParallelStream.run, "[len(row) for", "[len(row) + num_tokens - 1 for")
        ],
        "masks stand one position too far": [
            (ParallelStream.run, "torch.arange(1, num_tokens,", "1 + torch.arange(1, num_tokens,")
        ],
        "masks stand one position too early, over the last token": [
            (ParallelStream.run, "torch.arange(1, num_tokens,", "torch.arange(num_tokens - 1,")
        ],
        "every row's masks stand where the longest row ends": [
            (
                ParallelStream.run,
                "context.lengths[:, None]",
                "context.lengths.clamp(min=context.longest)[:, None]",
            )
        ],
        "a place's token by the states of the place before": [
            (ParallelStream.run, "hidden[:, width", "hidden.roll(1, 1)[:, width")
        ],
        "the mask token is proposed": [
            (ParallelDrafter.columns, "logits[..., self.mask_column].fill_(-math.inf)", "pass")
        ],
    },
    "stream, parallel": {
        "another place's logits for the q of a parallel draft": [
            (ParallelStream._draw, "logits, logsumexp, self", "logits.roll(1, 1), logsumexp, self")
        ],
        "another place's logsumexp for the q of a parallel draft": [
            (ParallelStream._draw, "logits, logsumexp, self", "logits, logsumexp.roll(1, 1), self")
        ],
        "one noise for all places of a parallel round": [
            (reference.sample_places, "places.repeat(batch)", "0")
        ],
    },
    "draft's cache, mask in a trimmed vocabulary": {
        "the mask token of a trimmed vocabulary is looked for by its id": [
            (ParallelDrafter._mask_column, " if self.vocab is None else self.vocab", "")
        ],
    },
    "rows on the device": {
        "captured: EOS inside the accepted prefix is ignored": [
            (RowState.advanced, "(ends, index + 1,", "(ends & False, index + 1,")
        ],
        "captured: an end by EOS is not seen": [
            (RowState.advanced, "self.done | ends.any(-1) |", "self.done |")
        ],
        "captured: a row that is done goes on": [
            (RowState.advanced, "torch.where(self.done, 0, count)", "count")
        ],
    },
    "captured": {
        "captured: the last tokens are one off": [
            (RowState.advanced, "after = count[:, None] +", "after = count[:, None] - 1 +")
        ],
        "captured: the same noise in each round": [
            (RowState.advanced, "step=self.step + ~self.done", "step=self.step")
        ],
        "captured: the target's positions one off": [
            (verify_round, "state.lengths[:, None] +", "state.lengths[:, None] + 1 +")
        ],
        "captured: one place's noise for all proposals": [
            (ModelStream.draft_round, "position=i", "position=0")
        ],
        "captured: a report is overwritten before it is read": [
            (Workspace.to_host, "self.reports.reverse()", "pass")
        ],
        "captured: a new row's round is taken for that of the row before it": [
            (CapturedStream._launch, "list(self.rows),", "self.rows,")
        ],
        "captured: too few slots are seen": [
            (Workspace.visible, "slots < needed", "slots < needed - 8")
        ],
    },
    "captured, itself": {
        "captured: the lengths are one off after full acceptance": [
            (
                RowState.advanced,
                "self.lengths + count",
                "self.lengths + count.clamp(max=emitted.shape[1] - 1)",
            )
        ],
        "captured: a proposal more counts than fits": [
            (verify_round, "(state.left - 1)", "state.left")
        ],
        "captured: the draft does not catch up": [
            (ModelStream.draft_round, "state.tail[:, -2:]", "state.tail[:, -1:]"),
            (ModelStream.draft_round, "places[:, :2]", "places[:, 1:2]"),
        ],
    },
    "captured, wide": {
        "captured: rows that go on take others' settings": [
            (Workspace.compact, "self.state.at(index)", "self.state.at(index.flip(0))")
        ],
        "captured: rows that go on take others' slots": [
            (CachedModel.compact, "layer.copy(index,", "layer.copy(index.flip(0),")
        ],
    },
    "captured twice": {
        "captured: a later stream meets the rows of the one before it": [
            (Workspace.reset, "self.cached.reset(batch)", "pass")
        ],
    },
    "captured until it fails": {
        "captured: requests that wait are lost where a round cannot be captured": [
            (CapturedStream.unfinished, " + list(self.waiting)", "")
        ],
    },
    "captured until it fails, wide": {
        "captured: rows that ended go on where a round cannot be captured": [
            (CapturedStream.unfinished, "row and not row.finished", "row")
        ],
    },
    "noise": {
        "a place's noise is the next step's from place 16 on": [
            (noise._parts, "step * 256", "step * 16")
        ],
        "tokens 1,024 apart share their noise": [
            (noise._bits, "(tokens * _GOLDEN", "(tokens % 1024 * _GOLDEN")
        ],
        "the upper half of a row's seed is not read": [(noise._bits, "(high, place)", "(place,)")],
        "a row's seed has 16 bits": [(row_seed, 'digest, "little") >> 1', 'digest[:2], "little")')],
    },
    "look-up": {
        "the look-up proposes from one place too far": [
            (_NgramIndex.follow, "[place : place + count]", "[place + 1 : place + 1 + count]")
        ],
    },
    "a score's interval": {
        "an interval by the spread of n, not n - 1, prompts": [
            (ratio_of_sums, "error *= math.sqrt(num_prompts / (num_prompts - 1))", "pass")
        ],
    },
    "a score's row": {
        "the prompt's prefill counts as verifying": [
            (rows.by_prompt, 'seconds_without("draft", "prefill")', 'seconds_without("draft")')
        ],
        "the prompt's prefill counts as stepping": [
            (rows.by_prompt, 'base.seconds_without("prefill")', "base.seconds")
        ],
        "a speedup predicted from γ draft steps a round, not those taken": [
            (rows.with_costs, 'spent["draft"] / row.rounds', "row.num_draft_tokens * draft_step")
        ],
    },
    "a score's choice": {
        "γ is judged on the prompts that chose it": [
            (
                choose,
                "{True: _fastest(settings, other), False:",
                "{False: _fastest(settings, other), True:",
            )
        ],
    },
    "a tie": {
        "every difference of greedy texts passes for a tie": [
            (explain_difference, "decided and rounding <= most_rounding(target, one)", "True")
        ],
        "a tie is decided by its size alone": [
            (explain_difference, "decided and rounding", "rounding")
        ],
    },
    "a verdict that failed": {
        "greedy texts that differ without a reason do not count": [
            (card_evidence._failures, "if unexplained > 0:", "if False:")
        ],
        "evidence that failed leaves the verdict as it was": [
            (scorecard.Scorecard.__post_init__, "if self.failures:", "if False:")
        ],
        "a draft pays though its evidence failed": [
            (scorecard._failed, "pays=False", "pays=verdict.pays")
        ],
    },
    "a card's figures": {
        "rates in sum are believed": [
            (contradictions.changed_figures, "_derived(row, base, prompts, weights)", "[]")
        ],
        "intervals are believed": [
            (contradictions.changed_figures, "not all(map(math.isnan, row.speedup_ci95))", "False")
        ],
    },
}


def plant(monkeypatch: pytest.MonkeyPatch, edits: list[Edit]) -> None:
    """Swap the code of the functions, which reaches every module that has imported them."""
    sources: dict[Callable[..., Any], str] = {}
    for function, old, new in edits:
        source = sources.get(function) or textwrap.dedent(inspect.getsource(function))
        assert source.count(old) == 1, f"{function.__qualname__} has {source.count(old)} x {old!r}"
        sources[function] = source.replace(old, new)
    for function, source in sources.items():
        code = compile(source, "mutation", "exec", __future__.annotations.compiler_flag, True)
        scope: dict[str, Any] = {}
        exec(code, function.__globals__, scope)
        monkeypatch.setattr(function, "__code__", scope[function.__name__].__code__)


@pytest.fixture(scope="module")
def caught(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, str, str]]]:
    """Lines for the table at the end of the run."""
    lines: list[tuple[str, str, str]] = []

    class Summary:
        def pytest_terminal_summary(self, terminalreporter: Any) -> None:
            terminalreporter.section("planted bugs and what caught them")
            for name, check, reason in lines:
                terminalreporter.write_line(f"{name} -> caught by {check}: {reason}")

    request.config.pluginmanager.register(Summary())
    return lines


def test_all_checks_pass_on_the_engine_as_it_is() -> None:
    for check in CHECKS.values():
        check()


@pytest.mark.parametrize(
    ("bug", "first"), [(bug, check) for check, bugs in MUTATIONS.items() for bug in bugs]
)
def test_a_planted_bug_is_caught(
    bug: str, first: str, monkeypatch: pytest.MonkeyPatch, caught: list[tuple[str, str, str]]
) -> None:
    plant(monkeypatch, MUTATIONS[first][bug])
    for name in [first, *(name for name in CHECKS if name != first)]:
        try:
            CHECKS[name]()
        except Exception as error:  # a broken engine may also trip over itself
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            caught.append((bug, name, reason))
            return
    pytest.fail(f"nothing saw that {bug}")
