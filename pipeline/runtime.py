"""Runtime: where and how fast. Nothing in it changes a published number, so nothing in it is hashed."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

from pipeline.errors import UserError

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.IGNORECASE)


def _listed(given: Any) -> Any:
    """`a, b` as the environment has it."""
    return tuple(part.strip() for part in given.split(",") if part.strip()) if isinstance(given, str) else given


class Runtime(BaseModel):
    """Set from the environment: field `store` is DATADOSE_STORE, and so on. It travels to workers and into logs: no secrets."""

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
    trainer: Literal["auto", "packed", "trl", "unsloth"] = "auto"
    """auto: unsloth on a GPU, packed on a CPU and wherever share_base or gang is more than 1."""
    share_base: PositiveInt = 1
    """Cells that a training worker trains at once over its one frozen base."""
    gang: int = Field(1, ge=1, le=8)
    """Training workers that may train one cell together, its global batch unchanged."""
    checkpoint_every_s: float = Field(120.0, ge=0)
    """Between two checkpoints of a cell: what a death of its worker loses at most."""
    track: Literal["none", "tensorboard", "mlflow", "wandb"] = "none"
    """Where else each step's loss, gradient norm, throughput and memory go."""
    track_to: str | None = None
    """TensorBoard: a folder; MLflow: a tracking URI; Weights & Biases: a project."""
    requests_in_flight: PositiveInt = 256
    """Requests that one engine works on at once."""
    kv_cache_gib: PositiveFloat = 2.0
    """Memory for keys and values of an engine on a CPU."""
    memory_gib: PositiveFloat = 6.0
    """What a study needs at its peak; checked before the start."""
    namespace: str | None = None
    """The Kubernetes namespace in which each stage of a study is a job of its own; without one, stages run in this process."""
    endpoint_url: str | None = None
    """Where `openai-compatible/...` models answer, up to and with the version: http://10.0.0.5:8000/v1."""
    endpoint_key_name: str = "OPENAI_API_KEY"
    """The environment variable that holds that endpoint's key; a name, never the key itself."""
    endpoint_key_file: Path | None = None
    """A mounted file that holds that endpoint's key, instead of a variable."""
    endpoint_timeout_s: PositiveFloat = 300.0
    """From a request's first byte to the last of its answer: a long answer of a busy server, and no more."""
    endpoint_attempts: PositiveInt = 8
    """Times that a row is asked for before it is quarantined; at the default backoff they span about a minute."""
    endpoint_backoff_s: PositiveFloat = 0.5
    """Longest wait before the second attempt where the endpoint names none; it doubles with each."""
    endpoint_wait_cap_s: PositiveFloat = 120.0
    """Longest wait between two attempts, whatever the endpoint asks for."""
    endpoint_batch: bool = False
    """Ask by the endpoint's Batch API: at a lower price, within a day."""
    endpoint_poll_s: PositiveFloat = 30.0
    """Between two looks at a batch."""
    network: Literal["open", "closed"] = "open"
    """closed: only loopback, the store, endpoint_url and allowed_hosts can be reached from Python (pipeline.network)."""
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Names, addresses or networks (10.0.0.0/8), separated by commas."""

    @field_validator("endpoint_url")
    @classmethod
    def _plain_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if set("@?#") & set(url):
            # Not a ValueError: whoever explains one shows what was given, and here that is a secret.
            raise UserError("endpoint_url: given with user, password or query, wanted without; the key comes from endpoint_key_name or endpoint_key_file")
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError("wanted an address like https://host/v1")
        return url.rstrip("/")

    @field_validator("endpoint_key_name")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):  # a key given by mistake has small letters or dashes
            raise UserError("endpoint_key_name: wanted the name of an environment variable in capitals, e.g. OPENAI_API_KEY, not a key")
        return name

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            try:
                ipaddress.ip_network(host, strict=False)
            except ValueError:
                if not _HOST.fullmatch(host):
                    raise ValueError(f"{host!r} is neither a host's name nor an address nor a network: no scheme, port or path") from None
        return hosts

    @property
    def cache_dir(self) -> Path:
        return self.cache.expanduser()
