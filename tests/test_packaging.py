"""What the packages load when they are imported, and what must never be importable."""

import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import specdistill

ROOT = Path(__file__).resolve().parents[1]


def modules_loaded_by(code: str) -> tuple[set[str], str]:
    """Run `code` in a fresh interpreter: the top-level modules it loaded, and its stdout."""
    report = (
        "import json, sys\n"
        "tops = lambda: {name.partition('.')[0] for name in sys.modules}\n"
        f"{code}\n"
        "print(json.dumps(sorted(tops())), file=sys.stderr)"
    )
    path = ["-c", f"import sys; sys.path[:0] = {sys.path!r}\n{report}"]
    done = subprocess.run([sys.executable, *path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


def test_nothing_here_is_importable_as_kernels() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
    for folder in ("", "tests", "bench", "notebooks"):
        assert not (ROOT / folder / "kernels.py").exists()
        assert not (ROOT / folder / "kernels" / "__init__.py").exists()


def test_importing_specdistill_loads_neither_torch_nor_transformers() -> None:
    loaded, _ = modules_loaded_by("import specdistill")
    assert "specdistill" in loaded
    assert not loaded & {"torch", "transformers"}


def test_help_loads_neither_torch_nor_transformers() -> None:
    loaded, stdout = modules_loaded_by(
        "import specdistill.cli\n"
        "sys.argv = ['specdistill', '--help']\n"
        "try:\n"
        "    specdistill.cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code"
    )
    assert "quickstart" in stdout
    assert not loaded & {"torch", "transformers"}


def test_importing_the_kernels_does_not_load_triton(tmp_path: Path) -> None:
    # A triton that can be imported anywhere, so that a guarded import would be seen here too.
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    loaded, _ = modules_loaded_by(
        "import torch\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.modules.pop('triton', None)\n"
        "import specdistill_kernels"
    )
    assert "specdistill_kernels" in loaded
    assert not loaded & {"triton", "specdistill", "transformers"}


@pytest.mark.parametrize("name", ["specdistill", "specdistill_kernels"])
def test_every_module_imports(name: str) -> None:
    package = importlib.import_module(name)
    modules = [module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")]
    assert modules
    for module in modules:
        importlib.import_module(module)


def test_version_is_that_of_the_distribution() -> None:
    assert specdistill.__version__ == importlib.metadata.version("specdistill")
