"""Cells over one frozen base, nothing padded: rows lie end to end, attention stays inside each row.

With more than one slot, each step takes one global batch from each cell that is under way: one forward and one backward
pass over the rows of all, each row's LoRA delta from its own cell. A cell that ends makes room for the next. All else is
the cell's own: loss normalisation, clipping, schedule, optimizer state, data order, seed, checkpoints and log.

What all rows of a cell's micro-batch begin with (the template's head and the task's instruction) is computed once and
attended to by each: the same sums, a sixth fewer tokens on the laptop study.

Per optimizer step the loss is the mean over all loss tokens of the global batch, however the batch is split into
micro-batches or over devices. Logits are made only where there is loss, in chunks, and their gradient in the same pass.
Nothing is drawn at random after the adapter's first weights, and `batches` gives the rows of a step from seed and step
alone: weights, optimizer state and the number of steps are all that a checkpoint needs.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pipeline.training import CellWork, Trained, Watch, batches, learning_rate
from pipeline.training.lora import Adapters
from pipeline.training.rendering import Rendered, common_prefix, micro_batches, render

if TYPE_CHECKING:
    from pipeline.study import Training

MICRO_BATCH_TOKENS = 8192
"""Tokens of one forward and backward pass at most; a row longer than that stands alone."""
CPU_MICRO_BATCH_TOKENS = 2048
"""The same on a CPU, whose matrix products gain nothing from more: SmolLM2-135M keeps 1.4 MB of activations for each token."""
LOGIT_ROWS = 512
"""Rows of logits at once: 512 x 49,152 in fp32 are 96 MiB."""
RECOMPUTE_BELOW = 2048
"""Tokens of a pass under which a device is no longer busy: then activations are computed twice before passes get shorter."""


def packed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any) -> tuple[Tensor, None]:
    """Causal attention of each row with the beginning that its group shares and itself: query (1, heads, tokens, dim).

    `row_lengths`: for each group the length of its shared beginning, which may be 0, then of each of its rows.
    `row_masks`: for each row of a group that shares one, what is added to its scores.
    """
    settings: dict[str, Any] = {"scale": kwargs.get("scaling"), "enable_gqa": True}
    groups, masks = kwargs["row_lengths"], iter(kwargs["row_masks"])
    flat = [length for group in groups for length in group]
    pieces = zip(*(torch.split(whole, flat, 2) for whole in (query, key, value)), strict=True)
    done = []
    for shared, *lengths in groups:
        first, first_key, first_value = next(pieces)
        if shared:
            done.append(functional.scaled_dot_product_attention(first, first_key, first_value, is_causal=True, **settings))
        for q, k, v in itertools.islice(pieces, len(lengths)):
            if shared:
                k, v = torch.cat([first_key, k], 2), torch.cat([first_value, v], 2)
                done.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=next(masks), **settings))
            else:
                done.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
    return torch.cat(done, 2).transpose(1, 2).contiguous(), None


def row_masks(groups: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of each row (tokens, shared + tokens): 0 where it may look and -inf ahead of it. Made once, not in every layer."""
    return [
        torch.full((length, shared + length), float("-inf"), dtype=dtype, device=device).triu_(shared + 1)
        for shared, *lengths in groups
        if shared
        for length in lengths
    ]


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


class TokenNll(torch.autograd.Function):
    """-log softmax(hidden W^T)[target] of each token, W frozen: (tokens,). hidden (tokens, width), W (vocabulary, width).

    The gradient for hidden, (softmax - onehot) W, is made with the loss, so no logits are kept or computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits, wanted = functional.linear(hidden[part], weight).float(), targets[part, None]
            normalizer = logits.logsumexp(-1, keepdim=True)
            losses[part] = (normalizer - logits.gather(-1, wanted))[:, 0]
            if gradient is not None:
                slope = logits.sub_(normalizer).exp_()
                slope.scatter_add_(-1, wanted, slope.new_full((1, 1), -1.0).expand_as(wanted))
                torch.mm(slope.to(weight.dtype), weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None


@dataclass(eq=False)
class Running:
    """A cell under way in a slot."""

    work: CellWork
    slot: int
    rows: list[Rendered]
    order: list[list[int]]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def batch(self) -> list[Rendered]:
        return [self.rows[index] for index in self.order[self.step]]


class PackedTrainer:
    """slots: cells that are trained at once.

    group: the torch process group of the devices that are to train the same cells together, each its part of every global
    batch. They hold the same weights; the first of them alone looks at held-out rows, saves, and has somebody look on.
    """

    name = "packed"

    def __init__(self, base: Path, training: Training, precision: str, slots: int = 1) -> None:
        self._training, self.group = training, None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = peft_model(base, training, precision, self._device, "packed")
        self._adapters = Adapters(self._model, slots)
        self._model.eval()  # no dropout anywhere: training and evaluation are the same function
        self._budget = min(MICRO_BATCH_TOKENS, CPU_MICRO_BATCH_TOKENS) if self._device.type == "cpu" else MICRO_BATCH_TOKENS

    def recompute(self) -> None:
        """From now on keep a layer's input only, and compute its activations a second time for the backward pass."""
        self._model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        self._model.train()  # transformers recomputes in training mode only; there is no dropout

    def run(self, cells: Iterable[CellWork], watch: Watch) -> Iterator[tuple[CellWork, Trained | Exception]]:
        waiting, running = iter(cells), list[Running]()
        free = list(range(len(self._adapters.weights)))
        while True:
            while free and (work := next(waiting, None)) is not None:
                try:
                    running.append(self._begin(work, free[0], watch))
                    free.pop(0)
                except Exception as error:  # noqa: BLE001  # whatever it is, it is this cell's alone
                    yield work, error
            if not running:
                return
            under_way = [cell for cell in running if cell.step < len(cell.order)]
            outcomes = self._advance(under_way, watch) if under_way else {}
            for cell in list(running):
                if cell not in outcomes and cell.step < len(cell.order):
                    continue
                running.remove(cell)
                free.append(cell.slot)
                yield cell.work, outcomes.get(cell) or self._finish(cell)

    def _begin(self, work: CellWork, slot: int, watch: Watch) -> Running:
        started = time.perf_counter()
        self._adapters.reset(slot, work.seed)
        rendered = [render(self._tokenizer, self._training, row) for row in work.rows]
        order = batches(len(rendered), work.steps, self._training.global_batch, work.seed)
        cell = Running(work, slot, rendered, order, self._optimizer(slot))
        if state := self._told(watch.restore(work.key) if self._leads else None):
            self._restore(cell, state)
        cell.seconds += time.perf_counter() - started
        return cell

    @property
    def _leads(self) -> bool:
        return self.group is None or self.group.rank() == 0

    def _told(self, value: bytes | None) -> bytes | None:
        """What the first device of the group has."""
        if self.group is None:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def _optimizer(self, slot: int) -> torch.optim.Optimizer:
        weights = torch.nn.Parameter(self._adapters.weights[slot])
        weights.grad = self._adapters.gradients[slot]
        if self._training.optimizer == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            optimizer: torch.optim.Optimizer = AdamW8bit([weights], weight_decay=self._training.weight_decay)
            return optimizer
        return torch.optim.AdamW([weights], weight_decay=self._training.weight_decay, fused=True)

    def _state(self, cell: Running) -> bytes:
        buffer = io.BytesIO()
        kept = {"step": cell.step, "seconds": cell.seconds, "log": cell.log, "optimizer": cell.optimizer.state_dict()}
        torch.save(kept | {"weights": self._adapters.weights[cell.slot].clone()}, buffer)  # a view would be saved with all slots
        return buffer.getvalue()

    def _restore(self, cell: Running, state: bytes) -> None:
        """A state that cannot be read is as none: the cell begins anew, and ends the same."""
        try:
            kept = torch.load(io.BytesIO(state), map_location=self._device, weights_only=True)
            weights, step, seconds, log = kept["weights"], kept["step"], kept["seconds"], kept["log"]
            cell.optimizer.load_state_dict(kept["optimizer"])
        except Exception as error:  # noqa: BLE001  # an unpickler of torn bytes raises whatever it stumbles over
            logging.getLogger(__name__).warning("%s begins anew: its checkpoint cannot be read (%s)", cell.work.key, error)
            return
        self._adapters.weights[cell.slot] = weights
        cell.step, cell.seconds, cell.log = step, seconds, log

    def _advance(self, cells: list[Running], watch: Watch) -> dict[Running, Exception]:
        """One step of each cell; those that end with an exception."""
        started, training = time.perf_counter(), self._training
        loss_tokens = [sum(len(row.targets) for row in cell.batch) for cell in cells]
        losses = self._pass(cells, loss_tokens)
        norms = [torch.linalg.vector_norm(self._adapters.gradients[cell.slot]) for cell in cells]
        found = list(zip(cells, loss_tokens, losses.tolist(), torch.stack(norms).tolist(), strict=True))
        tokens = {cell: sum(len(row.ids) for row in cell.batch) for cell in cells}
        ended: dict[Running, Exception] = {}
        for cell, counted, loss, norm in found:
            rate = learning_rate(cell.step, cell.work.steps, training.learning_rate, training.schedule, training.warmup_steps)
            cell.step += 1
            if not (math.isfinite(loss) and math.isfinite(norm)):
                ended[cell] = FloatingPointError(f"step {cell.step}: loss {loss}, gradient norm {norm}; lower training.learning_rate")
            else:
                self._update(cell, rate, norm)
            self._adapters.gradients[cell.slot].zero_()
            cell.log.append({
                "step": cell.step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens[cell], "loss_tokens": counted,
            })  # fmt: skip
        seconds, memory = time.perf_counter() - started, memory_bytes(self._device)
        for cell in cells:
            share = seconds * tokens[cell] / sum(tokens.values())
            cell.seconds += share
            cell.log[-1] |= {"seconds": share, "memory_bytes": memory}
            if cell in ended or not self._leads:
                continue
            try:
                watch.step(cell.work.key, cell.log[-1])
                if cell.step < len(cell.order) and watch.due(cell.work.key):
                    watch.save(cell.work.key, cell.step, self._state(cell))
            except Exception as error:
                if self.group is not None:  # the others would wait for the first
                    raise
                ended[cell] = error
        return ended

    def _update(self, cell: Running, rate: float, norm: float) -> None:
        for group in cell.optimizer.param_groups:
            group["lr"] = rate
        if (factor := self._training.max_grad_norm / (norm + 1e-6)) < 1:  # as torch.nn.utils.clip_grad_norm_
            self._adapters.gradients[cell.slot].mul_(factor)
        cell.optimizer.step()

    def _pass(self, cells: list[Running], loss_tokens: list[int]) -> Tensor:
        """Fill the gradients of one step; the loss of each cell: (cells,). Where memory runs out, passes get shorter for good."""
        while True:
            try:
                return self._try_pass(cells, loss_tokens)
            except torch.OutOfMemoryError:
                longest = max(len(row.ids) for cell in cells for row in cell.batch)
                if self._budget <= RECOMPUTE_BELOW and not self._model.get_base_model().is_gradient_checkpointing:
                    self.recompute()
                elif self._budget > longest:
                    self._budget = max(longest, self._budget // 2)
                else:
                    raise
            for cell in cells:  # outside of the handler, whose exception holds the activations
                self._adapters.gradients[cell.slot].zero_()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _try_pass(self, cells: list[Running], loss_tokens: list[int]) -> Tensor:
        losses = torch.zeros(len(cells), device=self._device)
        place = {cell: index for index, cell in enumerate(cells)}
        rank, size = (self.group.rank(), self.group.size()) if self.group is not None else (0, 1)
        mine = [(cell, row) for cell in cells for row in cell.batch[rank::size]]
        for micro in micro_batches(mine, self._budget):
            nll = self._nll([(cell.slot, rows) for cell, rows in micro])
            counts = torch.tensor([sum(len(row.targets) for row in rows) for _, rows in micro], device=self._device)
            owners = torch.tensor([place[cell] for cell, _ in micro], device=self._device).repeat_interleave(counts)
            weights = (1 / torch.tensor(loss_tokens, device=self._device))[owners]
            nll.backward(weights)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            losses.index_add_(0, owners, nll.detach() * weights)
        if size > 1:
            for cell in cells:
                torch.distributed.all_reduce(self._adapters.gradients[cell.slot], group=self.group)
            torch.distributed.all_reduce(losses, group=self.group)
        return losses

    def _finish(self, cell: Running) -> Trained | Exception:
        started = time.perf_counter()
        try:
            heldout = list(self._score(cell)) if self._leads else []
            if self._leads:
                self._adapters.hand_over(cell.slot)
                save_adapter(self._model, cell.work.folder)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this cell's alone
            return error
        seconds = cell.seconds + time.perf_counter() - started
        return Trained(cell.work.folder, cell.log, heldout, sum(row.cut for row in cell.rows), seconds)

    @torch.no_grad()
    def _score(self, cell: Running) -> Iterator[dict[str, Any]]:
        rendered = [(cell, render(self._tokenizer, self._training, row)) for row in cell.work.heldout]
        for ((_, rows),) in micro_batches(rendered, self._budget):
            parts = torch.split(self._nll([(cell.slot, rows)]), [len(row.targets) for row in rows])
            for row, nll in zip(rows, parts, strict=True):
                yield {"row_id": row.row_id, "nll": nll.sum().item(), "tokens": len(row.targets), "prompt_ids": row.prompt}

    def _nll(self, groups: Sequence[tuple[int, list[Rendered]]]) -> Tensor:
        """Negative log-likelihood (nats) of each loss token of each row, in order: (tokens,). groups: slots with their rows."""
        ids, positions, targets, before = list[int](), list[int](), list[int](), list[int]()
        lengths, segments = [], []
        for slot, rows in groups:
            start = len(ids)
            # Where the prompt carries loss, its tokens count once for each row and nothing can be shared.
            shared = common_prefix(rows) if self._training.loss_on == "completion" and len(rows) > 1 else 0
            ids += rows[0].ids[:shared]
            positions += range(shared)
            for row in rows:
                # The state at a position predicts the token after it.
                offset = len(ids) - shared - 1
                before += range(offset + row.first, offset + len(row.ids))
                targets += row.targets
                ids += row.ids[shared:]
                positions += range(shared, len(row.ids))
            lengths.append([shared, *(len(row.ids) - shared for row in rows)])
            segments.append((slot, start, len(ids)))
        self._adapters.segments = segments
        decoder = self._model.get_base_model()
        hidden = decoder.model(
            input_ids=torch.tensor([ids], device=self._device), position_ids=torch.tensor([positions], device=self._device), use_cache=False,
            row_lengths=lengths, row_masks=row_masks(lengths, decoder.dtype, self._device),
        ).last_hidden_state[0]  # fmt: skip
        states = hidden.index_select(0, torch.tensor(before, device=self._device, dtype=torch.long))
        wanted = torch.tensor(targets, device=self._device, dtype=torch.long)
        return TokenNll.apply(states, decoder.lm_head.weight, wanted)  # type: ignore[no-any-return, no-untyped-call]


def peft_model(base: Path, training: Training, precision: str, device: torch.device, attention: str) -> Any:
    """The frozen base with a fresh adapter, nothing loaded twice."""
    dtype = getattr(torch, precision)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=quantized if training.quantization == "nf4" else None,
        device_map={"": device},
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
    return get_peft_model(model, lora)


def save_adapter(model: Any, folder: Path) -> None:
    """As PEFT does, the same bytes in every process: it keeps the targets as a set."""
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": sorted(config["target_modules"])}, indent=2, sort_keys=True))


def memory_bytes(device: torch.device) -> int:
    """At the peak so far on a GPU, now on a CPU."""
    return int(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss)
