"""LoRA weights of many cells over one frozen model, and a frozen linear layer with their deltas as one function.

PEFT makes, names and saves an adapter; this replaces only what its layers compute, with the same result. The weights of a
cell lie in one vector: clipping, the optimizer, a checkpoint and a sum over devices are one operation each. Rows of a cell
lie together, so its delta is a plain product over a run of tokens. Nothing adds up over tokens of two cells: what goes
wrong in one (inf, NaN) stays in its own rows and its own gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Place(NamedTuple):
    """Where the weights of one layer are in a cell's vector: A (rank, in), then B transposed (rank, out)."""

    start: int
    rank: int
    fan_in: int
    fan_out: int

    @property
    def stop(self) -> int:
        return self.start + self.rank * (self.fan_in + self.fan_out)

    def of(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B^T (rank, out) as views of a cell's vector."""
        middle = self.start + self.rank * self.fan_in
        return vector[self.start : middle].view(self.rank, self.fan_in), vector[middle : self.stop].view(self.rank, self.fan_out)


class Adapters:
    """weights, gradients: (slots, size), a row for each cell; `segments` says whose the tokens of the next pass are.

    Raises ValueError for a LoRA layer with bias or dropout.
    """

    def __init__(self, model: Any, slots: int, adapter: str = "default") -> None:
        from peft.tuners.lora import LoraLayer

        self._name, start = adapter, 0
        self._layers: list[tuple[Any, Place]] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            base, down, up = layer.get_base_layer(), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if base.bias is not None or not isinstance(layer.lora_dropout[adapter], torch.nn.Identity):
                raise ValueError(f"{name}: a LoRA layer with bias or dropout cannot be fused")
            place = Place(start, down.shape[0], down.shape[1], up.shape[0])
            layer.forward = _Fused(self, place, base, float(layer.scaling[adapter]))
            self._layers.append((layer, place))
            start = place.stop
        self.weights = torch.zeros(slots, start, dtype=down.dtype, device=down.device)
        self.gradients = torch.zeros_like(self.weights)
        self.segments: list[tuple[int, int, int]] = []
        """(slot, first token, token after the last) of the pass, in order and without gaps."""
        self.anchor = torch.zeros((), device=down.device, requires_grad=True)
        """What makes autograd come by: the weights themselves are no inputs of it."""

    def reset(self, slot: int, seed: int) -> None:
        """A fresh adapter, as PEFT draws it after torch.manual_seed(seed)."""
        torch.manual_seed(seed)
        for layer, place in self._layers:
            layer.reset_lora_parameters(self._name, init_lora_weights=True)
            for mine, theirs in zip(place.of(self.weights[slot]), self._of_peft(layer), strict=True):
                mine.copy_(theirs)
        self.gradients[slot].zero_()

    @torch.no_grad()
    def hand_over(self, slot: int) -> None:
        """Put a cell's weights where PEFT saves them from."""
        for layer, place in self._layers:
            for mine, theirs in zip(place.of(self.weights[slot]), self._of_peft(layer), strict=True):
                theirs.copy_(mine)

    def _of_peft(self, layer: Any) -> tuple[Tensor, Tensor]:
        return layer.lora_A[self._name].weight.data, layer.lora_B[self._name].weight.data.T


class _Fused:
    def __init__(self, adapters: Adapters, place: Place, base: Any, scale: float) -> None:
        self._adapters, self._place, self._base, self._scale = adapters, place, base, scale

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        anchor = self._adapters.anchor
        return LoraLinear.apply(x, anchor, self._adapters, self._place, self._base.weight, self._scale)  # type: ignore[no-any-return, no-untyped-call]


def frozen_weight(weight: Any, dtype: torch.dtype) -> Tensor:
    """(out, in) in `dtype`, dequantized where it is NF4."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        full: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return full.to(dtype)
    return weight.to(dtype)  # type: ignore[no-any-return]


class LoraLinear(torch.autograd.Function):
    """x W^T + scale (x A^T) B^T for x (..., in), W (out, in) frozen, A (rank, in) and B (out, rank) those of each token's cell.

    The backward pass adds to the cells' gradients in place. A and B may be of higher precision than x: the delta is then
    added in theirs and rounded once, as PEFT does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, adapters: Adapters, place: Place, weight: Any, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = functional.linear(flat, frozen_weight(weight, x.dtype))
        segments, hidden = adapters.segments, []
        for slot, start, stop in segments:
            a, b = place.of(adapters.weights[slot])
            narrow = functional.linear(flat[start:stop].to(a.dtype), a)
            _add_product(out[start:stop], narrow, b, scale)
            hidden.append(narrow)
        ctx.save_for_backward(flat, *hidden)
        ctx.adapters, ctx.place, ctx.weight, ctx.scale, ctx.shape, ctx.segments = adapters, place, weight, scale, x.shape, segments
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        flat, *hidden = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        # The first layer's input is an embedding of a frozen table.
        grad_x = grad @ frozen_weight(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        for (slot, start, stop), narrow in zip(ctx.segments, hidden, strict=True):
            a, b = ctx.place.of(ctx.adapters.weights[slot])
            grad_a, grad_b = ctx.place.of(ctx.adapters.gradients[slot])
            wide = grad[start:stop].to(b.dtype)
            grad_narrow = (wide @ b.T).mul_(ctx.scale)
            grad_b.addmm_(narrow.T, wide, alpha=ctx.scale)  # B transposed, because this way round MKL is seven times as fast
            grad_a.addmm_(grad_narrow.T, flat[start:stop].to(a.dtype))
            if grad_x is not None:
                _add_product(grad_x[start:stop], grad_narrow, a, 1.0)
        return (None if grad_x is None else grad_x.view(ctx.shape)), None, None, None, None, None


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale left right, in the precision of left and rounded once to that of out."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.copy_(torch.addmm(out.to(left.dtype), left, right, alpha=scale))
