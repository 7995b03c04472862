"""The benchmarks' arithmetic, and every part of the one for GPUs at a small size on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.bench import Benchmark, Sides, interval, measure, table
from tests.runs import ROOT


@pytest.mark.fast
def test_interval_for_the_median_is_of_order_statistics():
    """Coverage by hand: five values, all of them, 1 - 2/2^5; nine values, second to eighth, 1 - 2 (1 + 9)/2^9."""
    assert interval([3, 1, 2, 5, 4]) == (1, 5, 1 - 2 / 32)
    assert interval(list(range(9))) == (1, 7, 1 - 20 / 512)


def benchmark(bar: float = 1.5, **more: object) -> Benchmark:
    order: list[str] = []

    @contextmanager
    def opened():
        yield Sides(lambda: order.append("ours") or 2.0, lambda: order.append("theirs") or 4.0, facts=lambda: {"order": " ".join(order)})

    return Benchmark("example", "ours", "theirs", bar, opened, **more)  # type: ignore[arg-type]


@pytest.mark.fast
def test_sides_take_turns_and_the_ratio_is_theirs_to_ours():
    found = measure(benchmark(), 2, lambda text: None)
    assert found["median"] == 2.0
    assert found["reached"]
    assert found["facts"]["order"] == "ours theirs ours theirs theirs ours"


@pytest.mark.fast
def test_table_says_what_was_missed_and_what_was_not_run():
    missed, absent = benchmark(bar=3), Benchmark("other", "ours too", "nobody", 0, lambda: None, 5.0)  # type: ignore[arg-type, return-value]
    lines = table([missed, absent], {"example": measure(missed, 5, lambda text: None)}).splitlines()
    assert "2.00 x (missed)" in lines[2]
    assert "at most 5 s | not run" in lines[3]


@pytest.mark.fast
def test_gpu_bars_are_judged_by_what_was_measured():
    from tests.gpu.bench import FULL, judged

    good = {"packed 1024": {"tokens_per_s": 6000.0, "peak_gib": 7.0, "loaded_gib": 5.6}, "packed 8192": {"tokens_per_s": 13000.0, "peak_gib": 30.0}}
    assert [line.split(":")[0] for line in judged(good | {"padded 2 x 4": {"tokens_per_s": 5000.0}}, FULL)] == ["reached"] * 5
    assert [line.split(":")[0] for line in judged({"trl": {"failed": "not installed"}}, FULL)] == ["MISSED"] * 5


def test_gpu_benchmark_without_a_gpu_says_so_and_stops():
    ended = subprocess.run([sys.executable, "-m", "tests.gpu.bench"], cwd=ROOT, capture_output=True, text=True, check=False, env=_no_gpu())
    assert ended.returncode == 0
    assert "there is no GPU here, so nothing was measured" in ended.stderr


@pytest.mark.long
def test_every_part_of_the_gpu_benchmark_runs_at_a_small_size(tmp_path):
    """With only what it says that it needs: everything else that this project installs is hidden from it."""
    code = (
        "import sys, bitsandbytes, peft\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "hidden = ('pydantic', 'pyarrow', 'ray', 'boto3', 'datasets', 'vllm')\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in hidden:\n"
        "            raise ModuleNotFoundError(f'{name} is hidden', name=name)\n"
        "for name in [name for name in sys.modules if name.split('.')[0] in hidden]:\n"
        "    del sys.modules[name]\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"sys.argv = ['bench', '--small', '--out', {str(tmp_path)!r}]\n"
        "from tests.gpu.bench import main\n"
        "sys.exit(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=_no_gpu())
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "bench-gpu.json").read_text())["results"]
    for name in ("packed 64", "packed 128", "shared 2", "shared 3", "padded 2 x 4"):
        assert found[name].get("tokens_per_s", 0) > 0, (name, found[name])


def _no_gpu() -> dict[str, str]:
    import os

    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
