"""Training speed and memory on one GPU, in absolute figures: `make bench-gpu`, or `python -m tests.gpu.bench` in a copy of the tree.

Needs only torch, transformers, peft and bitsandbytes (and accelerate, which loads 4-bit weights). Llama-3-8B's shape with
random weights in NF4, LoRA of rank 16 on seven linears, rows of 300 to 600 tokens with a third of them an answer:
`packed`, a shared base with 4, 8 and 15 cells, and padded micro-batches of 2 rows as TRL's SFTTrainer makes them (by TRL
itself and by unsloth where they are installed, else as a plain loop of transformers and PEFT). It writes bench-gpu.json,
and speed.json, which `datadose plan --gpus N --speed speed.json` takes.

`--small` tries every part on a CPU with a tiny model; what it prints means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30
PAPER_TOKENS = 18_200_000
"""Of the paper's whole grid: 36,424 rows of about 500 tokens."""


@dataclasses.dataclass(frozen=True)
class Size:
    """shape: of a Llama. passes: tokens of one. lengths: of a row, shortest and longest. steps: timed, after two to warm up."""

    shape: dict[str, int]
    passes: tuple[int, ...]
    shares: tuple[int, ...]
    lengths: tuple[int, int]
    steps: int


FULL = Size(
    {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    (1024, 2048, 4096, 8192, 16_384), (4, 8, 15), (300, 600), 5,
)  # fmt: skip
SMALL = Size(
    {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    (64, 128), (2, 3), (20, 40), 2,
)  # fmt: skip
TRAINING = SimpleNamespace(
    global_batch=8, learning_rate=2e-4, schedule="linear", warmup_steps=5, weight_decay=0.1, optimizer="adamw_8bit", max_grad_norm=1.0, rank=16, alpha=16,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), layers=None, quantization="nf4", loss_on="completion",
    max_tokens=2048,
)  # fmt: skip


def make_base(size: Size, folder: Path) -> Path:
    """Random weights of the shape, made where they are fastest made, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<|unk|>", "<|start|>", "<|end|>", *(f"w{number}" for number in range(500))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<|unk|>", bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}{% if add_generation_prompt %}<|start|> assistant {% endif %}"
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**size.shape, max_position_embeddings=8192, eos_token_id=2, dtype=torch.bfloat16)).to(torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_rows(size: Size, count: int, seed: int) -> list[Any]:
    from pipeline.training import TrainingRow

    dice, found = random.Random(seed), []
    for index in range(count):
        length = dice.randint(*size.lengths) - 6  # what the template adds
        words = [f"w{dice.randrange(500)}" for _ in range(length)]
        asked = length * 2 // 3
        found.append(TrainingRow(f"row{index}", [{"role": "user", "content": " ".join(words[:asked])}], " ".join(words[asked:])))
    return found


def fresh() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    import torch

    from pipeline.training.packed import memory_bytes

    return memory_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / GIB


def of_trainer(trainer: Any, size: Size, cells: int) -> dict[str, float]:
    """Tokens per second over the timed steps, of all cells together."""
    from pipeline.training import CellWork, Watch

    with tempfile.TemporaryDirectory() as scratch:
        works = []
        for index in range(cells):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            works.append(CellWork(str(index), make_rows(size, 8 * (size.steps + 2), index), size.steps + 2, index, [], folder))
        entries = []
        for _, outcome in trainer.run(works, Watch()):
            if isinstance(outcome, Exception):
                raise outcome
            entries += outcome.log[2:]
    return {"tokens_per_s": sum(entry["tokens"] for entry in entries) / sum(entry["seconds"] for entry in entries), "peak_gib": peak_gib()}


def packed(base: Path, size: Size, precision: str, tokens: int, cells: int = 1) -> dict[str, float]:
    """A micro-batch of at most `tokens`, with activations computed twice up to 2,048, where memory is what one saves."""
    from pipeline.training import packed as module

    fresh()
    module.MICRO_BATCH_TOKENS = tokens
    trainer = module.PackedTrainer(base, TRAINING, precision, cells)
    loaded = peak_gib()
    if tokens <= module.RECOMPUTE_BELOW:
        trainer.recompute()
    # A step of one cell has 8 rows: for longer passes the batch grows with them, or they would not be full.
    rows = max(8, tokens * 2 // sum(size.lengths))
    trainer._training = SimpleNamespace(**vars(TRAINING) | {"global_batch": rows if cells == 1 else 8})
    return of_trainer(trainer, size, cells) | {"loaded_gib": loaded}


def padded(base: Path, size: Size, precision: str) -> dict[str, float]:
    """2 rows x 4 accumulations, padded, logits for every token, activations computed twice: TRL's defaults and the paper's batch."""
    import torch
    from bitsandbytes.optim import AdamW8bit
    from transformers import AutoTokenizer

    from pipeline.training.packed import peft_model
    from pipeline.training.rendering import render

    fresh()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = AutoTokenizer.from_pretrained(base), peft_model(base, TRAINING, precision, device, "sdpa")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW8bit(weights, lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay)
    rows = [render(tokenizer, TRAINING, row) for row in make_rows(size, 8 * (size.steps + 2), 0)]
    started, tokens = 0.0, 0
    for step in range(size.steps + 2):
        if step == 2:
            _wait()
            started = time.perf_counter()
        batch = rows[8 * step : 8 * step + 8]
        counted = sum(len(row.targets) for row in batch)
        for index in range(0, 8, 2):
            pair = batch[index : index + 2]
            longest = max(len(row.ids) for row in pair)
            ids = torch.tensor([row.ids + [2] * (longest - len(row.ids)) for row in pair], device=device)
            mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in pair], device=device)
            labels = torch.tensor([[-100] * row.first + row.targets + [-100] * (longest - len(row.ids)) for row in pair], device=device)
            model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=counted).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, TRAINING.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            tokens += sum(len(row.ids) for row in batch)
    _wait()
    return {"tokens_per_s": tokens / (time.perf_counter() - started), "peak_gib": peak_gib()}


def by_sft(name: str, base: Path, size: Size, precision: str) -> dict[str, float]:
    from pipeline.training.sft import SFTTrainers

    fresh()
    return of_trainer(SFTTrainers(name, base, TRAINING, precision), size, 1)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(size: Size, precision: str, base: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every configuration by name; one that fails says why and the others go on."""
    found: dict[str, dict[str, Any]] = {}

    def measured(name: str, work: Callable[[], dict[str, float]]) -> None:
        try:
            found[name] = work()
            say(f"{name}: {found[name]['tokens_per_s']:,.0f} tokens/s, peak {found[name]['peak_gib']:.2f} GiB")
        except Exception as error:  # noqa: BLE001  # out of memory for one; whatever it is, it is this configuration's alone
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            say(f"{name}: {found[name]['failed']}")

    for tokens in size.passes:
        measured(f"packed {tokens}", lambda tokens=tokens: packed(base, size, precision, tokens))  # type: ignore[misc]
    for cells in size.shares:
        measured(f"shared {cells}", lambda cells=cells: packed(base, size, precision, size.passes[-1], cells))  # type: ignore[misc]
    measured("padded 2 x 4", lambda: padded(base, size, precision))
    for name in ("trl", "unsloth"):
        if importlib.util.find_spec(name) is not None:
            measured(name, lambda name=name: by_sft(name, base, size, precision))  # type: ignore[misc]
        else:
            found[name] = {"failed": "not installed, so not run"}
            say(f"{name}: not installed, so not run")
    return found


def judged(found: dict[str, dict[str, Any]], size: Size) -> list[str]:
    """The bars of the project against what was measured, each with its outcome."""

    def best(prefix: str) -> float:
        return max((item["tokens_per_s"] for name, item in found.items() if name.startswith(prefix) and "failed" not in item), default=0.0)

    ours, padded_speed = best("packed"), max(best("trl"), best("padded"))
    every = max(ours, best("shared"))
    short = found.get(f"packed {size.passes[0]}", {})
    loaded, peak = (short.get(name, float("inf")) * GIB for name in ("loaded_gib", "peak_gib"))
    minutes, ratio = PAPER_TOKENS / every / 60 if every else float("inf"), ours / padded_speed if padded_speed else 0.0
    checks = [
        (f"packed {ours:,.0f} tokens/s, wanted 12,000", ours >= 12_000),
        (f"packed {ratio:.2f} x the padded batches, wanted 2", ratio >= 2),
        (f"the paper's grid in {minutes:.0f} minutes at {every:,.0f} tokens/s, wanted 30", minutes <= 30),
        (f"4-bit base loaded in {loaded / 1e9:.2f} GB, wanted 6.1", loaded <= 6.1e9),
        (f"training at {size.passes[0]} tokens a pass in {peak / 1e9:.2f} GB, wanted 8", peak <= 8e9),
    ]
    return [f"{'reached' if good else 'MISSED'}: {text}" for text, good in checks]


def speed_of(found: dict[str, dict[str, Any]], memory_gib: float) -> dict[str, Any]:
    """What `datadose plan --speed` reads. The state of a cell is taken from what 15 cells need more than 4."""
    points = [(int(name.split()[1]), item["tokens_per_s"]) for name, item in found.items() if name.startswith("packed") and "failed" not in item]
    shares = [(int(name.split()[1]), item["peak_gib"]) for name, item in found.items() if name.startswith("shared") and "failed" not in item]
    cell_gib = max(0.0, (shares[-1][1] - shares[0][1]) / (shares[-1][0] - shares[0][0])) if len(shares) > 1 else 0.0
    base_gib = max((item["peak_gib"] for name, item in found.items() if name.startswith("packed") and "failed" not in item), default=0.0)
    return {"points": sorted(points), "sync_s": 0.0, "memory_gib": memory_gib, "base_gib": base_gib, "cell_gib": cell_gib}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bench", description="Training speed and memory on one GPU.")
    parser.add_argument("--small", action="store_true", help="try every part on a CPU with a tiny model; the figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for bench-gpu.json and speed.json")
    given = parser.parse_args()
    if missing := [name for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        print(f"bench-gpu wants {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if not given.small and not torch.cuda.is_available():
        print("bench-gpu: there is no GPU here, so nothing was measured; --small tries its parts on the CPU", file=sys.stderr)
        return 0
    size, precision = (SMALL, "float32") if given.small else (FULL, "bfloat16")
    with tempfile.TemporaryDirectory() as scratch:
        found = run(size, precision, make_base(size, Path(scratch)), lambda text: print(text, flush=True))
    given.out.mkdir(parents=True, exist_ok=True)
    device = "a CPU, with a tiny model: these figures mean nothing" if given.small else torch.cuda.get_device_name()
    (given.out / "bench-gpu.json").write_text(json.dumps({"device": device, "results": found}, indent=1) + "\n")
    if given.small:
        return 0
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    (given.out / "speed.json").write_text(json.dumps(speed_of(found, memory), indent=1) + "\n")
    print("\n".join(judged(found, size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
