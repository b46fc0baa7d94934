"""What a user can get wrong, one row each: the command ends with exit code 2 and one message that
names what was got; nothing that was there is lost or changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import pytest
import torch
import yaml
from cards import simulate
from conftest import amend, tiny_model
from pyarrow import Table, parquet
from safetensors.torch import load_file, save_file
from small_runs import make_world, settings
from small_runs import run as train
from test_cli import run

from specdistill.cli import application
from specdistill.drafts.making import save_draft

DIGITS = "7" * 5000
HUGE = str(10**30)


Setup = Callable[[], object]


class Bad(NamedTuple):
    """`setup` runs in a folder with all that `world` makes, where the command then is given."""

    id: str
    command: str | list[str]
    says: str | tuple[str, ...] | set[str]  # of a set one
    setup: Setup | None = None
    code: int = 2


GENERATE = "generate --target target --prompts prompts.jsonl --out new"
SERVER = "ask --target t --prompts prompts.jsonl --out new"
WIDEN = "widen --target target --prompts prompts.jsonl --out new.jsonl --count 2"
INIT = "init --target target --out new"
SCORE = "score --target target --draft draft --prompts prompts.jsonl --out new.json"
NO_DRAFT = "score --target target --prompts prompts.jsonl --out new.json"
BY_VLLM = f"{NO_DRAFT} --engine vllm --engine-python /bin/false"
NGRAM = """--speculative-config '{"method": "ngram"}'"""
QUICKSTART = "quickstart --target target --prompts demo:train --run-dir new"
CHECK = "check --target target --draft draft"
EXPORT = "export --draft draft --out new --for vllm"
DISTILL, SWEEP = "distill run.yaml", "sweep sweep.yaml"
RESUME = "distill run/config.yaml --resume"


# Options, one wrong at a time


def option(command: str, name: str, *values: str, says: str | None = None) -> list[Bad]:
    """A row each; the parser of the command line names the option, our own checks what was got."""
    return [
        Bad(
            f"{command.split()[0]} {name} {value[:20]} {len(value)}",
            [*shlex.split(command), f"{name}={value}"],
            {name, value[:20]} if says is None else says,
        )
        for value in values
    ]


def temperatures(command: str) -> list[Bad]:
    bounds = "temperature must be 0, or 0.0001 to"
    return [
        *option(command, "--temperature", "-1", "nan", "inf", "1e300", "1e-320", says=bounds),
        *option(command, "--temperature", "0,nan", says=bounds),
        *option(command, "--temperature", "x", "0,", "0;1", says="must look like 0 or 0,1; got"),
    ]


NUMBERS = [
    *option(GENERATE, "--seed", "-1", str(2**63), HUGE, "1.5", "x", DIGITS),
    *option(GENERATE, "--top-k", "-1", HUGE, "2.5"),
    *option(
        GENERATE + " --temperature 1",
        *("--top-p", "0", "-1", "1.1", "nan", "inf"),
        says="top_p must be above 0",
    ),
    *option(GENERATE + " --temperature 1", "--min-p", "-0.1", "1", "nan"),
    *option(GENERATE, "--turns", "some"),
    *option(GENERATE, "--chat-template-kwargs", "{", "[1]", "x=1"),
    *option(SCORE, "--chat-template-kwargs", "3"),
    *(row for command in (GENERATE, SCORE) for row in temperatures(command)),
    *option(GENERATE, "--max-new-tokens", "0", "-1", HUGE, DIGITS),
    *option(GENERATE, "--batch-size", "0", HUGE),
    *option(GENERATE, "--limit", "0", "-1", HUGE),
    *option(GENERATE, "--threads", "0", "-1", "1000000000"),
    *option(GENERATE, "--min-tokens", "-1", HUGE),
    *option(GENERATE, "--max-repetition", "-0.1", "1.5", "nan"),
    *option(GENERATE + " --temperature 1 --drop-truncated", "--retries", "-1", HUGE),
    *option(GENERATE + " --temperature 1 --scorer majority", "--best-of", "0", str(10**12)),
    *option(GENERATE + " --style in-context --examples prompts.jsonl", "--shots", "0", HUGE),
    *option(GENERATE, "--signal", "top-k:0", "top-k:99999", "everything", f"top-k:{DIGITS}"),
    *option(SERVER + " --base-url http://127.0.0.1:9/v1", "--concurrency", "0", HUGE),
    *option(
        GENERATE + " --temperature 1 --best-of 2 --scorer majority --generator target",
        *("--match", "cost:1e9", "cost:0.5", "cost:nan", "cost:", "free", f"cost:{DIGITS}"),
    ),
    *option(
        GENERATE + " --temperature 1 --best-of 1000 --scorer majority --generator target",
        *("--match", "cost:1000"),
        says="1024",
    ),
    *option(WIDEN, "--count", "0", "-1", HUGE),
    *option(WIDEN, "--shots", "0", "5000"),
    *option(WIDEN, "--max-similarity", "-1", "0", "1.5", "nan"),
    *option(WIDEN, "--temperature", "0", "-1", "nan", "1e300", says="temperature must be"),
    *option(WIDEN, "--seed", "-1", HUGE),
    *option(INIT, "--layers", "0", "-1", HUGE, DIGITS, "0,0", "1.5", "2,", ",", "0,-1"),
    *option(INIT, "--layers", "99", says="among the target's 0 to 3; got 99"),
    *option(INIT + " --vocab-from data", "--vocab-size", "0", "-1", "1", HUGE),
    *option(INIT + " --vocab-from data", "--vocab-size", "65", says="must be 1 to 64; got 65"),
    *option(INIT, "--random-seed", "-1", str(2**64), "x"),
    *option(INIT, "--dtype", "float8", "Float32"),
    *option(SCORE, "--least-reach", "-1", "1", "nan", "1e300", "x"),
    *option(SCORE + " --engine transformers", "--least-reach", "0.2"),
    *option(SCORE, "--drafting", "both", "", "PARALLEL"),
    *option(SCORE + " --engine transformers", "--drafting", "parallel"),
    *option(
        SCORE,
        *("--num-draft-tokens", "0", "65", "8-1", "1-99999999999", DIGITS, f"1-{DIGITS}"),
        says="must be 1 to 64; got '",
    ),
    *option(SCORE, "--num-draft-tokens", "1,,2", "-4", "x", "2,", says="like 4, 1-8 or 2,4,6"),
    *option(SCORE, "--verification", "tree"),
    *option(
        SCORE,
        *("--lenience", "lin:1", "lin:0", "sq:0.0", "cube:0.5", "lin:nan", "lin"),
        says="must look like lin:0.5, sq:0.7 or exp:0.8",
    ),
    *option(SCORE, "--max-new-tokens", "0", HUGE),
    *option(SCORE, "--seed", "-1", HUGE),
    *option(SCORE, "--device", "tpu", "cuda:99", "cpu:x"),
    *option(CHECK, "--max-new-tokens", "0", "1", HUGE),
    *option(CHECK, "--limit", "0", HUGE),
    *option("quickstart --run-dir new", "--threads", "0", HUGE),
    *option(QUICKSTART, "--minutes", "0", "-1", "nan", "1e300", "0.001", says="minutes"),
    *option(QUICKSTART, "--layers", "0", "-1", "99", "1,2", HUGE, says="layers"),
    *option(QUICKSTART, "--vocab-size", "0", "-1", "1", "65", HUGE, says="vocab"),
    *option(QUICKSTART, "--heldout", "none.jsonl"),
]

COMMANDS = [
    Bad("no such command", "distil run.yaml", "distil"),
    Bad("no such option", f"{GENERATE} --tempreature 1", "--tempreature"),
    Bad("an option without its value", f"{INIT} --layers", "--layers"),
    Bad("a needed option is missing", "init --target target", "--out"),
    Bad("a target is missing", "generate --prompts prompts.jsonl --out new", "--target"),
    Bad("a needed argument is missing", "compare", "cards"),
    Bad("env takes no argument", "env now", "now"),
    Bad("no such engine", f"{GENERATE} --engine tgi", "tgi"),
    Bad("no such engine to export for", "export --draft draft --out new --for ollama", "ollama"),
    Bad("an empty target", [*shlex.split(INIT), "--target", ""], "--target"),
    Bad("an empty folder", [*shlex.split(GENERATE), "--out", ""], "--out"),
    Bad("an empty folder, by =", [*shlex.split(GENERATE), "--out="], "--out"),
    Bad("empty prompts", [*shlex.split(SCORE), "--prompts", ""], "--prompts"),
    Bad("an empty configuration", ["distill", ""], "empty"),
    Bad("an empty card", ["compare", "card.json", ""], "empty"),
    Bad("a split of a local file", f"{GENERATE} --split train", "train"),
    Bad("a column of a local file", f"{SCORE} --column text", "text"),
    Bad("a split of no prompts", f"{CHECK} --split train", ("--split and --column", "--prompts")),
    Bad("no such style", f"{GENERATE} --style rude", "rude"),
    Bad("shots without the style", f"{GENERATE} --shots 2", "--shots"),
    Bad("examples without the style", f"{GENERATE} --examples prompts.jsonl", "examples"),
    Bad("a draft's γ without a draft", f"{GENERATE} --num-draft-tokens 3", "--num-draft-tokens"),
    Bad("best-of without a scorer", f"{GENERATE} --best-of 3", "--scorer"),
    Bad("a scorer without best-of", f"{GENERATE} --scorer majority", "--best-of"),
    Bad("best-of when greedy", f"{GENERATE} --best-of 3 --scorer majority", "temperature 0"),
    Bad("a generator without a match", f"{GENERATE} --generator draft", "--match"),
    Bad("retries when greedy", f"{GENERATE} --retries 2 --drop-truncated", "temperature 0"),
    Bad("retries without a filter", f"{GENERATE} --temperature 1 --retries 2", "retries: 2"),
    Bad("no such scorer", f"{GENERATE} --temperature 1 --best-of 2 --scorer best", "best"),
    Bad("no such module", f"{GENERATE} --temperature 1 --best-of 2 --scorer mine:f", "mine"),
    Bad("a server's option", f"{GENERATE} --base-url http://localhost:1/v1", "--base-url"),
    Bad("a local option", f"{SERVER} --base-url http://localhost:1/v1 --signal none", "--signal"),
    Bad("vocab-size alone", f"{INIT} --vocab-size 20", "--vocab-from go together"),
    Bad("vocab-from alone", f"{INIT} --vocab-from data", "--vocab-from go together"),
    Bad("lenience at temperature 0", f"{SCORE} --lenience lin:0.5", "no effect at temperature 0"),
    Bad(
        "lenience of blocks",
        f"{SCORE} --lenience lin:0.5 --verification block --temperature 1",
        "a rule for single tokens",
    ),
    Bad("a python without vLLM", f"{SCORE} --engine-python /bin/false", "-python go together"),
    Bad("vLLM without a python", f"{SCORE} --engine vllm", "-python go together"),
    Bad(
        "vLLM on a device of ours",
        f"{BY_VLLM} --draft draft --device cpu",
        ("--device cpu has no effect with --engine vllm", "leave it out"),
    ),
    Bad(
        "Transformers and a trimmed draft",
        f"{SCORE} --engine transformers",
        ("has a trimmed vocabulary", "specdistill export --for transformers"),
    ),
    Bad("no interpreter", f"{SCORE} --engine vllm --engine-python gone", "no interpreter gone"),
    Bad("a score of nothing", NO_DRAFT, "name a draft by --draft"),
    Bad("a draft and a config", f"{BY_VLLM} --draft draft {NGRAM}", "one of the two"),
    Bad("a config of our engine", f"{SCORE} {NGRAM}", "for --engine vllm"),
    Bad("runners of our engine", f"{SCORE} --runner both", "--runner would have no effect"),
    Bad("no such runner", f"{BY_VLLM} --draft draft --runner V3", "--runner"),
    Bad("a config and --drafting", f"{BY_VLLM} {NGRAM} --drafting parallel", "--drafting"),
    *(
        Bad(f"speculative config: {says}", f"{BY_VLLM} --speculative-config '{text}'", says)
        for text, says in (
            ("{", "not valid JSON"),
            ("[]", "write an object"),
            ("{}", "must name its method"),
            ('{"method": "ngram", "num_speculative_tokens": 2}', "--num-draft-tokens sets it"),
            ('{"method": "eagle3", "model": "none"}', "none"),
            ('{"method": "eagle3", "rejection_sample_method": "synthetic"}', "synthetic"),
        )
    ),
    Bad(
        "rules of ours for others",
        f"{SCORE} --engine transformers --verification block --keep-text",
        "leave out --verification and --keep-text",
    ),
    Bad("several cards without a folder", "plot card.json other.json", "--out"),
]


# Files


MANIFEST = "data/manifest.json"
PART, SIGNAL = "data/part-00000.parquet", "data/part-00000.safetensors"
P = ParamSpec("P")


def later(setup: Callable[P, object]) -> Callable[P, Setup]:
    """Of a function that changes files: what does it once the folder is there."""

    def prepared(*args: P.args, **kwargs: P.kwargs) -> Setup:
        return partial(setup, *args, **kwargs)

    return prepared


@later
def put(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


@later
def changed(name: str, **values: Any) -> None:
    """A JSON file with other values."""
    amend(Path(name), **values)


@later
def without(name: str, key: str) -> None:
    values = json.loads(Path(name).read_text())
    del values[key]
    Path(name).write_text(json.dumps(values))


@later
def cut(name: str) -> None:
    os.truncate(name, os.path.getsize(name) - 40)


@later
def both(*steps: Setup) -> None:
    for step in steps:
        step()


GOOD = {
    "target": "target",
    "draft": "draft",
    "data": "data",
    "run_dir": "new",
    "dtype": "float32",
    "heldout": 8,
    "training": {"max_steps": 2, "batch_tokens": 120},
}
GRID = {"grid": {"loss": ["fkl", "tvd"]}, "score": {"prompts": "prompts.jsonl"}}
TEXT = yaml.safe_dump(GOOD, sort_keys=False)
NESTED = "[" * 3000 + "]" * 3000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


def text(name: str, content: str | bytes, says: str, file: str = "run.yaml") -> Bad:
    command = DISTILL if file == "run.yaml" else SWEEP
    return Bad(f"{command.split()[0]}: {name}", command, says, put(file, content))


YAML = [
    *(
        text(name, content, f"must hold a mapping of keys to values; got {kind}")
        for name, content, kind in (
            ("an empty file", "", "NoneType"),
            ("comments alone", "# nothing\n", "NoneType"),
            ("a list", "- target\n- draft\n", "list"),
            ("a word", "target", "str"),
            ("a number", "5", "int"),
        )
    ),
    text("a key twice", TEXT + "target: other\n", "'target' is there twice"),
    text("a key twice within", TEXT + "decode: {prompts: 1, prompts: 2}\n", "'prompts'"),
    text("a tab", "\tx: 1\n", "run.yaml is not valid YAML: while scanning for the next token"),
    text("two colons", "a: b: c\n", "not valid YAML"),
    text("an open list", "target: [", "not valid YAML"),
    text("an open quote", TEXT + "device: 'cpu\n", "not valid YAML"),
    text("two documents", TEXT + "---\n" + TEXT, "not valid YAML"),
    text("an object of Python's", "target: !!python/object/apply:os.system ['true']\n", "python"),
    text("a tag", "target: !mine t\n", "!mine"),
    text("an unknown alias", "target: *nobody\n", "nobody"),
    text("a bomb of aliases", BOMB, "aliases"),
    text("an alias of itself", "target: &a [*a]\n", "aliases"),
    text("depth", f"target: {NESTED}\n", "too deeply"),
    text("depth of blocks", "\n".join(" " * i + "a:" for i in range(900)), "deep"),
    text("5,000 digits", TEXT + f"seed: {DIGITS}\n", "run.yaml"),
    text("5,000 hexadecimal digits", TEXT + f"seed: 0x{'f' * 5000}\n", "bits"),
    text("a float of 5,000 digits", TEXT + f"temperature: {DIGITS}.0\n", "temperature"),
    text("Latin-1", TEXT.encode() + b"device: caf\xe9\n", "run.yaml is not valid YAML"),
    text("bytes", bytes(range(256)), "run.yaml"),
    text("NUL in a name", TEXT.replace("run_dir: new", 'run_dir: "a\\0b"'), "NUL"),
    text("half a surrogate pair", TEXT.replace("run_dir: new", 'run_dir: "\\uD800"'), "ud800"),
    text("a key that is none", TEXT + "? [a, b]\n: 1\n", "run.yaml"),
    text("keys that are numbers", TEXT + "5: x\n", "5: Keys should be strings"),
    text("many unknown keys", TEXT + "".join(f"x{i}: 1\n" for i in range(5000)), "more"),
    text("a mebibyte", "#" * 2**20 + "\n" + TEXT, "bytes"),
    Bad("distill: a folder", "distill data", "data", None),
    Bad("distill: a device", "distill /dev/zero", "/dev/zero", None),
    Bad("distill: a pipe", "distill pipe", "pipe", lambda: os.mkfifo("pipe")),
    Bad("distill: no file", "distill none.yaml", "cannot read none.yaml: No such file", None),
    Bad(
        "distill: a link to nothing", "distill l.yaml", "l.yaml", lambda: os.symlink("x", "l.yaml")
    ),
    Bad("distill: a name of 300 letters", f"distill {'n' * 300}", "nnn", None),
]


def named(override: str) -> str:
    return re.split("[.=]", override)[0] or override[0]


def override(*values: str) -> list[Bad]:
    return [
        Bad(f"distill {value[:40]} {len(value)}", ["distill", "run.yaml", value], named(value))
        for value in values
    ]


OVERRIDES = [
    *override(
        "seed=-1", f"seed={HUGE}", "seed=1.5", "seed=yes", "seed=2024-01-01", f"seed={DIGITS}"
    ),
    *override("temperature=0", "temperature=.nan", "temperature=.inf", "temperature=1e-320"),
    *override("temperature=1e300", "loss.fkl=.nan", "loss.fkl=-1", "loss.fkl=1e300", "loss={}"),
    *override("loss=[fkl]", "loss=none", "beta=2", "skew=.nan", "eta=3", "num_draft_tokens=4"),
    *override(f"num_draft_tokens={HUGE}", "heldout=0", f"heldout={HUGE}", "evaluate_every=0"),
    *override(f"checkpoint_every={HUGE}", "dtype=int8", "device=", "device=tpu", "signal=maybe"),
    *override("target=", "target=5", "target={}", "draft=[]", "data=null", "run_dir=''"),
    *override("schema_version=2", "trackers=[excel]", "trackers=wandb", "hints={layers: {0: 1}}"),
    *override("hints={weight: .nan}", "hints={layers: {a: b}}", "hints={layers: {1: 99}}"),
    *override("training={}", "training=5", "training.max_steps=0", f"training.max_steps={HUGE}"),
    *override("training.max_steps=null", "training.max_seconds=5", "training.learning_rate=.nan"),
    *override("training.learning_rate=-1", "training.learning_rate=1e300", "training.warmup=1"),
    *override("training.warmup=.nan", "training.weight_decay=-1", "training.clip_norm=0"),
    *override(f"training.batch_tokens={HUGE}", "training.chunk=0", f"training.accumulate={HUGE}"),
    *override("training.lora={rank: 0}", "training.precision=fp8", "training.shard=maybe"),
    *override("decode={max_new_tokens: 1}", "decode={temperature: .nan}", "decode={prompts: 0}"),
    *override("turns=all", "turns=some", "chat_template_kwargs={a: 1}", "chat_template_kwargs=5"),
    *override("reward={function: accepted-length, group: 1}", "reward={function: accepted-length}"),
    *override("reward=5", "reward={}", "reward={function: 'a:b', weight: .nan}"),
    *override("policy=best", "policy={}x", "policy.top_k=5", "policy={name: skd, top_k: 0}"),
    *override(f"policy={{name: skd, top_k: {HUGE}}}", "policy={name: [a]}"),
    *override("seed", "=5", ".seed=1", "training..max_steps=1", "a.b.c.d.e.f=1", "target.x=1"),
    *override("seed={", "seed=*a", "seed=[1, 1", "training={max_steps: 1, max_steps: 2}"),
    *override(f"target={NESTED}"),
    Bad("distill run_dir=prompts.jsonl", f"{DISTILL} run_dir=prompts.jsonl", "prompts.jsonl"),
    Bad("distill: no draft", f"{DISTILL} draft=nowhere", "nowhere"),
    Bad("distill: no data", f"{DISTILL} data=nowhere", "answers in nowhere, which does not exist"),
    Bad("distill: nothing left", f"{DISTILL} heldout=40", ("40 answers", "heldout: 40")),
    Bad(
        "distill: a single answer",
        f"{DISTILL} data=one.jsonl policy=fixed signal=live",
        ("one.jsonl has 1 answer, and one must be held out", "generate more"),
        lambda: Path("one.jsonl").write_text('{"prompt": "w7", "response": "w8"}\n'),
    ),
]


def grid(name: str, says: str, grid: object = None, **more: Any) -> Bad:
    whole = {**GOOD, **GRID, **({} if grid is None else {"grid": grid}), **more}
    return text(name, yaml.safe_dump(whole), says, "sweep.yaml")


SWEEPS = [
    grid("no grid", "grid", {}),
    grid("a grid that is a list", "grid", ["loss"]),
    grid("a value that is no list", "fkl", {"loss": "fkl"}),
    grid("a list that is empty", "grid", {"loss": []}),
    grid("an unknown key", "lsos", {"lsos": ["fkl"]}),
    grid("the folder in the grid", "run_dir", {"run_dir": ["a", "b"]}),
    grid("a billion cells", "1,000,000,000", {k: list(range(1000)) for k in ("seed", "a", "b")}),
    grid("keys without end", "keys", {f"k{i}": [1] for i in range(5000)}),
    grid("a cell called ..", "'..'", {"target": [".."]}),
    grid("a cell called .", "'.'", {"target": ["."]}),
    grid("a cell without a name", "''", {"target": ["/"]}),
    grid("a cell that is empty", "''", {"target": [""]}),
    grid("a cell of 300 letters", "nnn", {"target": ["n" * 300]}),
    grid("a cell of NUL", "NUL", {"target": ["a\0b"]}),
    grid("cells that differ in case", "capital", {"target": ["Target", "target"]}),
    grid("cells of one folder", "a-b", {"target": ["a/b", "a:b"]}),
    grid("a cell called as our file", "score.json", {"target": ["score.json"]}),
    grid("one run twice", "'1'", {"seed": [1, 1]}),
    grid("a key and a part of it", "policy.top_k", {"policy": ["skd"], "policy.top_k": [5]}),
    grid("a key given twice", "'seed'", {"seed": [1], "loss": [{"loss": "fkl", "seed": 2}]}),
    grid("a cell that moves", "'run_dir'", {"loss": [{"loss": "fkl", "run_dir": "x"}]}),
    grid("a seed that is none", "seed", {"seed": [-1]}),
    grid("no scoring", "score", score=None),
    grid("scoring without prompts", "prompts", score={}),
    grid("scoring at no γ", "num_draft_tokens", score={"prompts": "p", "num_draft_tokens": []}),
    grid("scoring at γ of 65", "65", score={"prompts": "p", "num_draft_tokens": [65]}),
    grid("scoring at T of NaN", "nan", score={"prompts": "p", "temperatures": [float("nan")]}),
    grid("scoring with a key too many", "gamma", score={"prompts": "p", "gamma": 3}),
    grid("scoring with a seed below 0", "-1", score={"prompts": "p", "seed": -1}),
    grid("an empty folder", "run_dir", run_dir=""),
    grid("a folder that is a file", "prompts.jsonl", run_dir="prompts.jsonl"),
    Bad("distill: no unused token", f"{DISTILL} parallel={{}}", "no unused token"),
    Bad("distill: a mask that is read", f"{DISTILL} parallel.mask_token=5", "holds the token 5"),
    Bad("distill: a mask beyond", f"{DISTILL} parallel.mask_token=64", "the ids 0 to 63"),
    Bad("distill: blocks of one", f"{DISTILL} parallel.num_draft_tokens=1", "equal to 2"),
    Bad("distill of a sweep's file", "distill sweep.yaml", "sweep", None),
    *(
        Bad(
            f"sweep: {name} is {content[:20]}",
            SWEEP,
            {name, "runs scored with"},
            both(put("sweep.yaml", yaml.safe_dump(GOOD | GRID)), put(f"new/{name}", content)),
        )
        for name in ("score.json", "data.json")
        for content in ("", "[]", "{", '{"prompts": ', '{"a": {"b": [1]}}')
    ),
]


@later
def columns(**values: Callable[[Any], Any] | None) -> None:
    """The answers with other columns, and the hash that fits."""
    rows = parquet.read_table(PART).to_pydict()
    for name, change in values.items():
        if change is None:
            del rows[name]
        else:
            rows[name] = [change(value) for value in rows[name]]
    parquet.write_table(Table.from_pydict(rows), PART)
    rehash("parquet")


@later
def tensors(file: str, change: Callable[[dict[str, Any]], object]) -> None:
    held = load_file(file)
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, file)


@later
def part(**values: Any) -> None:
    """The manifest with other facts of the first part."""
    parts = json.loads(Path(MANIFEST).read_text())["parts"]
    amend(Path(MANIFEST), parts=[parts[0] | values, *parts[1:]])


def rehash(kind: str) -> None:
    """Make the manifest agree with the first part's file."""
    content = Path({"parquet": PART, "signal": SIGNAL}[kind]).read_bytes()
    part(**{f"{kind}_sha256": hashlib.sha256(content).hexdigest()})()


def signal(change: Callable[[dict[str, Any]], object]) -> Setup:
    return both(tensors(SIGNAL, change), partial(rehash, "signal"))


def ours(name: str, command: str, says: str, *setups: tuple[str, Setup]) -> list[Bad]:
    return [Bad(f"{command.split()[0]}: {name} {what}", command, says, do) for what, do in setups]


def answer(**values: object) -> str:
    """A line of answers.jsonl."""
    asked = [{"role": "user", "content": "w5"}]
    sound = {"id": "1", "category": None, "messages": asked, "response": "a", "ended": True}
    return json.dumps(sound | {"reasoning": None} | values)


STATE, OPTIMIZER = "run/checkpoints/state.json", "run/checkpoints/optimizer.safetensors"
WEIGHTS, BEST = "run/checkpoints/weights.safetensors", "run/checkpoints/best.safetensors"
AVERAGE = "0.exp_avg"  # of the optimiser
RIGHT_HASH = [
    ("is empty", both(put(PART, ""), partial(rehash, "parquet"))),
    ("is no Parquet", both(put(PART, "x" * 99), partial(rehash, "parquet"))),
    ("has no ids", columns(id=None)),
    ("has no tokens", columns(response_tokens=None)),
    ("has other ids", columns(id=lambda id_: f"x{id_}")),
    ("has ids that are numbers", columns(id=int)),
    ("has tokens that are words", columns(response_tokens=lambda tokens: [*map(str, tokens)])),
    ("has tokens that are floats", columns(prompt_tokens=lambda tokens: [*map(float, tokens)])),
    ("has null for tokens", columns(response_tokens=lambda tokens: None)),
    ("has null among tokens", columns(response_tokens=lambda tokens: [None, *tokens[1:]])),
    ("has no token of an answer", columns(response_tokens=lambda tokens: tokens[:0])),
    ("has prompts without tokens", columns(prompt_tokens=lambda tokens: tokens[:0])),
    ("has a token below 0", columns(response_tokens=lambda tokens: [-1, *tokens[1:]])),
]
OURS = [
    *ours(
        "the manifest",
        DISTILL,
        "manifest.json",
        ("is empty", put(MANIFEST, "")),
        ("is a list", put(MANIFEST, "[]")),
        ("is cut off", put(MANIFEST, '{"schema": ')),
        ("is no text", put(MANIFEST, b"\xff\xfe\x00")),
        ("nests", put(MANIFEST, '{"schema": ' + "[" * 9999)),
        ("has no schema", without(MANIFEST, "schema")),
        ("has another schema", changed(MANIFEST, schema="specdistill.generations/1")),
        ("has a schema that is a list", changed(MANIFEST, schema=[1])),
        ("has parts of null", changed(MANIFEST, parts=None)),
        ("has parts that are words", changed(MANIFEST, parts=["a"])),
        ("has a hash of null", part(parquet_sha256=None)),
        ("has ids of numbers", part(ids=[1, 2])),
        ("has tokens below 0", part(tokens=-1)),
        ("has withdrawn words", part(withdrawn="all")),
        ("has no signal's hash", part(signal_sha256=None)),
        ("has a target of 5", changed(MANIFEST, target=5)),
        ("has settings of null", changed(MANIFEST, settings=None)),
        ("has removed words", changed(MANIFEST, removed=[["a"]])),
        ("has parameters of text", changed(MANIFEST, writer_parameters="many")),
    ),
    *ours("the manifest", GENERATE.replace("new", "data"), "manifest", ("", put(MANIFEST, "[]"))),
    *ours(
        "the signal", DISTILL, "is truncated", ("is cut off", cut("data/part-00000.safetensors"))
    ),
    *ours(
        "the manifest", f"{INIT} --vocab-size 9 --vocab-from data", "x", ("", put(MANIFEST, "x"))
    ),
    *ours("a part", DISTILL, "part-00000.parquet", *RIGHT_HASH),
    *(
        Bad(
            f"{command.split()[0]}: a part has a token beyond the model",
            command,
            "100",
            columns(response_tokens=lambda tokens: [100, *tokens[1:]]),
        )
        for command in (DISTILL, f"{INIT} --vocab-size 9 --vocab-from data")
    ),
    Bad("distill: no part", DISTILL, "missing", lambda: os.remove(PART)),
    *ours(
        "the signal",
        DISTILL,
        "part-00000.safetensors",
        ("has another hash", put(SIGNAL, "x")),
        ("is no tensors", both(put(SIGNAL, "x"), partial(rehash, "signal"))),
        ("has no states", signal(lambda held: held.pop("hidden"))),
        ("is too short", signal(lambda held: held.update(hidden=held["hidden"][:-1]))),
        ("is flat", signal(lambda held: held.update(hidden=held["hidden"].flatten()))),
        ("is whole numbers", signal(lambda held: held.update(hidden=held["hidden"].long()))),
        ("has NaN", signal(lambda held: held["hidden"].fill_(float("nan")))),
        ("has a column of sums", signal(lambda h: h.update(logsumexp=h["logsumexp"][:, None]))),
    ),
    Bad(
        "distill: states are wide",
        DISTILL,
        "values",
        signal(lambda h: h.update(hidden=h["hidden"].repeat(1, 2))),
    ),
    *ours(
        "the state",
        RESUME,
        "state.json",
        ("is empty", put(STATE, "")),
        ("is a list", put(STATE, "[]")),
        ("has no step", without(STATE, "step")),
        ("has a step of text", changed(STATE, step="4")),
        ("has a step below 0", changed(STATE, step=-4)),
        ("has seconds of null", changed(STATE, seconds=None)),
        ("has tokens of 1.5", changed(STATE, tokens=1.5)),
        ("has no origins", without(STATE, "origins")),
        ("has origins of numbers", changed(STATE, origins={"target": 5})),
        ("has no best", changed(STATE, best=None)),
        ("has a best of nothing", changed(STATE, best={})),
        ("has a best of text", changed(STATE, best={"kept_step": 0, "expected_alpha": "x"})),
    ),
    Bad("distill: no measure", RESUME, "checkpoints", changed(STATE, best={"kept_step": 0})),
    *ours(
        "the optimiser",
        RESUME,
        "checkpoints",
        ("is empty", put(OPTIMIZER, "")),
        ("is of no parameter", tensors(OPTIMIZER, dict.clear)),
        ("is of other shapes", tensors(OPTIMIZER, lambda h: h.update({AVERAGE: torch.ones(3)}))),
        ("has other names", tensors(OPTIMIZER, lambda h: h.update(x=torch.ones(3)))),
        ("lacks one", tensors(OPTIMIZER, lambda h: h.pop(AVERAGE))),
        ("has one too many", tensors(OPTIMIZER, lambda h: h.update({"999.step": torch.ones(())}))),
        ("has NaN", tensors(OPTIMIZER, lambda h: h[AVERAGE].fill_(float("nan")))),
        ("is of numbers", tensors(OPTIMIZER, lambda h: h.update({AVERAGE: h[AVERAGE].long()}))),
    ),
    *ours(
        "the weights",
        RESUME,
        "checkpoints",
        ("are half", tensors(WEIGHTS, lambda h: h.update({n: t.half() for n, t in h.items()}))),
        ("lack one", tensors(BEST, lambda h: h.pop(min(h)))),
        ("are no tensors", put(BEST, "{}")),
    ),
    *ours(
        "the metrics",
        RESUME,
        "metrics.jsonl, line 1",
        ("are a list", put("run/metrics.jsonl", "[]\n")),
        ("are cut within", put("run/metrics.jsonl", '{"step": 1\n{"step": 2}\n')),
        ("have a step of text", put("run/metrics.jsonl", '{"step": "a"}\n')),
        ("have objects", put("run/metrics.jsonl", '{"step": 1, "loss": {}}\n')),
        ("are no text", put("run/metrics.jsonl", b"\xff\n")),
    ),
    *ours(
        "the metrics",
        "plot scored",
        "metrics.jsonl",
        ("are a list", put("scored/metrics.jsonl", "[]\n")),
        ("have a loss of text", put("scored/metrics.jsonl", '{"step": 1, "loss": [[]]}\n')),
        ("nest", put("scored/metrics.jsonl", "[" * 9999 + "\n")),
    ),
    *ours(
        "the run's configuration",
        "distill run.yaml run_dir=run --resume",
        "config.yaml",
        ("is a list", put("run/config.yaml", "[]")),
        ("is none", put("run/config.yaml", ": : :")),
    ),
    *ours(
        "an answer",
        "distill run.yaml data=texts signal=none loss=ce",
        "answers.jsonl, line 1",
        *(
            (f"is {line[-60:]}", put("texts/answers.jsonl", line + "\n"))
            for line in (
                *("[]", "{}", "5", '{"id": 1}', "nonsense", "[" * 9999),
                answer(messages="x"),
                answer(messages=[]),
                answer(messages=[{"role": "user", "content": 5}]),
                answer(category=3),
                answer(response=None),
                answer(ended="yes"),
                answer(more=1),
            )
        ),
    ),
    *ours(
        "a reply",
        f"{SERVER.replace('new', 'texts')} --base-url http://127.0.0.1:9/v1",
        "replies.jsonl, line 1",
        *(
            (
                f"is {line[:50]}",
                both(put("texts/manifest.json", "{}"), put("texts/replies.jsonl", line + "\n")),
            )
            for line in (
                *("[]", "{}", "nonsense", '{"id": "1", "attempt": -1, "text": "a", "ended": true}'),
                '{"id": "1", "attempt": 0, "text": null, "ended": true}',
                '{"id": "1", "attempt": 0, "text": "a", "ended": "no"}',
            )
        ),
    ),
    *ours(
        "what is widened",
        WIDEN,
        "new.jsonl",
        ("is not ours", put("new.jsonl", "{}\n")),
        ("has a state of a list", put("new.jsonl.json", "[]")),
        ("has an empty state", put("new.jsonl.json", "")),
        ("has a place of text", put("new.jsonl.json", '{"next": "a", "removed": {}}')),
        ("has a place below 0", put("new.jsonl.json", '{"next": -1, "removed": {}}')),
        ("has removed a list", put("new.jsonl.json", '{"next": 0, "removed": []}')),
        (
            "has lines of another kind",
            both(
                put("new.jsonl.json", '{"next": 0, "removed": {}}'),
                put("new.jsonl", '{"id": "mine", "prompt": "w5"}\n'),
            ),
        ),
    ),
]


def row(name: str, content: str | bytes, says: str | tuple[str, ...]) -> Bad:
    return Bad(
        f"prompts: {name}", SCORE.replace("prompts.jsonl", "p.jsonl"), says, put("p.jsonl", content)
    )


ASKED, ANSWER = ({"role": role, "content": "w5"} for role in ("user", "assistant"))
CALLING = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def turns(*messages: object) -> str:
    return json.dumps({"messages": messages}) + "\n"


PROMPTS = [
    row("an empty file", "", "p.jsonl holds no prompts"),
    row("blank lines", "\n\n", "p.jsonl holds no prompts"),
    row("no JSON", "hello\n", "line 1"),
    row(
        "cut off",
        '{"prompt": "w5"}\n\n{"prompt"',
        ("p.jsonl, line 3: not valid JSON", "each line must be"),
    ),
    row("a list", "[]\n", "list"),
    row("no prompt", '{"text": "w5"}\n', "text"),
    row("both kinds", '{"prompt": "w5", "messages": []}\n', "messages"),
    row("a prompt of 5", '{"prompt": 5}\n', "int"),
    row("an empty prompt", '{"prompt": " "}\n', "empty"),
    row("no messages", '{"messages": []}\n', "user"),
    row("messages of text", '{"messages": "w5"}\n', "str"),
    row("a role of nobody", turns({"role": "boss", "content": "w5"}), "boss"),
    row("a role of a list", turns({"role": ["user"], "content": "w5"}), "['user']"),
    row("content of null", turns({"role": "user", "content": None}), "NoneType"),
    row("no content", turns({"role": "user"}), "content"),
    row("half a surrogate pair", '{"prompt": "\\ud83d"}\n', "surrogate"),
    row("an id twice", '{"prompt": "w5", "id": "a"}\n{"prompt": "w6", "id": "a"}\n', "'a'"),
    row("an id of a list", '{"prompt": "w5", "id": []}\n', "list"),
    row("a category of 5", '{"prompt": "w5", "category": 5}\n', "category"),
    row("Latin-1", b'{"prompt": "caf\xe9"}\n', "0xe9"),
    row("a number of 5,000 digits", '{"prompt": "w5", "id": ' + DIGITS + "}\n", "line 1"),
    row("depth", '{"prompt": ' + "[" * 99999 + "\n", "line 1"),
    row(
        "a prompt beyond the positions",
        json.dumps({"prompt": "w5 " * 600}) + "\n",
        "(p.jsonl, line 1) comes to",
    ),
    row("an answer first", turns(ANSWER, ASKED), "line 1: message 1 has role 'assistant'"),
    row("two answers", turns(ASKED, ANSWER, ANSWER, ASKED), "line 1: message 3 has role"),
    row("an empty answer", turns(ASKED, ANSWER | {"content": ""}, ASKED), "message 2 is an empty"),
    row(
        "a result without a call", turns(ASKED, ANSWER | {"role": "tool"}), "line 1: message 2 has"
    ),
    row("a speaker of nobody", '{"conversations": [{"from": "x", "value": "w5"}]}\n', "from 'x'"),
    row("two forms", turns(ASKED) + '{"data": ["w5"]}\n', "line 2 has its conversation in 'data'"),
    row(
        "a call the template leaves out", turns(ASKED, ANSWER | CALLING, ASKED), "(p.jsonl, line 1)"
    ),
    Bad(
        "prompts: a conversation beyond the positions",
        GENERATE.replace("prompts.jsonl", "p.jsonl"),
        "(p.jsonl, line 2) has",
        put("p.jsonl", turns(ASKED) + turns(ASKED, ANSWER | {"content": "w6 " * 600}, ASKED)),
    ),
    Bad(
        "generate: more tokens than positions",
        f"{GENERATE} --max-new-tokens 600",
        ("tokens and up to 600 new ones, and", "reads 512 positions; take"),
    ),
    Bad(
        "prompts: no file", SCORE.replace("prompts.jsonl", "no.jsonl"), "there is no file no.jsonl"
    ),
    Bad("prompts: a folder", SCORE.replace("prompts.jsonl", "data"), "data"),
    Bad("prompts: another kind of file", SCORE.replace("prompts.jsonl", "run.yaml"), "run.yaml"),
    Bad("prompts: no such demo", SCORE.replace("prompts.jsonl", "demo:all"), "demo:all"),
    Bad("prompts: a name of 300 letters", SCORE.replace("prompts.j", "p" * 300 + ".j"), "ppp"),
    Bad("prompts: too few for the shots", f"{WIDEN} --shots 900", "900"),
]

SAMPLES = "policy={name: draft, refresh_every: 2, prompts: 4, max_new_tokens: 4}"
REWARDS = [
    Bad(
        f"distill: a reward function that {name}",
        f"{DISTILL} '{SAMPLES}' signal=live decode=null "
        f"'reward={{function: \"worth_{number}:f\", group: 2}}'",
        says,
        put(f"worth_{number}.py", f"def f(prompt, texts):\n    {body}\n"),
    )
    for number, (name, body, says) in enumerate(
        (
            ("raises", "raise KeyError('k')", "KeyError"),
            (
                "gives NaN",
                "return [float('nan')] * len(texts)",
                "gave [nan, nan] for the 2 samples",
            ),
        )
    )
]

CONFIG = "target/config.json"
MODELS = [
    *ours(
        "the target",
        CHECK,
        "target",
        ("has no config", lambda: os.remove(CONFIG)),
        ("has a config that is a list", put(CONFIG, "[]")),
        ("has another width", changed(CONFIG, hidden_size=64)),
        ("has another number of layers", changed(CONFIG, num_hidden_layers=9)),
        ("is of no known kind", changed(CONFIG, model_type="nobody", architectures=["Nobody"])),
        ("has weights cut off", cut("target/model.safetensors")),
        ("has an empty tokenizer", put("target/tokenizer.json", "")),
        (
            "has a longest text that is a list",
            changed("target/tokenizer_config.json", model_max_length=[1]),
        ),
        ("has a tokenizer that is a list", put("target/tokenizer.json", "[]")),
        (
            "has an index of nothing",
            both(
                lambda: os.remove("target/model.safetensors"),
                put("target/model.safetensors.index.json", "{}"),
            ),
        ),
    ),
    Bad("check: a vocabulary", CHECK, "draft", put("draft/draft_vocab.safetensors", "x")),
    *ours(
        "the draft's mask token",
        CHECK,
        "pard_token",
        *(
            (f"is {value}", changed("draft/config.json", pard_token=value))
            for value in (-1, 64, "63", True, [63], 1.5)
        ),
    ),
    Bad("a draft without a mask token", f"{SCORE} --drafting parallel", "pard_token"),
    Bad(
        "a parallel draft that stops early",
        f"{SCORE} --least-reach 0.2",
        "drafts in parallel",
        changed("draft/config.json", pard_token=63),
    ),
    *(
        Bad(
            f"{command.split()[0]}: a draft of another vocabulary",
            command.replace("draft draft", "draft stranger"),
            ("(32 tokens", "(64 tokens", "specdistill init"),
        )
        for command in (SCORE, CHECK, f"{DISTILL} draft=stranger")
    ),
    *(
        Bad(f"{command.split()[0]}: no model {name}", command, f"no checkpoint at ./{name}; give a")
        for name in ("none", "prompts.jsonl")
        for command in (
            GENERATE.replace("target target", f"target ./{name}"),
            SCORE.replace("draft draft", f"draft ./{name}"),
        )
    ),
    *(
        Bad(
            f"init: no answers for the vocabulary of {target}",
            f"init --target {target} --out new --vocab-size 9 --vocab-from none.txt",
            "there are no answers in none.txt",
        )
        for target in ("target", "nobody/asks-the-hub")
    ),
    Bad("init: no such target", "init --target none --out new", "none"),
    Bad("init: a file for a target", "init --target prompts.jsonl --out new", "prompts.jsonl"),
    Bad("init: an empty folder", "init --target e --out new", "e", lambda: os.mkdir("e")),
    Bad("init: no such demo", "init --target demo:gpt --out new", ("'demo:gpt'", "demo:smollm2")),
    *ours(
        "a GGUF file",
        "init --target m.gguf --out new",
        "m.gguf",
        ("is text", put("m.gguf", "text")),
        ("is empty", put("m.gguf", "")),
        ("is cut off", put("m.gguf", b"GGUF\3\0\0\0")),
        ("is a folder", lambda: os.mkdir("m.gguf")),
        ("is not there", lambda: None),
    ),
    Bad(
        "score: draft and target in each other's place",
        SCORE.replace("--target target --draft draft", "--target draft --draft target"),
        ("trimmed", "not a target"),
    ),
    Bad("export: no such draft", "export --draft none --out new --for vllm", "none"),
]

CARD = "card.json"
COMPARE = "compare card.json other.json"
CARDS = [
    *ours(
        "a card",
        COMPARE,
        "card.json",
        ("is empty", put(CARD, "")),
        ("is a list", put(CARD, "[]")),
        ("is a number", put(CARD, "5")),
        ("is cut off", put(CARD, '{"schema": "specdistill.scorecard/1", ')),
        ("is no text", put(CARD, b"\xff\xfe")),
        ("nests", put(CARD, "[" * 9999)),
        ("has no schema", without(CARD, "schema")),
        ("has another schema", changed(CARD, schema="specdistill.scorecard/99")),
        ("has rows of null", changed(CARD, rows=None)),
        ("has rows of text", changed(CARD, rows=["a"])),
        ("has a target of text", changed(CARD, target="t")),
        ("has provenance of a list", changed(CARD, provenance=[])),
        ("has prompts of null", changed(CARD, per_prompt=None)),
        ("has evidence of text", changed(CARD, lossless="yes")),
        ("has a verdict of null", changed(CARD, verdict=None)),
        ("has a baseline of text", changed(CARD, baseline="none")),
    ),
    Bad("compare: no such card", "compare card.json none.json", "none.json"),
    Bad("compare: a folder without a card", "compare card.json target", "target"),
    Bad("compare: a file that is there", f"{COMPARE} --out prompts.jsonl", "prompts.jsonl"),
    Bad("plot: no such run", "plot none", "none"),
    Bad("plot: a folder of something else", "plot target", "there is no scorecard"),
    Bad("plot: a card that is none", "plot card.json --out new", "card.json", put(CARD, "{}")),
    Bad("export: no card", f"{EXPORT} --scorecard card.json", "card.json", put(CARD, "{}")),
    Bad("export: no such card", f"{EXPORT} --scorecard none.json", "none.json"),
    Bad("export: another draft's card", f"{EXPORT} --scorecard card.json", "is of another draft"),
]

PLACES = [
    *(
        Bad(
            f"{command.split()[0]}: a folder that holds something",
            command.replace("new", "data"),
            ("data exists and is not empty", "name another folder"),
        )
        for command in (INIT, EXPORT)
    ),
    *(
        Bad(
            f"{command.split()[0]}: below a file",
            command.replace("new", "prompts.jsonl/x"),
            ("cannot write", "prompts.jsonl", "choose another folder"),
        )
        for command in (GENERATE, INIT, EXPORT, f"{DISTILL} run_dir=new", SCORE)
    ),
    Bad("init: a file for a folder", INIT.replace("new", "run.yaml"), "run.yaml: Not a directory"),
    Bad(
        "generate: answers to other prompts",
        GENERATE.replace("new", "data"),
        ("holds answers with other prompts", "choose another folder"),
    ),
    Bad(
        "quickstart: a run that is finished",
        "quickstart --run-dir finished",
        ("already holds a finished run", "another --run-dir"),
        put("finished/report.md", "mine"),
    ),
    Bad("init: a name of 300 letters", f"init --target target --out {'n' * 300}", "nnn"),
    Bad("init: where nothing can be written", "init --target target --out /proc/new", "/proc"),
    Bad("generate: a folder of something else", GENERATE.replace("new", "draft"), "draft"),
    Bad("generate: a file for a folder", GENERATE.replace("new", "run.yaml"), "run.yaml"),
    Bad("generate: a name of 300 letters", GENERATE.replace("new", "n" * 300), "nnn"),
    Bad("generate: where nothing can be written", GENERATE.replace("new", "/proc/new"), "/proc"),
    Bad(
        "score: a card that is there", SCORE.replace("new", "card"), ("json exists", "--overwrite")
    ),
    Bad("score: a folder for a file", SCORE.replace("new.json", "data"), "data"),
    Bad("score: a name of 300 letters", SCORE.replace("new", "n" * 300), "nnn"),
    Bad("score: where nothing can be written", SCORE.replace("new", "/proc/new"), "/proc"),
    Bad("widen: the prompts themselves", WIDEN.replace("new", "prompts"), "prompts.jsonl"),
    Bad("export: into the draft", EXPORT.replace("new", "draft"), "draft"),
    Bad(
        "distill: a run that is there",
        f"{DISTILL} run_dir=run",
        ("already holds a run", "--resume", "another run_dir"),
    ),
    Bad("distill: a run of 300 letters", f"{DISTILL} run_dir={'n' * 300}", "nnn"),
    Bad("distill: where nothing can be written", f"{DISTILL} run_dir=/proc/new", "/proc"),
    Bad("distill: the draft's own folder", f"{DISTILL} run_dir=draft draft=draft/draft", "draft"),
    Bad("plot: below a file", "plot card.json --out prompts.jsonl/x", "prompts.jsonl"),
    Bad("quickstart: a file for a folder", "quickstart --run-dir prompts.jsonl", "prompts.jsonl"),
]

SERVERS = [
    Bad("a server without an address", SERVER, "--base-url"),
    *option(SERVER, "--base-url", "localhost", "ftp://localhost/v1", "http://", "http:///v1"),
    *option(SERVER, "--base-url", "http://[::1/v1", "http://a b/v1", "http://localhost:99999/v1"),
    *option(SERVER, "--base-url", "http://localhost:x/v1", "file:///etc/passwd", "::::"),
]

TABLE = [
    *(*NUMBERS, *COMMANDS, *YAML, *OVERRIDES, *SWEEPS),
    *(*OURS, *PROMPTS, *REWARDS, *MODELS, *CARDS, *PLACES, *SERVERS),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A target, a draft, answers, a run that was interrupted, cards, configurations."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_folder, folder / "target")
    before = Path.cwd()
    os.chdir(folder)  # so that all is named as the table names it
    try:
        made = make_world(Path(), Path("target"))
        with pytest.raises(KeyboardInterrupt):
            train(settings(made, Path("run"), dtype="float32", decode=None), stop_at=6)
        asked = [{"prompt": f"w{5 + i} w{9 + i}"} for i in range(6)]
        Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        Path("run.yaml").write_text(TEXT)
        Path("sweep.yaml").write_text(yaml.safe_dump(GOOD | GRID))
        save_draft(tiny_model(9, vocab=32), Path("stranger"))
        Path("scored").mkdir()
        for name, draft in (
            ("card.json", "a"),
            ("other.json", "b"),
            ("scored/scorecard.json", "a"),
        ):
            simulate({(0.0, 2): 0.8, (1.0, 2): 0.7}, draft=draft).write(Path(name))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "place"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SPECDISTILL_CACHE", str(tmp_path / "cache"))
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def plain(text: str) -> str:
    """Without the frame of click's messages, and where their lines break."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_a_bad_input_is_refused_by_name(bad: Bad, place: Path) -> None:
    if bad.setup is not None:
        bad.setup()
    before = contents(place)
    command = shlex.split(bad.command) if isinstance(bad.command, str) else bad.command
    done = run(*command)
    assert done.code == bad.code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "\x1b" not in done.err
    ends = [line for line in done.err.splitlines() if line.startswith("error: ")]
    usage = done.err.count("─ Error ─")
    assert len(ends) + usage == 1, done.err
    message = ends[0] if ends else plain(done.err)
    parts = [bad.says] if isinstance(bad.says, str) else bad.says
    assert (any if isinstance(parts, set) else all)(part in message for part in parts), message
    assert len(message) < 12_000
    assert {file: now for file, now in contents(place).items() if file in before} == before


def test_the_table_is_wide() -> None:
    assert len({bad.id for bad in TABLE}) == len(TABLE) >= 220
    commands = {bad.id.split()[0].removesuffix(":") for bad in TABLE}
    assert {command.__name__ for command in application.COMMANDS} <= commands
