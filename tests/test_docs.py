"""What the pages say is so: commands have the options they are given, configurations are valid,
Python imports what there is; paths, links and figures are right.
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_cli import run

import specdistill
from specdistill.cli import app
from specdistill.config import DistillConfig, Training, load_config
from specdistill.sweep import load_sweep
from specdistill.training.losses import configured_objective

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDERS = ("docs", "kernels", "bench", "notebooks")
PAGES = [README, *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
PAGES = [page for page in PAGES if page.exists() and page.name != "LOG.md"]
WRITTEN = [page for page in PAGES if page.name not in ("commands.md", "config.md")]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OTHERS = ("source", "vllm", "jupyter")  # programs whose options are not ours to check

pytestmark = pytest.mark.skipif(not README.exists(), reason="the wheel has no docs")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def tokens(page: Path) -> list[Token]:
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def blocks(page: Path, *languages: str) -> list[str]:
    fences = [token for token in tokens(page) if token.type == "fence"]
    return [fence.content for fence in fences if fence.info in languages]


def spans(page: Path) -> list[str]:
    """Code within a line."""
    return [token.content for token in tokens(page) if token.type == "code_inline"]


# Commands


@cache
def commands() -> dict:
    return typer.main.get_command(app).commands


def check_ours(name: str, words: list[str], whole: bool) -> None:
    """`specdistill NAME WORDS` has options that exist, with values they take. A command within a
    line may leave out what is required, and the value of its last option.
    """
    assert name in commands(), f"there is no command {name!r}"
    last = words[-1] if words else ""
    if not whole and last.startswith("--"):
        assert any(last in param.opts for param in commands()[name].params), f"{name} has no {last}"
        words = words[:-1]
    try:
        commands()[name].make_context(name, [word for word in words if word != "..."])
    except typer.Exit:  # --help
        pass
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            pytest.fail(f"specdistill {name} {shlex.join(words)}: {error}")


def check_module(module: str, words: list[str]) -> None:
    """`python -m MODULE WORDS`, of a module that reads its options by argparse."""
    if module == "pytest":
        for word in words:
            assert word.startswith("-") or list(ROOT.glob(word)), f"no test {word}"
        return
    if module == "specdistill":
        return check_ours(words[0], words[1:], whole=True)
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    file = file if file.exists() else ROOT / "kernels" / file.relative_to(ROOT)
    assert file.exists(), f"there is no module {module}"
    known = set(re.findall(r'"(--[a-z-]+)"', file.read_text(encoding="utf-8")))
    assert {word for word in words if word.startswith("--")} <= known, f"{module}: {words}"


def check_shell(words: list[str]) -> None:
    """Any line of a block of commands."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "specdistill":
        check_ours(rest[0], rest[1:], whole=True)
    elif program == "make":
        for word in rest:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert "=" in word or f"\n{word}:" in makefile, f"there is no `make {word}`"
    elif program in ("python", "accelerate"):
        at = rest.index("-m")
        for word in rest[:at]:
            assert not word.endswith(".yaml") or (ROOT / word).exists(), f"there is no {word}"
        check_module(rest[at + 1], rest[at + 2 :])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        for extra in re.findall(r"specdistill\[(\w+)\]", shlex.join(rest)):
            assert extra in extras["project"]["optional-dependencies"]
    else:
        assert program in OTHERS, f"what is {shlex.join(words)!r}?"


def shell_lines(text: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_blocks_of_commands_can_be_run(page: Path) -> None:
    for block in blocks(page, "", "sh", "bash"):
        if not block.startswith("specdistill/\n"):  # the tree of folders
            for words in shell_lines(block):
                check_shell(words)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_within_a_line_have_the_options_they_are_given(page: Path) -> None:
    for span in spans(page):
        first, _, rest = span.partition(" ")
        if first == "specdistill" and rest and not rest.startswith("-"):
            name, *words = shlex.split(rest)
            check_ours(name, words, whole=False)
        elif first in commands() and " --" in span:
            check_ours(first, shlex.split(rest), whole=False)
        elif rest and (first in ("make", "pip") or rest.startswith("-m ")):
            check_shell(shlex.split(span))


FEWER = {  # so that what the README says takes seconds
    "generate": ["--max-new-tokens", 6],
    "distill": ["heldout=4", "training.max_steps=2"],
    "score": ["--limit", 2, "--max-new-tokens", 8, "--num-draft-tokens", "1,2"],
}


def test_the_four_commands_of_the_readme_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "T")
    for name, first in (("prompts", 5), ("heldout", 30)):
        lines = [json.dumps({"prompt": f"w{i} w{i + 2}"}) for i in range(first, first + 20)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    (config,) = blocks(README, "yaml")
    Path("config.yaml").write_text(config)
    (block,) = [block for block in blocks(README, "") if "config.yaml" in block]
    for _, name, *words in shell_lines(block):
        done = run(name, *words, *FEWER.get(name, []))
        assert done.code == 0, done.err
    assert (tmp_path / "run" / "draft" / "config.json").exists()
    assert (tmp_path / "run" / "scorecard.json").exists()


@pytest.mark.parametrize("path", [*EXAMPLES, *CONFIGS], ids=lambda path: path.name)
def test_the_comments_of_an_example_say_how_to_run_it(path: Path) -> None:
    indented = re.findall(r"^#  +(.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    lines = list(shell_lines("\n".join(indented)))
    assert lines
    for words in lines:
        check_shell(words)


# Configurations

BASE = {"target": "T", "draft": "D", "data": "data", "run_dir": "run", "training": {"max_steps": 1}}
LOSS_OF = {"beta": "jsd", "skew": "skew_kl", "eta": "lk_hybrid", "num_draft_tokens": "e2e_tv"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    configured_objective(load_config(path))


@by_page
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    for block in blocks(page, "yaml"):
        file.write_text(block)
        if "grid:" in block:
            load_sweep(file)
        else:
            configured_objective(load_config(file))
    for span in spans(page):
        key, colon, value = span.partition(": ")
        sections = {key.partition(".")[0], key} & DistillConfig.model_fields.keys()
        nested = key in Training.model_fields and key not in DistillConfig.model_fields
        if colon and (sections or nested):
            goal = f"training.{key}" if nested else key
            loss = "ce" if span == "signal: none" else LOSS_OF.get(key, "fkl")
            file.write_text(yaml.safe_dump({"loss": loss, **BASE}))
            configured_objective(load_config(file, [f"{goal}={value}"]))


# Python


@by_page
def test_python_compiles_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sd":
                assert hasattr(specdistill, node.attr), f"sd has no {node.attr}"


SMALLER = {"Qwen/Qwen3-8B": "T", "heldout=32": "heldout=4", "layers=4": "layers=2"} | {
    "8192": "32", "2000": "3, heldout=4, decode=None", "range(1, 9)": "[2], max_new_tokens=8"
}  # fmt: skip


def test_the_ten_lines_of_the_readme_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_folder: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "T")
    lines = [json.dumps({"prompt": f"w{i} w{i + 2} w{3 * i % 50 + 5}"}) for i in range(5, 29)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    (code,) = blocks(README, "python")
    for words, fewer in SMALLER.items():
        assert words in code
        code = code.replace(words, fewer)
    exec(code, {})
    assert "plain decoding" in capsys.readouterr().out
    assert (tmp_path / "served" / "config.json").exists()


# Paths, links, size


@by_page
def test_paths_and_the_names_after_them_exist(page: Path) -> None:
    """Such as `specdistill/training/hints.py`, `HINTS`."""
    tops = "|".join(("specdistill", "tests", "examples", "configs", *FOLDERS))
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(rf"`((?:{tops})/[^`\s]*)`(?:, `(\w+)`)?", text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path} is no more"
        if name:
            defined = rf"^(?:def|class) {name}\b|^{name}\b.*="
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(defined, source, re.MULTILINE), f"{path} has no {name}"


def test_the_tree_shows_every_module_and_no_other() -> None:
    (tree,) = [b for b in blocks(ROOT / "docs" / "contributing.md", "") if "cli/" in b]
    (package,) = re.findall(r"^specdistill/\n((?:  .*\n)+)", tree, re.MULTILINE)
    shown = set(re.findall(r"\w+(?:\.py|/)(?= |$)", package, re.MULTILINE)) - {"plots/"}
    there = {f"{p.name}/" for p in (ROOT / "specdistill").iterdir() if (p / "__init__.py").exists()}
    there |= {file.name for file in (ROOT / "specdistill").glob("[a-z]*.py")}
    assert shown == there


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for token in tokens(page):
        goal = token.attrGet("href") or token.attrGet("src")
        if goal and not str(goal).startswith("http"):
            path, _, anchor = str(goal).partition("#")
            yield ((page.parent / path).resolve() if path else page), anchor
        if token.type == "image":
            assert token.content, f"{page}: {goal} has no words beside it"


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for goal, anchor in links(page):
        assert goal.exists(), f"{page.name} links to {goal}"
        assert not anchor or anchor in anchors(goal), f"{goal.name} has no heading for #{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = set(), {README}
    while ahead:
        reached |= ahead
        ahead = {goal for page in ahead for goal, _ in links(page) if goal in PAGES} - reached
    assert reached == set(PAGES)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


# Figures


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "results.md"], ids=lambda p: p.name)
def test_the_quickstarts_figures_are_those_of_its_scorecards(page: Path) -> None:
    folder = ROOT / "bench" / "results" / "cpu-amd-epyc-2-cores" / "quickstart"
    text = page.read_text(encoding="utf-8").replace("**", "")
    for file, best in (("scorecard_before.json", {0: 3, 1: 3}), ("scorecard.json", {0: 5, 1: 5})):
        for row in json.loads((folder / file).read_text())["rows"]:
            if row["num_draft_tokens"] == best[row["temperature"]]:
                low, high = row["speedup_ci95"]
                cells = [
                    f"{row['num_draft_tokens']}",
                    f"{row['acceptance_rate_expected']:.2f}",
                    f"{row['block_efficiency']:.2f}",
                    f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
                ]
                line = rf"^\| {row['temperature']:g} \| .* \| {re.escape(' | '.join(cells))} \|$"
                assert re.search(line, text, re.MULTILINE), cells


def test_speeds_against_transformers_are_those_measured() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    names = {
        "SpecDistill, plain": "engine plain",
        "SpecDistill, full-vocabulary draft, γ = 4": "engine, full vocabulary",
        "SpecDistill, full-vocabulary draft, stopping early": (
            "engine, full vocabulary, stopping early"
        ),
        "SpecDistill, trimmed draft, γ = 4": "engine speculative",
    }
    machines = ("cpu-xeon-2.5ghz-2-cores", "cpu-amd-epyc-2-cores")
    files = [ROOT / "bench" / "results" / name / "decoding.json" for name in machines]
    measured = [json.loads(file.read_text())["batches"]["1"]["contenders"] for file in files]
    for row, name in names.items():
        speeds = " | ".join(f"{each[name]['tokens_per_second']:.1f}" for each in measured)
        ratios = " | ".join(f"{each[name]['over_best_assisted']['ratio']:.2f}" for each in measured)
        assert f"| {row} | {speeds} |" in page
        assert f"| {row} | {ratios} |" in page


def test_the_fields_of_a_scorecard_are_listed() -> None:
    from specdistill.scoring import scorecard

    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    for record in (scorecard.Row, scorecard.Verdict, scorecard.ModelCard, scorecard.Scorecard):
        for name in record.__dataclass_fields__:
            assert f"`{name}`" in page or name == "schema", f"{record.__name__}.{name}"
