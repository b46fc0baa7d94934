"""`score --engine vllm`: the options that are for it alone, and what vLLM is handed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specdistill import limits
from specdistill.cli import console, parsing
from specdistill.cli.at_server import ALL_GAMMAS, AtServer
from specdistill.cli.serving import check_given
from specdistill.engines.vllm_process import SCORING, Deployment, check_interpreter
from specdistill.errors import InputError

if TYPE_CHECKING:
    from specdistill.data.chat import EncodedPrompt
    from specdistill.data.prompts import Prompt
    from specdistill.decoding.parallel import Way
    from specdistill.scoring.scorecard import Scorecard

Runners = Literal["auto", "both"]


@dataclass(frozen=True)
class ByVllm:
    """As they were typed."""

    python: Path | None
    server: AtServer
    tensor_parallel: int | None
    options: str | None
    concurrency: str | None
    speculative_config: str | None
    runner: Runners

    def check(
        self,
        engine: str,
        device: str,
        draft: str | None,
        drafting: Way,
        num_draft_tokens: str,
        threads: int | None,
    ) -> None:
        """Raises `InputError` for options that would have no effect, or contradict each other."""
        started_with = {
            "--tensor-parallel": self.tensor_parallel is not None,
            "--engine-options": self.options is not None,
            "--runner": self.runner != "auto",
        }
        everywhere = {
            "--num-draft-tokens": num_draft_tokens != ALL_GAMMAS,
            "--threads": threads is not None,
        }
        self.server.check(engine, self.python, started_with | everywhere)
        of_vllm = {
            "--concurrency": self.concurrency is not None,
            "--speculative-config": self.speculative_config is not None,
        }
        check_given(engine, device, started_with | of_vllm)
        if (engine == "vllm") != (self.python is not None or self.server.base_url is not None):
            raise InputError(
                "--engine vllm and --engine-python go together: name the python of an environment "
                "that has vLLM, or a server that runs by --base-url"
            )
        if (draft is None) == (self.speculative_config is None):
            raise InputError(
                "name a draft by --draft, or what else proposes by --speculative-config with "
                "--engine vllm: one of the two"
            )
        if self.speculative_config is not None and drafting != "auto":
            raise InputError(
                f"--drafting {drafting} is of a draft named by --draft; a speculative config says "
                "itself how it proposes"
            )
        self.config()
        self.at_a_time()
        self.engine_options()
        if self.python is not None:
            check_interpreter(self.python)

    def config(self) -> dict[str, Any] | None:
        text = self.speculative_config
        return None if text is None else parsing.speculative_config(text)

    def engine_options(self) -> dict[str, Any]:
        return parsing.engine_options(self.options, SCORING)

    def at_a_time(self) -> list[int]:
        return [] if self.concurrency is None else parsing.concurrency(self.concurrency)

    def prepared(
        self,
        target: str,
        draft: str | None,
        asked: Sequence[Prompt],
        dtype: limits.Dtype,
        drafting: Way,
        num_draft_tokens: list[int],
        max_new_tokens: int,
        seed: int,
        threads: int | None,
    ) -> tuple[Sequence[EncodedPrompt], Callable[..., Scorecard]]:
        """The prompts as tokens, and the score of them. Of the models only facts and tokenizers are
        read: vLLM loads its own.
        """
        from specdistill.engines import vllm
        from specdistill.engines.vllm_pair import Pair
        from specdistill.engines.vllm_proposer import Proposer

        if (config := self.config()) is not None:
            Proposer.of_config(config)  # before anything is read
        big = console.outline(target, dtype)
        if config is not None:
            console.note_models(big)
            console.note(
                f"{config['method']} proposes, no draft of yours: whether its tokens are the "
                "target's, how long a text it reads and what it was trained on are not checked"
            )
            encoded = console.encoded(big, asked)
            pair = Pair.proposed_by(big, config, encoded, max_new_tokens, seed)
        else:
            assert draft is not None
            small = console.outline(draft, dtype)
            from specdistill.models import check_pair

            check_pair(big, small)
            console.note_models(big, small)
            if self.server.base_url is None:  # else γ is the server's
                console.note_drafting(small, drafting, num_draft_tokens)
            encoded = console.encoded(big, asked, small)
            pair = Pair.of(big, small, encoded, max_new_tokens, seed, drafting)
        if self.server.base_url is not None:
            return encoded, partial(self.server.score, pair, concurrency=self.at_a_time())
        assert self.python is not None
        deployment = Deployment(
            self.python, 1, self.tensor_parallel or 1, self.engine_options(), threads
        )
        return encoded, partial(
            vllm.score,
            deployment,
            pair,
            concurrency=self.at_a_time(),
            both_runners=self.runner == "both",
        )


def serve_lines(card: Scorecard, target: str, draft: str | None) -> list[str]:
    """How to serve what vLLM measured."""
    from specdistill.drafts.serve_commands import draft_config, name_elsewhere, vllm_command
    from specdistill.scoring.served import Served, served_lines

    config = card.provenance.get("speculative_config") or draft_config(
        str(draft), parallel=card.drafting == "parallel"
    )
    command = vllm_command(name_elsewhere(target), config, card.fixed_gamma, Served.of(card))
    return [*served_lines(card), "Serve it with", command]
