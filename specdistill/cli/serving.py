"""The options with which `generate` has a serving engine decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specdistill import limits
from specdistill.cli import console, parsing
from specdistill.engines.vllm_process import ANSWERING, Deployment, check_interpreter
from specdistill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import ExitStack

    from specdistill.data.outside import Outside, OutsideDecoder
    from specdistill.models import LanguageModel


def check_given(engine: str, device: str, given: Mapping[str, bool]) -> None:
    """Raises `InputError` for options of vLLM that are given with another engine, and a device with
    it.
    """
    names = [name for name, is_given in given.items() if is_given]
    if engine != "vllm" and names:
        verb = "it is" if len(names) == 1 else "they are"
        raise InputError(
            f"{' and '.join(names)} would have no effect with --engine {engine}: {verb} for "
            "--engine vllm"
        )
    if engine == "vllm" and device != "auto":
        raise InputError(
            f"--device {device} has no effect with --engine vllm, which runs on the device it was "
            "built for; leave it out"
        )


@dataclass(frozen=True)
class Serving:
    """What is given beside --engine vllm."""

    python: Path | None
    workers: int | None
    tensor_parallel: int | None
    options: str | None

    def check(self, engine: str, device: str, generator: str | None) -> None:
        """Raises `InputError` for what the engine would not heed."""
        given = {
            "--engine-python": self.python,
            "--workers": self.workers,
            "--tensor-parallel": self.tensor_parallel,
            "--engine-options": self.options,
        }
        check_given(engine, device, {name: value is not None for name, value in given.items()})
        if engine != "vllm":
            return
        if self.python is None:
            raise InputError(
                "--engine vllm and --engine-python go together: name the python of an environment "
                "that has vLLM"
            )
        check_interpreter(self.python)
        if generator is not None:
            raise InputError(
                "--generator answers by our own engine or Transformers; leave it out with --engine "
                "vllm"
            )

    def outside(
        self,
        target: str,
        dtype: limits.Dtype,
        signal: str,
        scored: bool,
        threads: int | None,
        stack: ExitStack,
    ) -> tuple[Callable[[], LanguageModel], Outside]:
        """What loads as much of the target as is needed beside vLLM, which loads its own, and the
        engine, ended with `stack`.
        """
        from specdistill.data.outside import Outside
        from specdistill.data.signal import NONE, STATES
        from specdistill.engines.vllm_answers import Answers

        assert self.python is not None
        options = parsing.engine_options(self.options, ANSWERING)
        deployment = Deployment(
            self.python, self.workers or 1, self.tensor_parallel or 1, options, threads
        )
        dtype = console.dtype_of_device(dtype)

        def decoder(model: LanguageModel, batch_size: int) -> OutsideDecoder:
            answers = Answers(deployment, model, batch_size, signal, scored=scored)
            return stack.enter_context(answers)

        # The head makes a logsumexp of each state, as fast as vLLM decodes.
        head = console.loader(target, dtype, "auto" if signal == STATES else "cpu", head_only=True)
        reader = None if signal == NONE else console.loader(target, dtype, "cpu", decoding=False)
        settings = {"engine_options": options} if options else {}
        return head, Outside("vllm", decoder, settings, reader)
