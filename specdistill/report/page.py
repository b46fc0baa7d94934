"""report.html: the report as one file that needs neither network nor script."""

from __future__ import annotations

import base64
import math
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt

from specdistill.report.text import drawn_pictures
from specdistill.run_folder import RunFolder
from specdistill.scoring.headline import gamma_is, number
from specdistill.scoring.scorecard import Scorecard


class Figure(NamedTuple):
    """A number that a reader looks for first, and what it is."""

    value: str
    name: str
    note: str


def page(title: str, text: str, card: Scorecard, run_dir: Path) -> str:
    """`text` is the report in Markdown, whose first line the plain `title` replaces. The pictures
    that SpecDistill drew in `run_dir` are taken into the page, no other file is; and nothing that
    the text quotes, such as names of models, is read as HTML or as a link.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "autolink", "reference"])
    tokens = parser.parse(text.partition("\n")[2])
    plots = RunFolder(run_dir).plots
    ours = {f"plots/{name}": plots / name for name in drawn_pictures(plots)}
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                child.attrs["src"] = _inline(ours[str(child.attrs["src"])])
    body = parser.renderer.render(tokens, parser.options, {})
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = files("specdistill.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=title, body=body, figures=_figures(card), pays=card.verdict.pays
    )


def _inline(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _figures(card: Scorecard) -> list[Figure]:
    best, proof = card.verdict_row(), card.lossless
    low, high = (number(end, 2) for end in best.speedup_ci95)
    same, compared = proof.greedy_identical
    needed = card.verdict.break_even_acceptance
    shown = "yes" if proof.holds else "not shown"
    speed = Figure(f"{number(best.speedup, 2)} ×", "speedup", f"95% interval {low} to {high}")
    if not card.baseline:
        speed = Figure(number(best.tokens_per_second, 1), "tokens/s", "plain decoding not measured")
    return [
        Figure("FAILED", "speedup", "not lossless") if card.failures else speed,
        Figure(
            number(best.block_efficiency, 2),
            "tokens per target call, τ",
            f"{gamma_is(best)}, T = {best.temperature:g}",
        ),
        Figure(
            number(best.acceptance_rate, 2),
            "acceptance rate, α",
            f"pays above {number(needed, 2)}" if math.isfinite(needed) else "of tokens tested",
        ),
        Figure(
            "no" if card.verification.lossy else shown,
            "output unchanged",
            f"{same} of {compared} greedy texts identical",
        ),
    ]
