"""Answers of the target on disk: those of the engine, with a signal that gives the logits back, and
whole again after whatever interrupts them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import full_disk, stop_at
from safetensors import SafetensorError

from specdistill import models
from specdistill.data import generation, token_store
from specdistill.data.chat import encode_prompt
from specdistill.data.filters import Filters
from specdistill.data.generation import generate, signal_bytes
from specdistill.data.prompts import Prompt
from specdistill.data.token_store import MANIFEST, Example, read_examples, read_manifest
from specdistill.decoding import Request, Sampling, SpeculativeDecoder
from specdistill.decoding.engine import _Stream
from specdistill.drafts.making import save_draft
from specdistill.errors import InputError, SpecDistillError, StorageError
from specdistill.models import LanguageModel
from specdistill.progress import Pace

pytestmark = pytest.mark.usefixtures("small_parts")
Tiny = Callable[..., LanguageModel]
LENGTH = 12
SAMPLED = Sampling(1.0, top_k=20)


def ask(count: int) -> list[Prompt]:
    """In no order of their own, as the generator sorts them."""
    return [
        Prompt(
            f"p{i}",
            ({"role": "user", "content": f"w{5 + i * 7 % 50} w{7 + i % 31}"},),
            "odd" if i % 2 else None,
        )
        for i in range(count)
    ]


PROMPTS = ask(21)


def answer(
    target: LanguageModel, folder: Path, prompts: list[Prompt] = PROMPTS, **changes: object
) -> list[Example]:
    settings = {"max_new_tokens": LENGTH, "samplings": [SAMPLED], "seed": 3, "batch_size": 5}
    generate(target, prompts, folder, **{**settings, **changes})
    return read_examples(folder, signal=changes.get("signal") != "none")


def test_a_prompt_is_encoded_once(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked."""
    encoded: list[str] = []

    def counted(tokenizer: object, prompt: Prompt) -> list[int]:
        encoded.append(prompt.id)
        return encode_prompt(target.tokenizer, prompt)

    monkeypatch.setattr(generation, "encode_prompt", counted)
    answer(target, tmp_path / "data", filters=Filters(truncated=True, retries=3))
    assert read_manifest(tmp_path / "data").removed, "some were asked again"
    assert encoded == [p.id for p in PROMPTS]


@pytest.fixture(scope="module")
def whole(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    """What a run that nothing interrupts leaves, by id."""
    return {e.id: e for e in answer(target, tmp_path_factory.mktemp("whole") / "data")}


def assert_same(examples: list[Example], expected: dict[str, Example]) -> None:
    """Every answer once, with its own signal. Other batches round otherwise in the last bits."""
    assert sorted(e.id for e in examples) == sorted(expected)
    for ours in examples:
        theirs = expected[ours.id]
        assert ours.prompt_tokens == theirs.prompt_tokens
        assert ours.response_tokens == theirs.response_tokens
        assert ours.category == theirs.category
        for name in ("hidden", "logsumexp"):
            assert torch.allclose(
                ours.signal.tensors()[name], theirs.signal.tensors()[name], atol=1e-9
            )


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_the_engines(target: LanguageModel, tmp_path: Path, sampling: Sampling) -> None:
    requests = [
        Request(p.id, encode_prompt(target.tokenizer, p), LENGTH, sampling, 3) for p in PROMPTS
    ]
    expected = {
        o.request_id: o.tokens
        for o in SpeculativeDecoder(target, batch_size=3).run(requests).outputs
    }
    assert len({tuple(text) for text in expected.values()}) > 10
    examples = answer(target, tmp_path / "data", samplings=[sampling])
    assert {e.id: e.response_tokens for e in examples} == expected
    prompts = {r.id: list(r.tokens) for r in requests}
    assert {e.id: e.prompt_tokens for e in examples} == prompts
    assert {e.id: e.category for e in examples} == {p.id: p.category for p in PROMPTS}


def test_the_seed_decides(target: LanguageModel, tmp_path: Path, whole: dict[str, Example]) -> None:
    assert_same(answer(target, tmp_path / "same", batch_size=2), whole)
    other = answer(target, tmp_path / "other", seed=4)
    assert [e.response_tokens for e in other] != [whole[e.id].response_tokens for e in other]
    greedy = [answer(target, tmp_path / f"g{s}", samplings=[Sampling()], seed=s) for s in (1, 2)]
    assert [e.response_tokens for e in greedy[0]] == [e.response_tokens for e in greedy[1]]


def test_several_samplings_share_the_prompts_by_id_and_seed(
    target: LanguageModel, tmp_path: Path, whole: dict[str, Example]
) -> None:
    greedy = {e.id: e for e in answer(target, tmp_path / "greedy", samplings=[Sampling()])}
    both = [SAMPLED, Sampling()]
    with pytest.raises(KeyboardInterrupt):
        answer(target, tmp_path / "mixed", samplings=both, progress=stop_at(9))
    mixed = {e.id: e for e in answer(target, tmp_path / "mixed", samplings=both)}
    sampled = {i for i, e in mixed.items() if e.response_tokens == whole[i].response_tokens}
    told_apart = {i for i in whole if whole[i].response_tokens != greedy[i].response_tokens}
    assert 3 < len(sampled & told_apart) < len(told_apart) - 3
    assert_same(list(mixed.values()), {i: (whole if i in sampled else greedy)[i] for i in mixed})
    fewer = answer(target, tmp_path / "fewer", PROMPTS[5:], samplings=both)
    assert_same(fewer, {p.id: mixed[p.id] for p in PROMPTS[5:]})


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_kept_signal_gives_the_logits_back(
    tiny_folder: Path, tmp_path: Path, dtype: str
) -> None:
    target = models.load(str(tiny_folder), dtype=dtype)
    tolerance = {"float32": 1e-4, "float64": 1e-5, "bfloat16": 0.6}[dtype]  # norms in float32
    size = 0
    for example in answer(target, tmp_path / "data"):
        assert example.signal.hidden.dtype == target.dtype
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        stock = (
            target.model(tokens)
            .logits[0, len(example.prompt_tokens) - 1 : -1]
            .to(example.signal.logsumexp.dtype)
        )
        logits = target.logits(example.signal.hidden)
        assert torch.allclose(logits, stock, atol=tolerance)
        assert torch.allclose(logits.logsumexp(-1), example.signal.logsumexp, atol=1e-5)
        size += example.signal.hidden.nbytes + example.signal.logsumexp.nbytes
    tokens = sum(len(e.response_tokens) for e in read_examples(tmp_path / "data", signal=False))
    assert size == signal_bytes(target, 1, tokens), "the bytes announced for so many tokens"
    assert tokens <= len(PROMPTS) * LENGTH


def test_without_a_signal_the_answers_are_the_same(
    target: LanguageModel, tmp_path: Path, whole: dict[str, Example]
) -> None:
    examples = answer(target, tmp_path / "data", signal="none")
    assert {e.id: e.response_tokens for e in examples} == {
        e.id: e.response_tokens for e in whole.values()
    }
    assert not list((tmp_path / "data").glob("*.safetensors"))
    with pytest.raises(InputError, match="keeps no signal"):
        read_examples(tmp_path / "data", signal=True)


def test_a_finished_folder_is_left_as_it_is(
    target: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, Example],
) -> None:
    answer(target, tmp_path / "data")
    before = {f.name: f.read_bytes() for f in (tmp_path / "data").iterdir()}
    monkeypatch.setattr(_Stream, "round", lambda self: pytest.fail("decoded again"))
    assert_same(answer(target, tmp_path / "data"), whole)
    assert {f.name: f.read_bytes() for f in (tmp_path / "data").iterdir()} == before


# Interruptions


def test_out_of_time_there_is_still_something(
    target: LanguageModel, tmp_path: Path, whole: dict[str, Example]
) -> None:
    some = answer(target, tmp_path, max_seconds=0.0)
    assert 0 < len(some) < len(whole)
    assert_same(answer(target, tmp_path), whole)


def test_out_of_time_every_task_has_some_answers(target: LanguageModel, tmp_path: Path) -> None:
    """Three tasks, each with its own beginning: sorted, the first alone would be answered."""
    prompts = [
        Prompt(f"{task}{i}", ({"role": "user", "content": f"w{first} w{9 + i}"},), task)
        for task, first in (("a", 5), ("b", 25), ("c", 45))
        for i in range(20)
    ]
    limits = {"max_seconds": 0.0, "max_new_tokens": 1, "batch_size": 4}
    some = answer(target, tmp_path, prompts, **limits, signal="none")
    assert len(some) == 4
    assert {example.category for example in some} == {"a", "b", "c"}


def test_progress_tells_how_fast_it_goes_and_how_long_it_takes(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by two seconds a report."""
    monkeypatch.setattr(generation, "Pace", partial(Pace, count(step=2).__next__))
    told: list[tuple[float, str]] = []
    answer(target, tmp_path, progress=lambda stage, done, total, words: told.append((done, words)))
    (begun, words), *_, (done, middle) = told[: len(told) // 2]
    first, tokens = (int(words.split()[0]) for words in (words, middle))
    assert words == f"{first} tokens"
    seconds = 2 * (len(told) // 2 - 1)
    left = timedelta(seconds=round(seconds * (21 - done) / (done - begun)))
    assert middle == f"{tokens} tokens, {(tokens - first) / seconds:,.0f}/s, {left} left"
    assert re.fullmatch(r"\d+ tokens, \d+/s", told[-1][1])


@pytest.mark.parametrize("call", [1, 5, 14, 25, 40])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    target: LanguageModel, tmp_path: Path, whole: dict[str, Example], call: int
) -> None:
    folder = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        answer(target, folder, progress=stop_at(call))
    kept = read_manifest(folder).parts
    listed = [id_ for part in kept for id_ in part["ids"]]
    assert len(set(listed)) == len(listed) < len(PROMPTS)
    assert (len(listed) > 0) == (call > 1), "what was finished is kept"
    told: list[tuple[float, float]] = []
    go_on = answer(target, folder, progress=lambda stage, *rest: told.append(rest[:2]))
    assert_same(go_on, whole)
    assert read_manifest(folder).parts[: len(kept)] == kept
    assert told[0][0] >= len(listed)
    assert told[-1] == (21, 21)


@pytest.mark.parametrize(
    "place", ["parquet", "signal", "before the manifest", "after the manifest"]
)
def test_an_interrupt_while_a_part_is_written_neither_loses_nor_doubles(
    target: LanguageModel,
    tmp_path: Path,
    whole: dict[str, Example],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    owner, name = {
        "parquet": (token_store, "write_rows"),
        "signal": (token_store, "save_file"),
    }.get(place, (token_store.Store, "_write"))
    real = getattr(owner, name)
    calls = 0

    def interrupted(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        stop = calls == (
            3 if owner is token_store.Store else 2
        )  # the manifest's first is the empty one
        if not stop or place == "after the manifest":
            real(*args, **kwargs)
        if stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(target, tmp_path / "data")
    assert len(read_examples(tmp_path / "data", signal=True)) >= 4
    assert_same(answer(target, tmp_path / "data"), whole)


def test_a_folder_of_something_else_is_not_written_into(
    target: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text("{}")
    before = sorted((tmp_path / "draft").iterdir())
    with pytest.raises(StorageError, match="holds no answers of `generate`"):
        answer(target, tmp_path / "draft")
    assert sorted((tmp_path / "draft").iterdir()) == before


def test_settings_that_differ_are_told_alone(target: LanguageModel, tmp_path: Path) -> None:
    answer(target, tmp_path / "data", prompts=PROMPTS[:4])
    with pytest.raises(StorageError) as refused:
        answer(target, tmp_path / "data", prompts=PROMPTS[:4], seed=4)
    assert "other settings ({'seed': 3}, now {'seed': 4})" in str(refused.value)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from specdistill import models
from specdistill.data import generation
from specdistill.data.prompts import Prompt
from specdistill.decoding import Sampling

generation.PART = 4
calls = 0
def progress(stage, done, total, detail=""):
    global calls
    calls += 1
    if calls == 25:
        os.kill(os.getpid(), signal.SIGKILL)

prompts = [
    Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i * 7 % 50} w{7 + i % 31}"},),
        "odd" if i % 2 else None)
    for i in range(21)
]
generation.generate(
    models.load(sys.argv[1], dtype="float64"), prompts, Path(sys.argv[2]), max_new_tokens=12,
    samplings=[Sampling(1.0, top_k=20)], seed=3, batch_size=5, progress=progress,
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_run_goes_on_and_ends_the_same(
    target: LanguageModel, tiny_folder: Path, tmp_path: Path, whole: dict[str, Example]
) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_folder), str(tmp_path / "data")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert 0 < len(read_examples(tmp_path / "data", signal=True)) < len(PROMPTS)
    assert_same(answer(target, tmp_path / "data"), whole)


# Disks that are small or full


def test_a_disk_too_small_is_refused_before_any_work(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = signal_bytes(target, len(PROMPTS), LENGTH)
    usage = namedtuple("usage", "total used free")
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))
    with monkeypatch.context() as patch:
        patch.setattr(_Stream, "round", lambda self: pytest.fail("it decoded"))
        with pytest.raises(StorageError) as caught:
            answer(target, tmp_path / "data")
    for part in (f"{needed:,}", f"{free:,} free", str(tmp_path / "data"), "keep no signal"):
        assert part in str(caught.value)
    # The advice works, in the same folder too.
    assert len(answer(target, tmp_path / "data", signal="none")) == len(PROMPTS)
    free = needed
    assert len(answer(target, tmp_path / "room")) == len(PROMPTS)


def test_a_disk_full_from_the_start_is_told(target: LanguageModel, tmp_path: Path) -> None:
    with full_disk(4000), pytest.raises(StorageError, match=r"cannot write part-00000 .*again"):
        answer(target, tmp_path / "data")
    with full_disk(0), pytest.raises(StorageError, match="choose another folder"):
        answer(target, tmp_path / "none")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["OSError", "SafetensorError"],
)
def test_a_disk_that_fills_up_leaves_the_listed_parts_and_a_rerun_completes(
    target: LanguageModel,
    tmp_path: Path,
    whole: dict[str, Example],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    real, calls = token_store.save_file, 0

    def fills_up(tensors: dict, file: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            file.write_bytes(b"half of it")
            raise error
        real(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(token_store, "save_file", fills_up)
        with pytest.raises(StorageError, match=r"cannot write part-00002 .*No space left.*again"):
            answer(target, tmp_path / "data")
    kept = read_examples(tmp_path / "data", signal=True)
    assert len(kept) >= 8
    assert_same(kept, {e.id: whole[e.id] for e in kept})
    assert_same(answer(target, tmp_path / "data"), whole)


def test_a_manifest_that_cannot_be_written_doubles_nothing(
    target: LanguageModel,
    tmp_path: Path,
    whole: dict[str, Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full for a moment, while the manifest is written."""
    real, calls = Path.replace, 0

    def full_once(self: Path, other: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        return real(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_once)
        with pytest.raises(StorageError, match="No space left"):
            answer(target, tmp_path / "data")
    assert_same(answer(target, tmp_path / "data"), whole)


def test_a_folder_that_cannot_be_written(target: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="choose another folder"):
            answer(target, folder)


# A folder that belongs to something else, or is damaged


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "other settings"),
        ({"max_new_tokens": LENGTH + 1}, "other settings"),
        ({"samplings": [Sampling(0.9, top_k=20)]}, "other settings"),
        ({"samplings": [SAMPLED, Sampling()]}, "other settings"),
        ({"signal": "none"}, "another signal"),
        ({"signal": "top-k:8"}, "another signal"),
        ({"prompts": PROMPTS[:20]}, "other prompts"),
        ({"prompts": [*PROMPTS[:20], ask(22)[21]]}, "other prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_other_generations_in_the_folder_are_refused(
    target: LanguageModel, tmp_path: Path, changes: dict, named: str
) -> None:
    answer(target, tmp_path / "data")
    before = {f.name: f.read_bytes() for f in (tmp_path / "data").iterdir()}
    with pytest.raises(StorageError, match=f"{named}.*choose another folder"):
        answer(target, tmp_path / "data", **changes)
    assert {f.name: f.read_bytes() for f in (tmp_path / "data").iterdir()} == before


def test_another_target_or_dtype_or_template_is_refused(
    tiny: Tiny, target: LanguageModel, tiny_folder: Path, tmp_path: Path
) -> None:
    answer(target, tmp_path / "data")
    save_draft(tiny(50, layers=4), tmp_path / "other")
    with pytest.raises(
        StorageError, match="another target, by the hash of its weights and its config"
    ):
        answer(models.load(str(tmp_path / "other"), dtype="float64"), tmp_path / "data")
    with pytest.raises(StorageError, match="other settings"):
        answer(models.load(str(tiny_folder), dtype="float32"), tmp_path / "data")
    again = models.load(str(tiny_folder), dtype="float64")
    again.tokenizer.chat_template = again.tokenizer.chat_template + " "
    with pytest.raises(StorageError, match="another tokenizer_sha256"):
        answer(again, tmp_path / "data")


@pytest.fixture(scope="module")
def finished(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "data"
    generate(target, ask(70), folder, max_new_tokens=3, batch_size=32)
    assert len(read_manifest(folder).parts) >= 2
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap(file: Path) -> None:
    other = file.with_stem("part-00000")
    ours = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(ours)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
@pytest.mark.parametrize("damage", [cut, flip, swap, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_part_is_refused_by_name(
    finished: Path, tmp_path: Path, suffix: str, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "data")
    file = folder / f"part-00001.{suffix}"
    damage(file)
    with pytest.raises(StorageError) as caught:
        read_examples(folder, signal=True)
    state = "is missing" if damage is Path.unlink else "is truncated, changed or from other data"
    bad = file.with_stem("part-00000") if damage is swap else file
    assert str(caught.value) == f"{bad} {state}; remove the folder and generate again"
    if suffix == "safetensors":
        assert len(read_examples(folder, signal=False)) == 70


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"target": 1}', b"\xff\xfe", "parts: 1", "parts: [1]", "parts: [{}]"],
    ids=repr,
)
def test_a_damaged_manifest_is_refused_by_name(
    finished: Path, tmp_path: Path, target: LanguageModel, content: str | bytes
) -> None:
    folder = shutil.copytree(finished, tmp_path / "data")
    if isinstance(content, str) and content.startswith("parts: "):
        raw = json.loads((folder / MANIFEST).read_text())
        content = json.dumps({**raw, "parts": json.loads(content.removeprefix("parts: "))})
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = (folder / MANIFEST).read_bytes()
    for use in (
        lambda: read_examples(folder, signal=True),
        lambda: generate(target, ask(70), folder, max_new_tokens=3),
    ):
        with pytest.raises(SpecDistillError, match=r"manifest\.json"):
            use()
    assert (folder / MANIFEST).read_bytes() == before


def test_a_manifest_of_a_later_version_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "data")
    raw = json.loads((folder / MANIFEST).read_text())
    for change in ({"schema": "specdistill.generations/3"}, {"more": 1, "schema": "other/9"}):
        (folder / MANIFEST).write_text(json.dumps({**raw, **change}))
        with pytest.raises(InputError, match=f"{change['schema']}.*specdistill.generations/2"):
            read_examples(folder, signal=True)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json: not a folder made by"):
        read_examples(tmp_path, signal=False)


def test_a_folder_with_no_answer_yet(target: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        answer(target, tmp_path / "data", progress=stop_at(1))
    with pytest.raises(InputError, match="no answers yet"):
        read_examples(tmp_path / "data", signal=True)


def test_no_prompts(target: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prompts"):
        answer(target, tmp_path / "data", prompts=[])
    with pytest.raises(InputError, match="no sampling"):
        answer(target, tmp_path / "data", samplings=[])
    assert not (tmp_path / "data").exists()
