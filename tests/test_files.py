"""Files that are there whole or not at all, and folders that one process writes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from test_cli import run

from specdistill.config import load_config
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt
from specdistill.data.widening import Widening, widen
from specdistill.drafts.making import save_draft
from specdistill.errors import InputError, StorageError
from specdistill.files import UNFINISHED, at_home, held, keep_apart, lock_of, replacing, write_whole

fcntl = pytest.importorskip("fcntl", reason="there are no such locks on this system")

HOLD = """
import sys
from pathlib import Path
from unittest import mock
from specdistill.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def questions(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("w5 w6\nw7\nw8 w9\nw6 w5\n")
    return folder / "prompts.txt"


@contextmanager
def other_process_in(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_is_one_processs_until_it_ends_however_it_does(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with other_process_in(folder) as process:
        with pytest.raises(StorageError, match=f"another process is at work in {folder}; wait"):
            held(folder).__enter__()
        with held(tmp_path / "a"), held(tmp_path / "b"):
            pass  # others are free
        process.send_signal(signal.SIGKILL)
        process.wait()
        with held(folder):
            pass  # nothing was left that would have to be removed by hand
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyError), held(folder):
        raise KeyError
    with held(folder):
        pass  # an error within lets go, too


def test_where_there_are_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_process_in(tmp_path / "run"):
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with held(tmp_path / "run"):
            pass
        monkeypatch.undo()

        def none(*_: object) -> None:
            raise OSError("no locks available")

        monkeypatch.setattr(fcntl, "flock", none)
        with held(tmp_path / "run"):
            pass


def test_a_folder_that_cannot_be_made_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    for folder in (tmp_path / "run", tmp_path / "run" / "inner"):
        with pytest.raises(StorageError, match=r"cannot write to .*run"), held(folder):
            pytest.fail("the work begins")


def test_commands_leave_a_folder_alone_in_which_another_is_at_work(
    tmp_path: Path, tiny_folder: Path
) -> None:
    data, made, wide = tmp_path / "data", tmp_path / "run", tmp_path / "wide.jsonl"
    config = (
        f"target: {tiny_folder}\ndraft: {tiny_folder}\ndata: {data}\nrun_dir: {made}\nheldout: 1\n"
        "dtype: float32\ntraining: {max_steps: 1}\n"
    )
    (tmp_path / "run.yaml").write_text(config)
    (tmp_path / "grid.yaml").write_text(
        f"{config}grid: {{loss: [fkl, ce]}}\nscore: {{prompts: x.jsonl, num_draft_tokens: [1]}}\n"
    )
    asked = ["--target", tiny_folder, "--prompts", questions(tmp_path)]
    generate = ["generate", *asked, "--out", data, "--max-new-tokens", 4, "--dtype", "float32"]
    assert run(*generate).code == 0
    commands = {
        data: [generate],
        made: [
            ["distill", tmp_path / "run.yaml"],
            ["sweep", tmp_path / "grid.yaml"],
            ["quickstart", "--run-dir", made],
            ["init", "--target", tiny_folder, "--out", made],
            ["export", "--draft", tiny_folder, "--out", made, "--for", "vllm"],
        ],
        lock_of(wide): [["widen", *asked, "--out", wide, "--count", 1, "--shots", 2]],
    }
    for place, refused in commands.items():
        with other_process_in(place):
            for command in refused:
                done = run(*command)
                assert done.code == 2, command
                assert "another process is at work in" in done.err
    assert list(made.iterdir()) == []
    assert run("distill", tmp_path / "run.yaml").code == 0


def test_nothing_is_loaded_where_another_process_is_at_work(tmp_path: Path) -> None:
    prompts = [Prompt(str(i), ({"role": "user", "content": f"w{i}"},)) for i in range(6)]
    data, file, load = tmp_path / "data", tmp_path / "more.jsonl", mock.Mock()
    with other_process_in(data), pytest.raises(StorageError, match="another process is at work"):
        generate(load, prompts, data)
    with other_process_in(lock_of(file)), pytest.raises(StorageError, match="another process"):
        widen(load, prompts, file, Widening(2))
    with other_process_in(data), pytest.raises(StorageError, match="another process is at work"):
        save_draft(load, data)
    load.assert_not_called()


def test_a_file_is_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    write_whole(tmp_path / "a", "new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "new")]


def test_what_lies_beside_is_nobodys_to_overwrite(tmp_path: Path) -> None:
    """Neither a file that has the name of a temporary one, nor what a link leads to."""
    (tmp_path / "a.new").write_text("the user's")
    (tmp_path / "victim").write_text("the user's")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "a.new").read_text() == (tmp_path / "victim").read_text() == "the user's"
    (tmp_path / "folder.new").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        with replacing(tmp_path / "folder") as new:
            new.mkdir()
            (new / "file").touch()
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["file"]
    assert (tmp_path / "elsewhere" / "kept").exists()
    names = {"a", "a.new", "victim", "folder", "folder.new", "elsewhere"}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_behind(tmp_path: Path, kind: type[BaseException]) -> None:
    write_whole(tmp_path / "a", "old")

    def fail() -> None:
        with replacing(tmp_path / "a") as new:
            assert new.parent.name.startswith(UNFINISHED)
            assert new.parent.stat().st_mode & 0o77 == 0, "nobody else may put a link there"
            new.write_text("half")
            raise kind

    with pytest.raises(kind):
        fail()
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "old")]


def test_what_is_written_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "plain-folder").mkdir()
    write_whole(tmp_path / "a", "new")
    with replacing(tmp_path / "folder") as new:
        new.mkdir()
    for ours, plain in (("a", "plain"), ("folder", "plain-folder")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / plain).stat().st_mode


def test_who_holds_a_folder_may_ask_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder):
        with held(tmp_path / "." / "run"):
            pass
        asked = [sys.executable, "-c", HOLD, str(folder)]
        done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert "another process is at work" in done.stderr
    assert not folder.exists(), "it was made for this alone"
    with held(folder):
        with replacing(folder) as new:
            new.mkdir()
            (new / "file").touch()
        with held(folder):
            pass
    assert (folder / "file").exists()


def test_what_is_read_is_never_written_over(tmp_path: Path) -> None:
    folder, file = tmp_path / "data", tmp_path / "data" / "prompts.jsonl"
    folder.mkdir()
    file.touch()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "here").symlink_to(folder)
    crooked = folder / ".." / "data" / "prompts.jsonl"
    for out in (file, crooked, tmp_path / "link", tmp_path / "here" / "prompts.jsonl", folder):
        with pytest.raises(InputError, match="which is read; name another place"):
            keep_apart([tmp_path / "other", out], [None, str(file)])
    with pytest.raises(InputError, match="which is read"):
        keep_apart([file], [folder])  # a part of it
    keep_apart([folder / "new"], [folder])
    keep_apart([tmp_path / "org" / "model"], ["org/model", "demo:train"])


def test_commands_refuse_to_write_over_what_they_read(tmp_path: Path, tiny_folder: Path) -> None:
    prompts, config = questions(tmp_path), tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "run")
    text = f"target: {tiny_folder}\ndraft: {tiny_folder}\ndata: {prompts}\nheldout: 1\n"
    text += "training: {max_steps: 1}\nloss: ce\nsignal: none\npolicy: fixed\nrun_dir: "
    config.write_text(f"{text}{tmp_path / 'made'}\n")
    own = tmp_path / "own.yaml"
    own.write_text(f"{text}{tmp_path / 'run'}\n")
    (tmp_path / "run" / "draft").symlink_to(tiny_folder)
    pair = ["--target", tiny_folder, "--draft", tiny_folder]
    commands: list[list[object]] = [
        ["distill", config],
        ["distill", own, f"draft={tmp_path / 'run' / 'draft'}"],
        ["score", *pair, "--prompts", prompts, "--out", prompts, "--overwrite"],
        ["score", *pair, "--prompts", prompts, "--out", tiny_folder / "config.json", "--overwrite"],
        ["generate", "--target", tiny_folder, "--prompts", prompts, "--out", tmp_path],
        ["widen", "--target", tiny_folder, "--prompts", prompts, "--out", prompts, "--count", 1],
        ["init", "--target", tiny_folder, "--out", tiny_folder],
        ["export", "--draft", tiny_folder, "--out", tiny_folder, "--for", "vllm"],
        ["plot", prompts, "--out", prompts],
        ["compare", prompts, prompts, "--out", prompts, "--overwrite"],
    ]
    before = {f: f.read_bytes() for f in [prompts, config, *tiny_folder.iterdir()]}
    for command in commands:
        done = run(*command)
        assert (done.code, "name another" in done.err) == (2, True), (command, done.err)
    assert before == {f: f.read_bytes() for f in before}


def test_home_is_understood_whatever_the_shell_left(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~/a") == at_home("~") + "/a" == f"{tmp_path}/a"
    assert at_home("--out=~/a") == f"--out={tmp_path}/a"
    assert at_home("a~b") == "a~b"
    assert run("init", "--target", tiny_folder, "--out=~/d", "--layers", "1").code == 0
    assert (tmp_path / "d" / "config.json").exists()
    (tmp_path / "c.yaml").write_text(
        "{target: ~/t, draft: ~/d, data: ~/p, run_dir: ~/r, training: {max_steps: 1}}"
    )
    config = load_config(tmp_path / "c.yaml", ["data=~/q"])
    names = (config.target, config.draft, config.data, config.run_dir)
    assert names == tuple(f"{tmp_path}/{name}" for name in "tdqr")
