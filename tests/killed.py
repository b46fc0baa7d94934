"""`python killed.py FOLDER PLACE NUMBER ARGUMENTS` runs `specdistill ARGUMENTS` and kills it by
SIGKILL at the NUMBERth change of a file below FOLDER that matches PLACE, a regular expression; with
PLACE "seconds" so long after the first change. A file about to be written is left torn: cut to
nothing, or with half a line more. NUMBER 0 lets it live. With the ARGUMENTS `plan TASK PLAN`, both
JSON, it runs the pipeline of `quickstart` with them in FOLDER.
"""

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

FOLDER, PLACE, NUMBER = sys.argv[1] + os.sep, sys.argv[2], float(sys.argv[3])
CHANGES = {"os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
count = 0
emptied = ""  # the folder whose files `rmtree` removes, by their names alone


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(path: str, mode: str) -> None:
    """What is left of a file whose writer died."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if "a" in mode else os.O_TRUNC)
    os.write(os.open(path, flags), b'{"step": 1, "to' if "a" in mode else b"")


def hook(event: str, arguments: tuple) -> None:
    global count, emptied
    if event not in CHANGES and event != "open":
        return
    path, mode = str(arguments[0]), ""
    if event == "open":
        mode = str(arguments[1] or "")
        if not set(mode) & set("wax+"):
            return
    elif event == "shutil.rmtree":
        emptied = path
    elif event == "os.remove" and not os.path.isabs(path):
        path = os.path.join(emptied, path)
    if not path.startswith(FOLDER):
        return
    if PLACE == "seconds":
        if count == 0 and NUMBER:
            threading.Timer(NUMBER, die).start()
        count += 1
    elif re.search(PLACE, f"{event} {path.removeprefix(FOLDER)}"):
        count += 1
        if count == NUMBER:
            if mode:
                tear(path, mode)
            die()


if __name__ == "__main__":
    sys.addaudithook(hook)
    sys.argv = ["specdistill", *sys.argv[4:]]
    if sys.argv[1] == "plan":
        from specdistill.quickstart import Plan, Task, quickstart

        task, plan = map(json.loads, sys.argv[2:])
        quickstart(Path(FOLDER), Task(**task), Plan(**plan))
    else:
        from specdistill.cli import main

        main()
