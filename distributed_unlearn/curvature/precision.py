"""Numerical settings under which second derivatives exist and float64 means float64."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_SOFTMAXES = frozenset(
    {
        torch.softmax,
        torch.log_softmax,
        torch.special.softmax,
        torch.special.log_softmax,
        functional.softmax,
        functional.log_softmax,
        Tensor.softmax,
        Tensor.log_softmax,
    }
)
_PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__})


def _lifted(value: Any) -> Any:
    """A cast's argument with float32 replaced by float64, also where it is a tensor to take the dtype from."""
    if value is torch.float32:
        return torch.float64
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return value


class LiftFloat32Casts(TorchFunctionMode):
    """Context in which a float64 tensor stays float64 where a model's code casts it to float32.

    Hugging Face models cast to float32 in norms, softmax and losses, whatever the weights' dtype, so that
    `model.double()` alone computes with float32 islands (relative errors of 1e-7 and more). Inside the context
    `Tensor.float`, `.to`, `.type`, `softmax(dtype=)` and `log_softmax(dtype=)` that ask for float32 return float64
    for a float64 input. Every other tensor is cast as written: a float32 or bfloat16 model computes bit for bit
    what it computes outside, and integers become float32. As lifted and unlifted tensors may then meet in a
    matrix product (rotary frequencies times positions, exact in float32), products promote float32 to float64.

    Buffers such as rotary frequencies keep the values that the model was built with, merely widened.
    `torch.autocast` needs no care: it leaves float64 alone. The context must be open in forward passes only;
    backward passes have no casts of their own, but a recomputation inside one is a forward pass.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, with its cast lifted or its operands promoted."""
        kwargs = dict(kwargs or {})
        if func in _PRODUCTS:
            args = self._promoted(args)
        elif args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                func = Tensor.double
            elif func in (Tensor.to, Tensor.type):
                args = (args[0], *(_lifted(value) for value in args[1:]))
                kwargs = {name: _lifted(value) for name, value in kwargs.items()}
            elif func in _SOFTMAXES and kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)

    @staticmethod
    def _promoted(args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtypes = {value.dtype for value in args if isinstance(value, Tensor)}
        if dtypes != {torch.float32, torch.float64}:
            return args
        return tuple(value.double() if isinstance(value, Tensor) else value for value in args)


@contextmanager
def exact_attention() -> Iterator[None]:
    """Context in which `scaled_dot_product_attention` uses its math kernel, the one with second derivatives.

    The flash and memory-efficient kernels have neither a double backward nor forward-mode derivatives
    (pytorch issue 116350).
    """
    with sdpa_kernel([SDPBackend.MATH]):
        yield
