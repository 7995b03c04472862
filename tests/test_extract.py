"""The extract task: tables of pages in three formats with whatever is wrong in them, shops on one side only, exact scores."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import sampling
from pipeline.errors import UserError
from pipeline.tasks import DataFile, Example, load
from pipeline.tasks.extract import Params
from pipeline.tasks.extract.scoring import normal

pytestmark = pytest.mark.fast

TASK = load("extract")
SHIPPED = Params(name="extract")
PAGES = [
    {"shop": "Alder", "text": "Blue mug, £4.50", "brand": "Potter", "price": "4.50"},
    {"shop": "Alder", "text": "Red mug", "brand": None, "price": ""},
    {"shop": "Birch", "text": "Hat\nby Felt & Co", "brand": "Felt & Co", "price": None},
    {"shop": "Cedar", "text": "A “café” chair, 12 €", "brand": "Stuhl", "price": "12"},
]


def params(path: Path, **changes: Any) -> Params:
    file = DataFile(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return Params(**{"name": "extract", "table_file": file, "attributes": ("brand", "price")} | changes)


def every(params: Params) -> list[Example]:
    return [*TASK.train(params), *TASK.evaluation(params)]


def problems(params: Params) -> list[str]:
    return [row.problem for row in TASK.train(params) if row.problem is not None]


def quoted(value: str | None) -> str:
    doubled = (value or "").replace('"', '""')
    return f'"{doubled}"'


def csv_of(rows: list[dict[str, Any]]) -> str:
    return "\n".join([",".join(rows[0]), *(",".join(quoted(value) for value in row.values()) for row in rows)])


def jsonl_of(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def written(folder: Path, suffix: str, rows: list[dict[str, Any]] = PAGES) -> Path:
    path = folder / f"pages{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text({".csv": csv_of, ".jsonl": jsonl_of}[suffix](rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_table_gives_every_page_with_its_attributes_and_null_for_what_is_not_there(tmp_path: Path, suffix: str):
    rows = {row.fields["text"]: row for row in every(params(written(tmp_path, suffix)))}
    assert rows.keys() == {page["text"] for page in PAGES}
    assert {text: json.loads(row.answer or "") for text, row in rows.items()} == {
        page["text"]: {"brand": page["brand"], "price": page["price"] or None} for page in PAGES
    }
    assert [row.fields["shop"] for row in rows.values() if row.fields["missing"] == "2"] == ["Alder"]


def test_same_table_gives_the_same_rows_in_every_format(tmp_path: Path):
    ids = [{row.row_id for row in every(params(written(tmp_path, suffix)))} for suffix in (".csv", ".jsonl", ".parquet")]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == len(PAGES)


def test_numbers_booleans_and_dates_become_text(tmp_path: Path):
    rows = [{"shop": shop, "text": shop, "brand": True, "price": 49.5} for shop in "ab"]
    for suffix in (".jsonl", ".parquet"):
        assert {row.answer for row in every(params(written(tmp_path, suffix, rows)))} == {'{"brand": "true", "price": "49.5"}'}
    whole = [{"shop": shop, "text": shop, "brand": float("nan"), "price": 49} for shop in "ab"]
    for suffix in (".jsonl", ".parquet"):
        assert {row.answer for row in every(params(written(tmp_path, suffix, whole)))} == {'{"brand": null, "price": "49"}'}


def test_columns_are_those_that_the_study_names(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("Händler,Seite,Größe,rest\nA,one,5,x\nB,two,,y\n", encoding="utf-8-sig")
    found = every(params(path, shop="Händler", text="Seite", attributes=("Größe",)))
    assert sorted((row.fields["shop"], row.fields["text"], row.answer) for row in found) == [("A", "one", '{"Größe": "5"}'), ("B", "two", '{"Größe": null}')]


GOOD_CSV = 'shop,text,brand,price\nA,first,X,1\nB,"second\nline",Y,2\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"A,page,X", "line 5: 3 cells, where the header has 4"),
        (b"A,page,X,1,2", "line 5: 5 cells, where the header has 4"),
        (b",page,X,1", "line 5: shop missing or empty"),
        (b"A, ,X,1", "line 5: text missing or empty"),
        (b",,,", "line 5: shop and text missing or empty"),
        (b"A,caf\xe9,X,1", "line 5: text is not UTF-8 at its character 4"),
        (b"A,page,\xff,1", "line 5: brand is not UTF-8 at its character 1"),
        (b'A,"page" x,X,1', "line 5: not valid CSV"),
        (b'A,"page,X,1\nC,page,Z,3', "line 5 to 6: not valid CSV"),
        (b"C, FIRST ,Z,3", "line 5: the same text as line 2"),
        (b'A,"second  line",Z,3', "line 5: the same text as line 3"),
        (b"A," + b"x" * 140_000 + b",X,1", "line 5: not valid CSV: field larger"),
    ],
    ids=["short", "long", "no shop", "blank text", "no both", "text no UTF-8", "attribute no UTF-8", "quote", "open quote", "duplicate", "folded", "huge"],
)
def test_csv_row_that_cannot_be_used_is_quarantined_with_its_line_and_reason(tmp_path: Path, line: bytes, problem: str):
    path = tmp_path / "t.csv"
    path.write_bytes(GOOD_CSV.encode() + line + b"\n")
    found = params(path)
    assert len(every(found)) == 3
    assert [text.startswith(problem) for text in problems(found)] == [True], problems(found)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "line 3: not valid JSON"),
        (b'{"shop": "A", "text": "page"} x', "line 3: not valid JSON"),
        (b"[" * 100_000, "line 3: not valid JSON"),
        (b"[1]", "line 3: a JSON list, where an object is wanted"),
        (b"null", "line 3: a JSON NoneType, where an object is wanted"),
        (b'{"text": "page"}', "line 3: shop missing or empty"),
        (b'{"shop": "A", "text": null}', "line 3: text missing or empty"),
        (b'{"shop": "A", "text": "page", "brand": ["X"]}', "line 3: brand is a list, where one text or number is wanted"),
        (b'{"shop": "A", "text": {"de": "Seite"}}', "line 3: text is a dict, where one text or number is wanted"),
        (b'{"shop": "A", "text": "caf\xe9"}', "line 3: text is not UTF-8 at its character 4"),
        (b'{"shop": "A", "text": "page \\ud800"}', "line 3: text is not UTF-8 at its character 6"),
        (b'{"shop": "A", "text": "one"}', "line 3: the same text as line 1"),
    ],
    ids=["broken", "tail", "deep", "list", "null", "no shop", "null text", "list value", "dict text", "no UTF-8", "surrogate", "duplicate"],
)
def test_jsonl_line_that_cannot_be_used_is_quarantined_with_its_line_and_reason(tmp_path: Path, line: bytes, problem: str):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"shop": "A", "text": "one", "brand": "X", "price": 1}\n\n' + line + b'\n{"shop": "B", "text": "two"}\n')
    found = params(path)
    assert len(every(found)) == 3
    assert [text.startswith(problem) for text in problems(found)] == [True], problems(found)


def test_parquet_row_that_cannot_be_used_is_quarantined_with_its_row_and_reason(tmp_path: Path):
    text = pa.array([b"one", b"caf\xe9", b"two", None, b"TWO", b"three"], pa.binary()).view(pa.string())
    shop = pa.array(list("ABBABA")).dictionary_encode()
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"shop": shop, "text": text, "brand": [None] * 6, "price": [[1], None, None, None, None, None]}), path)
    assert problems(params(path)) == [
        "row 1: price is a list, where one text or number is wanted",
        "row 2: text is not UTF-8 at its character 4",
        "row 4: text missing or empty",
        "row 5: the same text as row 3",
    ]


def test_quarantined_rows_have_ids_of_their_own_no_answer_and_a_prompt(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text(GOOD_CSV + "A,first,X,1\n" * 3 + ",,,\n" * 2)
    found = list(TASK.train(params(path)))
    assert len({row.row_id for row in found}) == len(found)
    assert all((row.answer is None) == (row.problem is not None) for row in found)
    assert all({*TASK.columns, *TASK.strata, TASK.cluster} <= set(row.fields) and TASK.plain(row.fields) for row in found)


def test_every_row_of_a_table_is_used_or_quarantined_once(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("shop,text,brand,price\n" + "".join(f"{'ABC'[i % 3] if i % 5 else ''},page {i % 17},X,{i}{',' * (i % 7 == 0)}\n" for i in range(40)))
    assert len(every(params(path))) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "no rows"),
        ("t.csv", b"shop,text,brand,price\n", "no rows"),
        ("t.jsonl", b"\n\n", "no rows"),
        ("t.csv", b"shop,txt,brand,price\nA,page,X,1\n", "no column 'text'; did you mean 'txt'"),
        ("t.csv", b"shop;text;brand;price\nA;page;X;1\n", "no column 'shop'"),
        ("t.csv", b"shop,text,text,brand,price\nA,page,page,X,1\n", r"names \['text'\] twice"),
        ("t.csv", b'shop,"te\nA,page\n', "header in line 1 is not valid CSV"),
        ("t.jsonl", b'{"shop": "A", "text": "page", "brand": "X"}\n', "no column 'price'"),
        ("t.jsonl", b"{\n{\n", r"none of its 2 rows can be read:\n  line 1: not valid JSON"),
        ("t.parquet", b"PAR1 no", "not a parquet file"),
        ("t.xlsx", b"PK", r"\.csv, \.jsonl, \.parquet; got '\.xlsx'"),
        ("t.csv", b"shop,text,brand,price\nA,page,X,1\nA,,X,1\n", r"both sides of the split need a shop .* 1 \(A\)\.\n  line 3: text missing"),
    ],
)
def test_table_that_cannot_be_used_raises_user_error_that_says_why(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        every(params(path))


def test_table_that_changed_after_the_study_was_loaded_raises_user_error(tmp_path: Path):
    path = written(tmp_path, ".csv")
    before = params(path)
    path.write_text(path.read_text() + "\nD,new,X,1")
    with pytest.raises(UserError, match="has changed since the study was loaded"):
        every(before)


def test_table_that_is_gone_raises_user_error_that_names_it(tmp_path: Path):
    gone = DataFile(path=str(tmp_path / "gone.csv"), sha256="0" * 64)
    with pytest.raises(UserError, match=r"gone\.csv cannot be read"):
        every(Params(name="extract", table_file=gone))


@settings(max_examples=150)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".jsonl", ".parquet"]))
def test_any_bytes_are_read_or_refused_with_a_user_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes({".csv": b"shop,text,brand,price\nA,a,,\nB,b,,\n", ".jsonl": b'{"shop":"A","text":"a","brand":1,"price":1}\n'}.get(suffix, b"") + data)
    try:
        found = every(params(path))
    except UserError:
        return
    for row in found:
        assert row.problem or TASK.scores(row.fields, row.answer or "")["accuracy"] == 1


# ---------------------------------------------------------------- params and split


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": ("Alder",), "held_out_share": 0.5}, "give one of held_out, held_out_share"),
        ({"held_out": ("Alder", "Alder")}, "held_out must be distinct"),
        ({"attributes": ("brand", "brand")}, "must be distinct"),
        ({"attributes": ("brand", "text")}, "must be distinct"),
        ({"attributes": ("brand", "F1")}, "'F1'.* rename"),
        ({"attributes": ("status",)}, "'status'.* rename"),
        ({"attributes": ()}, "attributes"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"colour": "x"}, "colour"),
    ],
)
def test_params_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Params(**{"name": "extract"} | changes)


def test_named_shops_are_held_out(tmp_path: Path):
    found = params(written(tmp_path, ".csv"), held_out=("Alder", "Cedar"))
    assert {row.fields["shop"] for row in TASK.evaluation(found)} == {"Alder", "Cedar"}
    assert {row.fields["shop"] for row in TASK.train(found)} == {"Birch"}


@pytest.mark.parametrize(
    ("held_out", "message"),
    [(("Aldr",), "did you mean 'Alder'"), (("Alder", "Birch", "Cedar"), "all 3 shops are held out")],
)
def test_held_out_shops_that_cannot_be_raise_user_error(tmp_path: Path, held_out: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        list(TASK.train(params(written(tmp_path, ".csv"), held_out=held_out)))


@settings(max_examples=60)
@given(shops=st.lists(st.integers(0, 8), min_size=2, max_size=30).filter(lambda shops: len(set(shops)) > 1), share=st.floats(0.01, 0.99), seed=st.integers())
def test_no_shop_is_on_both_sides_and_neither_side_is_empty(tmp_path_factory: pytest.TempPathFactory, shops: list[int], share: float, seed: int):
    path = tmp_path_factory.getbasetemp() / "split.csv"
    path.write_text("shop,text,brand,price\n" + "".join(f"shop {shop},page {index},,\n" for index, shop in enumerate(shops)))
    found = params(path, held_out_share=share, seed=seed)
    sides = [{row.fields["shop"] for row in side(found)} for side in (TASK.train, TASK.evaluation)]
    assert not sides[0] & sides[1]
    assert all(sides)
    assert len(every(found)) == len(shops)
    assert abs(len(sides[1]) - share * len(set(shops))) <= 1


def test_held_out_share_is_drawn_by_the_seed_and_not_by_the_order_of_rows(tmp_path: Path):
    rows = [{"shop": f"shop {index}", "text": f"page {index}", "brand": "", "price": ""} for index in range(12)]
    first, turned = written(tmp_path, ".csv", rows), written(tmp_path, ".jsonl", rows[::-1])
    draws = [{row.fields["shop"] for row in TASK.evaluation(params(path, seed=seed))} for seed in range(4) for path in (first, turned)]
    assert draws[::2] == draws[1::2]
    assert len({frozenset(draw) for draw in draws}) > 1


def test_every_evaluation_row_is_of_a_new_shop():
    assert {row.tier for row in TASK.evaluation(SHIPPED)} == {"new shop"}


# ---------------------------------------------------------------- prompt


def test_prompt_names_the_keys_and_the_page_and_tells_no_value_that_the_page_does_not():
    for row in every(SHIPPED):
        text = "\n".join(message["content"] for message in TASK.plain(row.fields))
        assert all(f'"{key}"' in text for key in SHIPPED.attributes)
        assert text.endswith(row.fields["text"])
    one, other = ({**row.fields, "text": "page", "truth": truth} for truth in ('{"brand": "Potter"}', '{"brand": null}'))
    assert TASK.plain(one) == TASK.plain(other)


def test_prompts_of_all_pages_begin_alike():
    texts = ["\n".join(message["content"] for message in TASK.plain(row.fields)) for row in every(SHIPPED)]
    assert len({text.partition("Page:")[0] for text in texts}) == 1


def test_task_asks_no_teacher_and_no_judge():
    assert (TASK.rich, TASK.parse, TASK.rubric) == (None, None, None)


# ---------------------------------------------------------------- scores

FIELDS = {"truth": '{"brand": "Felt & Co", "price": "1249.50", "color": null}'}
RIGHT = '{"brand": "Felt & Co", "price": "1249.50", "color": null}'


def score(answer: str) -> dict[str, float]:
    return TASK.scores(FIELDS, answer)


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT,
        '{"color": null, "price": 1249.5, "brand": "felt  &  CO "}',
        '{"brand": "Felt\\u00a0& Co", "price": "1,249.50", "color": ""}',
        ' {"brand": "FELT & CO", "price": "1.249,50", "color": " "}\n',
        '{"brand": "Felt & Co", "price": "1 249,5", "color": null}',
        '{\n  "brand": "Felt & Co",\n  "price": "1249.500",\n  "color": null\n}',
    ],
)
def test_right_answer_scores_one_on_every_check_in_whatever_form(answer: str):
    assert set(score(answer).values()) == {1.0}


def test_checks_of_an_answer_are_known():
    assert list(score(RIGHT)) == list(score("x")) == ["valid JSON", "nothing but JSON", "no unknown keys", "brand", "price", "color", "accuracy", "F1"]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("", {"valid JSON": 0, "nothing but JSON": 0, "no unknown keys": 0, "color": 0, "accuracy": 0, "F1": 0}),
        ("none", {"valid JSON": 0, "accuracy": 0}),
        ("{brand: Felt & Co}", {"valid JSON": 0, "no unknown keys": 0}),
        (RIGHT[:-1], {"valid JSON": 0, "brand": 0}),
        (f"Sure: {RIGHT}", {"valid JSON": 1, "nothing but JSON": 0, "accuracy": 1, "F1": 1}),
        (f"```json\n{RIGHT}\n```", {"valid JSON": 1, "nothing but JSON": 0, "accuracy": 1}),
        (f"{{curly}} {RIGHT}", {"valid JSON": 1, "nothing but JSON": 0, "accuracy": 1}),
        (f'{{"brand": "x"}} {RIGHT}', {"brand": 0, "accuracy": 0, "nothing but JSON": 0}),
        (f"[{RIGHT}]", {"valid JSON": 1, "nothing but JSON": 0, "accuracy": 1}),
        ("{}", {"valid JSON": 1, "no unknown keys": 1, "color": 0, "accuracy": 0, "F1": 0}),
        ('{"brand": "Felt & Co", "price": "1249.50", "color": null, "size": "M"}', {"no unknown keys": 0, "accuracy": 1, "F1": 1}),
        ('{"brand": "Felt & Co", "price": null, "color": null}', {"brand": 1, "price": 0, "color": 1, "accuracy": 2 / 3, "F1": 2 / 3}),
        ('{"brand": "Felt & Co", "price": "99", "color": null}', {"price": 0, "accuracy": 2 / 3, "F1": 1 / 2}),
        ('{"brand": "Felt & Co", "price": "1249.50", "color": "red"}', {"color": 0, "accuracy": 2 / 3, "F1": 4 / 5}),
        ('{"brand": null, "price": null, "color": null}', {"accuracy": 1 / 3, "F1": 0}),
        ('{"brand": ["Felt & Co"], "price": {"EUR": 1249.5}, "color": false}', {"brand": 0, "price": 0, "color": 0, "F1": 0}),
        ('{"brand": "Felt", "price": "1249.50 EUR", "color": "null"}', {"brand": 0, "price": 0, "color": 0}),
        ('{"brand": "Felt & Co", "price": NaN, "color": null}', {"valid JSON": 1, "price": 0}),
    ],
)
def test_checks_tell_field_by_field_what_is_wrong(answer: str, wanted: dict[str, float]):
    found = score(answer)
    assert {check: found[check] for check in wanted} == pytest.approx(wanted)


def test_page_without_any_attribute_is_answered_by_nulls_alone():
    fields = {"truth": '{"brand": null, "size": null}'}
    assert set(TASK.scores(fields, '{"brand": null, "size": ""}').values()) == {1.0}
    assert TASK.scores(fields, '{"brand": "x", "size": null}')["F1"] == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("€ 49,90", "€49.9"),
        ("49.90 EUR", "49,9 eur"),
        ("1'249 CHF", "1249 CHF"),
        ("8 990 kr", "8990 kr"),
        ("1.234.567,80", "1,234,567.8"),
        ("640 g", "640g"),
        ("0,250 l", "0.25 l"),
        ("007", "7"),
        ("ＸＬ", "xl"),
        ("45 x 25 cm", "45  X 25CM"),
    ],
)
def test_values_that_differ_in_writing_alone_have_one_normal_form(one: str, other: str):
    assert normal(one) == normal(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("49.90", "4990"), ("1.249", "1249"), ("€49", "$49"), ("49", "49.01"), ("10", "1"), ("0", ""), ("red", "dark red"), ("1 kg", "1 g"), ("0 500", "0.5")],
)
def test_values_that_differ_have_different_normal_forms(one: str, other: str):
    assert normal(one) != normal(other)


@given(st.decimals(min_value=0, max_value=10**7, places=2, allow_nan=False, allow_infinity=False))
def test_normal_form_of_a_number_is_the_same_with_and_without_thousands_and_cents(value: Any):
    forms = {f"{value:f}", f"{value:,.2f}", f"{value:,.2f}".translate(str.maketrans(",.", ".,")), f"{value:,.2f}".replace(",", " ")}
    assert len({normal(form) for form in forms}) == 1


JSON_LIKE = st.text(st.sampled_from('{}[]",:\\ 01.eE-naultrfsbrandpricecolor'))


@given(st.text(st.characters()) | JSON_LIKE | JSON_LIKE.map(lambda text: f'{{"brand": {text}'))
@example("{" * 10_000)
@example('{"a":' * 5_000)
@example("{[" * 5_000)
@example('{"brand": ' + "9" * 10_000 + "}")
@example('{"brand": 1e999999999, "price": -Infinity}')
@example('{"brand": "\\ud800", "price": "\ud800"}')
@example('{"brand": "' + "1,234" * 20_000 + '"}')
@example("\x00")
def test_scores_of_any_text_are_between_zero_and_one(text: str):
    found = score(text)
    assert found.keys() == score(RIGHT).keys()
    assert all(0 <= value <= 1 for value in found.values())


VALUES = st.none() | st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.dictionaries(st.sampled_from(["brand", "size", "Größe", 'a "b"']), VALUES, min_size=1))
def test_any_truth_as_the_answer_scores_one_on_every_check(truth: dict[str, str | None]):
    text = json.dumps(truth, ensure_ascii=False)
    assert set(TASK.scores({"truth": text}, text).values()) == {1.0}


# ---------------------------------------------------------------- the table that ships with the task


@pytest.fixture(scope="module")
def shipped() -> list[Example]:
    return every(SHIPPED)


def test_shipped_table_has_no_problem_and_about_320_pages_of_24_shops(shipped: list[Example]):
    assert [row.problem for row in shipped if row.problem] == []
    shops = Counter(row.fields["shop"] for row in shipped)
    assert len(shops) == 24
    assert len({re.sub(r"\W", "", shop.casefold()) for shop in shops}) == 24
    assert all(8 <= count <= 16 for count in shops.values())
    assert 300 <= len(shipped) == len({row.row_id for row in shipped}) <= 340


def test_shipped_values_stand_in_their_pages(shipped: list[Example]):
    for row in shipped:
        for value in filter(None, json.loads(row.answer or "").values()):
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", row.fields["text"], re.IGNORECASE), (value, row.fields["text"])


def test_shipped_pages_lack_every_attribute_but_the_product_now_and_then(shipped: list[Example]):
    lacking = Counter(key for row in shipped for key, value in json.loads(row.answer or "").items() if value is None)
    assert lacking["product"] == 0
    assert all(0.05 <= lacking[key] / len(shipped) <= 0.4 for key in SHIPPED.attributes if key != "product")


def test_shipped_pages_show_other_prices_than_the_one_asked_for(shipped: list[Example]):
    amount = re.compile(r"(?:[£€$¥]|CHF|kr|EUR|USD|CAD|AUD|NZD|NOK|JPY|SEK) ?[0-9]|[0-9] ?(?:€|kr|EUR|USD|SEK)")
    distracted = [row for row in shipped if len(amount.findall(row.fields["text"])) > (json.loads(row.answer or "")["price"] is not None)]
    assert len(distracted) > len(shipped) / 2


def test_shipped_pages_are_short_and_no_two_are_alike(shipped: list[Example]):
    texts = [row.fields["text"] for row in shipped]
    assert all(100 <= len(text) <= 500 for text in texts)
    words = [re.findall(r"\w+", text.casefold()) for text in texts]
    shingles = [set(zip(word, word[1:], word[2:], strict=False)) for word in words]
    assert max(len(one & other) / len(one | other) for one, other in itertools.combinations(shingles, 2)) < 0.4


def test_shipped_evaluation_draws_prompts_of_six_shops_evenly_and_small_subsets_spread_over_shops():
    pool = list(TASK.evaluation(SHIPPED))
    chosen = sampling.balanced([row.fields for row in pool], (*TASK.strata, TASK.cluster), 36, 3407)
    assert all(5 <= count <= 7 for count in Counter(pool[index].fields["shop"] for index in chosen).values())
    rows = [row.fields for row in TASK.train(SHIPPED)]
    drawn, _ = sampling.draw(rows, TASK.strata, 8, 3407)
    assert len({rows[index]["shop"] for index in drawn}) == 8
