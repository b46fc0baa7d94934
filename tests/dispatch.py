"""What torch is asked to do, seen below its Python: modes that watch every operation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdistill.decoding import graphs


class Draws(TorchDispatchMode):
    """Notes what draws random numbers. Attention and dropout draw none in `eval`, and tensors of
    the meta device hold none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        idle = any(word in str(func) for word in ("attention", "dropout"))
        idle = idle or (isinstance(out, Tensor) and out.is_meta)
        if torch.Tag.nondeterministic_seeded in func.tags and not idle:
            self.names.append(str(func))
        return out


class Sizes(TorchDispatchMode):
    """The numbers in the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if isinstance(out, Tensor) and not func.is_view and not name.split(".")[1].endswith("_"):
            self.largest = max(self.largest, out.numel())
        return out


class EagerCapture:
    """Captures as CUDA does, without CUDA: the step runs on buffers of its own and its output stays
    in place; nothing is committed before the first replay.
    """

    captures = 0
    replays = 0
    in_replay = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def __call__(
        self, step: graphs.Step, inputs: list[Tensor], commit: graphs.Commit
    ) -> tuple[graphs.Replay, Any]:
        EagerCapture.captures += 1
        output = step(*inputs)

        def replay() -> None:
            EagerCapture.replays += 1
            EagerCapture.in_replay = True
            overwrite(output, step(*inputs))
            commit(output)
            EagerCapture.in_replay = False

        return replay, output


def overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        old.copy_(new)
    elif old is not None:
        for mine, its in zip(old, new, strict=True):
            overwrite(mine, its)


@contextmanager
def eager_capture() -> Iterator[type[EagerCapture]]:
    EagerCapture.captures = EagerCapture.replays = 0
    with mock.patch.object(graphs, "CudaCapture", EagerCapture):
        yield EagerCapture


class NoHost(TorchDispatchMode):
    """Fails where a graph could not be captured: the host reads a tensor or makes one, or a shape
    depends on values. Between replays nothing may be done but to view tensors and to copy them,
    and the `copies` are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        indexed = name.startswith(("aten.index.", "aten.index_put"))
        assert indexed or not tags & set(func.tags), name
        assert "lift_fresh" not in name, "a tensor made from numbers on the host"
        if indexed:
            used = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in used), f"{name} by a mask"
        if not EagerCapture.in_replay:
            if name.startswith("aten.copy_"):
                self.copies += 1
            else:
                assert func.is_view, f"{name} between replays"
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and somebody still holds, at their most. Also
    of tensors of the meta device, so that a shape no machine here could hold can be counted; what a
    library takes within an operation is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given:
                storage = x.untyped_storage()
                self.live[key] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out
