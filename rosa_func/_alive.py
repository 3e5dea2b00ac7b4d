"""What is alive of a computation on the meta device."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rosa_func._torch import VALUE_OF, TorchDispatchMode, attention, tree_leaves


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive after each operation; `peak` is the most.

    Where the code asks for a value, which the meta device does not have, it is told 1 (True).

    Args:
        held: what is alive before.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: Any = weakref.WeakSet()
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count what comes out."""
        if func is VALUE_OF:
            return True
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._forget, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size


class Attention(TorchFunctionMode):
    """Lets attention without dropout hold what it holds on a device, not all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute attention otherwise, and all else as it is."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    func: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    **others: Any,
) -> Any:
    if enable_gqa:
        times = q.shape[-3] // k.shape[-3]
        k, v = (t.repeat_interleave(times, -3) for t in (k, v))
    if dropout_p or q.ndim != 4:
        return func(q, k, v, attn_mask, dropout_p, is_causal, **others)
    return attention(q, k, v, attn_mask, is_causal)
