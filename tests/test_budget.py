"""What endpoints may cost: refused before the start, stopped on the way, continued with more, and told in the ledger."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import Step, Store, commit, open_store, read_manifest
from pipeline.budget import NO_LIMIT, Bill, Limit, Tally, Usage, money, reached, usage_of
from pipeline.errors import EndpointStopped, UserError
from pipeline.journal import Journal
from pipeline.ledger import SHARED, ledger, require_budget, spent
from pipeline.llm import Completion, Request
from pipeline.llm.asking import Asker
from pipeline.plan import Plan, asked_model, describe, make_plan, paid, planned_use
from pipeline.study import Prices, Sampling, Study, load_study, parse
from tests.runs import SMALL, contents, datadose

fast = pytest.mark.fast

TEACHER, JUDGE = "groq/llama-3.1-8b-instant", "openai-compatible/judge@fp8"
PRICES = {"date": "2026-11-01", "currency": "EUR", TEACHER: {"input": 0.05, "output": 0.08}, JUDGE: {"input": 1.0, "output": 4.0}}


def study(**tables: Any) -> Study:
    """The laptop's study with a teacher and a judge behind endpoints."""
    raw = copy.deepcopy(load_study("laptop").model_dump(mode="json"))
    raw["synthesis"] |= {"teacher": TEACHER, "sampling": {"max_tokens": 128}}
    raw["judging"]["judges"] = [JUDGE]
    for name, table in tables.items():
        raw[name] = {**raw[name], **table} if name in ("synthesis", "judging") else table
    return parse(Study, raw, "study.toml")


def plan_of(**tables: Any) -> Plan:
    return make_plan(study(**tables))


# ---------------------------------------------------------------- the study


@fast
def test_price_table_is_read_by_the_names_of_the_models():
    prices = study(prices=PRICES).prices
    assert (prices.date.isoformat() if prices.date else None, prices.currency) == ("2026-11-01", "EUR")
    assert {name: (price.input, price.output) for name, price in prices.models.items()} == {TEACHER: (0.05, 0.08), JUDGE: (1.0, 4.0)}


@fast
def test_study_with_budget_and_prices_as_json_is_the_same_study():
    whole = study(prices=PRICES, budget={"tokens": 10**6, "requests": 500, "money": 2.5})
    assert Study.model_validate_json(whole.model_dump_json()) == whole


@fast
@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"budget": {"tokns": 5}}, "did you mean 'tokens'"),
        ({"budget": {"money": 0}}, "budget.money"),
        ({"budget": {"requests": -1}}, "budget.requests"),
        ({"prices": {TEACHER: {"input": 1, "output": 2}}}, "date is missing"),
        ({"prices": {"date": "2026-11-01", TEACHER: {"input": 1, "outptu": 2}}}, "did you mean 'output'"),
        ({"prices": {"date": "2026-11-01", TEACHER: {"input": -1, "output": 2}}}, "input"),
        ({"prices": {"date": "soon"}}, "prices.date"),
        ({"synthesis": {"max_quarantined": 1.5}}, "synthesis.max_quarantined"),
        ({"judging": {"max_quarantined": -0.1}}, "judging.max_quarantined"),
    ],
)
def test_bad_budget_or_price_is_refused_with_its_place_or_the_nearest_name(tables: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        study(**tables)


@fast
def test_budget_of_money_without_a_price_for_every_model_names_the_model():
    with pytest.raises(UserError, match=JUDGE):
        plan_of(budget={"money": 1.0}, prices={name: value for name, value in PRICES.items() if name != JUDGE})


@fast
@pytest.mark.parametrize(
    "tables",
    [
        {"budget": {"tokens": 10**9, "requests": 10**6, "money": 1000.0}, "prices": PRICES},
        {"prices": PRICES},
        {"synthesis": {"max_quarantined": 0.9}, "judging": {"max_quarantined": 0.9}},
    ],
    ids=["budget", "prices", "max_quarantined"],
)
def test_budget_prices_and_quarantine_touch_no_step_but_the_report(tables: dict[str, Any]):
    one, other = plan_of(), plan_of(**tables)
    assert {step.stage for step in set(one.steps) ^ set(other.steps)} == {"report"}


# ---------------------------------------------------------------- before the start


@fast
def test_plan_prices_every_model_behind_an_endpoint():
    told = describe(plan_of(prices=PRICES), set())["cost"]["endpoints"]
    teacher, judge = told["models"][TEACHER], told["models"][JUDGE]
    assert (teacher["requests"], judge["requests"]) == (188, 17 * 12 * 2)
    assert teacher["output_tokens"] == 188 * 128
    assert teacher["money"] == pytest.approx((teacher["input_tokens"] * 0.05 + teacher["output_tokens"] * 0.08) / 1e6)
    assert told["money"] == pytest.approx(teacher["money"] + judge["money"])
    assert (told["currency"], told["prices_of"]) == ("EUR", "2026-11-01")


@fast
def test_plan_agrees_with_itself_on_tokens_whether_or_not_they_are_paid_for():
    cost = describe(plan_of(), set())["cost"]
    for model, stage in ((TEACHER, "synthesize"), (JUDGE, "judge")):
        use = cost["endpoints"]["models"][model]
        assert use["input_tokens"] + use["output_tokens"] == pytest.approx(cost["tokens_estimated"][stage], abs=20)  # a step's tokens are whole


@fast
def test_plan_without_a_price_knows_no_sum_and_without_an_endpoint_no_cost():
    partly = describe(plan_of(prices={name: value for name, value in PRICES.items() if name != JUDGE}), set())["cost"]["endpoints"]
    assert partly["money"] is None
    assert partly["models"][TEACHER]["money"] > 0
    assert partly["models"][JUDGE]["money"] is None
    assert describe(make_plan(load_study("laptop")), set())["cost"]["endpoints"] is None


def limits(plan: Plan, share: float) -> dict[str, float]:
    """A budget that has the given share of what the plan needs."""
    use = planned_use(plan)
    total = sum(use.values(), Usage())
    return {"tokens": math.ceil(total.tokens * share), "requests": math.ceil(total.requests * share), "money": (money(plan.study.prices, use) or 0.0) * share}


@fast
@pytest.mark.parametrize("name", ["tokens", "requests", "money"])
def test_plan_above_the_budget_is_refused_with_both_numbers_and_within_it_is_not(tmp_path, name: str):
    store, needed = open_store(str(tmp_path)), plan_of(prices=PRICES)
    require_budget(plan_of(prices=PRICES, budget={name: limits(needed, 1.0)[name] * 1.0001 if name == "money" else limits(needed, 1.0)[name]}), store)
    small = limits(needed, 0.9)[name]
    with pytest.raises(UserError, match=f"budget.{name}") as refused:
        require_budget(plan_of(prices=PRICES, budget={name: small}), store)
    wanted = limits(needed, 1.0)[name]
    for number in (small, wanted):
        assert (f"{number:,.4f} EUR" if name == "money" else f"{number:,}") in str(refused.value)


def committed(plan: Plan, store: Store, stages: tuple[str, ...], usage: Usage = Usage(10, 1000, 200), **facts: Any) -> None:  # noqa: B008  # frozen
    for step in plan.steps:
        if step.stage in stages:
            told = {"rows": 10, "requests": usage.requests, "prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "seconds": 2.0}
            commit(store, step, {"t.parquet": pa.table({"x": [1]})}, told | facts)


@fast
def test_what_was_used_counts_and_what_is_done_needs_no_more(tmp_path):
    store = open_store(str(tmp_path))
    plan = plan_of(budget={"requests": 188 + 408})
    committed(plan, store, ("synthesize",), Usage(1000, 0, 0))
    with pytest.raises(UserError, match="4,408"):  # four shards took 1,000 each, the judge is still to come
        require_budget(plan, store)
    done = plan_of(budget={"requests": 1})
    for stage in ("subset", "train", "generate", "judge"):
        committed(done, store, (stage,))
    require_budget(done, store)


@fast
def test_spent_counts_committed_steps_and_journaled_answers_of_the_others(tmp_path):
    store, plan = open_store(str(tmp_path)), plan_of()
    first, second, *_ = plan.stage("synthesize")
    commit(store, first, {}, {"requests": 70, "prompt_tokens": 7000, "completion_tokens": 700})
    answers = [Completion("x", "stop", (0,) * 11, 3, attempts=2), Completion("", "error", (), 0, outcome="error", attempts=8)]

    async def put() -> None:
        journal = Journal(store, second)
        await asyncio.gather(*(journal.put(str(number), answer) for number, answer in enumerate(answers)))

    asyncio.run(put())
    assert spent(plan, store) == {TEACHER: Usage(80, 7011, 703)}
    assert spent(plan, store, journals=False) == {TEACHER: Usage(70, 7000, 700)}


# ---------------------------------------------------------------- on the way


class Endpoint:
    """Answers everything with 10 tokens for 20, at the given number of attempts."""

    def __init__(self, attempts: int = 1) -> None:
        self.asked: list[int] = []
        self._attempts = attempts

    async def complete(self, request: Request) -> Completion:
        self.asked.append(request.seed)
        await asyncio.sleep(0.001)
        return Completion(f"answer {request.seed}", "stop", (0,) * 20, 10, attempts=self._attempts)

    def close(self) -> None:
        """Nothing to close."""


STEP = Step("synthesize", "train-0000of0001", {"teacher": TEACHER})
IN_FLIGHT = 5


def ask(model: Endpoint, store: Store, count: int, before: Bill | None = None, tally: Tally | None = None, **tables: Any) -> list[Completion]:
    shared = tally or Tally(NO_LIMIT, 0, Counter())

    async def tell(done: int, used: Usage) -> tuple[Usage, str | None]:
        return shared.use(used)

    async def run() -> list[Completion]:
        journal = Journal(store, STEP)
        asker = Asker(model, TEACHER, study(**tables), before or {}, IN_FLIGHT, tell)
        requests = [Request([{"role": "user", "content": "?"}], Sampling(), number) for number in range(count)]
        return (await asker.ask(requests, journal, journal.load())).completions

    return asyncio.run(run())


@fast
@pytest.mark.parametrize(
    ("budget", "fewest", "most"),
    [({"requests": 12}, 12, 12), ({"tokens": 300}, 10, 10 + IN_FLIGHT), ({"money": 0.000018}, 10, 10 + IN_FLIGHT)],
    ids=["requests", "tokens", "money"],
)
def test_run_that_reaches_its_budget_keeps_what_came_and_goes_on_with_a_larger_one(tmp_path, budget: dict[str, Any], fewest: int, most: int):
    store, model = open_store(str(tmp_path)), Endpoint()
    (name,) = budget
    with pytest.raises(EndpointStopped, match=rf"budget.{name}.*run it again to go on"):
        ask(model, store, 40, budget=budget, prices=PRICES)
    assert fewest <= len(model.asked) <= most
    answers = Journal(store, STEP).load()
    assert len(answers) == len(model.asked)

    rest = Endpoint()
    completions = ask(rest, store, 40, {TEACHER: usage_of(answers.values())}, budget={name: budget[name] * 10}, prices=PRICES)
    assert [completion.text for completion in completions] == [f"answer {number}" for number in range(40)]
    assert not set(rest.asked) & set(model.asked)
    assert len(rest.asked) + len(model.asked) == 40


@fast
def test_retries_count_against_the_budget_of_requests(tmp_path):
    model = Endpoint(attempts=3)
    with pytest.raises(EndpointStopped):
        ask(model, open_store(str(tmp_path)), 40, budget={"requests": 30})
    assert 10 <= len(model.asked) <= 10 + IN_FLIGHT


@fast
def test_what_other_models_of_the_study_used_counts_too(tmp_path):
    model = Endpoint()
    with pytest.raises(EndpointStopped):
        ask(model, open_store(str(tmp_path)), 40, {JUDGE: Usage(97, 0, 0)}, budget={"requests": 100})
    assert len(model.asked) == 3


@fast
def test_worker_stops_once_it_hears_that_another_had_to(tmp_path):
    model, tally = Endpoint(), Tally(NO_LIMIT, 0, Counter())
    tally.stop("the key is refused")
    with pytest.raises(EndpointStopped, match="the key is refused"):
        ask(model, open_store(str(tmp_path)), 100, tally=tally)
    assert len(model.asked) <= 2 * IN_FLIGHT


@fast
def test_run_without_a_budget_asks_everything(tmp_path):
    model = Endpoint()
    ask(model, open_store(str(tmp_path)), 40)
    assert len(model.asked) == 40


bills = st.dictionaries(st.sampled_from([TEACHER, JUDGE]), st.builds(Usage, *(st.integers(0, 10**7),) * 3), max_size=2)


@fast
@given(bills, st.integers(1, 10**7), st.integers(1, 10**7), st.floats(0.001, 100))
def test_budget_is_reached_exactly_where_one_of_its_limits_is(bill: dict[str, Usage], tokens: int, requests: int, amount: float):
    whole = study(prices=PRICES, budget={"tokens": tokens, "requests": requests, "money": amount})
    total = sum(bill.values(), Usage())
    cost = money(whole.prices, bill)
    assert cost is not None
    assert (reached(whole, bill) is not None) == (total.tokens >= tokens or total.requests >= requests or cost >= amount)


# ---------------------------------------------------------------- quarantine


@fast
def test_stage_stops_at_the_first_row_too_many_and_says_why():
    tally = Tally(Limit("synthesis.max_quarantined", 0.2), 100, Counter())
    assert tally.quarantine("a", 50, {"error: 503 eight times": 8, "refused": 2}, hold=True)
    assert tally.quarantine("b", 25, {"unparsed": 5}, hold=True)
    assert tally.outcome() == (None, [])
    assert not tally.quarantine("c", 4, {"refused": 6}, hold=True)
    reason, _ = tally.outcome()
    assert reason is not None
    for part in ("21 of 100 rows", "synthesis.max_quarantined = 0.2", "8 x error: 503 eight times", "8 x refused", "5 x unparsed"):
        assert part in reason


@fast
def test_step_with_many_bad_rows_waits_for_the_stage_where_its_answers_are_journaled():
    limit = Limit("judging.max_quarantined", 0.2)
    for hold in (True, False):
        tally = Tally(limit, 1000, Counter())
        assert tally.quarantine("bad", 64, {"error": 30}, hold) is not hold
        assert tally.quarantine("good", 64, {"error": 2}, hold)
        assert tally.outcome() == (None, ["bad"] if hold else [])


@fast
def test_rows_quarantined_before_this_run_count():
    tally = Tally(Limit("synthesis.max_quarantined", 0.1), 100, Counter({"truncated": 11}))
    assert tally.check() is not None
    assert tally.use(Usage(1, 2, 3)) == (Usage(1, 2, 3), tally.reason)


# ---------------------------------------------------------------- the ledger

ENTRY = ("requests", "input_tokens", "output_tokens", "seconds", "gpu_seconds", "money")


def built(plan: Plan, store: Store) -> dict[Step, Any]:
    return {step: manifest for step in plan.steps if (manifest := read_manifest(store, step)) is not None}


@fast
def test_ledger_adds_up_by_stage_and_by_cell(tmp_path):
    store, plan = open_store(str(tmp_path)), plan_of(prices=PRICES)
    committed(plan, store, ("synthesize",), Usage(64, 9000, 4000))
    committed(plan, store, ("subset",), requests=None, prompt_tokens=None, completion_tokens=None, seconds=None)
    committed(plan, store, ("train",), tokens=5000, prompt_tokens=None, completion_tokens=None, requests=None, gpu_seconds=4.0)
    committed(plan, store, ("generate",), Usage(12, 2400, 1200), gpu_seconds=1.0)
    committed(plan, store, ("judge",), Usage(24, 12000, 48))
    found = built(plan, store)
    told = ledger(plan, found)
    for name in ENTRY:
        for groups in (told["stages"], told["cells"]):
            assert sum(entry[name] or 0 for entry in groups.values()) == pytest.approx(told["total"][name])
    assert set(told["stages"]) == {"synthesize", "train", "generate", "judge"}
    assert set(told["cells"]) == {SHARED, "base", "zero", "broken", *(cell.name for cell in plan.cells)}
    shards = len(plan.stage("synthesize"))
    assert told["stages"]["synthesize"]["money"] == pytest.approx(shards * (9000 * 0.05 + 4000 * 0.08) / 1e6)
    assert told["cells"][plan.cells[0].name]["money"] == pytest.approx((12000 * 1.0 + 48 * 4.0) / 1e6)
    assert told["stages"]["train"] == {
        "requests": None, "input_tokens": 16 * 5000, "output_tokens": None, "seconds": 16 * 2.0, "gpu_seconds": 16 * 4.0, "money": None,
    }  # fmt: skip
    assert (told["currency"], told["prices_of"]) == ("EUR", "2026-11-01")


@fast
def test_ledger_knows_no_money_without_prices_and_no_gpu_seconds_on_a_cpu(tmp_path):
    store, plan = open_store(str(tmp_path)), plan_of()
    committed(plan, store, ("synthesize", "subset", "train", "generate"), gpu_seconds=None)
    told = ledger(plan, built(plan, store))
    assert {entry["money"] for entry in (*told["stages"].values(), told["total"])} == {None}
    assert told["total"]["gpu_seconds"] is None
    assert told["prices_of"] is None


@fast
def test_only_steps_asked_of_an_endpoint_are_paid_for():
    plan = plan_of()
    assert {step.stage for step in plan.steps if paid(step)} == {"synthesize", "judge"}
    assert {asked_model(step) for step in plan.steps if paid(step)} == {TEACHER, JUDGE}
    assert not any(paid(step) for step in make_plan(load_study("laptop")).steps)


@fast
def test_money_is_tokens_times_price_and_unknown_with_one_model_unpriced():
    prices = parse(Prices, PRICES, "prices")
    bill = {TEACHER: Usage(1, 2_000_000, 1_000_000), JUDGE: Usage(1, 500_000, 250_000)}
    assert money(prices, bill) == pytest.approx(2 * 0.05 + 0.08 + 0.5 + 1.0)
    assert money(prices, {**bill, "groq/other": Usage()}) is None
    assert money(prices, {}) == 0


# ---------------------------------------------------------------- through the command line


def small(folder: Path, *changes: tuple[str, str], more: str = "") -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.toml"
    path.write_text(text + more)
    return path


PAID = ('teacher = "scripted/writer"', f'teacher = "{TEACHER}"')
PRICED = f'[prices]\ndate = 2026-11-01\n"{TEACHER}" = {{ input = 0.05, output = 0.08 }}\n'


def test_plan_prints_what_endpoints_will_cost_and_of_which_day_the_prices_are(tmp_path):
    told = datadose("plan", small(tmp_path, PAID, more=PRICED), store=tmp_path / "store")
    assert told.returncode == 0, told.stderr
    flat = " ".join(told.stdout.split())
    assert f"{TEACHER}: 27 requests" in flat
    assert "USD (prices of 2026-11-01)" in flat


def test_run_above_its_budget_ends_with_2_and_builds_nothing(tmp_path):
    run = datadose("run", small(tmp_path, PAID, more="[budget]\nrequests = 26\n"), store=tmp_path / "store")
    assert run.returncode == 2
    assert "budget.requests = 26" in " ".join(run.stderr.split())
    assert contents(tmp_path / "store") == {}


def test_too_many_quarantined_rows_end_with_3_and_a_larger_share_goes_on(tmp_path, ray_address):
    store = tmp_path / "store"
    rough = ('teacher = "scripted/writer"', 'teacher = "scripted/rough"\nmax_quarantined = 0.05')
    for _ in range(2):  # a rerun stops for the same reason
        run = datadose("run", small(tmp_path, rough), store=store, RAY_ADDRESS=ray_address)
        assert run.returncode == 3, run.stderr
        flat = " ".join(run.stderr.split())
        assert "synthesis.max_quarantined = 0.05" in flat
        assert "x truncated" in flat
        assert not (store / "manifests/subset").exists()
    before = contents(store)
    more = small(tmp_path, ('teacher = "scripted/writer"', 'teacher = "scripted/rough"\nmax_quarantined = 0.9'))
    for stage in ("synthesize", "subset"):
        run = datadose("run", more, "--only", stage, store=store, RAY_ADDRESS=ray_address)
        assert run.returncode == 0, run.stderr
    assert (store / "manifests/subset").exists()
    after = contents(store)
    assert {name: after[name] for name in before} == before


def test_report_has_the_ledger_of_its_study_and_every_row_is_ok_or_quarantined(finished):
    manifests = [json.loads(path.read_text()) for path in (finished / "manifests").rglob("*.json")]
    asked = [manifest["facts"] for manifest in manifests if manifest["step"].split("/")[0] in ("synthesize", "generate", "judge")]
    assert all(facts["ok"] + facts["quarantined"] == facts["rows"] for facts in asked)
    (report,) = (manifest for manifest in manifests if manifest["step"].startswith("report/"))
    told = json.loads((finished / report["objects"]["results.json"]["key"]).read_text())["ledger"]
    assert told["total"]["requests"] == sum(facts["requests"] for facts in asked) == 27 + 3 * 3 + 3 * 3 * 2
    assert told["total"]["money"] is None
    page = (finished / report["objects"]["report.html"]["key"]).read_text()
    assert 'id="ledger"' in page
    assert f"{told['total']['input_tokens']:,}" in page
