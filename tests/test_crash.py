"""Kill -9 of the driver and of the committing worker at every commit: the runs after it finish the same study."""

from __future__ import annotations

import signal

import pytest

from tests.runs import contents, start, tables


@pytest.mark.timeout(1200)
def test_study_killed_before_and_after_every_commit_ends_as_an_undisturbed_one(tmp_path, small_study, undisturbed, ray_cluster):
    store = tmp_path / "store"
    kills = 0
    while True:
        committed = {name: entry for name, entry in (contents(store) if store.exists() else {}).items() if name.startswith("manifests/")}
        process = start("run", small_study, store=store, RAY_ADDRESS=ray_cluster.address, **ray_cluster.crash)
        ray_cluster.control.write_text(f"{('before', 'after')[kills % 2]} {process.pid}")
        ended = process.wait(timeout=300)
        ray_cluster.settled()
        after = contents(store)
        assert {name: after[name] for name in committed} == committed, "a committed step was built again"
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        kills += 1
    ray_cluster.control.unlink(missing_ok=True)
    commits = sum(name.startswith("manifests/") and name.endswith(".json") for name in contents(store))
    assert commits == 12
    assert kills == 2 * commits
    assert tables(store) == undisturbed
