"""The LoRA products that vLLM is given on a CPU, against adding each token's own delta one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own


@pytest.mark.parametrize("indices", [[0, 1, 2, 0], [-1, -1, 2, 0], [2, 2, 2, 2], [-1, 0, -1, 1], [-1, -1, -1, -1], [2, 1, 0, 1]])
def test_each_token_gets_its_own_adapter_and_none_without_one(indices):
    import torch

    from pipeline.llm import cpu_lora

    generator = torch.Generator().manual_seed(3)
    slots, rank, width, sizes = 3, 4, 8, (6, 2, 2)
    x, y = torch.randn(4, width, generator=generator), torch.randn(4, sum(sizes), generator=generator)
    a = [torch.randn(slots, 1, rank, width, generator=generator) for _ in sizes]
    b = [torch.randn(slots, 1, size, rank, generator=generator) for size in sizes]
    wanted = y.clone()
    for token, slot in enumerate(indices):
        if slot >= 0:
            wanted[token] += torch.cat([2.0 * b[part][slot, 0] @ (a[part][slot, 0] @ x[token]) for part in range(3)])
    wrapper = SimpleNamespace(no_lora=False, token_lora_indices=torch.tensor(indices))
    cpu_lora._add_lora_linear(wrapper, y, x, a, b, 2.0, sizes)
    torch.testing.assert_close(y, wanted)
