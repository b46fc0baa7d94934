"""What `--engine-python` runs: one vLLM engine that answers one prompt after the other.

It imports vLLM and the standard library, nothing of this project. Standard input and output carry
a JSON document a line: first ours with the device's memory; then the arguments of `LLM`, answered
by versions and device; then requests, each answered by its tokens, its seconds and the engine's
counters so far, or many requests to have so many at a time of, answered by their times.
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

COUNTERS = {
    "rounds": "vllm:spec_decode_num_drafts",
    "proposed": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def counters(engine: Any) -> dict[str, Any]:
    """The engine's totals since it was made; without a draft there are none."""
    found: dict[str, Any] = {}
    for metric in engine.get_metrics():
        value = metric.values if hasattr(metric, "values") else getattr(metric, "value", None)
        found[metric.name] = value
    return {name: found[metric] for name, metric in COUNTERS.items() if metric in found}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def under_load(vllm: Any, engine: Any, requests: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """Answer all, up to `most` at a time; times are seconds from when a request was handed over."""
    core = engine.llm_engine
    waiting = list(enumerate(requests))[::-1]
    begun: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens: dict[str, int] = {}
    start = time.perf_counter()
    while waiting or len(last) < len(begun):
        while waiting and len(begun) - len(last) < most:
            number, request = waiting.pop()
            prompt = {"prompt_token_ids": request["tokens"]}
            params = {key: value for key, value in request.items() if key != "tokens"}
            begun[str(number)] = time.perf_counter()
            core.add_request(str(number), prompt, vllm.SamplingParams(**params))
        for output in core.step():
            now = time.perf_counter() - begun[output.request_id]
            count = len(output.outputs[0].token_ids)
            if count:
                first.setdefault(output.request_id, now)
            if output.finished:
                tokens[output.request_id], last[output.request_id] = count, now
    seconds = time.perf_counter() - start
    ids = [id_ for id_ in begun if id_ in first]
    return {
        "seconds": seconds,
        "tokens": [tokens[id_] for id_ in ids],
        "first": [first[id_] for id_ in ids],
        "last": [last[id_] for id_ in ids],
        "counters": counters(engine),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the engine prints is no answer

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    import vllm
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()  # where compiling takes minutes and gains little
    answer({"memory_bytes": None if on_cpu else current_platform.get_device_total_memory()})
    engine = vllm.LLM(enforce_eager=on_cpu, **json.loads(sys.stdin.readline()))
    answer(
        {
            "versions": {"vllm": vllm.__version__, **versions()},
            "device": None if on_cpu else current_platform.get_device_name(),
            "compiled": not on_cpu,
            "runner": "V2" if engine.llm_engine.vllm_config.use_v2_model_runner else "V1",
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        if "at_a_time" in request:
            answer(under_load(vllm, engine, request["requests"], request["at_a_time"]))
            continue
        prompt = {"prompt_token_ids": request.pop("tokens")}
        params = vllm.SamplingParams(**request)
        start = time.perf_counter()
        (output,) = engine.generate([prompt], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = list(output.outputs[0].token_ids)
        answer({"tokens": tokens, "seconds": seconds, "counters": counters(engine)})


if __name__ == "__main__":
    main()
