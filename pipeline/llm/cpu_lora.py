"""LoRA for vLLM's CPU backend as two matrix products, loaded by vLLM as a plugin (pyproject.toml, vllm.general_plugins).

vLLM 0.32 gathers the A and B matrices of every token before it multiplies, which costs about five times the base
model's own work, and indexes the last adapter's slot for tokens that have none (index -1), so that a base request in
a batch with a full set of adapters gets an adapter's answer. Here all slots are multiplied at once and the columns of
other adapters are masked: for tokens X, slots l, `Y += scale * (mask * (X A^T)) B^T`.
"""

from __future__ import annotations

from typing import Any

_expanded: dict[int, Any] = {}
"""Address of a stacked B (slots, 1, out, rank) -> its copy as (slots * rank, out)."""


def register() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if PunicaWrapperCPU.add_lora_linear is _add_lora_linear:
        return
    PunicaWrapperCPU.add_lora_linear = _add_lora_linear
    PunicaWrapperCPU.update_metadata = _forgetting_mask(PunicaWrapperCPU.update_metadata)
    PunicaWrapperCPU.add_lora_logits = _only_where_trained(PunicaWrapperCPU.add_lora_logits)
    for change in ("activate_adapter", "deactivate_adapter", "remove_all_adapters"):
        setattr(LoRAModelManager, change, _forgetting(getattr(LoRAModelManager, change)))


def _only_where_trained(add_lora_logits: Any) -> Any:
    """vLLM adds a delta to the logits even where no adapter has one, and mistakes its shape under prompt_logprobs."""

    def add(self: Any, y: Any, x: Any, lora_a_stacked: Any, *args: Any, **kwargs: Any) -> None:
        if lora_a_stacked.any():
            add_lora_logits(self, y, x, lora_a_stacked, *args, **kwargs)

    return add


def _forgetting_mask(update_metadata: Any) -> Any:
    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        update_metadata(self, *args, **kwargs)
        self.mask = None

    return update


def _forgetting(method: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        _expanded.clear()
        return method(*args, **kwargs)

    return changed


def _add_lora_linear(
    self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, *, buffer: Any = None, **_: Any
) -> None:
    """y (tokens, sum of output_slices) += scale * x (tokens, in) A^T B^T, each token with its own adapter; in place."""
    import torch

    if self.no_lora:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if getattr(self, "mask", None) is None or len(self.mask) != len(x):  # one mask serves all layers of a batch
        slots = torch.arange(lora_a_stacked[0].shape[0], device=x.device)
        self.mask = (self.token_lora_indices[: len(x), None] == slots).to(torch.float32)
    start = 0
    for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        count, _, rank, width = a.shape
        hidden = torch.nn.functional.linear(x, a.view(count * rank, width)).view(-1, count, rank).float() * self.mask[:, :, None]
        expanded = _expanded.get(b.data_ptr())
        if expanded is None:
            expanded = _expanded[b.data_ptr()] = b[:, 0].transpose(1, 2).reshape(count * rank, -1).contiguous()
        y[:, start : start + size].addmm_(hidden.view(-1, count * rank).to(y.dtype), expanded[:, :size], alpha=scale)
        start += size
