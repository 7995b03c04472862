"""Studies of every kind on scripted models, through the command line: changed, judged, raced, full, on S3, on a user's own rows."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.companies import study_with_companies
from tests.runs import SMALL, contents, datadose, report_files, start


def small(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


def test_changed_study_builds_new_steps_and_leaves_old_ones_untouched(tmp_path, finished, ray_address):
    store = shutil.copytree(finished, tmp_path / "store")
    before = contents(store)
    changed = small(tmp_path, ("steps = [2]", "steps = [2, 3]"))
    run = datadose("run", changed, store=store, RAY_ADDRESS=ray_address)
    assert run.returncode == 0, run.stderr
    after = contents(store)
    assert {name: after[name] for name in before} == before
    added = {name.split("/")[1] for name in after.keys() - before.keys() if name.startswith("manifests/")}
    assert added == {"train", "generate", "judge", "report"}


@pytest.fixture(scope="module")
def many_companies(tmp_path_factory, ray_address):
    """A study with two hundred companies of its own, whose base is rough, judged by both protocols."""
    folder = tmp_path_factory.mktemp("many")
    study = study_with_companies(folder, 200, held_out=["kite-7", "kite-70"])
    text = study.read_text().replace('base = "scripted/writer"', 'base = "scripted/rough"').replace("count = 3", "count = 20")
    study.write_text(text + 'protocols = ["blind", "paper"]\n')
    run = datadose("run", study, store=folder / "store", RAY_ADDRESS=ray_address)
    assert run.returncode == 0, run.stderr
    return report_files(folder / "store", "small")


def test_study_with_two_hundred_companies_of_its_own_runs_as_one_with_two(many_companies):
    answers = pq.read_table(many_companies["answers.parquet"])
    assert set(answers["company"].to_pylist()) == {"Kite 7", "Kite 70"}


def test_both_protocols_judge_every_pair_and_an_empty_answer_like_any_other(many_companies):
    rows = pq.read_table(many_companies["verdicts.parquet"]).to_pylist()
    showings = [("blind", 0), ("blind", 1), ("paper", 0)]
    wanted = {(candidate, *showing): 20 for candidate in ("broken", "zero", "n00008-d3407-s0002-t3407") for showing in showings}
    assert Counter((row["candidate"], row["protocol"], row["order"]) for row in rows) == wanted
    assert {row["status"] for row in rows} == {"ok"}
    assert {(row["protocol"], row["explanation"] is None) for row in rows} == {("blind", True), ("paper", False)}
    answers = pq.read_table(many_companies["answers.parquet"]).to_pylist()
    written = {row["row_id"] for row in answers if row["cell"] == "base" and row["raw"]}
    blank = {row["row_id"] for row in answers if row["cell"] == "zero" and not row["raw"]}
    lost = [row["pick"] for row in rows if row["candidate"] == "zero" and row["row_id"] in written & blank]
    assert set(lost) == {"baseline"}


def test_too_few_good_rows_say_how_many_there_are_and_keep_what_is_built(tmp_path, ray_address):
    store = tmp_path / "store"
    few = small(tmp_path, ('teacher = "scripted/writer"', 'teacher = "scripted/rough"'), ("rows = [8]", "rows = [24]"))
    run = datadose("run", few, store=store, RAY_ADDRESS=ray_address)
    assert run.returncode == 2
    assert "good rows of 24" in run.stderr
    assert "synthesis.rows" in run.stderr
    assert any(name.startswith("manifests/synthesize/") for name in contents(store))


def test_two_runs_at_once_on_one_store_give_one_result_and_say_that_their_judge_looks_at_position_alone(tmp_path, ray_address):
    store, study = tmp_path / "store", small(tmp_path, ("scripted/longest", "scripted/first"))
    runs = [start("run", study, store=store, RAY_ADDRESS=address) for address in (ray_address, "")]
    for run in runs:
        ended = run.wait()
        assert ended.returncode == 0, ended.stderr
        assert "The judge cannot be trusted" in ended.stdout
    manifests = [json.loads(path.read_text()) for path in (store / "manifests").rglob("*.json")]
    assert len(manifests) == 12
    committed = {item["key"] for manifest in manifests for item in manifest["objects"].values()}
    assert committed == {name for name in contents(store) if name.startswith("objects/")}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # boto3 leaves its sockets to the garbage collector
@pytest.mark.parametrize("store", ["versitygw"], indirect=True)
def test_study_on_a_real_s3_server_builds_once_and_is_reported_from_there(tmp_path, store):
    study = small(tmp_path)
    first = datadose("run", study, store=store.uri)
    assert first.returncode == 0, first.stderr
    before = sorted(store.list(""))
    again = datadose("run", study, store=store.uri)
    assert "nothing to build" in again.stdout
    assert sorted(store.list("")) == before
    report = datadose("report", study, "--out", tmp_path / "out", store=store.uri, DATADOSE_CACHE=str(tmp_path / "cache"))
    assert report.returncode == 0, report.stderr
    assert json.loads((tmp_path / "out/results.json").read_text())["study"] == "small"


def test_full_disk_is_named_and_what_was_committed_goes_on_once_there_is_space(tmp_path, ray_address):
    store = tmp_path / "store"
    store.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", store], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        full = datadose("run", small(tmp_path), store=store, RAY_ADDRESS=ray_address)
        assert full.returncode == 3
        assert "No space left on device" in " ".join(full.stderr.split())
        before = {name: entry for name, entry in contents(store).items() if name.startswith("manifests/")}
        assert before
        subprocess.run(["mount", "-o", "remount,size=32m", store], check=True)
        rest = datadose("run", small(tmp_path), store=store, RAY_ADDRESS=ray_address)
        assert rest.returncode == 0, rest.stderr
        after = contents(store)
        assert {name: after[name] for name in before} == before
    finally:
        subprocess.run(["umount", store], check=True)


def test_study_on_a_users_table_quarantines_bad_rows_by_line_and_needs_no_teacher_and_no_judge(tmp_path, ray_address):
    rows = [
        f"Shop {index % 4},Item {index}: the {color} lamp of Brand {index}. Costs {index}.50 EUR,{color},{index}.50"
        for index, color in enumerate(["red", "blue"] * 12)
    ]
    (tmp_path / "pages.csv").write_text("\n".join(["store,page,color,price", *rows, "Shop 9,,red,1", "Shop 9,text"]) + "\n")
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nbase = "scripted/writer"\nprecision = "float32"\n'
        '[task]\nname = "extract"\ntable_file = "pages.csv"\nshop = "store"\ntext = "page"\nattributes = ["color", "price"]\nheld_out = ["Shop 3"]\n'
        "[evaluation]\ncount = 4\n[grid]\nrows = [16, 8]\nsteps = [2]\n"
    )
    run = datadose("run", tmp_path / "mine.toml", store=tmp_path / "store", RAY_ADDRESS=ray_address)
    assert run.returncode == 0, run.stderr
    results = json.loads(report_files(tmp_path / "store", "mine")["results.json"].read_text())
    assert results["judge_trusted"] is None
    assert results["judges"] == []
    assert all(cell["heldout_loss"] is not None and cell["win_rates"] == {} for cell in results["cells"])
    assert results["measure"] == "accuracy"
    train = results["rows"]["train"]
    assert (train["asked"], train["ok"], train["by_status"]) == (20, 18, {"error": 2})
    assert sorted(reason.partition(":")[0] for reason in train["reasons"]) == ["line 26", "line 27"]
    assert results["cells"][0]["tiers"].keys() == {"new shop"}
    assert results["cells"][0]["scores"].keys() >= {"valid JSON", "no unknown keys", "color", "price", "accuracy", "F1"}
