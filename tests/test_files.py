"""Files that are there whole or not at all, and folders that one process writes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_cli import run

from specdistill.errors import StorageError
from specdistill.files import held, write_whole

fcntl = pytest.importorskip("fcntl", reason="there are no such locks on this system")

HOLD = """
import sys
from pathlib import Path
from specdistill.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


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


def test_a_folder_that_cannot_be_made_is_for_the_writer_to_name(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with held(tmp_path / "run"), held(tmp_path / "run" / "inner"):
        pass


def test_commands_leave_a_folder_alone_in_which_another_is_at_work(
    tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7\nw8 w9\nw6 w5\n")
    (tmp_path / "run.yaml").write_text(
        f"target: {tiny_folder}\ndraft: {tiny_folder}\ndata: {tmp_path / 'data'}\n"
        f"run_dir: {tmp_path / 'run'}\nheldout: 1\ndtype: float32\n"
        "training: {max_steps: 1}\n"
    )
    (tmp_path / "grid.yaml").write_text(
        (tmp_path / "run.yaml").read_text()
        + "grid: {loss: [fkl, ce]}\nscore: {prompts: x.jsonl, num_draft_tokens: [1]}\n"
    )
    asked = ["--target", tiny_folder, "--prompts", tmp_path / "prompts.txt"]
    generate = ["generate", *asked, "--out", tmp_path / "data", "--max-new-tokens", 4]
    generate += ["--dtype", "float32"]
    assert run(*generate).code == 0
    commands = {
        "data": [generate],
        "run": [
            ["distill", tmp_path / "run.yaml"],
            ["sweep", tmp_path / "grid.yaml"],
            ["quickstart", "--run-dir", tmp_path / "run"],
        ],
    }
    for name, refused in commands.items():
        with other_process_in(tmp_path / name):
            for command in refused:
                done = run(*command)
                assert done.code == 2, command
                assert f"another process is at work in {tmp_path / name}" in done.err
    assert list((tmp_path / "run").iterdir()) == []
    assert run("distill", tmp_path / "run.yaml").code == 0


def test_a_file_is_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    write_whole(tmp_path / "a", "new")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "new")]
