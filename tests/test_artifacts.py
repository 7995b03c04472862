"""The store's contract on a folder, on moto and on a real S3 server; commits that are whole or not there; fingerprints."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import random
import string
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import (
    FolderStore,
    NotFoundError,
    S3Store,
    Step,
    Store,
    commit,
    digest,
    done_keys,
    open_store,
    read_manifest,
    read_object,
    read_table,
    read_tables,
)
from pipeline.errors import UserError
from tests.conftest import FOLDER, MOTO, VERSITYGW

fast = pytest.mark.fast
on_s3 = pytest.mark.parametrize("store", [MOTO, VERSITYGW], indirect=True)
# moto looks whether the key is there and then writes it, so of two threads both may win: a fault of the double alone.
on_atomic = pytest.mark.parametrize("store", [FOLDER, VERSITYGW], indirect=True)
on_folder = pytest.mark.parametrize("store", [FOLDER], indirect=True)


def a_step(name: str = "n00008", *inputs: Step, **config: Any) -> Step:
    return Step("subset", name, config or {"size": 8}, inputs)


def together(count: int, call: Callable[[int], Any]) -> list[Any]:
    """The results of `count` calls that start at the same moment."""
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


# ---------------------------------------------------------------- the store


def test_read_of_missing_key_raises_not_found(store: Store):
    with pytest.raises(NotFoundError):
        store.read("manifests/train/none.json")


@pytest.mark.parametrize("data", [b"", b"\x00\xff\n", bytes(range(256)) * 8192], ids=["empty", "binary", "2MiB"])
def test_create_on_free_key_returns_true_and_stores_bytes(store: Store, data: bytes):
    assert store.create("manifests/train/a.json", data) is True
    assert store.read("manifests/train/a.json") == data


def test_create_on_existing_key_returns_false_and_keeps_bytes(store: Store):
    store.create("a/b.json", b"first")
    assert store.create("a/b.json", b"second") is False
    assert store.read("a/b.json") == b"first"


def test_create_on_replaced_key_returns_false_and_keeps_bytes(store: Store):
    store.replace("a/b.json", b"first")
    assert store.create("a/b.json", b"second") is False
    assert store.read("a/b.json") == b"first"


def test_create_on_deleted_key_returns_true(store: Store):
    store.create("a/b.json", b"first")
    store.delete("a/b.json")
    assert store.create("a/b.json", b"second") is True
    assert store.read("a/b.json") == b"second"


@on_atomic
def test_create_by_sixteen_threads_has_one_winner_whose_bytes_stay(store: Store):
    for attempt in range(5):
        key = f"manifests/train/{attempt}.json"
        won = together(16, lambda index, key=key: store.create(key, f"thread {index}".encode() * 100))
        assert won.count(True) == 1
        assert store.read(key) == f"thread {won.index(True)}".encode() * 100


def test_replace_of_existing_key_stores_the_new_bytes(store: Store):
    store.replace("a/b", b"old and long")
    store.replace("a/b", b"new")
    assert store.read("a/b") == b"new"


def test_replace_with_a_file_stores_its_bytes(store: Store, tmp_path: Path):
    source = tmp_path / "adapter.safetensors"
    source.write_bytes(os.urandom(3 << 20))
    store.replace("objects/train/adapter.safetensors", source)
    assert store.read("objects/train/adapter.safetensors") == source.read_bytes()


@on_folder
def test_replace_with_a_missing_file_writes_nothing(store: Store, tmp_path: Path):
    with pytest.raises((UserError, FileNotFoundError)):
        store.replace("objects/a", tmp_path / "none")
    assert list(store.list("")) == []


def test_list_returns_exactly_the_keys_of_a_folder(store: Store):
    keys = {"manifests/train/a.json", "manifests/train/b.json", "manifests/judge/a.json", "objects/train/a/x/log.parquet"}
    for key in keys:
        store.create(key, b"x")
    assert set(store.list("manifests/")) == {key for key in keys if key.startswith("manifests/")}
    assert set(store.list("manifests/train/")) == {"manifests/train/a.json", "manifests/train/b.json"}
    assert set(store.list("objects/train/a/")) == {"objects/train/a/x/log.parquet"}
    assert set(store.list("")) == keys


def test_list_with_the_beginning_of_a_name_returns_keys_that_begin_so(store: Store):
    for key in ("events/laptop/1.jsonl", "events/laptop/12.jsonl", "events/laptop/2.jsonl"):
        store.create(key, b"x")
    assert set(store.list("events/laptop/1")) == {"events/laptop/1.jsonl", "events/laptop/12.jsonl"}


def test_list_under_an_unused_prefix_is_empty(store: Store):
    store.create("a/b", b"x")
    assert list(store.list("manifests/")) == []


@pytest.mark.parametrize("store", [MOTO], indirect=True)
def test_list_of_more_keys_than_one_page_returns_all(store: Store):
    keys = {f"manifests/train/{index:04d}.json" for index in range(1001)}  # S3 answers 1,000 at a time
    for key in keys:
        store.replace(key, b"")
    assert set(store.list("manifests/")) == keys


def test_delete_removes_the_key_and_nothing_else(store: Store):
    store.create("a/b", b"x")
    store.create("a/c", b"y")
    store.delete("a/b")
    assert list(store.list("")) == ["a/c"]
    with pytest.raises(NotFoundError):
        store.read("a/b")


def test_delete_of_missing_key_does_nothing(store: Store):
    store.delete("a/b")
    assert list(store.list("")) == []


def test_path_is_a_local_file_with_the_bytes_also_the_second_time(store: Store, tmp_path: Path):
    store.create("objects/train/a/1f/adapter.bin", b"weights")
    for _ in range(2):
        assert store.path("objects/train/a/1f/adapter.bin", tmp_path / "cache").read_bytes() == b"weights"


def test_stores_at_two_prefixes_do_not_see_each_other(store: Store):
    one, other = open_store(f"{store.uri}/one"), open_store(f"{store.uri}/other")
    one.create("a", b"1")
    assert other.create("a", b"2") is True
    assert (one.read("a"), other.read("a")) == (b"1", b"2")
    assert list(one.list("")) == ["a"]


def test_two_openings_of_one_store_see_the_same(store: Store):
    store.create("a", b"1")
    again = open_store(f"{store.uri}/")
    assert again.read("a") == b"1"
    assert again.create("a", b"2") is False


@fast
def test_s3_address_without_bucket_raises_user_error():
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        open_store("s3://")


@on_folder
@pytest.mark.parametrize("key", ["../out", "a/../../out", "a/..", "..", ".", ""])
def test_key_that_leaves_the_folder_is_refused(store: Store, tmp_path: Path, key: str):
    for call in (lambda: store.create(key, b"x"), lambda: store.replace(key, b"x"), lambda: store.read(key), lambda: store.delete(key)):
        with pytest.raises(ValueError, match="leaves"):
            call()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@on_folder
def test_absolute_key_is_refused(store: Store, tmp_path: Path):
    with pytest.raises(ValueError, match="leaves"):
        store.create(str(tmp_path / "out"), b"x")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- a folder that cannot be written


@on_folder
@pytest.mark.parametrize("write", ["create", "replace", "replace_file"])
def test_full_disk_raises_user_error_and_leaves_nothing_half_written(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str):
    source = tmp_path / "source"
    source.write_bytes(b"y" * 1000)
    store.replace("objects/kept", b"kept")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    calls = {
        "create": lambda: store.create("objects/new", b"x"),
        "replace": lambda: store.replace("objects/kept", b"x"),
        "replace_file": lambda: store.replace("objects/kept", source),
    }
    with pytest.raises(UserError, match="No space left"):
        calls[write]()
    assert store.read("objects/kept") == b"kept"
    assert [path.name for path in Path(store.uri).rglob("*") if path.is_file()] == ["kept"]


@on_folder
def test_full_disk_during_a_commit_leaves_the_step_undone_and_a_rerun_commits(store: Store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(UserError, match="run again"):
            commit(store, a_step(), {"subset.bin": b"x"})
    assert done_keys(store) == set()
    commit(store, a_step(), {"subset.bin": b"x"})
    assert done_keys(store) == {a_step().key}


@fast
def test_store_below_a_file_raises_user_error_that_names_the_setting(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="DATADOSE_STORE"):
        open_store(str(tmp_path / "file" / "store"))


@fast
def test_store_in_a_folder_without_permission_raises_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", denied)  # tests may run as root, whom no mode stops
    with pytest.raises(UserError, match="Permission denied"):
        open_store(str(tmp_path / "store"))


@on_folder
def test_write_without_permission_raises_user_error_that_names_the_key(store: Store, monkeypatch: pytest.MonkeyPatch):
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(UserError, match=r"objects/new.*Permission denied"):
        store.create("objects/new", b"x")


@on_folder
def test_write_where_a_file_stands_in_place_of_a_folder_raises_user_error(store: Store):
    store.create("objects", b"a file")
    with pytest.raises(UserError, match="objects/new"):
        store.create("objects/new", b"x")


@on_folder
def test_leftover_of_a_killed_write_is_not_listed_and_does_not_block_the_key(store: Store, monkeypatch: pytest.MonkeyPatch):
    class KilledError(BaseException):
        """What no `except OSError` sees, as a kill."""

    def killed(descriptor: int) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KilledError):
            store.create("manifests/train/a.json", b"x")
    assert [path for path in Path(store.uri).rglob("*") if path.is_file()]  # the kill did leave something
    assert list(store.list("")) == []
    assert store.create("manifests/train/a.json", b"y") is True
    assert list(store.list("")) == ["manifests/train/a.json"]


# ---------------------------------------------------------------- answers that S3 loses


class Wrapped:
    """A client or store with one method exchanged."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner, self._methods = inner, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._inner, name)


def with_put(store: Store, put: Callable[..., Any]) -> S3Store:
    """The same store over a client whose put_object is `put(client, **arguments)`."""
    import boto3

    client = boto3.client("s3")
    return S3Store(store.uri, Wrapped(client, put_object=lambda **arguments: put(client, **arguments)))


def sent_twice(client: Any, **arguments: Any) -> Any:
    """boto3's retry after the answer to the first request was lost on its way."""
    client.put_object(**arguments)
    return client.put_object(**arguments)


def failing(status: int, code: str, times: int) -> Callable[..., Any]:
    from botocore.exceptions import ClientError

    left = [None] * times

    def put(client: Any, **arguments: Any) -> Any:
        if left:
            left.pop()
            raise ClientError({"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
        return client.put_object(**arguments)

    return put


@on_s3
def test_create_whose_answer_was_lost_returns_true(store: Store):
    assert with_put(store, sent_twice).create("a", b"mine") is True
    assert store.read("a") == b"mine"


@on_s3
def test_create_whose_answer_was_lost_after_another_won_returns_false(store: Store):
    store.create("a", b"theirs")
    assert with_put(store, sent_twice).create("a", b"mine") is False
    assert store.read("a") == b"theirs"


@on_s3
def test_commit_whose_manifest_answer_was_lost_keeps_its_own_objects(store: Store):
    def put(client: Any, **arguments: Any) -> Any:
        return sent_twice(client, **arguments) if "IfNoneMatch" in arguments else client.put_object(**arguments)

    manifest = commit(with_put(store, put), a_step(), {"x": b"mine"})
    assert read_manifest(store, a_step()) == manifest
    assert read_object(store, a_step(), "x") == b"mine"


@on_s3
def test_create_that_met_another_conditional_put_is_sent_again(store: Store):
    assert with_put(store, failing(409, "ConditionalRequestConflict", 3)).create("a", b"mine") is True
    assert store.read("a") == b"mine"


@on_s3
def test_create_that_met_another_put_and_lost_returns_false(store: Store):
    store.create("a", b"theirs")
    assert with_put(store, failing(409, "ConditionalRequestConflict", 1)).create("a", b"mine") is False


@on_s3
def test_create_that_is_not_allowed_raises_and_writes_nothing(store: Store):
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError, match="AccessDenied"):
        with_put(store, failing(403, "AccessDenied", 1)).create("a", b"mine")
    assert list(store.list("")) == []


# ---------------------------------------------------------------- commits


class DeadError(Exception):
    """The process died here."""


def dies(*_: Any) -> bool:
    raise DeadError


def test_committed_step_is_done_and_gives_back_table_bytes_and_file(store: Store, tmp_path: Path):
    table = pa.table({"row_id": ["a", "b"], "loss": [0.5, 0.25]})
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * 5000)
    manifest = commit(store, a_step(), {"log.parquet": table, "note.txt": b"hello", "weights": weights}, {"seconds": 1.5})
    assert done_keys(store) == {a_step().key}
    assert read_table(store, a_step(), "log.parquet").equals(table)
    assert read_object(store, a_step(), "note.txt") == b"hello"
    assert read_object(store, a_step(), "weights") == weights.read_bytes()
    assert read_manifest(store, a_step()) == manifest
    assert manifest.objects["log.parquet"].rows == 2
    assert manifest.objects["note.txt"].rows is None
    assert manifest.objects["weights"].size_bytes == 5000
    assert manifest.objects["weights"].sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (manifest.config, manifest.facts, manifest.fingerprint) == ({"size": 8}, {"seconds": 1.5}, a_step().fingerprint)


def test_commit_that_dies_before_its_manifest_leaves_nothing_done_and_a_rerun_commits_its_own(store: Store):
    with pytest.raises(DeadError):
        commit(Wrapped(store, create=dies), a_step(), {"x": b"old", "y": b"old"})
    left = set(store.list("objects/"))
    assert done_keys(store) == set()
    assert read_manifest(store, a_step()) is None
    with pytest.raises(NotFoundError):
        read_object(store, a_step(), "x")
    manifest = commit(store, a_step(), {"x": b"new"})
    assert read_object(store, a_step(), "x") == b"new"
    assert done_keys(store) == {a_step().key}
    assert not left & {artifact.key for artifact in manifest.objects.values()}


@pytest.mark.parametrize("written", [0, 1, 2])
def test_commit_that_dies_after_some_objects_leaves_nothing_done(store: Store, written: int):
    names = iter(range(written))

    def replace(key: str, data: Any) -> None:
        if next(names, None) is None:
            raise DeadError
        store.replace(key, data)

    with pytest.raises(DeadError):
        commit(Wrapped(store, replace=replace), a_step(), {"x": b"1", "y": b"2", "z": b"3"})
    assert done_keys(store) == set()
    commit(store, a_step(), {"x": b"4"})
    assert read_object(store, a_step(), "x") == b"4"


def test_second_commit_returns_the_first_manifest_and_takes_its_own_objects_away(store: Store):
    first = commit(store, a_step(), {"x": b"first"})
    second = commit(store, a_step(), {"x": b"second", "y": b"more"})
    assert second == first
    assert read_object(store, a_step(), "x") == b"first"
    assert set(store.list("objects/")) == {artifact.key for artifact in first.objects.values()}


@on_atomic
def test_commits_by_eight_threads_agree_on_one_attempt_and_only_its_objects_stay(store: Store):
    manifests = together(8, lambda index: commit(store, a_step(), {"x": f"thread {index}".encode()}))
    assert len({manifest.attempt for manifest in manifests}) == 1
    assert list(store.list("objects/")) == [manifests[0].objects["x"].key]
    assert hashlib.sha256(read_object(store, a_step(), "x")).hexdigest() == manifests[0].objects["x"].sha256


def test_commits_of_two_steps_stay_apart(store: Store):
    small, large = a_step(size=8), a_step(size=16)
    commit(store, small, {"t": pa.table({"a": [1]})})
    commit(store, large, {"t": pa.table({"a": [2, 3]})})
    assert done_keys(store) == {small.key, large.key}
    assert read_tables(store, [large, small], "t").to_pydict() == {"a": [2, 3, 1]}


def test_manifest_names_the_bytes_of_its_inputs_manifests(store: Store):
    first = Step("synthesize", "train-0000of0001", {"rows": 2})
    commit(store, first, {"x": b"rows"})
    manifest = commit(store, a_step("n00008", first), {"x": b"subset"})
    assert manifest.inputs == {first.key: hashlib.sha256(store.read(first.manifest_key)).hexdigest()}


def test_commit_before_its_input_is_built_is_refused(store: Store):
    step = a_step("n00008", Step("synthesize", "train-0000of0001", {"rows": 2}))
    with pytest.raises(NotFoundError):
        commit(store, step, {"x": b"subset"})
    assert done_keys(store) == set()


def test_commit_with_facts_that_have_no_json_form_is_refused(store: Store):
    with pytest.raises(TypeError, match="loss"):
        commit(store, a_step(), {"x": b""}, {"loss": float("nan")})
    assert done_keys(store) == set()


def test_read_of_a_step_that_is_not_built_raises_not_found_that_names_it(store: Store):
    with pytest.raises(NotFoundError, match=a_step().key):
        read_object(store, a_step(), "x")


@pytest.mark.parametrize("change", [b"tampered", b"", b"rowt"], ids=["longer", "empty", "one byte"])
def test_read_of_a_tampered_object_raises_user_error_that_names_the_file(store: Store, change: bytes):
    manifest = commit(store, a_step(), {"x": b"rows"})
    store.replace(manifest.objects["x"].key, change)
    with pytest.raises(UserError) as error:
        read_object(store, a_step(), "x")
    assert manifest.objects["x"].key in str(error.value)
    assert a_step().manifest_key in str(error.value)


def test_step_rebuilds_once_its_manifest_is_deleted(store: Store):
    commit(store, a_step(), {"x": b"old"})
    store.delete(a_step().manifest_key)
    commit(store, a_step(), {"x": b"new"})
    assert read_object(store, a_step(), "x") == b"new"


# ---------------------------------------------------------------- fingerprints


@fast
def test_digest_is_sha256_of_compact_sorted_json():
    text = '{"a":[1,0.5,null,true],"b":{"c":"ü"}}'
    assert digest({"b": {"c": "ü"}, "a": (1, 0.5, None, True)}) == hashlib.sha256(text.encode()).hexdigest()


@fast
def test_key_of_a_known_step_is_what_it_always_was():
    step = Step("train", "n00088-s0050-seed3407", {"base": "m", "steps": 50, "rate": 2e-4}, (Step("subset", "n00088", {"size": 88}),))
    assert step.key == "train/n00088-s0050-seed3407-680d4cbcd7"


@fast
@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_fingerprint_in_another_process_is_the_same(hash_seed: str):
    config = {key: {"index": index, "rate": index / 7} for index, key in enumerate(string.ascii_lowercase)}
    program = (
        "import json, sys; from pipeline.artifacts import Step; config = json.loads(sys.argv[1]);"
        "print(Step('train', 'n1', {key: config[key] for key in sorted(set(config), key=hash)}, (Step('subset', 'n1', {}),)).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(config)], env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == Step("train", "n1", config, (Step("subset", "n1", {}),)).fingerprint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, max_size=4), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict):
        items = list(value.items())
        dice.shuffle(items)
        return {key: shuffled(item, dice) for key, item in items}
    return [shuffled(item, dice) for item in value] if isinstance(value, list) else value


@fast
@given(value=JSON, seed=st.integers(0, 1000))
def test_digest_of_the_same_value_in_another_key_order_is_the_same(value: Any, seed: int):
    assert digest(shuffled(value, random.Random(seed))) == digest(value)


@fast
@pytest.mark.parametrize("other", ["1", True, None, [1], {"a": 1}, 2, 1.5, ""], ids=repr)
def test_digest_of_another_value_differs(other: Any):
    assert digest({"a": 1}) != digest({"a": other})


@fast
def test_fingerprint_changes_with_stage_config_and_inputs():
    base = a_step()
    others = [
        Step("train", "n00008", {"size": 8}),
        a_step(size=16),
        a_step(size=8, seed=1),
        a_step("n00008", a_step()),
        a_step("n00008", a_step(size=16)),
        a_step("n00008", a_step(size=16), a_step()),
        a_step("n00008", a_step(), a_step(size=16)),
    ]
    assert len({step.fingerprint for step in [base, *others]}) == 8


@fast
def test_fingerprint_changes_when_an_input_of_an_input_changes():
    def chain(size: int) -> Step:
        return a_step("n3", a_step("n2", a_step("n1", size=size)))

    assert chain(8).fingerprint != chain(9).fingerprint


@fast
def test_name_is_in_the_key_and_not_in_the_fingerprint():
    one, other = a_step("n00008"), a_step("renamed")
    assert one.fingerprint == other.fingerprint
    assert one.key != other.key


@fast
@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), float("inf"), float("-inf"), {1, 2}, frozenset(), b"bytes", Path("a"), datetime.date(2024, 1, 1), 1j, len],
    ids=lambda value: type(value).__name__,
)
def test_digest_of_a_value_without_stable_form_raises_type_error_that_names_the_place(value: Any):
    with pytest.raises(TypeError, match=r"training\.rates\[1\]"):
        digest({"training": {"rates": [1, value]}})


@fast
@pytest.mark.parametrize("key", [1, None, True, ("a", "b"), 0.5], ids=repr)
def test_digest_of_a_key_that_is_no_string_raises_type_error_that_names_the_place(key: Any):
    with pytest.raises(TypeError, match="training"):
        digest({"training": {key: 1}})


@fast
@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "../a", "-a", "a-", "a_b", "a\n", "ä", "a" * 64])
def test_step_whose_name_is_no_dns_label_is_refused(name: str):
    with pytest.raises(ValueError, match="DNS label"):
        Step("train", name, {})


@fast
def test_folder_store_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    FolderStore("~/runs").create("a", b"x")
    assert (tmp_path / "runs" / "a").read_bytes() == b"x"
