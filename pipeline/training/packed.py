"""One cell at a time over a frozen base, nothing padded: rows lie end to end, attention stays inside each row.

What all rows of a micro-batch begin with (the template's head and the task's instruction) is computed once and attended
to by each: the same sums, a sixth fewer tokens on the laptop study.

Per optimizer step the loss is the mean over all loss tokens of the global batch, however the batch is split into
micro-batches. Logits are made only where there is loss, in chunks, and their gradient in the same pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pipeline.chat import completion_ids, prompt_ids
from pipeline.study import Training
from pipeline.training import Trained, TrainingRow, batches, learning_rate
from pipeline.training.lora import fuse

MICRO_BATCH_TOKENS = 8192
"""Tokens of one forward and backward pass at most; a row longer than that stands alone."""
LOGIT_ROWS = 512
"""Rows of logits at once: 512 x 49,152 in fp32 are 96 MiB."""


class Rendered(NamedTuple):
    row_id: str
    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def packed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any) -> tuple[Tensor, None]:
    """Causal attention of each row with the shared beginning and itself: query (1, heads, tokens, dim).

    `row_lengths` sums to tokens; the first is the shared beginning's and may be 0.
    """
    settings: dict[str, Any] = {"scale": kwargs.get("scaling"), "enable_gqa": True}
    (first, *queries), (first_key, *keys), (first_value, *values) = (torch.split(whole, kwargs["row_lengths"], 2) for whole in (query, key, value))
    shared = first.shape[2]
    done = [functional.scaled_dot_product_attention(first, first_key, first_value, is_causal=True, **settings)] if shared else []
    for q, k, v in zip(queries, keys, values, strict=True):
        if not shared:
            done.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
            continue
        mask = torch.ones(q.shape[2], shared + q.shape[2], dtype=torch.bool, device=q.device).tril(shared)
        k, v = torch.cat([first_key, k], 2), torch.cat([first_value, v], 2)
        done.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings))
    return torch.cat(done, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(hidden W^T)[target], W frozen. hidden (tokens, width), W (vocabulary, width).

    The gradient for hidden, (softmax - onehot) W, is made with the loss, so no logits are kept or computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(targets), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = functional.linear(hidden[part], weight).float()
            total += functional.cross_entropy(logits, targets[part], reduction="sum")
            slope = logits.softmax(-1)
            slope[torch.arange(len(slope)), targets[part]] -= 1
            gradient[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


class PackedTrainer:
    def __init__(self, base: Path, training: Training, precision: str) -> None:
        self._training = training
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, precision)
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation="packed",
            quantization_config=quantized if training.quantization == "nf4" else None,
            device_map={"": self._device},
        )
        model.requires_grad_(False)
        lora = LoraConfig(
            r=training.rank,
            lora_alpha=training.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(training.targets),
            task_type="CAUSAL_LM",
            layers_to_transform=None if training.layers is None else list(training.layers),
        )
        self._model = get_peft_model(model, lora)
        fuse(self._model)
        self._model.eval()  # no dropout anywhere: training and evaluation are the same function

    def run(self, rows: Sequence[TrainingRow], steps: int, seed: int, heldout: Sequence[TrainingRow], folder: Path, on_step: Callable[[], None]) -> Trained:
        torch.manual_seed(seed)
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)
        rendered = [self._render(row) for row in rows]
        cut = sum(row.length > self._training.max_tokens for row in rendered)
        log = self._train(rendered, steps, seed, on_step)
        self._model.save_pretrained(folder, save_embedding_layers=False)
        return Trained(folder, log, list(self._score(heldout)), cut)

    def _train(self, rows: list[Rendered], steps: int, seed: int, on_step: Callable[[], None]) -> list[dict[str, Any]]:
        training = self._training
        weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        optimizer = self._optimizer(weights)
        log = []
        for step, chosen in enumerate(batches(len(rows), steps, training.global_batch, seed)):
            started = time.perf_counter()
            rate = learning_rate(step, steps, training.learning_rate, training.schedule, training.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = [rows[index] for index in chosen]
            loss_tokens = sum(len(self._targets(row)[0]) for row in batch)
            loss = 0.0
            for micro in micro_batches(batch, MICRO_BATCH_TOKENS):
                part = self._nll(micro).sum() / loss_tokens
                part.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                loss += part.item()
            norm = torch.nn.utils.clip_grad_norm_(weights, training.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"step {step + 1}: loss {loss}, gradient norm {norm.item()}; lower training.learning_rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.append({
                "step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm.item(),
                "tokens": sum(min(row.length, training.max_tokens) for row in batch), "loss_tokens": loss_tokens,
                "seconds": time.perf_counter() - started,
            })  # fmt: skip
            on_step()
        return log

    def _optimizer(self, weights: list[Any]) -> torch.optim.Optimizer:
        if self._training.optimizer == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            optimizer: torch.optim.Optimizer = AdamW8bit(weights, weight_decay=self._training.weight_decay)
            return optimizer
        return torch.optim.AdamW(weights, weight_decay=self._training.weight_decay)

    @torch.no_grad()
    def _score(self, rows: Sequence[TrainingRow]) -> Iterator[dict[str, Any]]:
        rendered = [self._render(row) for row in rows]
        for micro in micro_batches(rendered, MICRO_BATCH_TOKENS):
            for row, nll in zip(micro, self._nll(micro), strict=True):
                yield {"row_id": row.row_id, "nll": nll.item(), "tokens": len(self._targets(row)[0]), "prompt_ids": row.prompt}

    def _render(self, row: TrainingRow) -> Rendered:
        return Rendered(row.row_id, prompt_ids(self._tokenizer, row.conversation), completion_ids(self._tokenizer, row.conversation, row.answer))

    def _targets(self, row: Rendered) -> tuple[list[int], int]:
        """The tokens that carry loss, and the position of the first of them."""
        first = len(row.prompt) if self._training.loss_on == "completion" else 1
        return (row.prompt + row.answer)[first : self._training.max_tokens], first

    def _nll(self, rows: Sequence[Rendered]) -> Tensor:
        """Summed negative log-likelihood (nats) of each row's loss tokens: (rows,)."""
        lengths = [min(row.length, self._training.max_tokens) for row in rows]
        # Where the prompt carries loss, its tokens count once for each row and nothing can be shared.
        shared = common_prefix([row.prompt for row in rows]) if self._training.loss_on == "completion" and len(rows) > 1 else 0
        ids = rows[0].prompt[:shared] + [token for row, length in zip(rows, lengths, strict=True) for token in (row.prompt + row.answer)[shared:length]]
        positions = [*range(shared), *(position for length in lengths for position in range(shared, length))]
        decoder = self._model.get_base_model()
        hidden = decoder.model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            row_lengths=[shared, *(length - shared for length in lengths)],
        ).last_hidden_state[0]
        sums, start = [], shared
        for row, length in zip(rows, lengths, strict=True):
            targets, first = self._targets(row)
            # The state at a position predicts the token after it.
            before = start + first - 1 - shared
            states = hidden[before : before + len(targets)]
            wanted = torch.tensor(targets, device=self._device)
            sums.append(SummedCrossEntropy.apply(states, decoder.lm_head.weight, wanted))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            start += length - shared
        return torch.stack(sums)


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each prompt is left to itself."""
    most = min(len(prompt) for prompt in prompts) - 1
    return next((index for index in range(most) if len({prompt[index] for prompt in prompts}) > 1), most)


def micro_batches(rows: Sequence[Rendered], budget: int) -> Iterator[list[Rendered]]:
    """The rows in order, in runs of at most `budget` tokens."""
    run: list[Rendered] = []
    for row in rows:
        if run and sum(item.length for item in run) + row.length > budget:
            yield run
            run = []
        run.append(row)
    if run:
        yield run
