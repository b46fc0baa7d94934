"""Small distillations for the tests: a target, its answers, a draft, a configuration, a run."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from specdistill import models
from specdistill.config import DistillConfig, parse_config
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt
from specdistill.decoding import Sampling
from specdistill.drafts.making import make_draft, save_draft
from specdistill.models import LanguageModel
from specdistill.training.run import train


def ask(count: int) -> list[Prompt]:
    return [
        Prompt(str(i), ({"role": "user", "content": f"w{5 + i % 50} w{7 + i % 31}"},))
        for i in range(count)
    ]


def never_writes(model: LanguageModel, first: int) -> LanguageModel:
    """The model, whose texts hold no id from `first` on: one value of its states is above 0
    whatever it reads, and the rows of these tokens weigh it by -100.
    """
    embedding, head = model.model.get_input_embeddings().weight, model.head.weight
    embedding[:, 0], head[:, 0] = 3.0, 0.0
    for layer in model.model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head[first:] = 0.0
    head[first:, 0] = -100.0
    return model


def padded_target(folder: Path) -> Path:
    """A tiny target of 64 tokens with 8 rows of padding, which its own texts never hold."""
    save_draft(never_writes(tiny_model(layers=4, vocab=72), 64), folder)
    return folder


def make_world(folder: Path, target_folder: Path) -> dict[str, str]:
    """A target, 40 of its answers with their signal, and a draft with a trimmed vocabulary."""
    target = models.load(str(target_folder), dtype="float32")
    generate(
        target, ask(40), folder / "data", max_new_tokens=12, samplings=[Sampling(1.0)], batch_size=8
    )
    save_draft(make_draft(target, [0, 1], torch.arange(0, 64, 2)), folder / "draft")
    return {
        "target": str(target_folder),
        "data": str(folder / "data"),
        "draft": str(folder / "draft"),
    }


def pair_of(world: dict[str, str]) -> tuple[LanguageModel, LanguageModel]:
    """The target and the draft, in float32."""
    target, draft = (models.load(world[name], dtype="float32") for name in ("target", "draft"))
    return target, draft


def settings(world: dict[str, str], run: Path, **more: object) -> DistillConfig:
    training = {"max_steps": 12, "batch_tokens": 120, "learning_rate": 5e-3}
    training |= more.pop("training", {})  # type: ignore[arg-type]
    raw = {**world, "run_dir": str(run), "heldout": 8, "evaluate_every": 5, "checkpoint_every": 4}
    return parse_config({**raw, **more, "training": training})


def run(config: DistillConfig, resume: bool = False, stop_at: int | None = None) -> list[dict]:
    """The rows of metrics.jsonl."""

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        if stop_at is not None and detail.startswith(f"step {stop_at},"):
            raise KeyboardInterrupt

    alone = config.signal == "none"
    target = None if alone else models.load(config.target, dtype="float32")
    draft = models.load(config.draft, dtype="float32")
    train(config, target, draft, resume=resume, progress=progress)
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def interrupted(config: DistillConfig, step: int) -> None:
    """A run that is stopped after so many updates."""
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at=step)


def reported(config: DistillConfig) -> list[str]:
    """What a run reports of its progress, in words."""
    details: list[str] = []
    pair = pair_of({"target": config.target, "draft": config.draft})
    train(config, *pair, progress=lambda *report: details.append(str(report[-1])))
    return details


def untimed(rows: list[dict]) -> list[dict]:
    """Metrics without what a clock says."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def digest(run_dir: Path) -> str:
    """Of the weights that a run ended with."""
    return hashlib.sha256((run_dir / "draft/model.safetensors").read_bytes()).hexdigest()
