"""What `generate --engine vllm` runs in vLLM's interpreter: an engine that answers requests as they
come, with what is to be kept of the target at each response token, in the pass that decodes it.

It imports vLLM, torch and the standard library, nothing of this project. A JSON document a line
comes in: the arguments of `LLM`, then requests. Out go such lines, too, first the version and the
device's memory, then what was started, then answers; each is followed by as many bytes of
safetensors as it says. The engine's workers import this file as `MODULE` for `Signal`.
"""

import json
import os
import queue
import sys
import threading
from importlib.metadata import version
from typing import Any

MODULE = "specdistill_vllm"
TOP_K = ("tokens", "log_probs", "log_tail", "alpha_cost")
STATES = ("hidden",)
STEPS = 32  # whose rows wait on the device before they are copied, all at once


class Signal:
    """What each of vLLM's workers learns besides: keeping what the head is given, or what it makes
    of that. Only the model runner V1 has its rows in the order of `input_batch.req_ids`, one each.
    """

    def specdistill_keep(self, top_k: int | None) -> None:
        """Of every row that is decoded from now on: its hidden state, or the `top_k` most probable
        tokens. The first rank of those that share a layer does so.
        """
        from vllm.distributed import get_tensor_model_parallel_rank

        if get_tensor_model_parallel_rank() != 0:
            return
        runner = self.model_runner  # type: ignore[attr-defined]
        execute, compute = runner.execute_model, runner.model.compute_logits
        self.rows: dict[str, dict[int, tuple[Any, ...]]] = {}
        self.waiting: list[tuple[list[tuple[str, int]], tuple[Any, ...]]] = []
        scheduled: dict[str, int] = {}

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal scheduled
            scheduled = scheduler_output.num_scheduled_tokens
            return execute(scheduler_output, *args, **kwargs)

        def compute_logits(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            logits = compute(hidden, *args, **kwargs)
            batch = runner.input_batch
            ids = batch.req_ids[: batch.num_reqs]
            if logits is not None and len(ids) == len(hidden):
                done = batch.num_computed_tokens_cpu
                places = [(id_, int(done[i]) + scheduled[id_] - 1) for i, id_ in enumerate(ids)]
                signal = (hidden.clone(),) if top_k is None else reduced(logits, top_k)
                self.waiting.append((places, signal))
                if len(self.waiting) == STEPS:
                    self._specdistill_copy()
            return logits

        runner.execute_model, runner.model.compute_logits = execute_model, compute_logits

    def _specdistill_copy(self) -> None:
        for places, signal in self.waiting:
            on_host = [tensor.cpu() for tensor in signal]
            for i, (id_, position) in enumerate(places):
                # A row that is computed again, after a preemption, replaces itself.
                self.rows.setdefault(id_, {})[position] = tuple(t[i] for t in on_host)
        self.waiting = []

    def specdistill_take(self, id_: str, first: int, number: int) -> list[Any] | None:
        """The rows of a request at `number` positions from `first` on, tensor by tensor."""
        import torch

        if not hasattr(self, "waiting"):  # another rank keeps them
            return None
        self._specdistill_copy()
        rows = self.rows.pop(id_, {})
        wanted = [rows[place] for place in range(first, first + number) if place in rows]
        if len(wanted) < number:
            raise RuntimeError(
                f"vLLM's head was called in {len(wanted)} of the {number} steps of {id_!r}, so "
                "that the signal of the others is lost"
            )
        return [torch.stack(parts) for parts in zip(*wanted, strict=True)]


def reduced(logits: Any, k: int) -> tuple[Any, Any, Any, Any]:
    """Of logits [n, V] the k most probable tokens [n, k], their log-probabilities [n, k], the log
    of the others' mass [n] and what acceptance is lost with them [n], see `signal.alpha_cost`.
    """
    log_p = logits.float().log_softmax(-1)
    top = log_p.topk(k, -1)
    rest = log_p.scatter(-1, top.indices, -float("inf"))
    log_tail = rest.logsumexp(-1)
    even = log_tail.exp()[:, None] / (logits.shape[-1] - k)
    cost = (rest.exp() - even).clamp(min=0).sum(-1)
    return top.indices.int(), top.values.half(), log_tail, cost


class Conversation:
    """Lines in, lines and bytes out. The process ends with its input: nobody is there any more."""

    def __init__(self) -> None:
        self.heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self.out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what the engine prints is no answer
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self.heard.put(json.loads(line))
        os._exit(0)

    def say(self, document: dict[str, Any], body: bytes = b"") -> None:
        self.out.write(json.dumps({**document, "bytes": len(body)}).encode() + b"\n" + body)
        self.out.flush()


def started(vllm: Any, engine: Any) -> dict[str, Any]:
    """What the engine runs."""
    model = engine.llm_engine.vllm_config.model_config
    return {
        "name": "vllm",
        "version": vllm.__version__,
        "torch": version("torch"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": None if model.quantization is None else str(model.quantization),
        "runner": "V1",
    }


def answer(
    vllm: Any, engine: Any, conversation: Conversation, names: tuple[str, ...] | None
) -> None:
    """Take requests as they come, say answers as they end, each with the tensors `names`."""
    core = engine.llm_engine
    under_way: dict[str, tuple[str, int]] = {}  # by the request's name: that inside, prompt length
    while True:
        while not (under_way and conversation.heard.empty()):
            request = conversation.heard.get()
            prompt, id_ = request["prompt"], request["id"]
            params = vllm.SamplingParams(
                **request["sampling"],
                detokenize=False,
                output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            inside = core.add_request(id_, {"prompt_token_ids": prompt}, params)
            under_way[id_] = inside, len(prompt)
        for output in core.step():
            (completion,) = output.outputs
            inside, length = under_way.pop(output.request_id)
            tokens = list(completion.token_ids)
            document = {
                "id": output.request_id,
                "tokens": tokens,
                "log_prob": completion.cumulative_logprob,
            }
            body = b""
            if names is not None:
                places = inside, length - 1, len(tokens)
                ranks = engine.collective_rpc("specdistill_take", args=places)
                from safetensors.torch import save

                signal = next(rank for rank in ranks if rank is not None)
                body = save(dict(zip(names, signal, strict=True)))
            conversation.say(document, body)


def main() -> None:
    conversation = Conversation()
    import vllm
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()  # where compiling takes minutes and gains little
    memory = None if on_cpu else current_platform.get_device_total_memory()
    conversation.say({"version": vllm.__version__, "memory_bytes": memory})
    asked = conversation.heard.get()
    settings = {"enforce_eager": on_cpu, **asked["engine"]}
    engine = vllm.LLM(worker_extension_cls=f"{MODULE}.Signal", **settings)
    names = None
    if asked["keep"]:
        engine.collective_rpc("specdistill_keep", args=(asked["top_k"],))
        names = STATES if asked["top_k"] is None else TOP_K
    device = None if on_cpu else current_platform.get_device_name()
    conversation.say({**started(vllm, engine), "device": device})
    answer(vllm, engine, conversation, names)


if __name__ == "__main__":
    main()
