"""8-bit and 4-bit weights of a frozen denoiser, stored by torchao."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import BenchError
from bench.settings import Quantized

BLOCK = 64  # numbers of NF4 that share a scale, as in QLoRA (Dettmers et al., 2023)
BLOCKS = 256  # scales that share one of their own
BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / BLOCK}  # of a number, without what a whole row or 16,384 numbers share


def require_torchao() -> None:
    """Raise BenchError if torchao is not installed."""
    if find_spec("torchao") is None:
        raise BenchError("model.quantize needs torchao: pip install 'nabla-bench[quantize]'.")


def quantize(network: nn.Module, kind: Quantized, device: torch.device) -> None:
    """Quantise the weights of the frozen linear layers, each on the device, where it stays."""
    to_quantized = _int8() if kind == "int8" else _nf4()
    for layer in quantizable(network):
        weight = to_quantized(layer.weight.detach().to(device))
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.__class__ = QuantizedLinear


def quantizable(network: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers that are not trained and have whole blocks; nearly all weights of a denoiser are theirs."""
    for layer in network.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad and layer.weight.numel() % BLOCK == 0:
            yield layer


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantised weight."""

    def forward(self, input: Tensor) -> Tensor:
        """`x Wᵀ + b` in the precision of x."""
        product = _Product.apply(input, self.weight)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """`x Wᵀ`. The graph keeps the quantised W: torchao's own product of 8-bit weights keeps it in full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return F.linear(x, _full(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _full(ctx.weight), None


def _full(weight: Any) -> Tensor:
    """The weight in its former precision."""
    return weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()


def _int8() -> Callable[[Tensor], Tensor]:
    """By the largest number of each row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def convert(weight: Tensor) -> Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        return layer.weight.detach()

    return convert


def _nf4() -> Callable[[Tensor], Tensor]:
    """To the quantiles of a normal distribution, with scales in 8 bits."""
    from torchao.quantization import NF4Tensor

    def convert(weight: Tensor) -> Tensor:
        blocks = weight.numel() // BLOCK
        return NF4Tensor.from_tensor(weight.contiguous(), BLOCK, BLOCKS if blocks % BLOCKS == 0 else blocks)

    return convert
