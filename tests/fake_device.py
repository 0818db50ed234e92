"""A device that is none: the tensors of "fake:0" lie in the memory of the CPU, which computes with them, but torch
takes them for those of an accelerator. What an accelerator refuses is refused, and what it would wait for is counted.

Tensors change sides by DLPack, with another device written into its header: both share memory, storage and all.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone", 0)
CPU, EXTENSION = 1, 12  # DLDeviceType
COPY = "aten::_copy_from"  # (source, target), of which one may be of the CPU
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# What sends a number, or the size of a result, to the host.
WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"}

_counter = Counter()
_cpu_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_library = torch.library.Library("_", "IMPL")
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _view(of: torch.Tensor, size, stride, offset: int) -> torch.Tensor:
    """Of the same storage, by which autograd sees what it may not change. (This CPU kernel takes any device.)"""
    return torch.ops.aten.as_strided.default.redispatch(_cpu_keys, of, size, stride, offset)


def _moved(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    whole = _view(tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    capsule = torch._C._to_dlpack(whole)
    header = _pointer_of(capsule, b"dltensor")  # the address of the data, the type of the device, its index
    device = ctypes.cast(header + ctypes.sizeof(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int32))
    device[0], device[1] = device_type, 0
    return _view(torch._C._from_dlpack(capsule), tensor.shape, tensor.stride(), tensor.storage_offset())


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return target.copy_(source)


def _is_fake(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE.type


def _check(name: str, tensors: list[torch.Tensor], generators: list[torch.Generator]) -> None:
    if name == COPY:
        return
    tensors = tensors[:1] if name in INDEXING else tensors  # an index may come from the host
    if any(not _is_fake(tensor) and tensor.dim() for tensor in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got some of fake:0 and some of cpu"
        )
    if any(generator.device.type != DEVICE.type for generator in generators):
        raise RuntimeError("Expected a 'fake' device type for generator but found 'cpu'")


def _waits(name: str, tensors: list[torch.Tensor]) -> bool:
    if name == COPY:
        return not _is_fake(tensors[1])
    if name == "aten::_index_put_impl_":  # one value for all that a mask selects is filled in without a list of them
        return tensors[-1].numel() > 1 and any(tensor.dtype == torch.bool for tensor in tensors[1:-1])
    return name in WAITING


def _with_tensors(operation, args: tuple) -> list:
    """Torch hands numbers to kernels in Python where it promised tensors of no dimension."""
    types = (argument.type for argument in operation._schema.arguments)
    pairs = zip(args, types, strict=False)  # arguments by name come last
    return [
        torch.tensor(value) if str(kind) == "Tensor" and isinstance(value, (int, float)) else value
        for value, kind in pairs
    ]


def _compute(operation, *args, **kwargs):
    name, args = operation._schema.name, _with_tensors(operation, args)
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    _check(name, tensors, [leaf for leaf in leaves if isinstance(leaf, torch.Generator)])
    if _waits(name, tensors):
        _counter[name] += 1
    originals = {}

    def to_cpu(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not _is_fake(value):
            return value
        # Some results come as nothing yet, to be made larger: that takes memory of its own.
        moved = _moved(value, CPU) if value.numel() else torch.empty_like(value, device="cpu")
        originals[id(moved)] = moved, value  # an operation in place returns what it was given
        return moved

    def to_fake(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in originals:
            _, original = originals[id(value)]
            if original.shape != value.shape:
                original.data = _moved(value, EXTENSION)
            return original
        for moved, original in originals.values():
            if moved.untyped_storage()._cdata == value.untyped_storage()._cdata and moved.dtype == value.dtype:
                return _view(original, value.shape, value.stride(), value.storage_offset())
        return _moved(value, EXTENSION)

    function = _copy if name == COPY else operation
    return tree_map(to_fake, function(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs)))


def set_up() -> None:
    _setup_privateuseone_for_python_backend("fake")
    _library.fallback(_compute, "PrivateUse1")


@contextmanager
def synchronisations() -> Iterator[Counter]:
    """Within it, how often the host waits for the device, by operation."""
    _counter.clear()
    yield _counter


set_up()
