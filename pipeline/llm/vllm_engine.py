"""vLLM in process: one engine, one thread that steps it, requests that join and leave its batch at any time.

On a CPU the engine lives in this very process (one import instead of three: 24 s instead of 62 s to start, and
nothing is left behind when the process is killed). Known traps of vLLM 0.32 on a CPU that the settings here avoid:
seeded requests crash when a prompt is prefilled in chunks; top_p sorts the whole vocabulary for every token.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from pathlib import Path
from typing import Any

from pipeline.chat import prompt_ids
from pipeline.llm import Completion, Request
from pipeline.models import local_model
from pipeline.runtime import Runtime
from pipeline.study import ModelName

CONTEXT_TOKENS = 4096
"""Prompt and answer together, at most: the cache is made for it."""
BLOCK_TOKENS = 32
"""Of the key-value cache on a CPU, the least it takes: what prompts share is read to within a block (vLLM's own choice is 128)."""


def context_tokens(model: Path) -> int:
    """What the model in this folder can hold, CONTEXT_TOKENS at most."""
    from transformers import AutoConfig

    return min(CONTEXT_TOKENS, getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", CONTEXT_TOKENS))


class EngineDiedError(Exception):
    """The engine stopped; requests under way are lost and nothing of them was committed."""


class VllmModel:
    def __init__(self, model: ModelName, runtime: Runtime, precision: str, adapters: int, rank: int) -> None:
        on_cpu = not runtime.gpus_per_worker
        if on_cpu:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        from transformers import AutoTokenizer
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        path = local_model(model, runtime.cache_dir)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        context = context_tokens(path)
        arguments: dict[str, Any] = {
            "model": str(path), "dtype": precision, "max_model_len": context, "max_num_seqs": runtime.requests_in_flight,
            "enable_prefix_caching": True, "disable_log_stats": True,
        }  # fmt: skip
        if on_cpu:
            arguments |= {
                "distributed_executor_backend": "uni", "enforce_eager": True, "enable_chunked_prefill": False,
                "max_num_batched_tokens": context, "block_size": BLOCK_TOKENS, "kv_cache_memory_bytes": int(runtime.kv_cache_gib * 2**30),
            }  # fmt: skip
        if adapters:
            arguments |= {"enable_lora": True, "max_loras": adapters, "max_cpu_loras": adapters, "max_lora_rank": rank}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._inbox: queue.SimpleQueue[tuple[Request, asyncio.Future[Completion], asyncio.AbstractEventLoop] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vllm-steps", daemon=True)
        self._thread.start()

    async def complete(self, request: Request) -> Completion:
        if self._failure is not None:
            raise EngineDiedError(f"the engine stopped: {self._failure!r}") from self._failure
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        self._inbox.put((request, future, loop))
        return await future

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        waiting: dict[str, tuple[asyncio.Future[Completion], asyncio.AbstractEventLoop]] = {}
        count = 0
        try:
            while True:
                while not self._inbox.empty() or not waiting:
                    item = self._inbox.get()
                    if item is None:
                        return
                    request, future, loop = item
                    count += 1
                    waiting[str(count)] = (future, loop)
                    try:
                        self._add(str(count), request)
                    except ValueError as error:  # this request alone is bad, a prompt longer than the context for one
                        del waiting[str(count)]
                        loop.call_soon_threadsafe(_fail, future, error)
                for output in self._engine.step():
                    if output.finished:
                        future, loop = waiting.pop(output.request_id)
                        loop.call_soon_threadsafe(_succeed, future, _completion(output))
        except BaseException as error:
            self._failure = error
            for future, loop in waiting.values():
                loop.call_soon_threadsafe(_fail, future, EngineDiedError(f"the engine stopped: {error!r}"))
            raise

    def _add(self, request_id: str, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = request.sampling
        parameters = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty, seed=request.seed, stop=list(sampling.stop),
            max_tokens=sampling.max_tokens, output_kind=RequestOutputKind.FINAL_ONLY, prompt_logprobs=0 if request.prompt_logprobs else None,
            structured_outputs=StructuredOutputsParams(choice=list(request.choices)) if request.choices else None,
        )  # fmt: skip
        adapter = request.adapter
        lora = LoRARequest(adapter.name, adapter.number, str(adapter.path)) if adapter else None
        ids = prompt_ids(self._tokenizer, request.conversation)
        self._engine.add_request(request_id, {"prompt_token_ids": ids}, parameters, lora_request=lora)


def _completion(output: Any) -> Completion:
    (answer,) = output.outputs
    logprobs = None
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        logprobs = tuple(float(ranked[token].logprob) for token, ranked in pairs)
    return Completion(answer.text, str(answer.finish_reason), tuple(output.prompt_token_ids), len(answer.token_ids), logprobs)


def _succeed(future: asyncio.Future[Completion], completion: Completion) -> None:
    if not future.done():
        future.set_result(completion)


def _fail(future: asyncio.Future[Completion], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
