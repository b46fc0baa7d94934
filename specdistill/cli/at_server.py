"""`score --base-url`: the options of a server that runs, and its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdistill.errors import InputError

if TYPE_CHECKING:
    from specdistill.data.chat import EncodedPrompt
    from specdistill.engines.vllm_pair import Pair
    from specdistill.scoring.scorecard import Scorecard

ALL_GAMMAS = "1-8"  # what --num-draft-tokens is where nobody chose


@dataclass(frozen=True)
class AtServer:
    """As they were typed."""

    base_url: str | None
    plain_base_url: str | None

    def check(
        self,
        engine: str,
        engine_python: Path | None,
        others: Mapping[str, bool],
    ) -> None:
        """Raises `InputError` for options that would have no effect, or contradict each other;
        `others` are options that a server was started with, and whether they are given here.
        """
        if self.base_url is None:
            if self.plain_base_url is not None:
                raise InputError(
                    "--plain-base-url goes with --base-url, the server that drafts; name both"
                )
            return
        if engine != "vllm":
            raise InputError(
                f"--base-url would have no effect with --engine {engine}: it is for --engine vllm"
            )
        if engine_python is not None:
            raise InputError(
                "--base-url names a server that runs, --engine-python an engine to start: name one"
            )
        if self.base_url == self.plain_base_url:
            raise InputError(
                "--base-url and --plain-base-url are the same server: vLLM cannot leave the draft "
                "out of single requests; name a second one, of the target alone"
            )
        from specdistill.engines.openai_servers import Server

        for url in filter(None, (self.base_url, self.plain_base_url)):
            Server(url, "")  # before anything is loaded
        if given := [name for name, is_given in others.items() if is_given]:
            raise InputError(
                f"{' and '.join(given)} would have no effect with --base-url: the server was "
                "started with its own; leave it out"
            )

    def score(
        self,
        pair: Pair,
        prompts: Sequence[EncodedPrompt],
        *,
        num_draft_tokens: Sequence[int],
        **how: Any,
    ) -> Scorecard:
        """By the server's own γ, whatever `num_draft_tokens` are."""
        from specdistill.engines import server

        assert self.base_url is not None
        return server.score(self.base_url, self.plain_base_url, pair, prompts, **how)
