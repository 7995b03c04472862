"""Runtime: where and how fast. Nothing in it changes a published number, so nothing in it is hashed."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class Runtime(BaseModel):
    """Set from the environment: field `store` is DATADOSE_STORE, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = "./runs"
    """A folder, or s3://bucket/prefix (endpoint and keys as boto3 takes them)."""
    cache: Path = Path("~/.cache/datadose")
    """Converted models and downloaded adapters: safe to delete."""
    gpus_per_worker: float = Field(0.0, ge=0)
    answer_workers: PositiveInt = 1
    """Engines that write rows, answers and verdicts in parallel."""
    train_workers: PositiveInt = 1
    """Workers that train cells in parallel."""
    requests_in_flight: PositiveInt = 256
    """Requests that one engine works on at once."""
    kv_cache_gib: PositiveFloat = 3.0
    """Memory for keys and values of an engine on a CPU."""
    memory_gib: PositiveFloat = 6.0
    """What a study needs at its peak; checked before the start."""

    @property
    def cache_dir(self) -> Path:
        return self.cache.expanduser()
