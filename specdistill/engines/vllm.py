"""vLLM as an engine, in an environment of its own that the user names.

One process for plain decoding and one for each γ, since an engine's γ is fixed; they take turns
prompt by prompt. `vllm_worker.py` is what they run.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding.parallel import Drafting, Way
from specdistill.decoding.sampling import row_seed
from specdistill.engines import vllm_worker
from specdistill.engines.base import explained_differences, scorecard, take_turns
from specdistill.engines.vllm_process import environment, run
from specdistill.errors import DecodingError, InputError
from specdistill.limits import Dtype
from specdistill.models import LanguageModel, check_positions, check_sizes, load
from specdistill.progress import Progress, silent
from specdistill.scoring.card_rows import DraftingWay, ModelCard
from specdistill.scoring.choice import Setting
from specdistill.scoring.load import Load, Run, load_rows
from specdistill.scoring.measure import model_card, provenance
from specdistill.scoring.rows import Counts
from specdistill.scoring.scorecard import Scorecard

GRACE_SECONDS = 10
MEMORY_SHARE = 0.9  # of an accelerator, for all engines together


@dataclass(frozen=True)
class Pair:
    """What is left of the models once vLLM is to load them itself."""

    target: ModelCard
    target_path: Path
    draft: ModelCard
    draft_path: Path
    eos_ids: list[int]
    facts: dict[str, Any]  # the provenance
    drafting: DraftingWay = "autoregressive"

    @classmethod
    def of(
        cls,
        target: LanguageModel,
        draft: LanguageModel,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        seed: int,
        drafting: Way = "auto",
    ) -> Pair:
        """Raises `InputError` for a draft with a trimmed vocabulary, or one that cannot draft in
        parallel and is asked to.
        """
        if draft.vocab is not None:
            raise InputError(
                f"{draft.name} has a trimmed vocabulary, which vLLM cannot read; write it at full "
                "vocabulary with `specdistill export --for vllm`, and score that"
            )
        check_sizes(target, draft)
        check_positions([draft], ((p.id, len(p.tokens) + max_new_tokens) for p in prompts))
        return cls(
            model_card(target),
            target.path,
            model_card(draft),
            draft.path,
            sorted(target.eos_ids),
            provenance(target, draft, seed, max_new_tokens, prompts),
            "parallel" if Drafting(drafting).in_parallel(draft) else "autoregressive",
        )

    def load_target(self) -> LanguageModel:
        return load(str(self.target_path), dtype=cast("Dtype", self.target.dtype))


class _Worker:
    """One engine in a process of its own; a JSON document a line goes in and comes out."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.counted: dict[str, Any] = {}

    def tell(self, document: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(document) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; `hear` says why
            return

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            said = [line for line in lines if line.strip()][-1:] or ["it said nothing"]
            raise DecodingError(
                f"the vLLM process ended with exit code {self.process.wait()}: {said[0].strip()}"
            )
        return dict(json.loads(line))


def score(
    python: Path,
    pair: Pair,
    prompts: Sequence[EncodedPrompt],
    *,
    num_draft_tokens: Sequence[int],
    temperature: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
    threads: int | None = None,
    concurrency: Sequence[int] = (),
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt with vLLM, plainly and with the draft as its `draft_model`, by the
    interpreter `python`, which must have vLLM. A parallel draft gets `parallel_drafting`. Where a
    temperature is above 0 the draft samples its proposals, which vLLM does not by itself. Then all
    prompts are answered again by so many at a time as `concurrency` says.

    All engines are there at a time, so that they can take turns, and share the device's memory.
    Raises `InputError` where `python` cannot be run or that memory is too small, `DecodingError`
    where vLLM ends early or its counters do not tell enough. Where greedy texts differ, our own
    pass reads them once the engines have ended.
    """
    longest = max(len(prompt.tokens) for prompt in prompts) + max_new_tokens
    gammas = [0, *num_draft_tokens]
    with ExitStack() as stack:
        workers = {}
        for done, num in enumerate(gammas):  # one after the other: each measures free memory
            share = (
                f"plain; {len(gammas)} engines at {MEMORY_SHARE / len(gammas):.0%} of the memory"
            )
            progress("start", done, len(gammas), f"γ = {num}" if num else share)
            workers[num] = stack.enter_context(_started(python, threads))
            _check_memory(pair, workers[num].hear()["memory_bytes"], len(gammas))
            settings = _engine_settings(pair, num, longest, len(gammas), max(temperature) > 0)
            settings["max_num_seqs"] = max(concurrency, default=1)
            workers[num].tell(settings)
            facts = workers[num].hear()
        progress("start", len(gammas), len(gammas))

        def ask(setting: Setting, prompt: EncodedPrompt, count: int) -> Counts:
            return _ask(workers[setting[1]], setting, prompt, count, pair.eos_ids, seed)

        measured = take_turns(ask, prompts, temperature, num_draft_tokens, max_new_tokens, progress)
        requests = {
            t: [_request(t, prompt, max_new_tokens, pair.eos_ids, seed) for prompt in prompts]
            for t in dict.fromkeys(temperature)
        }
        load = under_load(workers, requests, concurrency, progress)
    told = pair.facts | {"engine": "vllm", "turns": "prompt by prompt, in a process each"}
    told["versions"] = {"specdistill": told["versions"].get("specdistill"), **facts["versions"]}
    told["threads"] = threads or torch.get_num_threads()
    told["device"] = facts["device"] or told["device"]
    told["compiled"], told["runner"] = facts["compiled"], facts["runner"]
    told["draft_sampling"] = "probabilistic" if max(temperature) > 0 else "greedy"
    ties = explained_differences(pair.load_target, prompts, measured)  # its memory is free again
    card = scorecard(pair.target, pair.draft, told, prompts, measured, ties, seed, pair.drafting)
    return replace(card, load=load)


def _check_memory(pair: Pair, memory_bytes: int | None, engines: int) -> None:
    """Before anything is loaded; None where there is no accelerator."""
    if memory_bytes is None:
        return
    weights = sum(
        model.parameters * getattr(torch, model.dtype).itemsize
        for model in (pair.target, pair.draft)
    )
    usable = MEMORY_SHARE * memory_bytes
    if weights < usable / engines:
        return
    fitting = int(usable // weights) - 1
    remedy = f"score at most {fitting} γ at a time" if fitting > 0 else "it needs a larger device"
    raise InputError(
        f"vLLM's engines, for plain decoding and for each of {engines - 1} γ, would have "
        f"{usable / engines / 1e9:.1f} GB each of the device's {memory_bytes / 1e9:.1f} GB; the "
        f"pair's weights take {weights / 1e9:.1f} GB: {remedy}"
    )


def _engine_settings(
    pair: Pair, num: int, longest: int, engines: int, sampled: bool
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": str(pair.target_path),
        "dtype": pair.target.dtype,
        "max_model_len": longest + num + 1,  # room for the last round's proposals
        "gpu_memory_utilization": MEMORY_SHARE / engines,
        "enable_prefix_caching": False,  # prompts come again, and must cost the same again
        "disable_log_stats": False,
        "seed": 0,
    }
    if num:
        settings["speculative_config"] = {
            "method": "draft_model",
            "model": str(pair.draft_path),
            "num_speculative_tokens": num,
            **({"draft_sample_method": "probabilistic"} if sampled else {}),
            **({"parallel_drafting": True} if pair.drafting == "parallel" else {}),
        }
    return settings


@contextmanager
def _started(python: Path, threads: int | None) -> Iterator[_Worker]:
    """A process that says how much memory there is and loads the engine that it is told of; ended
    with the context, whatever happens.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        source = Path(vllm_worker.__file__).read_text(encoding="utf-8")
        with log.open("w", encoding="utf-8") as errors:
            process = run(python, source, errors, folder, environment(threads), text=True)
        try:
            yield _Worker(process, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Its input ends, so it does; one that is still loading is ended."""
    try:
        process.communicate(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _ask(
    worker: _Worker,
    setting: Setting,
    prompt: EncodedPrompt,
    count: int,
    eos_ids: Sequence[int],
    seed: int,
) -> Counts:
    temperature, num = setting
    worker.tell(_request(temperature, prompt, count, eos_ids, seed))
    heard = worker.hear()
    tokens = heard["tokens"]
    if not num:
        return Counts(tokens, heard["seconds"], len(tokens), [], [], [])
    before, worker.counted = worker.counted, heard["counters"]
    rounds, proposed = (_since(worker.counted, before, name) for name in ("rounds", "proposed"))
    by_position = worker.counted["accepted_by_position"][:num]
    old = before.get("accepted_by_position", [0] * num)
    accepted = [now - then for now, then in zip(by_position, old, strict=False)]
    if proposed != num * rounds:
        raise DecodingError(
            f"prompt {prompt.id}: vLLM proposed {proposed} tokens in {rounds} rounds of {num}; its "
            "counters do not tell in which rounds there were fewer"
        )
    return Counts(
        tokens,
        heard["seconds"],
        rounds=rounds + 1,  # the prompt's own pass emits the first token, without a proposal
        offered=[rounds] * num,
        tested=[rounds, *accepted[:-1]],
        accepted=accepted,
    )


def _request(
    temperature: float, prompt: EncodedPrompt, count: int, eos_ids: Sequence[int], seed: int
) -> dict[str, Any]:
    return {
        "tokens": prompt.tokens,
        "temperature": temperature,
        "max_tokens": count,
        "stop_token_ids": list(eos_ids),
        "seed": row_seed(seed, prompt.id) % 2**31,
        "detokenize": False,
    }


def under_load(
    workers: Mapping[int, _Worker],
    requests: Mapping[float, Sequence[dict[str, Any]]],
    concurrency: Sequence[int],
    progress: Progress,
) -> Load:
    """Requests by temperature, so many at a time, with each γ and plainly before and after."""
    load = Load()
    every = [(t, most) for t in requests for most in concurrency]
    for done, (temperature, most) in enumerate(every):
        progress("load", done, len(every), f"{most} at a time, T = {temperature:g}")
        asked = {"requests": list(requests[temperature]), "at_a_time": most}
        gammas = [num for num in workers if num]
        runs = [(num, _loaded(workers[num], num, asked)) for num in (0, *gammas, 0)]
        plain, drafted = load_rows(
            temperature,
            most,
            [run for num, run in runs if not num],
            {num: run for num, run in runs if num},
        )
        load.plain.append(plain)
        load.drafted.extend(drafted)
    progress("load", len(every), len(every))
    return load


def _loaded(worker: _Worker, num: int, asked: dict[str, Any]) -> Run:
    worker.tell(asked)
    heard = worker.hear()
    now = heard.pop("counters")
    if not num:
        return Run(**heard)
    before, worker.counted = worker.counted, now
    rounds = max(_since(now, before, "rounds"), 1)
    old = before.get("accepted_by_position", [0] * num)
    accepted = zip(now["accepted_by_position"][:num], old, strict=False)
    return Run(**heard, accepted_by_position=[(after - then) / rounds for after, then in accepted])


def _since(now: dict[str, Any], before: dict[str, Any], name: str) -> int:
    return int(now[name] - before.get(name, 0))
