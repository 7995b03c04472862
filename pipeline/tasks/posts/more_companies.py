"""How a teacher is asked for a company, field by field, and what it must hold to be taken. Pure: no model is asked here.

The brief of a company decides its industry and size, which go into the company word for word: so a file of companies
tells which briefs are written already. A candidate is refused for what it is, or for one other company that it
resembles; one that was refused stays refused when more companies are there, so an interrupted run can go on.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count as numbers
from typing import NamedTuple

from pipeline.study import NAME
from pipeline.tasks import Conversation
from pipeline.tasks.posts import Company

INDUSTRIES = (
    "Bicycle repair", "Beekeeping supplies", "Dental laboratories", "Escape rooms", "Tea blending", "Fire safety equipment", "Piano restoration",
    "Houseplant nurseries", "Cheese making", "Climbing gyms", "Wedding photography", "Hearing aids", "Garden tools", "Fishing tackle", "Craft brewing",
    "Office cleaning", "Laundry services", "Children's books", "Camper van rental", "Coffee roasting", "Ceramic tableware", "Window glazing",
    "Driving schools", "Sewing patterns", "Reading glasses", "Home insurance", "Accounting software", "Sailing courses", "Soap making", "Wooden toys",
    "Hotel linen", "Elevator maintenance", "Running shoes", "Chocolate making", "Seed breeding", "Water filters", "Recycled paper", "Museum tours",
    "Translation services", "Massage therapy", "Ice cream parlours", "Roofing materials", "Car sharing", "Candle making", "Knitting yarn",
    "School catering", "Drone surveying", "Perfume making", "Warehouse robots", "Horse riding equipment", "Vegetable boxes", "Printing services",
)  # fmt: skip
PLACES = (
    "Ghent", "Porto", "Leeds", "Tallinn", "Halifax", "Tucson", "Bologna", "Graz", "Cork", "Aarhus", "Nantes", "Dunedin", "Hobart", "Pune", "Nairobi",
    "Accra", "Medellin", "Rosario", "Oaxaca", "Kyoto", "Busan", "Penang", "Cebu", "Izmir", "Krakow", "Brno", "Riga", "Tampere", "Bergen", "Duluth",
)  # fmt: skip
BUYERS = (
    "families with young children", "retired couples", "students", "small firms", "schools and town councils", "hotels and restaurants", "first-time buyers",
    "serious hobbyists", "people who live alone", "independent shops", "public hospitals", "visitors from abroad", "night-shift workers", "home owners",
)  # fmt: skip
"""Three lists of our own: any three of their entries make a company that could be."""


class Brief(NamedTuple):
    """What a company is to be about. No two briefs of a seed have both industry and size in common."""

    industry: str
    size: str
    buyers: str


def briefs(seed: int) -> Iterator[Brief]:
    """Without end; a longer run of a seed begins with a shorter one. Every industry comes once before one comes again."""
    seen: set[tuple[str, str]] = set()
    for cycle in numbers():
        dice = random.Random(f"briefs|{seed}|{cycle}")
        for industry in dice.sample(INDUSTRIES, len(INDUSTRIES)):
            brief = None
            while brief is None or (brief.industry, brief.size) in seen:
                # Log-uniform from 3 to 3,000: most companies are small, and some are not.
                brief = Brief(industry, f"{round(3 * 10 ** dice.uniform(0, 3))} employees in {dice.choice(PLACES)}", dice.choice(BUYERS))
            seen.add((brief.industry, brief.size))
            yield brief


# ---------------------------------------------------------------- how a field is asked and read


class Text(NamedTuple):
    """A field in prose. sentences: kept at most; words: wanted at least; chars: allowed at most."""

    label: str
    question: str
    sentences: int
    words: int
    chars: int


TEXTS = {
    "description": Text("Description", "Describe the company in two sentences.", 2, 8, 600),
    "offering": Text("Offering", "Say in one sentence what the company sells.", 1, 4, 300),
    "mission": Text("Mission", "Say in one sentence what the company wants to achieve.", 1, 4, 240),
    "history": Text("History", "Tell in two sentences how the company began.", 2, 8, 600),
    "audience": Text("Audience", "Say in one sentence who buys from the company.", 1, 3, 300),
    "simple_description": Text("In short", 'Say in one short sentence what the company does. Begin with "We".', 1, 4, 200),
}
"""Limits fit the companies of the tree (the longest: 401 characters) and single sentences of a model of 135M parameters."""

NAME_CHARS, NAME_WORDS = (3, 40), (1, 5)
PRODUCT_CHARS, PRODUCT_WORDS = (5, 60), (2, 7)
PRODUCTS = (8, 30)
"""Fewest and most products of a company. A model of 135M parameters names eight good ones; the tree has 21 or 22 each."""
PRODUCTS_ASKED, PRODUCTS_LISTED = 12, 10
"""Lists of ten are asked for until there are twelve different products, or as often as `pipeline.companies` allows."""
SHOTS = {"name": 6, "products": 2}
"""Companies of the tree that show how it is done: names need several, or a small model copies their form."""
TEXT_SHOTS = 2


def question(field: str, brief: Brief, written: Mapping[str, str], examples: Mapping[str, Company], dice: random.Random) -> Conversation:
    """Ask for one field, shown by companies of `examples` that `dice` draw.

    written: the fields that are there already. The question ends in the label of its answer, which is one line, or of products a list.
    """
    conversation: Conversation = []
    for slug in dice.sample(sorted(examples), min(SHOTS.get(field, TEXT_SHOTS), len(examples))):
        shown = examples[slug]
        if field == "products":
            answer = "\n".join(f"{number}. {product}" for number, product in enumerate(shown.products[:PRODUCTS_LISTED], 1))
        else:
            answer = str(getattr(shown, field))
        if field in TEXTS:
            answer = _sentences(answer, TEXTS[field].sentences)
        facts = {"name": shown.name, "offering": shown.offering}
        conversation += [
            {"role": "user", "content": _asked(field, Brief(shown.industry, shown.size, shown.audience), facts)},
            {"role": "assistant", "content": answer},
        ]
    return [*conversation, {"role": "user", "content": _asked(field, brief, written)}]


def _asked(field: str, brief: Brief, written: Mapping[str, str]) -> str:
    facts = [f"Industry: {brief.industry}"]
    if field == "name":
        return "\n".join([*facts, "", "Invent a name of two or three words for a company of this industry.", "Name:"])
    facts = [f"Company: {written['name']}", *facts]
    if field == "products":
        listed = f"List {PRODUCTS_LISTED} different products of this company, each in two to five words."
        return "\n".join([*facts, f"Offering: {written['offering']}", "", listed, "Products:"])
    text = TEXTS[field]
    return "\n".join([*facts, f"Size: {brief.size}", f"Customers: {brief.buyers}", "", text.question, f"{text.label}:"])


class Refused(NamedTuple):
    """Why an answer or a company was not taken: of a fixed set of texts, so that reasons can be counted."""

    reason: str


_LABEL = re.compile(r"^(?:name|products?|description|offering|mission|history|audience|in short|\d{1,2}[.)])\s*(?:[:\-]\s*|(?<=[.)])\s*)", re.IGNORECASE)
_ENDS = re.compile(r"[.!?…]+[\"'”’)]*(?=\s|$)")
_PLACEHOLDER = re.compile(
    r"[\[\]<>{}|*_#\\]|\b(?:tbd|tba|todo|n/?a|xxx+|lorem ipsum|placeholder|insert (?:your|the|name|company)|(?:your|my) company|company name|product name|"
    r"example\.com|as an ai|language model)\b|https?:|www\.|\bproduct \d",
    re.IGNORECASE,
)
_NAME = re.compile(r"[^\W\d_](?:[^\W_]|[ &'’.\-])*")
_PRODUCT = re.compile(r"[^\W_](?:[^\W_]|[ &'’.,+/\-])*")


def read_answer(field: str, text: str, finished: bool) -> str | Refused:
    """The value in a teacher's answer: its first line without label and quotes, of prose the whole sentences asked for.

    A name or a product that was cut off at the limit of tokens is refused; of prose the sentences before the cut are kept.
    """
    lines = text.strip().splitlines()
    value = " ".join(_LABEL.sub("", lines[0].strip().strip('"“”*')).split()).strip('"“”* ') if lines else ""
    if field in TEXTS:
        value = _sentences(value, TEXTS[field].sentences) or (value if finished else "")
    elif not finished and len(lines) < 2:
        return Refused(f"{field}: cut off")
    problem = problem_of(field, value)
    return Refused(problem) if problem else value


def read_products(text: str, finished: bool) -> list[str]:
    """The usable names of a list, a line each, without what explains them; the last line of a text that was cut off is left out."""
    lines = [part for line in text.strip().splitlines() for part in line.split(";")]
    names = (read_answer("products", re.split(r"\s[-–—]\s|[:(]", line)[0], True) for line in (lines if finished else lines[:-1]))
    return [name for name in names if isinstance(name, str)]


def _sentences(text: str, count: int) -> str:
    ends = [match.end() for match in _ENDS.finditer(text)]
    return text[: ends[min(count, len(ends)) - 1]] if ends else ""


# ---------------------------------------------------------------- checks


def problem_of(field: str, value: str) -> str | None:
    """What is wrong with one value of a field ("products": with one product), None if nothing is."""
    if not value.strip():
        return f"{field}: blank"
    if not value.isprintable() or "\ufffd" in value:
        return f"{field}: not printable"
    if _PLACEHOLDER.search(value):
        return f"{field}: placeholder"
    words = _words(value)
    if field == "products" and {"product", "products"} & set(words):
        return "products: placeholder"
    if field in TEXTS:
        text = TEXTS[field]
        return _length_problem(field, value, words, (1, text.chars), (text.words, text.chars))
    if field not in ("name", "products"):
        return _length_problem(field, value, words, (1, 80), (1, 12))
    chars, wanted, form = (NAME_CHARS, NAME_WORDS, _NAME) if field == "name" else (PRODUCT_CHARS, PRODUCT_WORDS, _PRODUCT)
    if problem := _length_problem(field, value, words, chars, wanted):
        return problem
    if not form.fullmatch(value) or re.search(r"\d{4}", value) or value[0].islower() or value.count(".") > 2 or max(map(len, words)) > 20:
        return f"{field}: not the form of a name"
    return f"{field}: says a word twice" if len(set(words)) < len(words) else None


def _length_problem(field: str, value: str, words: list[str], chars: tuple[int, int], wanted: tuple[int, int]) -> str | None:
    if len(value) < chars[0] or len(words) < wanted[0]:
        return f"{field}: too short"
    return f"{field}: too long" if len(value) > chars[1] or len(words) > wanted[1] else None


NEAR = 0.5
"""Resemblance from which two descriptions are one. The closest two in the tree have 0.1; a changed name alone gives 1."""


def refusal(company: Company, others: Mapping[str, Company]) -> str | None:
    """Why `company` cannot join `others` (slug -> company), None if it can: first what it is, then whom it resembles."""
    for field in Company.model_fields:
        for value in company.products if field == "products" else (str(getattr(company, field)),):
            if problem := problem_of(field, value):
                return problem
    if not PRODUCTS[0] <= len({kind_of(product) for product in company.products}) == len(company.products) <= PRODUCTS[1]:
        return f"products: not {PRODUCTS[0]} to {PRODUCTS[1]} different ones"
    slug = slug_of(company.name)
    if not NAME.fullmatch(slug):
        return "name: gives no short name of a-z, 0-9 and -"
    industry = _words(company.industry)
    if set(_words(company.name)) <= set(industry):
        return "name: only names the industry"
    told = _words(" ".join([company.name, company.description, company.offering, company.simple_description, *company.products]))
    if not any(word.startswith(stem) for stem in map(_stem, industry) for word in told):
        return "company: never mentions its industry"
    return next((problem for other_slug, other in others.items() if (problem := _clash(company, slug, other, other_slug))), None)


def kind_of(product: str) -> str:
    """What two names of one product have in common: its words without numbers and plurals."""
    return " ".join(word.removesuffix("s") for word in _words(product) if not word.isdigit())


def _clash(company: Company, slug: str, other: Company, other_slug: str) -> str | None:
    here, there = (f" {' '.join(_words(name))} " for name in (company.name, other.name))
    if slug == other_slug or _key(company.name) == _key(other.name) or here in there or there in here:
        return "name: taken by another company"
    if {_key(product) for product in company.products} & {_key(product) for product in other.products}:
        return "products: sold by another company"
    if resemblance(company, other) >= NEAR:
        return "description: near copy of another company's"
    return None


def resemblance(one: Company, other: Company) -> float:
    """Jaccard index in [0, 1] of the descriptions' character 5-grams (Broder 1997), each without its company's own name."""
    here, there = (_grams(company) for company in (one, other))
    return len(here & there) / len(here | there) if here | there else 1.0


def _grams(company: Company) -> set[str]:
    own = set(_words(company.name))
    text = " ".join(word for word in _words(company.description) if word not in own)
    return {text[start : start + 5] for start in range(max(1, len(text) - 4))}


def slug_of(name: str) -> str:
    """A short name for [tables] and studies: ASCII letters, digits and single hyphens, at most 40 characters; may be blank."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", ""))


def _key(text: str) -> str:
    return "".join(_words(text))


def _stem(word: str) -> str:
    """Near enough for 'brewing' and 'brewery', 'toys' and 'toy'."""
    return word[: max(3, len(word) - 3)]


Candidate = Company | Refused
Asked = Callable[[Sequence[tuple[int, Brief]], int], Iterator[Candidate]]
"""Slots with their briefs, attempt -> a candidate for each, in their order."""
