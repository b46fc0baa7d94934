"""A real vLLM, where SPECDISTILL_VLLM_PYTHON names the python of its environment, and a target for
it.
"""

import os
from pathlib import Path

import pytest
from conftest import tiny_model

from specdistill.drafts.making import save_draft
from specdistill.models import LanguageModel

VLLM_PYTHON = os.environ.get("SPECDISTILL_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON, reason="SPECDISTILL_VLLM_PYTHON names no python with vLLM"
)


def served_target(folder: Path) -> LanguageModel:
    """A random target of sizes that vLLM takes, which lies in `folder`/target, too."""
    target = tiny_model(1, layers=3, vocab=64, hidden_size=128, head_dim=32)
    save_draft(target, folder / "target")
    return target
