"""Cells by TRL's SFTTrainer, over a PEFT model (`trl`) or over unsloth's (`unsloth`): padded micro-batches of 2 rows.

What makes them the same as `packed`: rows rendered by us and in our order, the loss on the tokens that the study says and
normalised over the whole global batch, the adapter's first weights, and weights in fp32 however the base is kept.
A checkpoint is the folder that the trainer writes itself: adapter, optimizer, schedule, random state, place in the data.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.study import Training
from pipeline.training import CellWork, Trained, Watch, batches
from pipeline.training.rendering import Rendered, render

MICRO_BATCH_ROWS = 2
"""Of Infantino 2024, where the batch divides by it."""
IGNORED = -100
LOG_FILE = "datadose_log.json"
NEEDED = {"trl": ("trl==1.14.2", "peft", "bitsandbytes"), "unsloth": ("unsloth",)}


class SFTTrainers:
    group = None

    def __init__(self, name: str, base: Path, training: Training, precision: str) -> None:
        if missing := [package for package in NEEDED[name] if importlib.util.find_spec(package.partition("=")[0]) is None]:
            raise UserError(
                f"trainer {name!r} wants {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}, or set DATADOSE_TRAINER=packed"
            )
        self.name, self._base, self._training, self._precision = name, base, training, precision
        if name == "unsloth":
            os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
            importlib.import_module("unsloth")  # before transformers, peft and trl, which it rewrites

    def run(self, cells: Iterable[CellWork], watch: Watch) -> Iterator[tuple[CellWork, Trained | Exception]]:
        for work in cells:
            try:
                yield work, self._train(work, watch)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this cell's alone
                yield work, error

    def _train(self, work: CellWork, watch: Watch) -> Trained:
        from peft.tuners.lora import LoraLayer
        from torch import manual_seed
        from trl import SFTTrainer

        from pipeline.training.packed import save_adapter

        started = time.perf_counter()
        model, tokenizer = self._load()
        rendered = [render(tokenizer, self._training, row) for row in work.rows]
        order = batches(len(rendered), work.steps, self._training.global_batch, work.seed)
        stream = [rendered[index] for batch in order for index in batch]
        with tempfile.TemporaryDirectory() as scratch:
            log = _Log(work.key, order, rendered, watch)
            if work.steps:
                state = watch.restore(work.key)
                trainer = SFTTrainer(
                    model, self._settings(work, scratch), train_dataset=_dataset(stream), processing_class=tokenizer, callbacks=[log.callback()]
                )
                model = trainer.model
            for parameter in model.parameters():  # TRL halves the adapter's precision over a quantized base
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            manual_seed(work.seed)
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    layer.reset_lora_parameters("default", init_lora_weights=True)
            if work.steps:
                resumed = _unpacked(state, Path(scratch)) if state else None
                if resumed:
                    log.entries = json.loads((Path(resumed) / LOG_FILE).read_text())
                trainer.train(resume_from_checkpoint=resumed)
                if log.failure is not None:
                    raise log.failure
            heldout = list(self._score(model, tokenizer, work))
        save_adapter(model, work.folder)
        return Trained(work.folder, log.entries, heldout, sum(row.cut for row in rendered), time.perf_counter() - started)

    def _load(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoTokenizer

        from pipeline.training.packed import peft_model

        training, device = self._training, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(self._base)
        if self.name == "trl":
            return peft_model(self._base, training, self._precision, device, "sdpa"), tokenizer
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(self._base), max_seq_length=training.max_tokens, dtype=getattr(torch, self._precision),
            load_in_4bit=training.quantization == "nf4",
        )  # fmt: skip
        model = FastLanguageModel.get_peft_model(
            model, r=training.rank, lora_alpha=training.alpha, lora_dropout=0, bias="none", target_modules=list(training.targets),
            layers_to_transform=None if training.layers is None else list(training.layers), use_gradient_checkpointing="unsloth",
        )  # fmt: skip
        return model, tokenizer

    def _settings(self, work: CellWork, folder: str) -> Any:
        import torch
        from trl import SFTConfig

        training, on_gpu = self._training, torch.cuda.is_available()
        rows = MICRO_BATCH_ROWS if training.global_batch % MICRO_BATCH_ROWS == 0 else 1
        return SFTConfig(
            output_dir=folder, max_steps=work.steps, per_device_train_batch_size=rows, gradient_accumulation_steps=training.global_batch // rows,
            learning_rate=training.learning_rate, warmup_steps=training.warmup_steps, weight_decay=training.weight_decay,
            lr_scheduler_type={"linear": "linear", "constant": "constant_with_warmup"}[training.schedule],
            optim={"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}[training.optimizer], max_grad_norm=training.max_grad_norm,
            max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential", seed=work.seed,
            bf16=self._precision == "bfloat16", use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, gradient_checkpointing=on_gpu,
            logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip

    def _score(self, model: Any, tokenizer: Any, work: CellWork) -> Iterator[dict[str, Any]]:
        import torch

        model.eval()
        with torch.no_grad():
            for item in work.heldout:
                row = render(tokenizer, self._training, item)
                ids, labels = (torch.tensor([values], device=model.device) for values in (row.ids, _labels(row)))
                count = len(row.targets)
                nll = model(input_ids=ids, labels=labels).loss.item() * count if count else 0.0  # the mean over what is not ignored
                yield {"row_id": row.row_id, "nll": nll, "tokens": count, "prompt_ids": row.prompt}


def _labels(row: Rendered) -> list[int]:
    return [IGNORED] * min(row.first, len(row.ids)) + row.targets


def _dataset(rows: list[Rendered]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": row.ids, "labels": _labels(row)} for row in rows])


class _Log:
    """What the trainer tells, as rows of schemas.TRAIN_LOG, and its checkpoints for whoever looks on."""

    def __init__(self, key: str, order: list[list[int]], rows: list[Rendered], watch: Watch) -> None:
        self._key, self._order, self._rows, self._watch = key, order, rows, watch
        self.entries: list[dict[str, Any]] = []
        self.failure: Exception | None = None

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        from pipeline.training.packed import memory_bytes

        log, device = self, torch.device("cuda" if torch.cuda.is_available() else "cpu")

        class Callback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.started = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seconds = time.perf_counter() - self.started

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
                if "grad_norm" not in logs:  # the summary at the end
                    return
                batch = [log._rows[index] for index in log._order[state.global_step - 1]]
                log.entries.append({
                    "step": state.global_step, "loss": logs["loss"], "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"],
                    "tokens": sum(len(row.ids) for row in batch), "loss_tokens": sum(len(row.targets) for row in batch),
                    "seconds": self.seconds, "memory_bytes": memory_bytes(device),
                })  # fmt: skip
                control.should_save = log._told(log.entries[-1], state.max_steps)
                control.should_training_stop |= log.failure is not None

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                (folder / LOG_FILE).write_text(json.dumps(log.entries))
                log._watch.save(log._key, state.global_step, _packed(folder))

        return Callback()

    def _told(self, entry: dict[str, Any], steps: int) -> bool:
        """Tells of a step; whether a checkpoint is wanted."""
        if not (math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])):
            self.failure = FloatingPointError(f"step {entry['step']}: loss {entry['loss']}, gradient norm {entry['grad_norm']}; lower training.learning_rate")
            return False
        try:
            self._watch.step(self._key, entry)
            return entry["step"] < steps and self._watch.due(self._key)
        except Exception as error:  # noqa: BLE001  # as Watch says
            self.failure = error
            return False


def _packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, folder.name)
    return buffer.getvalue()


def _unpacked(state: bytes, scratch: Path) -> str | None:
    """The checkpoint's folder; None where it cannot be read, and the cell begins anew."""
    try:
        with tarfile.open(fileobj=io.BytesIO(state)) as archive:
            archive.extractall(scratch, filter="data")
            return str(scratch / archive.getnames()[0])
    except tarfile.TarError as error:
        logging.getLogger(__name__).warning("a checkpoint cannot be read (%s)", error)
        return None
