"""LoRA for vLLM's CPU backend as two batched matrix products, loaded by vLLM as a plugin (pyproject.toml, vllm.general_plugins).

vLLM 0.32 gathers the A and B matrices of every token before it multiplies, which costs about five times the base
model's own work, and indexes the last adapter's slot for tokens that have none (index -1), so that a base request in
a batch with a full set of adapters gets an adapter's answer. Here the tokens are gathered by adapter instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class _Tokens(NamedTuple):
    """The tokens of a batch that have an adapter, by adapter: groups are padded to the largest, so that one batched product serves all."""

    slots: Any
    """(groups,) adapter of each group."""
    padded: Any
    """(groups * width,) token at each place; any token where a group is shorter."""
    places: Any
    """(tokens with an adapter,) their places."""
    tokens: Any
    """(tokens with an adapter,) their indices in the batch."""


def register() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if PunicaWrapperCPU.add_lora_linear is _add_lora_linear:
        return
    PunicaWrapperCPU.add_lora_linear = _add_lora_linear
    PunicaWrapperCPU.update_metadata = _forgetting_groups(PunicaWrapperCPU.update_metadata)
    PunicaWrapperCPU.add_lora_logits = _only_where_trained(PunicaWrapperCPU.add_lora_logits)


def _only_where_trained(add_lora_logits: Any) -> Any:
    """vLLM adds a delta to the logits even where no adapter has one, and mistakes its shape under prompt_logprobs."""

    def add(self: Any, y: Any, x: Any, lora_a_stacked: Any, *args: Any, **kwargs: Any) -> None:
        if lora_a_stacked.any():
            add_lora_logits(self, y, x, lora_a_stacked, *args, **kwargs)

    return add


def _forgetting_groups(update_metadata: Any) -> Any:
    def update(self: Any, *args: Any, **kwargs: Any) -> None:
        update_metadata(self, *args, **kwargs)
        self.grouped = None

    return update


def _group(indices: Any) -> _Tokens:
    """indices: (tokens,) slot of each token's adapter, -1 for none."""
    import torch

    ordered, tokens = torch.sort(indices, stable=True)
    tokens, ordered = tokens[ordered >= 0], ordered[ordered >= 0]
    slots, group, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    width = int(counts.max()) if len(counts) else 0
    places = group * width + torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[group]
    padded = torch.zeros(len(slots) * width, dtype=torch.long)
    padded[places] = tokens
    return _Tokens(slots, padded, places, tokens)


def _add_lora_linear(
    self: Any, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, *, buffer: Any = None, **_: Any
) -> None:
    """y (tokens, sum of output_slices) += scale * x (tokens, in) A^T B^T, each token with its own adapter; in place."""
    import torch

    if self.no_lora:
        return
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if getattr(self, "grouped", None) is None or self.grouped[0] != len(x):  # one grouping serves all layers of a batch
        self.grouped = len(x), _group(self.token_lora_indices[: len(x)])
    slots, padded, places, tokens = self.grouped[1]
    if not len(tokens):
        return
    shown = x[padded].view(len(slots), -1, x.shape[-1])
    start = 0
    for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        if len(slots) < len(a):
            a, b = a[slots], b[slots]
        hidden = torch.bmm(shown, a[:, 0].transpose(1, 2))
        delta = torch.bmm(hidden, b[:, 0, :size].transpose(1, 2)).view(-1, size)
        y[:, start : start + size].index_add_(0, tokens, delta[places].to(y.dtype), alpha=scale)
        start += size
