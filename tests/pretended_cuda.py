"""A pretended GPU: tensors lie in host memory but have a device, and to mix devices raises as on CUDA.

Every tensor is on "cpu" or "cuda"; a tensor that autograd makes has no device and takes the device of
the first tensor that it meets. As on CUDA, scalars, indices on the CPU, `copy_` and `to` may mix. It
counts the calls that would make the host wait for the device, and says nothing of speed.
"""

from itertools import chain
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
FREE = {
    "copy_", "to", "cpu", "__get__", "__set__", "detach", "set_", "backward", "register_hook",
    "register_post_accumulate_grad_hook", "requires_grad_", "_has_compatible_shallow_copy_type",
}  # fmt: skip
WAITING = {"cpu", "item", "tolist", "nonzero", "equal", "__bool__", "__int__", "__float__"}
VIEWS = ("T", "mT", "data", "grad")


def device_of(tensor: Any) -> str | None:
    return getattr(tensor, "_pretended", None)


def mark(value: Any, device: str | None) -> Any:
    """Put the tensors in a value on a device, if they have none yet."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and device and device_of(leaf) is None:
            leaf._pretended = device
    return value


def move(bridge) -> None:
    """Put a model on the pretended GPU."""
    for module in chain(bridge.modules(), bridge.original_model.modules()):
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                tensor._pretended = "cuda"
    bridge.cfg.device = "cuda:0"


def _waits(name, args) -> bool:
    """Whether the host would wait for what the device computes."""
    tensors = [leaf for leaf in tree_leaves(args[:2]) if isinstance(leaf, torch.Tensor)]
    if not tensors or device_of(tensors[0]) == "cpu":
        return False
    by_truth = any(tensor.dtype == torch.bool for tensor in tensors[1:])
    to_host = name == "to" and any(str(value) == "cpu" for value in args[1:])
    return name in WAITING or to_host or (name == "__getitem__" and by_truth)


class PretendedCuda(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        self.waits += _waits(name, args)
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_on_gpu = any(device_of(tensor) == "cuda" for tensor in tensors)
        if name in ("numpy", "__array__") and is_on_gpu:
            raise TypeError("can't convert a tensor on cuda:0 to numpy")
        if name == "cpu":
            with torch._C.DisableTorchFunction():
                copied = args[0].detach().clone() if is_on_gpu else args[0]
            return mark(copied, "cpu")

        target = None
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
            kwargs["device"] = "cpu"
        if name == "to":
            return self._move(func, args, kwargs, target)
        if kwargs.get("generator") is not None and (target == "cuda" or is_on_gpu):
            raise RuntimeError("expected a 'cuda' device type for generator but found 'cpu'")
        if name not in FREE:
            self._refuse_mixing(name, args, tensors)
        result = func(*args, **kwargs)
        device = target or ("cuda" if is_on_gpu else None)
        if device is None and (not tensors or any(map(device_of, tensors))):
            device = "cpu"
        return mark(result, device)

    def _attribute(self, func, args, kwargs):
        tensor, name = args[0], func.__self__.__name__
        if name == "device" and device_of(tensor) == "cuda":
            return CUDA
        if name == "is_cuda":
            return device_of(tensor) == "cuda"
        value = func(*args, **kwargs)
        return mark(value, device_of(tensor)) if name in VIEWS else value

    def _move(self, func, args, kwargs, target):
        tensor, *arguments = args
        for place, value in enumerate(arguments):
            if isinstance(value, str | torch.device):
                target, arguments[place] = torch.device(value).type, "cpu"
            elif isinstance(value, torch.Tensor):
                target = device_of(value) or target
        source = device_of(tensor)
        result = func(tensor, *arguments, **kwargs)
        if result is tensor and target and target != source:
            result = tensor.detach().clone() if tensor.requires_grad else tensor.view_as(tensor)
            result._pretended = target
        return mark(result, target or source)

    def _refuse_mixing(self, name, args, tensors):
        devices = {device_of(tensor) for tensor in tensors if tensor.dim()} - {None}
        if len(devices) < 2:
            return
        if name in INDEXING and device_of(args[0]) != "cpu":
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            values = [leaf for leaf in tree_leaves(args[2:]) if isinstance(leaf, torch.Tensor)]
            is_elsewhere = any(leaf.dim() and device_of(leaf) == "cpu" for leaf in values)
            if not (indices and is_elsewhere):
                return
        raise RuntimeError(
            f"{name}: expected all tensors to be on one device, found cuda:0 and cpu"
        )
