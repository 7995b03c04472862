"""The posts task: its companies and rows, what its prompts tell and keep back, and its exact scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tasks import Example, load, posts
from pipeline.tasks.posts import LENGTHS, TONES, TYPES, UNIVERSAL, Params, company_named, company_names, read_company, sentence_count

pytestmark = pytest.mark.fast

PARAMS = Params(name="posts")
TASK = load("posts")
COMPANY = """
name = "Penrook"
description = "A bank."
industry = "Finance"
mission = "To be clear."
offering = "An account."
size = "9 employees"
history = "Since 2010."
audience = "Freelancers."
simple_description = "We make an account."
products = ["Account", "Card"]
"""


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return list(TASK.train(PARAMS))


@pytest.fixture(scope="module")
def one_of_each(rows: list[Example]) -> list[Example]:
    """One row of each type and tone, of one product."""
    return rows[: len(TYPES) * len(TONES)]


def text_of(conversation: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in conversation)


# ---------------------------------------------------------------- rows


def test_task_has_fifteen_companies_with_320_distinct_products():
    companies = [company_named(slug) for slug in company_names()]
    assert len({company.name for company in companies}) == len(companies) == 15
    assert all(len(set(company.products)) == len(company.products) for company in companies)
    assert sum(len(company.products) for company in companies) == 320


def test_rows_are_17600_with_distinct_ids(rows: list[Example]):
    assert len(rows) == len({row.row_id for row in rows}) == 320 * 11 * 5


def test_rows_cross_eleven_types_with_five_tones(rows: list[Example]):
    assert len({row.fields["type"] for row in rows}) == 11
    assert len({row.fields["tone"] for row in rows}) == 5
    assert {row.fields["length"] for row in rows} == {"short", "medium", "long"}
    assert len({tuple(row.fields[column] for column in TASK.columns) for row in rows}) == 17_600


def test_length_of_a_row_follows_from_its_type(rows: list[Example]):
    assert len({(row.fields["type"], row.fields["length"]) for row in rows}) == 11


def test_rows_hold_every_column_of_the_task(rows: list[Example]):
    for row in rows[::500]:
        assert {*TASK.columns, *TASK.strata, TASK.cluster} <= set(row.fields)
        assert all(isinstance(value, str) and value.strip() for value in row.fields.values())


def test_held_out_companies_are_in_evaluation_only():
    params = Params(name="posts", held_out=("penrook", "larkroof-solar"))
    assert {row.fields["company"] for row in TASK.evaluation(params)} == {"Penrook", "Larkroof Solar"}
    trained = {row.fields["company"] for row in TASK.train(params)}
    assert len(trained) == 13
    assert not trained & {"Penrook", "Larkroof Solar"}


def test_without_held_out_companies_evaluation_is_about_those_of_training():
    params = Params(name="posts", companies=("penrook",))
    assert [row.row_id for row in TASK.evaluation(params)] == [row.row_id for row in TASK.train(params)]


def test_company_both_trained_and_held_out_raises_user_error_that_names_it():
    with pytest.raises(UserError, match="penrook"):
        list(TASK.train(Params(name="posts", companies=("penrook", "larkroof-solar"), held_out=("penrook",))))


# ---------------------------------------------------------------- company files


def company_file(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in COMPANY
    path = folder / "penrook.toml"
    path.write_text(COMPANY.replace(old, new), encoding="utf-8")
    return path


def test_company_file_that_is_whole_is_read(tmp_path: Path):
    company = read_company(company_file(tmp_path))
    assert (company.name, company.products) == ("Penrook", ("Account", "Card"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mission = "To be clear."\n', "", r"penrook\.toml: 'mission' is missing"),
        ('["Account", "Card"]', "[]", r"penrook\.toml: products"),
        ('["Account", "Card"]', '["Account", " "]', r"penrook\.toml: products\.1"),
        ('["Account", "Card"]', '"Account"', r"penrook\.toml: products"),
        ('"Finance"', '""', r"penrook\.toml: industry"),
        ('"Finance"', '"  \\n "', r"penrook\.toml: industry"),
        ('"Finance"', "7", r"penrook\.toml: industry"),
        ("industry =", "industri =", r"unknown key 'industri'; did you mean 'industry'"),
        ('"A bank."', '"A bank.', r"penrook\.toml: not valid TOML"),
    ],
    ids=["missing field", "no products", "blank product", "products no list", "empty text", "blank text", "number", "unknown key", "broken TOML"],
)
def test_company_file_that_is_not_whole_raises_user_error_that_names_the_place(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(UserError, match=message):
        read_company(company_file(tmp_path, old, new))


def test_company_file_with_a_product_twice_is_refused_or_holds_it_once(tmp_path: Path):
    try:
        company = read_company(company_file(tmp_path, '"Card"', '"Account"'))
    except UserError:
        return
    assert len(set(company.products)) == len(company.products)


def test_company_file_that_is_not_utf8_raises_user_error_with_the_byte(tmp_path: Path):
    path = tmp_path / "penrook.toml"
    path.write_bytes(COMPANY.encode().replace(b"A bank.", b"A caf\xe9."))
    with pytest.raises(UserError, match=r"penrook\.toml: byte \d+ is not UTF-8"):
        read_company(path)


def test_unknown_company_raises_user_error_that_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'penrook'"):
        company_named("penrok")


# ---------------------------------------------------------------- prompts


def test_plain_prompt_tells_no_criterion(one_of_each: list[Example]):
    criteria = [*UNIVERSAL, *(criterion for post in TYPES.values() for criterion in post.criteria)]
    for row in one_of_each:
        text = text_of(TASK.plain(row.fields)).casefold()
        assert [criterion for criterion in criteria if criterion.casefold() in text] == []


def test_rich_prompt_tells_all_universal_criteria_and_those_of_its_type_alone(one_of_each: list[Example]):
    for row in one_of_each:
        text = text_of(TASK.rich(row.fields))
        told = {kind for kind, post in TYPES.items() if all(criterion in text for criterion in post.criteria)}
        assert all(criterion in text for criterion in UNIVERSAL)
        assert told == {row.fields["type"]}


@pytest.mark.parametrize("prompt", [TASK.plain, TASK.rich], ids=["plain", "rich"])
def test_prompt_names_company_product_type_tone_and_length(one_of_each: list[Example], prompt):
    for row in one_of_each:
        text = text_of(prompt(row.fields))
        assert all(row.fields[column] in text for column in ("company", "product", "type", "tone"))
        assert f"{LENGTHS[row.fields['length']][0]} " in text


def test_only_the_rich_prompt_tells_the_profile_of_the_company(one_of_each: list[Example]):
    fields = one_of_each[0].fields
    assert fields["profile"] in text_of(TASK.rich(fields))
    assert fields["profile"] not in text_of(TASK.plain(fields))
    assert fields["simple"] in text_of(TASK.plain(fields))


def test_rich_prompts_of_all_rows_begin_with_the_same_system_message(one_of_each: list[Example]):
    assert len({TASK.rich(row.fields)[0]["content"] for row in one_of_each}) == 1


# ---------------------------------------------------------------- parse

FIVE = "One. Two! Three? Four. Five."


def fields_of(length: str, product: str = "Account") -> dict[str, str]:
    return {"company": "Penrook", "product": product, "type": "promotional", "tone": "witty", "length": length}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("text", ["", " ", "\n\t \n", "\u00a0\u2003"])
@pytest.mark.parametrize("finished", [False, True])
def test_blank_text_is_unparsed(text: str, finished: bool, trim: bool):
    assert TASK.parse(Params(name="posts", trim=trim), fields_of("short"), text, finished) == ("unparsed", None)


@pytest.mark.parametrize(
    ("length", "text", "finished", "wanted"),
    [
        ("short", FIVE, True, ("ok", FIVE)),
        ("short", f"  {FIVE}\n", True, ("ok", FIVE)),
        ("long", "One.", True, ("ok", "One.")),
        ("short", FIVE, False, ("truncated", None)),
        ("short", "no end", False, ("truncated", None)),
    ],
)
def test_without_trim_a_post_is_the_whole_text_and_a_cut_text_is_truncated(length: str, text: str, finished: bool, wanted: tuple):
    assert TASK.parse(PARAMS, fields_of(length), text, finished) == wanted


@pytest.mark.parametrize(
    ("length", "text", "finished", "wanted"),
    [
        ("short", FIVE, True, ("ok", "One. Two! Three?")),
        ("short", f"{FIVE} and so o", False, ("ok", "One. Two! Three?")),
        ("short", "One. Two! and so o", False, ("ok", "One. Two!")),
        ("short", "One. Two! #tag", True, ("ok", "One. Two! #tag")),
        ("short", "no end in sigh", False, ("truncated", None)),
        ("short", "no end", True, ("ok", "no end")),
        ("medium", FIVE, True, ("ok", FIVE)),
        ("medium", "One. Two! Three? Fou", False, ("truncated", None)),
        ("medium", f"{FIVE} Six. Seven. Eight.", True, ("ok", f"{FIVE} Six.")),
        ("long", f"{FIVE} Six. Sev", False, ("truncated", None)),
        ("long", f"{FIVE} Six. Seven. Eight. Ni", False, ("ok", f"{FIVE} Six. Seven. Eight.")),
        ("long", f"{FIVE} " * 4, True, ("ok", (f"{FIVE} " * 4).strip())),
        ("short", "“One.” (Two!) Three?! Four.", True, ("ok", "“One.” (Two!) Three?!")),
        ("short", "It costs 3.50 euro. Two. Three. Four.", True, ("ok", "It costs 3.50 euro. Two. Three.")),
    ],
)
def test_with_trim_a_post_is_as_many_whole_sentences_as_were_asked_for(length: str, text: str, finished: bool, wanted: tuple):
    assert TASK.parse(Params(name="posts", trim=True), fields_of(length), text, finished) == wanted


@pytest.mark.parametrize("length", LENGTHS)
def test_trimmed_post_keeps_the_length_asked_for(length: str):
    status, answer = TASK.parse(Params(name="posts", trim=True), fields_of(length), f"{FIVE} " * 5 + "cut of", False)
    assert status == "ok"
    assert TASK.scores(fields_of(length), answer)["length kept"] == 1


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("   \n ", 0),
        ("#One #Two", 0),
        ("🎉🎉", 0),
        ("Buy now.", 1),
        ("Buy now", 1),
        ("Buy now. 🎉", 1),
        ("Hello 👋", 1),
        ("Buy. #One #Two", 1),
        ("Buy.\n\n#One #Two", 1),
        ("Great.#tag", 1),
        ("It costs 3.5 euro.", 1),
        ("Visit shop.example today.", 1),
        ("C# is fun.", 1),
        ("Wow!!! Great.", 2),
        ("Really?! Yes.", 2),
        ("Wait… there is more.", 2),
        ('"It lasts." Anna agrees.', 2),
        ("“Best pack ever!” says Anna.", 2),
        ("(Really.) Yes.", 2),
        ("One line\nAnother line", 2),
        ("- one\n- two", 2),
        ("Tired of the #ordinary? Try #GoPack today!", 2),
        ("First.\n\nSecond.\nThird", 3),
        ("Line one. Line two\nline three.", 3),
    ],
)
def test_sentence_count_of_a_text_is_known(text: str, count: int):
    assert sentence_count(text) == count


GOOD = "Still sorting receipts? Account does it for you. Open yours today and save an hour! #freelance"


def test_good_post_scores_one_on_every_check():
    found = TASK.scores(fields_of("short"), GOOD)
    assert found == dict.fromkeys(("length kept", "product named", "hashtag", "call to action", "only the post"), 1.0)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("length kept", "One. Two. Three.", "One. Two. Three. Four."),
        ("length kept", "One.", ""),
        ("length kept", "One. #a #b #c", "One. Two.\nThree.\nFour"),
        ("product named", "The Account is here.", "The bank is here."),
        ("product named", "ACCOUNT!", "Acc ount!"),
        ("hashtag", "Hello #go", "Hello # go"),
        ("hashtag", "#go", "C#go"),
        ("call to action", "It is good. Order yours today.", "Order is good. It lasts. It shines."),
        ("call to action", "It is good.\nTell us what you think! #go #now", "It is good. #order #now"),
        ("call to action", "It is good. Sign up.", "It is good. It signs up."),
        ("only the post", "Your week just got easier.", "Sure! Your week just got easier."),
        ("only the post", "Here is to you.", "Here is your post: Buy."),
        ("only the post", "A title for you.", "Title: Buy."),
        ("only the post", "Buy. We hope so.", "Buy. I hope this helps!"),
        ("only the post", "A witty tone, and short.", "Buy. Tone: witty"),
        ("only the post", "Let me know your favourite.", "Buy. Let me know if you want another."),
    ],
)
def test_check_tells_a_good_post_from_a_bad_one(check: str, good: str, bad: str):
    assert (TASK.scores(fields_of("short"), good)[check], TASK.scores(fields_of("short"), bad)[check]) == (1.0, 0.0)


@pytest.mark.parametrize(("length", "least", "most"), [("short", 1, 3), ("medium", 4, 6), ("long", 7, 40)])
def test_length_is_kept_from_its_least_to_its_most_sentences(length: str, least: int, most: int):
    kept = {count for count in range(41) if TASK.scores(fields_of(length), " ".join(["Go."] * count))["length kept"]}
    assert kept == set(range(least, most + 1))


@pytest.mark.parametrize("text", ["", " ", "#", "\x00", "🎉", "(" * 500, "a" * 10_000, "." * 10_000, "\n" * 10_000, "Buy. " * 3_000])
def test_scores_of_any_text_are_zero_or_one(text: str):
    assert set(TASK.scores(fields_of("short"), text).values()) <= {0.0, 1.0}


def test_scores_need_the_columns_of_a_row_only(rows: list[Example]):
    row = rows[0]
    assert TASK.scores({column: row.fields[column] for column in TASK.columns}, GOOD).keys() == TASK.scores(row.fields, GOOD).keys()


# ---------------------------------------------------------------- every task


def test_unknown_task_raises_user_error_that_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'posts'"):
        load("post")


def test_task_is_the_module_s_own():
    assert load("posts") is posts.TASK
