"""A frozen linear layer with its LoRA delta as one function: no scaled copy and no sum of two full-width tensors.

PEFT makes, names and saves the adapter; this replaces only what its layers compute, with the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def fuse(model: torch.nn.Module, adapter: str = "default") -> None:
    """Replace the forward of every LoRA layer of a PEFT model. Raises ValueError for a layer with bias or dropout."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if base.bias is not None or not isinstance(layer.lora_dropout[adapter], torch.nn.Identity):
            raise ValueError(f"{name}: a LoRA layer with bias or dropout cannot be fused")
        layer.forward = _Fused(base, layer.lora_A[adapter], layer.lora_B[adapter], float(layer.scaling[adapter]))


class _Fused:
    def __init__(self, base: Any, down: Any, up: Any, scale: float) -> None:
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return LoraLinear.apply(x, self.down.weight, self.up.weight, self.base.weight, self.scale)  # type: ignore[no-any-return, no-untyped-call]


def frozen_weight(weight: Any, dtype: torch.dtype) -> Tensor:
    """(out, in) in `dtype`, dequantized where it is NF4."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        full: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return full.to(dtype)
    return weight.to(dtype)  # type: ignore[no-any-return]


class LoraLinear(torch.autograd.Function):
    """x W^T + scale (x A^T) B^T for x (..., in), W (out, in) frozen, A (rank, in), B (out, rank).

    A and B may be of higher precision than x: the delta is then added in theirs and rounded once, as PEFT does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Any, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = functional.linear(flat, frozen_weight(weight, x.dtype))
        hidden = functional.linear(flat.to(a.dtype), a)
        if out.dtype == b.dtype:
            out.addmm_(hidden, b.T, alpha=scale)
        else:
            out = torch.addmm(out.to(b.dtype), hidden, b.T, alpha=scale).to(x.dtype)
        ctx.save_for_backward(flat, hidden, a, b)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        flat, hidden, a, b = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        grad_wide = grad.to(b.dtype)
        grad_hidden = (grad_wide @ b).mul_(ctx.scale)
        grad_b = (hidden.T @ grad_wide).mul_(ctx.scale).T  # this way round MKL is seven times as fast as grad.T @ hidden
        grad_a = grad_hidden.T @ flat.to(a.dtype)
        if not ctx.needs_input_grad[0]:  # the first layer's input is an embedding of a frozen table
            return None, grad_a, grad_b, None, None
        grad_x = grad @ frozen_weight(ctx.weight, grad.dtype)
        if grad_x.dtype == a.dtype:
            grad_x.addmm_(grad_hidden, a)
        else:
            grad_x = torch.addmm(grad_x.to(a.dtype), grad_hidden, a).to(grad_x.dtype)
        return grad_x.view(ctx.shape), grad_a, grad_b, None, None
