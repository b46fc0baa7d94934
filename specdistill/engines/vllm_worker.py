"""What `--engine-python` runs: one vLLM engine that answers one prompt after the other.

It imports vLLM and the standard library, nothing of this project. Standard input and output carry
a JSON document a line: first ours with the version, what that has, and the device's memory; then
the arguments of `LLM`, and what later engines propose with, answered by versions and device; then
requests, each answered by its tokens, its seconds and the engine's counters so far, or many
requests to have so many at a time of, answered by their times.
"""

import json
import os
import sys
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

SCHEDULE = "num_speculative_tokens_per_batch_size"
COUNTERS = {
    "rounds": "vllm:spec_decode_num_drafts",
    "proposed": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def counters(engine: Any) -> dict[str, Any]:
    """The engine's totals since it was made; without a draft there are none."""
    values: dict[str, Any] = {}
    for metric in engine.get_metrics():
        value = metric.values if hasattr(metric, "values") else getattr(metric, "value", None)
        values[metric.name] = value
    return {name: values[metric] for name, metric in COUNTERS.items() if metric in values}


def versions() -> dict[str, str]:
    numbers = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "triton"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers


def judge(vllm: Any, settings: dict[str, Any], later: list[dict[str, Any]]) -> None:
    """Raises what vLLM says against an engine that is to come later, by its config alone: nothing
    is loaded for that.
    """
    variables = dict(os.environ)
    for config in (None, *later):
        try:
            vllm.EngineArgs(**settings, speculative_config=config).create_engine_config()
        except Exception:
            if config is None:  # `LLM` itself takes more, or will say it
                break
            raise
    os.environ.clear()  # what a config sets there is for its own engine
    os.environ.update(variables)


def begin(vllm: Any, engine: Any, name: str, request: dict[str, Any]) -> None:
    prompt = {"prompt_token_ids": request["tokens"]}
    params = {key: value for key, value in request.items() if key != "tokens"}
    engine.llm_engine.add_request(name, prompt, vllm.SamplingParams(**params))


def answered(vllm: Any, engine: Any, request: dict[str, Any], each_round: bool) -> dict[str, Any]:
    """The tokens of one request, its seconds, and those of the rounds after the first. With
    `each_round` also what was proposed and accepted in every round, the first being the prompt's
    own pass: the counters are read between rounds, off the clock.
    """
    known = counters(engine)
    tokens: list[int] = []
    ends: list[float] = []
    rounds: list[list[int]] = []
    reading, finished = 0.0, False
    start = time.perf_counter()
    begin(vllm, engine, "0", request)
    while not finished:
        for output in engine.llm_engine.step():
            tokens, finished = list(output.outputs[0].token_ids), output.finished
            now = time.perf_counter()
            ends.append(now - start - reading)
            if each_round:
                before, known = known, counters(engine)
                rounds.append([known[n] - before.get(n, 0) for n in ("proposed", "accepted")])
                reading += time.perf_counter() - now
    return {
        "tokens": tokens,
        "seconds": ends[-1],
        "step_seconds": [after - before for before, after in pairwise(ends)],
        "rounds": rounds,
        "counters": counters(engine),
    }


def under_load(vllm: Any, engine: Any, requests: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Answer all, up to `most` at a time; times are seconds from when a request was handed over."""
    waiting, under_way = deque(enumerate(requests)), 0
    rows: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    while waiting or under_way:
        while waiting and under_way < most:
            number, request = waiting.popleft()
            rows[str(number)] = {"begun": time.perf_counter()}
            under_way += 1
            begin(vllm, engine, str(number), request)
        for output in engine.llm_engine.step():
            row = rows[output.request_id]
            row["last"] = time.perf_counter() - row["begun"]
            row["tokens"] = len(output.outputs[0].token_ids)
            if row["tokens"]:
                row.setdefault("first", row["last"])
            under_way -= output.finished
    seconds = time.perf_counter() - start
    answered = [row for row in rows.values() if "first" in row]
    columns = {name: [row[name] for row in answered] for name in ("tokens", "first", "last")}
    return {"seconds": seconds, **columns, "counters": counters(engine)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the engine prints is no answer

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    import vllm
    from vllm import envs
    from vllm.config import SpeculativeConfig
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()  # where compiling takes minutes and gains little
    answer(
        {
            "version": vllm.__version__,
            "runners": "VLLM_USE_V2_MODEL_RUNNER" in envs.environment_variables,
            "schedules": SCHEDULE in getattr(SpeculativeConfig, "__dataclass_fields__", {}),
            "memory_bytes": None if on_cpu else current_platform.get_device_total_memory(),
        }
    )
    line = sys.stdin.readline()
    if not line:  # it is not wanted
        return
    asked = json.loads(line)
    settings = {"enforce_eager": on_cpu, **asked["engine"]}
    if asked["later"]:
        judge(vllm, settings, asked["later"])
    engine = vllm.LLM(**settings)
    answer(
        {
            "versions": {"vllm": vllm.__version__, **versions()},
            "device": None if on_cpu else current_platform.get_device_name(),
            "compiled": not on_cpu,
            "runner": "V2" if engine.llm_engine.vllm_config.use_v2_model_runner else "V1",
        }
    )
    for line in sys.stdin:
        asked = json.loads(line)
        if "at_a_time" in asked:
            answer(under_load(vllm, engine, asked["requests"], asked["at_a_time"]))
        else:
            answer(answered(vllm, engine, asked["request"], asked["each_round"]))


if __name__ == "__main__":
    main()
