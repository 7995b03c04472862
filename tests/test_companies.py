"""`datadose companies`: what a candidate must hold to be taken, and a file that is never lost and ends the same."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.companies import ATTEMPTS, fill, read_companies, write_company
from pipeline.errors import UserError, WriteError
from pipeline.llm import open_model
from pipeline.runtime import Runtime
from pipeline.study import NAME, Sampling
from pipeline.tasks.posts import Company, company_named, company_names
from pipeline.tasks.posts.more_companies import INDUSTRIES, TEXTS, Brief, Refused, briefs, question, read_answer, read_products, refusal, slug_of
from tests.runs import SMALL, datadose

fast = pytest.mark.fast
TREE = {slug: company_named(slug) for slug in company_names()}


def kites(**changed: Any) -> Company:
    fields = {
        "name": "Gale Street Kites",
        "description": "Gale Street sews kites from spinnaker cloth in an old net loft and tests every one on the pier before it is sold.",
        "industry": "Kites and windsocks",
        "mission": "To get more people to look up.",
        "offering": "Kites, lines and repair lessons for every wind.",
        "size": "4 employees in Nantes",
        "history": "Two sailmakers began in 2019 with the cloth that was left over. A beach festival made them known.",
        "audience": "Families and clubs by the sea.",
        "simple_description": "We sew kites by hand.",
        "products": tuple(f"{wind} Kite" for wind in ("Breeze", "Squall", "Mistral", "Zephyr", "Monsoon", "Sirocco", "Chinook", "Tramontane")),
    }
    return Company(**{**fields, **changed})


# ---------------------------------------------------------------- checks


@fast
@pytest.mark.parametrize("slug", sorted(TREE))
def test_company_of_the_tree_would_be_taken_beside_the_others_under_its_own_short_name(slug: str):
    assert refusal(TREE[slug], {other: company for other, company in TREE.items() if other != slug}) is None
    assert slug_of(TREE[slug].name) == slug


@fast
def test_good_company_is_taken_beside_the_tree():
    assert refusal(kites(), TREE) is None


@fast
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"name": "[name] Kites"}, "name: placeholder"),
        ({"name": "Ox"}, "name: too short"),
        ({"name": "The Very Best Kite Company of Nantes"}, "name: too long"),
        ({"name": "gale street kites"}, "name: not the form"),
        ({"name": "Gale Street (Kites)"}, "name: not the form"),
        ({"name": "Gale Kites Kites"}, "name: says a word twice"),
        ({"name": "Kites and Windsocks"}, "name: only names the industry"),
        ({"name": "凧の会"}, "name: gives no short name"),
        ({"name": "Gale\u200b Street"}, "name: not printable"),
        ({"mission": "TBD"}, "mission: placeholder"),
        ({"mission": "Lorem ipsum dolor sit amet."}, "mission: placeholder"),
        ({"mission": "More wind."}, "mission: too short"),
        ({"mission": "More wind " * 30}, "mission: too long"),
        ({"history": "Founded by [founder] in 2019 with nothing but cloth and a pier."}, "history: placeholder"),
        ({"audience": "Families by\x07the sea."}, "audience: not printable"),
        ({"description": "Sells kites."}, "description: too short"),
        ({"size": "4\nemployees"}, "size: not printable"),
        ({"products": ("Breeze Kite", "Squall Kite")}, "products: not 8 to 30"),
        ({"products": tuple(f"Breeze {'-' * index}Kite" for index in range(8))}, "products:"),
        ({"products": tuple(f"Kite Model {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜÉÈ")}, "products: not 8 to 30"),
        ({"products": tuple(f"Breeze Kite {number}" for number in range(1, 9))}, "products: not 8 to 30"),
        ({"products": (*kites().products, "Breeze Kites")}, "products: not 8 to 30"),
        ({"products": (*kites().products, "Kite")}, "products: too short"),
        ({"products": (*kites().products, "Kite - 3208761")}, "products: not the form"),
        ({"industry": "Horse riding equipment"}, "company: never mentions its industry"),
    ],
)
def test_candidate_with_a_fault_is_refused_for_it(changed: dict[str, Any], reason: str):
    found = refusal(kites(**changed), TREE)
    assert found is not None
    assert found.startswith(reason)


@fast
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"name": "GALE-STREET KITES!"}, "name: taken"),
        ({"name": "Gale Street"}, "name: taken"),
        ({"name": "Old Gale Street Kites"}, "name: taken"),
        ({"name": "Northern Loft", "products": ("MISTRAL-Kite",)}, "products: sold by another"),
        ({"name": "Northern Loft", "products": ("Loft Lamp",)}, "description: near copy"),
        ({"name": "Northern Loft", "products": ("Loft Lamp",), "description": kites().description.replace("pier", "beach")}, "description: near copy"),
    ],
)
def test_candidate_that_resembles_another_company_is_refused_for_it(other: dict[str, Any], reason: str):
    found = refusal(kites(), {**TREE, "other": kites(**other)})
    assert found is not None
    assert found.startswith(reason)


@fast
def test_company_that_shares_only_its_trade_with_another_is_taken():
    other = kites(name="Northern Loft", products=("Loft Lamp",), description="Northern Loft imports kites from Weifang and sells them to toy shops in winter.")
    assert refusal(kites(), {"other": other}) is None


@fast
@given(st.text(max_size=120))
def test_name_of_any_text_gives_a_short_name_or_none(name: str):
    slug = slug_of(name)
    assert slug == "" or NAME.fullmatch(slug)


@fast
@given(st.sampled_from(["name", "products", *TEXTS]), st.text(st.characters(), max_size=300), st.booleans())
def test_answer_of_any_text_is_one_printable_line_or_is_refused(field: str, text: str, finished: bool):
    value = read_answer(field, text, finished)
    assert all(name.isprintable() for name in read_products(text, finished))
    assert isinstance(value, Refused) or (value.isprintable() and value == value.strip() != "")


@fast
@given(st.fixed_dictionaries({field: st.text(min_size=1, max_size=80).filter(str.strip) for field in ("name", "description", "industry", "offering")}))
def test_company_of_any_text_is_judged(fields: dict[str, str]):
    found = refusal(kites(**fields), TREE)
    assert found is None or ": " in found


@fast
@pytest.mark.parametrize(
    ("field", "text", "finished", "value"),
    [
        ("name", ' Name: "Gale Street Kites"\nAnother', True, "Gale Street Kites"),
        ("products", "3. Breeze Kite", True, "Breeze Kite"),
        ("mission", "Mission: To get people to look up. And then to", False, "To get people to look up."),
        ("mission", "To get people to look up", True, "To get people to look up"),
        ("history", "Two sailmakers began with cloth. They sold it all. Then more came.", True, "Two sailmakers began with cloth. They sold it all."),
    ],
)
def test_answer_is_its_first_line_without_label_in_whole_sentences(field: str, text: str, finished: bool, value: str):
    assert read_answer(field, text, finished) == value


@fast
@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("name", "Gale Street Kit", "name: cut off"),
        ("mission", "To get people to look up and", "mission: blank"),
        ("mission", "", "mission: blank"),
        ("history", "[Insert history here, in about two sentences].", "history: placeholder"),
    ],
)
def test_answer_that_is_cut_off_or_empty_is_refused(field: str, text: str, reason: str):
    assert read_answer(field, text, False) == Refused(reason)


@fast
def test_list_of_products_gives_the_usable_names_and_not_the_one_that_was_cut_off():
    text = "Products:\n1. Breeze Kite\n2. Squall Kite: for storms\n3) Zephyr Kite - light\n4. Product 3\n5. Kite\n6. Mistral Kite; Chinook Kite\n7. Sirocco K"
    assert read_products(text, False) == ["Breeze Kite", "Squall Kite", "Zephyr Kite", "Mistral Kite", "Chinook Kite"]
    assert read_products(text, True)[-1] == "Sirocco K"


# ---------------------------------------------------------------- briefs


@fast
def test_briefs_of_a_seed_are_the_same_all_different_and_cover_every_industry():
    first = list(islice(briefs(1), 500))
    assert first == list(islice(briefs(1), 500))
    assert first[:20] != list(islice(briefs(2), 20))
    assert len({(brief.industry, brief.size) for brief in first}) == 500
    assert {brief.industry for brief in first[: len(INDUSTRIES)]} == set(INDUSTRIES)
    assert len(INDUSTRIES) >= 40


@fast
def test_industry_and_size_of_every_brief_pass_the_checks():
    for brief in islice(briefs(3), 300):
        found = refusal(kites(industry=brief.industry, size=brief.size), {})
        assert found in (None, "company: never mentions its industry")


@fast
def test_question_shows_companies_of_the_tree_but_not_their_answer_to_it():
    import random

    brief = next(briefs(1))
    asked = question("mission", brief, {"name": "Gale Street"}, TREE, random.Random(1))
    users, answers = [[item["content"] for item in asked if item["role"] == role] for role in ("user", "assistant")]
    assert "Company: Gale Street" in users[-1]
    assert brief.industry in users[-1]
    assert users[-1].endswith("Mission:")
    assert set(answers) <= {company.mission for company in TREE.values()}


# ---------------------------------------------------------------- the file


def by_teacher(slots: Sequence[tuple[int, Brief]], attempt: int) -> Iterator[Company | Refused]:
    """The scripted teacher without Ray."""
    model = open_model("scripted/writer", Runtime(), "float32")
    return (asyncio.run(write_company(model, Sampling(), slot, brief, attempt, 7)) for slot, brief in slots)


def hard_teacher(slots: Sequence[tuple[int, Brief]], attempt: int) -> Iterator[Company | Refused]:
    """Every third company comes late, and every fifth attempt has the name of the first company."""
    for (slot, _), company in zip(slots, by_teacher(slots, attempt), strict=True):
        if (slot + attempt) % 3 == 0:
            yield Refused("mission: too short")
        else:
            yield company.model_copy(update={"name": "Gale Street"}) if isinstance(company, Company) and (slot + attempt) % 5 == 1 else company


class KilledError(Exception):
    pass


@fast
def test_companies_of_the_same_seed_are_the_same_and_a_study_can_read_them(tmp_path: Path):
    for name in ("one", "two"):
        assert fill(tmp_path / name, 6, 7, by_teacher, print).there == 6
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_companies(tmp_path / "one")
    assert {slug_of(company.name) for company in found.values()} == set(found)
    assert all(refusal(company, {**TREE, **{other: item for other, item in found.items() if other != slug}}) is None for slug, company in found.items())


@fast
@pytest.mark.parametrize("kill_after", [0, 1, 4, 7])
def test_run_killed_after_any_candidate_keeps_the_accepted_and_ends_as_an_undisturbed_one(tmp_path: Path, kill_after: int):
    whole = fill(tmp_path / "whole", 6, 7, hard_teacher, print)
    assert whole.there == 6
    assert {"mission: too short", "name: taken by another company"} <= whole.refused.keys()
    before_the_kill = iter(range(kill_after))

    def dying(slots: Sequence[tuple[int, Brief]], attempt: int) -> Iterator[Company | Refused]:
        for candidate in hard_teacher(slots, attempt):
            if next(before_the_kill, None) is None:
                raise KilledError
            yield candidate

    said: list[str] = []
    try:
        fill(tmp_path / "part", 6, 7, dying, said.append)
    except KilledError:
        assert len(said) < 6
        assert len(read_companies(tmp_path / "part")) == len(said)
    assert fill(tmp_path / "part", 6, 7, hard_teacher, print).there == 6
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


@fast
def test_full_file_asks_for_nothing_and_stays_as_it_is(tmp_path: Path):
    fill(tmp_path / "file", 3, 7, by_teacher, print)
    before = (tmp_path / "file").read_bytes()

    def nobody(slots: Sequence[tuple[int, Brief]], attempt: int) -> Iterator[Company | Refused]:
        raise AssertionError("was asked")

    assert fill(tmp_path / "file", 3, 7, nobody, print) == (3, 0, {})
    assert fill(tmp_path / "file", 2, 7, nobody, print) == (3, 0, {})
    assert (tmp_path / "file").read_bytes() == before


@fast
def test_companies_and_comments_of_the_users_own_stay_and_count(tmp_path: Path):
    own = '# ours\n[gale]\nname = "Gale" # short\nproducts = ["Kite"]\n' + "".join(
        f'{field} = "x"\n' for field in Company.model_fields if field not in ("name", "products")
    )
    (tmp_path / "file").write_text(own)
    assert fill(tmp_path / "file", 3, 7, by_teacher, print)[:2] == (3, 2)
    assert (tmp_path / "file").read_text().startswith(own)
    assert len(tomllib.loads((tmp_path / "file").read_text())) == 3


@fast
def test_teacher_that_never_gives_a_good_company_ends_with_every_reason_counted(tmp_path: Path):
    def hopeless(slots: Sequence[tuple[int, Brief]], attempt: int) -> Iterator[Company | Refused]:
        return (Refused("name: too long") if slot else kites(name="Penrook") for slot, _ in slots)

    outcome = fill(tmp_path / "file", 3, 7, hopeless, print)
    assert outcome[:2] == (0, 0)
    assert outcome.refused == {"name: too long": 2 * ATTEMPTS, "name: taken by another company": ATTEMPTS}
    assert not (tmp_path / "file").exists()


@fast
@pytest.mark.parametrize("text", ["", "[gale", "[gale]\nname = 'Gale'\n", "name = 'Gale'"])
def test_file_that_is_none_of_companies_is_refused_and_left_alone(tmp_path: Path, text: str):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError):
        fill(tmp_path / "file", 3, 7, by_teacher, print)
    assert (tmp_path / "file").read_text() == text


@fast
def test_file_that_another_program_changes_meanwhile_is_noticed(tmp_path: Path):
    def meddling(_: str) -> None:
        (tmp_path / "file").unlink()

    with pytest.raises(WriteError, match="changed by another program"):
        fill(tmp_path / "file", 2, 7, by_teacher, meddling)


# ---------------------------------------------------------------- the command


def test_command_writes_companies_that_a_study_plans_with_and_does_nothing_again(tmp_path: Path, ray_address: str):
    (tmp_path / "small.toml").write_text(SMALL)
    out = tmp_path / "more.toml"
    arguments = ("companies", tmp_path / "small.toml", "--count", "3", "--seed", "5", "--out", out)
    first = datadose(*arguments, store=tmp_path / "store", RAY_ADDRESS=ray_address)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(read_companies(out)) == 3
    before = out.read_bytes()
    again = datadose(*arguments, store=tmp_path / "store")
    assert again.returncode == 0
    assert "nothing to write" in again.stdout
    assert out.read_bytes() == before
    text = SMALL.replace('companies = ["penrook"]', 'companies_file = "more.toml"')
    (tmp_path / "mine.toml").write_text(text)
    planned = datadose("plan", tmp_path / "mine.toml", store=tmp_path / "store")
    assert planned.returncode == 0, planned.stderr
    assert "24 training rows" in planned.stdout


def test_command_whose_every_candidate_is_refused_ends_with_3_and_the_reasons(tmp_path: Path, ray_address: str):
    (tmp_path / "small.toml").write_text(SMALL)
    taken = "".join(f'{field} = "Works"\n' for field in Company.model_fields if field != "products")  # the scripted teacher's names end so
    (tmp_path / "more.toml").write_text(f"[works]\n{taken}products = ['Works']\n")
    run = datadose("companies", tmp_path / "small.toml", "--count", "3", "--out", tmp_path / "more.toml", store=tmp_path, RAY_ADDRESS=ray_address)
    assert run.returncode == 3, run.stderr
    assert "1 of 3 companies were accepted" in run.stdout.replace("\n", " ")
    assert f"refused {2 * ATTEMPTS} times: name: taken by another company" in run.stdout


@fast
@pytest.mark.parametrize(
    ("study", "arguments", "said"),
    [
        (SMALL, ["--count", "0"], "--count"),
        (SMALL, [], "--count"),
        (SMALL, ["--count", "2", "--out", "nowhere/x.toml"], "is not there"),
        (SMALL.replace('teacher = "scripted/writer"', ""), ["--count", "2"], "synthesis.teacher"),
        (SMALL.replace('name = "posts"', 'name = "other"'), ["--count", "2"], "only 'posts'"),
    ],
)
def test_bad_arguments_end_with_2_and_what_to_do(tmp_path: Path, study: str, arguments: list[str], said: str):
    (tmp_path / "small.toml").write_text(study)
    run = datadose("companies", tmp_path / "small.toml", *arguments, store=tmp_path)
    assert run.returncode == 2
    assert said in run.stderr.replace("\n", " ")
