"""vLLM's kernels from its Python files alone, where no build of it is installed.

`VLLM_SOURCE` names a source tree or an unpacked wheel, of 0.32 or 0.33: the folder that holds
`vllm/`. Its modules are read as they are, but no package's `__init__` runs, as those load all of
vLLM; the platform, which the kernels ask for the device, and the names that they take Triton by,
are made here.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

VARIABLE = "VLLM_SOURCE"


def provide() -> None:
    """Make `import vllm...` read the folder that the variable names, if it names one. Raises
    ImportError where that holds no vLLM.
    """
    folder = os.environ.get(VARIABLE)
    if not folder or any(isinstance(finder, Sources) for finder in sys.meta_path):
        return
    if not Path(folder, "vllm", "v1").is_dir():
        raise ImportError(f"{VARIABLE} is {folder}, which holds no vllm/v1; name vLLM's sources")
    sys.meta_path.insert(0, Sources(Path(folder)))


class Sources(MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] != "vllm":
            return None
        if name in STAND_INS:
            return ModuleSpec(name, StandIn(), is_package=True)
        place = self.folder.joinpath(*name.split("."))
        if place.is_dir():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None


class StandIn(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(STAND_INS[module.__name__]())


class Platform:
    """This device, as vLLM asks for it."""

    device_type = "cuda"

    def is_cuda_alike(self) -> bool:
        return torch.cuda.is_available()

    def is_cuda(self) -> bool:
        return torch.cuda.is_available() and torch.version.hip is None

    def is_rocm(self) -> bool:
        return torch.version.hip is not None

    def is_cpu(self) -> bool:
        return not torch.cuda.is_available()

    def is_xpu(self) -> bool:
        return False

    def num_compute_units(self, device_id: int | None = 0) -> int:
        return torch.cuda.get_device_properties(device_id or 0).multi_processor_count

    def get_device_name(self, device_id: int = 0) -> str:
        return torch.cuda.get_device_name(device_id)


def _platforms() -> dict[str, Any]:
    return {"current_platform": Platform()}


def _triton_utils() -> dict[str, Any]:
    import triton
    import triton.language as tl

    libdevice = importlib.import_module("triton.language.extra.libdevice")
    return {"HAS_TRITON": True, "triton": triton, "tl": tl, "tldevice": libdevice}


STAND_INS = {"vllm.platforms": _platforms, "vllm.triton_utils": _triton_utils}
