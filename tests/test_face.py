"""`import specdistill as sd`: what it offers, and the loop written with nothing else."""

import ast
from pathlib import Path

import pytest
from test_packaging import modules_loaded_by

import specdistill as sd
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel

NAMES = {
    "Decoder", "Sampling", "check", "compare", "distill", "export", "generate", "load",
    "make_draft", "plot", "prompts", "score",
}  # fmt: skip


def test_the_face_has_these_names_and_loads_them_on_use() -> None:
    assert {name for name in dir(sd) if not name.startswith("_")} >= NAMES
    for name in NAMES:
        assert callable(getattr(sd, name)), name
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        sd.distil  # noqa: B018
    loaded, _ = modules_loaded_by("import specdistill as sd\ndir(sd)\nsd.__version__")
    assert not loaded & {"torch", "transformers"}


def test_type_checkers_see_the_objects_that_programs_get() -> None:
    tree = ast.parse(Path(sd.__file__).read_text(encoding="utf-8"))
    (known,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: f"{node.module}:{alias.name}".removeprefix("specdistill.")
        for node in known.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == sd._PLACES
    assert typed.keys() == NAMES


def test_prompts_come_from_files_and_from_lists(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"question {i} of {i * i}\n" for i in range(40)))
    train, heldout = sd.prompts(str(tmp_path / "p.txt")).split(heldout=8)
    assert (len(train), len(heldout)) == (32, 8)
    assert {p.id for p in train}.isdisjoint(p.id for p in heldout)
    texts = sd.prompts(["one", [{"role": "user", "content": "two"}]])
    assert [p.messages[-1]["content"] for p in texts] == ["one", "two"]
    with pytest.raises(InputError, match="prompt 2"):
        sd.prompts(["one", []])


def test_answers_are_asked_for_by_temperature(target: LanguageModel, tmp_path: Path) -> None:
    asked = sd.prompts([f"w{5 + i} w{9 + i}" for i in range(8)])
    settings = {"max_new_tokens": 8, "seed": 3}
    named = sd.generate(target, asked, str(tmp_path / "a"), temperature=(0, 1), **settings)
    samplings = [sd.Sampling(0.0), sd.Sampling(1.0)]
    same = sd.generate(target, asked, tmp_path / "b", samplings=samplings, **settings)
    assert named.texts() == same.texts()
    greedy = sd.generate(target, asked, tmp_path / "c", **settings)
    assert named.texts() != greedy.texts()
    with pytest.raises(InputError, match="one of the two"):
        sd.generate(target, asked, tmp_path / "d", samplings=samplings, temperature=1.0)


def test_a_score_takes_prompts_and_single_numbers(target: LanguageModel, tmp_path: Path) -> None:
    asked = sd.prompts([f"w{5 + i} w{9 + i}" for i in range(4)])
    draft = make_draft(target, [0])
    card = sd.score(target, draft, asked, num_draft_tokens=2, temperature=0, max_new_tokens=6)
    assert [(row.temperature, row.num_draft_tokens) for row in card.rows] == [(0.0, 2)]
    assert {row.prompt_id for row in card.per_prompt} == {p.id for p in asked}
    assert sd.compare({"one": card, "same": card}).standings


def test_the_loop_in_ten_lines(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"w{5 + i} w{50 - i} w{7 + i}\n" for i in range(30)))

    target = sd.load(str(tiny_folder))
    train, heldout = sd.prompts(str(tmp_path / "p.txt")).split(heldout=6)
    data = sd.generate(target, train, tmp_path / "data", temperature=(0, 1), max_new_tokens=12)
    draft = sd.make_draft(target, layers=2, vocab_size=40, vocab_from=data)
    draft = sd.distill(target, draft, data, tmp_path / "run", loss="fkl", max_steps=4, heldout=6)
    card = sd.score(target, draft, heldout, num_draft_tokens=range(1, 3), max_new_tokens=8)
    card.write(f"{tmp_path}/run/scorecard.json")
    sd.plot(card).savefig(tmp_path / "speedup.png")
    served = sd.export(draft, str(tmp_path / "served"), engine="vllm")
    answer = sd.Decoder(target, draft).generate("w5 w6", temperature=0.8, max_new_tokens=6)

    assert (draft.num_layers, draft.vocab_size) == (2, 40)
    assert card.draft.sha256 == draft.sha256() == sd.load(str(tmp_path / "run/draft")).sha256()
    assert card.verdict.reason
    assert {row.prompt_id for row in card.per_prompt} == {prompt.id for prompt in heldout}
    assert not card.provenance["trained_prompts"]["scored"]
    assert "vllm serve" in served.serve
    assert sd.load(served.out).vocab_size == target.vocab_size
    assert (len(answer.tokens), bool(answer.text)) == (6, True)
    assert len(sd.check(target, draft, heldout[:2], max_new_tokens=6)) > 3
