"""A study whose teacher and judge are behind an endpoint: killed on the way, over its budget, with rows that fail for good."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.endpoint_server import FAULTS, LIMITED, EndpointServer, Record
from tests.runs import ROOT, SMALL, Run, contents, datadose, start

MODEL = "openai-compatible/small"
IN_FLIGHT = 4
SPARING = 1
"""A seed of the server whose faults do not meet the preflight's own request."""
UNEVEN = 42
"""A seed with which three of the 24 rows for training meet a fault, and two of the three for evaluation."""
PRICES = f'[prices]\ndate = 2026-11-01\n"{MODEL}" = {{ input = 1000.0, output = 2000.0 }}\n'


def study(folder: Path, more: str = "", quarantined: float = 0.5) -> Path:
    text = SMALL.replace('teacher = "scripted/writer"', f'teacher = "{MODEL}"\nmax_quarantined = {quarantined}')
    path = folder / "small.toml"
    path.write_text(text.replace("scripted/longest", MODEL) + more)
    return path


def setting(server: EndpointServer) -> dict[str, str]:
    return {"DATADOSE_ENDPOINT_URL": server.url, "DATADOSE_ENDPOINT_BACKOFF_S": "0.01", "DATADOSE_REQUESTS_IN_FLIGHT": str(IN_FLIGHT)}


def of_rows(records: list[Record]) -> list[Record]:
    """Without the trials of the preflight, which are repeated by every run."""
    return [record for record in records if json.loads(record.body).get("max_tokens") != 1]


def facts(store: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text())["facts"] for path in sorted((store / f"manifests/{stage}").glob("*.json"))]


def results(store: Path) -> dict[str, Any]:
    (path,) = (store / "manifests/report").glob("*.json")
    found: dict[str, Any] = json.loads((store / json.loads(path.read_text())["objects"]["results.json"]["key"]).read_text())
    return found


def killed(process: Run) -> None:
    """With its whole family, as when a machine dies."""
    family = [*process.family(), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=60)
    process.wait()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_study_killed_on_the_way_asks_twice_at_most_for_what_was_under_way(tmp_path):
    store, kills = tmp_path / "store", (9,)
    with EndpointServer(latency_s=0.2) as server:
        for count in kills:
            before = len(server.requests)
            process = start("run", study(tmp_path), store=store, **setting(server))
            server.wait_for(before + 1 + count)  # the preflight's is one
            killed(process)
        run = datadose("run", study(tmp_path), store=store, **setting(server))
        assert run.returncode == 0, run.stderr
        assert len(of_rows(server.asked_after_delivery())) <= IN_FLIGHT * len(kills)
        assert len(of_rows(server.requests)) <= 27 + 18 + IN_FLIGHT * len(kills)
    assert sum(part["ok"] + part["quarantined"] for part in facts(store, "synthesize")) == 27


STOPPING = {"401", "403", "404_model"}
"""Faults that no later row could escape: they stop the stage, and have tests of their own."""
KINDS = [fault for fault in FAULTS if fault not in STOPPING | set(LIMITED)]
BAD_WEATHER = {fault: 0.05 / (len(KINDS) + 1) for fault in KINDS} | {fault: 0.05 / (len(KINDS) + 1) / len(LIMITED) for fault in LIMITED}
"""5 % of all requests, every kind as often as any other; refusals for the rate are one kind, whatever they say."""


@pytest.mark.timeout(900)
@pytest.mark.long
def test_rows_in_bad_weather_and_after_kills_are_all_ok_or_quarantined_with_a_reason(tmp_path):
    rows, kills = 17_600, 5
    store, in_flight, dice = tmp_path / "store", 64, random.Random(rows)
    text = (ROOT / "jobs/studies/paper.toml").read_text()
    for old, new in (("vllm/unsloth/llama-3-8b-Instruct", MODEL), ("unsloth/llama-3-8b-Instruct", "scripted/writer")):
        text = text.replace(f'"{old}"', f'"{new}"')
    path = tmp_path / "paper.toml"
    path.write_text(text.replace("[synthesis]", f"[synthesis]\nrows = {rows}"))
    arguments = ("run", path, "--only", "synthesize")
    with EndpointServer(chances=BAD_WEATHER, seed=SPARING, retry_after_s=0.02, drip_s=0.001, latency_s=0.001, redirect_to="/v1/chat/completions") as server:
        settings = setting(server) | {"DATADOSE_REQUESTS_IN_FLIGHT": str(in_flight), "DATADOSE_ENDPOINT_TIMEOUT_S": "5"}
        for count in sorted(dice.sample(range(100, rows), kills)):
            process = start(*arguments, store=store, **settings)
            server.wait_for(count, timeout_s=600)
            killed(process)
        run = datadose(*arguments, store=store, **settings)
        assert run.returncode == 0, run.stderr
        asked, again = of_rows(server.requests), of_rows(server.asked_after_delivery())
    met = Counter(record.fault for record in asked)
    print(f"{len(asked)} requests for {rows} rows, {len(again)} repeated after {kills} kills; faults met: {dict(met)}")
    assert len(again) <= in_flight * kills
    shards = facts(store, "synthesize")
    assert sum(part["rows"] for part in shards) > rows, "rows for training, and some held out"
    for part in shards:
        assert part["ok"] + part["quarantined"] == part["rows"]
        assert sum(part["reasons"].values()) == part["quarantined"]
        assert all(":" in reason for reason in part["reasons"])
    assert met.keys() >= {None, *KINDS}
    assert met.keys() & set(LIMITED)


def test_run_that_reaches_its_budget_ends_with_3_and_goes_on_with_a_larger_one_to_a_ledger_of_what_the_endpoint_counted(tmp_path, ray_address):
    store = tmp_path / "store"
    with EndpointServer(each=["503"]) as server:  # twice the requests that were planned
        run = datadose("run", study(tmp_path, "[budget]\nrequests = 46\n"), store=store, RAY_ADDRESS=ray_address, **setting(server))
        assert run.returncode == 3, run.stderr
        assert "budget.requests = 46" in " ".join(run.stderr.split())
        assert 46 <= len(of_rows(server.requests)) <= 46 + 2 * IN_FLIGHT
        again = datadose("run", study(tmp_path, "[budget]\nrequests = 46\n"), store=store, RAY_ADDRESS=ray_address, **setting(server))
        assert again.returncode in (2, 3)
        assert len(of_rows(server.requests)) <= 46 + 2 * IN_FLIGHT
        rest = datadose("run", study(tmp_path, "[budget]\nrequests = 200\n" + PRICES), store=store, RAY_ADDRESS=ray_address, **setting(server))
        assert rest.returncode == 0, rest.stderr
        assert of_rows(server.asked_after_delivery()) == []
        asked = of_rows(server.requests)
    told = results(store)["ledger"]
    assert told["stages"]["synthesize"]["requests"] + told["stages"]["judge"]["requests"] == len(asked) == 2 * (27 + 18)
    tokens = sum(told["stages"][stage][name] for stage in ("synthesize", "judge") for name in ("input_tokens", "output_tokens"))
    assert tokens == sum(record.tokens for record in asked if record.delivered_at is not None)
    wanted = sum(told["stages"][stage]["input_tokens"] * 1e-3 + told["stages"][stage]["output_tokens"] * 2e-3 for stage in ("synthesize", "judge"))
    assert told["total"]["money"] == pytest.approx(wanted)
    assert not any(name.startswith("journal/") for name in contents(store))


def test_too_many_failed_rows_stop_the_stage_and_once_mended_only_these_are_asked_again(tmp_path, ray_address):
    store, few = tmp_path / "store", study(tmp_path, quarantined=0.1)
    with EndpointServer(chances={"400": 0.4}, seed=SPARING) as server:
        run = datadose("run", few, "--only", "synthesize", store=store, RAY_ADDRESS=ray_address, **setting(server))
        assert run.returncode == 3, run.stderr
        flat = " ".join(run.stderr.split())
        assert "synthesis.max_quarantined = 0.1" in flat
        assert "x error: " in flat
        answered = sum(server.delivered().values())
        server.configure(chances={})
        rest = datadose("run", few, "--only", "synthesize", store=store, RAY_ADDRESS=ray_address, **setting(server))
        assert rest.returncode == 0, rest.stderr
        assert of_rows(server.asked_after_delivery()) == []
        assert sum(server.delivered().values()) > answered
    assert sum(part["ok"] for part in facts(store, "synthesize")) == 27


def test_failed_rows_within_the_studys_share_are_quarantined_with_their_reasons_also_where_one_step_has_more(tmp_path, ray_address):
    store = tmp_path / "store"
    with EndpointServer(chances={"400": 0.2}, seed=UNEVEN) as server:
        run = datadose("run", study(tmp_path, quarantined=0.25), "--only", "synthesize", store=store, RAY_ADDRESS=ray_address, **setting(server))
        assert run.returncode == 0, run.stderr
    shards = facts(store, "synthesize")
    assert max(part["quarantined"] / part["rows"] for part in shards) > 0.25 > sum(part["quarantined"] for part in shards) / 27
    assert not any(name.startswith("journal/") for name in contents(store))
    assert all(part["ok"] + part["quarantined"] == part["rows"] for part in shards)
    assert all(reason.startswith("error: ") for part in shards for reason in part["reasons"])
