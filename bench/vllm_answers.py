"""What keeping the signal costs vLLM, and what our own engine makes of the same requests.

    python -m bench.vllm_answers --engine-python V/bin/python --target demo:smollm2

The same prompts are answered in turns by vLLM's own `LLM.generate`, alone and with as many
log-probabilities of its own, by `generate --engine vllm` with each signal and by our engine. Rates
are tokens per second of the whole call after one that does not count; the last line is JSON.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import load_prompts
from specdistill.data.signal import States, keep
from specdistill.decoding import Request, SpeculativeDecoder
from specdistill.engines.vllm_answers import Answers
from specdistill.engines.vllm_process import Deployment, environment, run
from specdistill.models import LanguageModel, load
from specdistill.provenance import device_name, git_commit

BARE = """
import json, os, sys
out = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
import vllm
given = json.loads(sys.stdin.readline())
engine = vllm.LLM(enforce_eager=True, **given)
for line in sys.stdin:
    asked = json.loads(line)
    params = vllm.SamplingParams(temperature=0, detokenize=False, **asked["params"])
    prompts = [{"prompt_token_ids": tokens} for tokens in asked["prompts"]]
    found = engine.generate(prompts, params, use_tqdm=False)
    out.write(json.dumps(sum(len(o.outputs[0].token_ids) for o in found)) + "\\n"); out.flush()
"""
Contender = Callable[[list[Request]], int]  # how many tokens it made


def bare(
    python: Path, target: LanguageModel, batch: int, length: int, stack: ExitStack
) -> Contender:
    """vLLM by itself; a number of log-probabilities can be set on what is returned."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    errors = stack.enter_context((Path(folder) / "log").open("w"))
    process: subprocess.Popen[str] = run(python, BARE, errors, folder, environment(None), text=True)
    stack.callback(process.communicate)

    def ask(document: object) -> None:
        process.stdin.write(json.dumps(document) + "\n")
        process.stdin.flush()

    dtype = str(target.dtype).removeprefix("torch.")
    settings = {"model": str(target.path), "dtype": dtype, "max_num_seqs": batch}
    ask(settings | {"max_model_len": length, "max_logprobs": 64})

    def answer(requests: list[Request], **more: object) -> int:
        params = {"max_tokens": requests[0].max_new_tokens, **more}
        params["stop_token_ids"] = sorted(target.eos_ids)
        ask({"prompts": [list(r.tokens) for r in requests], "params": params})
        return int(json.loads(process.stdout.readline()))

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine-python", type=Path, required=True)
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--prompts", default="demo:train")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    target = load(given.target)
    prompts = load_prompts(given.prompts, limit=given.requests)
    encoded = [encode_prompt(target.tokenizer, prompt) for prompt in prompts]
    length = max(map(len, encoded)) + given.max_new_tokens
    requests = [Request(str(i), t, given.max_new_tokens) for i, t in enumerate(encoded)]
    own = SpeculativeDecoder(target, batch_size=given.batch_size, keep_hidden=True)

    def ours(requests: list[Request]) -> int:
        tokens = 0
        for round_ in own.stream(requests):
            for row in round_.rows:
                tokens += len(row.tokens)
                keep(target, States(row.hidden, row.logsumexp), "top-k:64")
        return tokens

    with ExitStack() as stack:
        alone = bare(given.engine_python, target, given.batch_size, length, stack)
        contenders: dict[str, Contender] = {
            "vLLM alone": alone,
            "vLLM, 64 log-probabilities": lambda r: alone(r, logprobs=64, flat_logprobs=True),
            "our engine, top-k:64": ours,
        }
        for signal in ("none", "top-k:64", "states"):
            engine = Deployment(given.engine_python)
            answers = Answers(engine, target, given.batch_size, signal, scored=False)
            stream = stack.enter_context(answers).stream
            contenders[f"--engine vllm, {signal}"] = lambda r, stream=stream: sum(
                len(row.tokens) for round_ in stream(r) for row in round_.rows
            )
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(given.turns + 1):
            for name in list(contenders)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                tokens = contenders[name](requests)
                if turn:
                    rates[name].append(tokens / (time.perf_counter() - start))
    for name, found in rates.items():
        print(f"{name:28} {' '.join(f'{rate:7.1f}' for rate in found)}")
    facts = {"device": device_name(target.device), "commit": git_commit(), "rates": rates}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
