"""Sales posts for social media: company x product x post type x tone, after Infantino 2024.

The rich prompt tells the teacher the whole company and the criteria of a good post; the plain prompt names neither,
so that a fine-tune has to learn the criteria from the posts. Companies are data files beside this module.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from itertools import product as cross
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import UserError, nearest
from pipeline.study import NAME
from pipeline.study import parse as parse_model
from pipeline.tasks import SEEN, Conversation, Criterion, DataFile, Example, Parsed, Rubric, Task, row_id

COMPANIES = Path(__file__).parent / "companies"


class PostType(NamedTuple):
    length: str
    criteria: tuple[str, ...]


LENGTHS = {"short": (1, 3), "medium": (4, 6), "long": (7, None)}
"""Sentences from, to (None: no upper end)."""

TONES = ("professional", "enthusiastic", "witty", "inspirational", "conversational")
"""Infantino 2024 names the first four of its five tones; the fifth is our choice."""

UNIVERSAL = (
    "open with a bold claim or a question that stops the scroll",
    "be concise; every sentence earns its place",
    "end on one clear, strong call to action",
    "show what the reader gains from the product",
    "make plain what only this product offers",
    "sound like this brand and no other",
    "carry hashtags and keywords that the platform can pick up",
)

TYPES = {
    "promotional": PostType("short", (
        "announce a sale, a discount or a special offer",
        "make the deadline felt",
        "say for whom the offer is reserved",
    )),
    "question": PostType("short", (
        "ask the reader something about the product's use",
        "address the reader personally",
    )),
    "feature highlight": PostType("short", (
        "single out one feature or benefit",
        "describe it so vividly that it can be pictured",
    )),
    "comparison": PostType("short", ("set the product against a rival or its own earlier version",)),
    "announcement": PostType("short", (
        "break the news of a launch or an update",
        "tie it to the season or to a current theme",
    )),
    "educational": PostType("medium", (
        "teach something useful around the product",
        "include a tip or a surprising fact",
    )),
    "testimonial": PostType("medium", (
        "let a customer's experience speak",
        "quote a satisfied customer",
        "add social proof such as customer numbers or an award",
    )),
    "user-generated content": PostType("medium", (
        "share something that a customer made or posted",
        "show what using the product was like and what it brought",
    )),
    "value proposition": PostType("medium", (
        "state what sets the product apart",
        "go from the problem to the solution",
    )),
    "storytelling": PostType("long", (
        "tell a story in which the product makes the difference",
        "use vivid, sensory language",
        "let the reader recognise themselves in it",
    )),
    "interactive": PostType("long", (
        "run a poll, a quiz or a contest",
        "use elements that invite a reaction",
        "ask the audience to take part and to share",
    )),
}  # fmt: skip
"""Post type -> its length and its own criteria (Infantino 2024, the lists of step 1)."""


class Company(BaseModel):
    """One company file. Every field is needed and none may be blank."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_min_length=1, str_strip_whitespace=True)

    name: str
    description: str
    industry: str
    mission: str
    offering: str
    size: str
    history: str
    audience: str
    simple_description: str
    products: tuple[str, ...] = Field(min_length=1)

    @field_validator("products")
    @classmethod
    def _distinct(cls, products: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(products)) < len(products):
            raise ValueError("products must be distinct")
        return products

    @property
    def profile(self) -> str:
        return f"{self.description} It offers: {self.offering} It sells to: {self.audience}"


NEW_COMPANY, NEW_PRODUCT, NEW_STYLE = "new company", "new product", "new tone or type"


class Params(BaseModel):
    """The [task] table of a study: what training sees, and what is held out for evaluation.

    `companies` and `held_out` are names of companies: a file in companies/, or `name` in the study's own `companies_file`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    companies: tuple[str, ...] | None = None
    """Who training rows are written for; all that are not held out where not given."""
    companies_file: DataFile | None = None
    """More companies, as `datadose companies` writes them; where given and `companies` is not, they are all that there is."""
    held_out: tuple[str, ...] = ()
    held_out_products: tuple[str, ...] = ()
    held_out_types: tuple[str, ...] = ()
    held_out_tones: tuple[str, ...] = ()
    tiers: tuple[str, ...] | None = None
    """Which tiers to evaluate; every one that is held out where not given, and what training sees where nothing is."""
    trim: bool = False
    """Keep of the teacher's post as many whole sentences as were asked for: small teachers do not stop by themselves."""

    @field_validator("companies", "held_out", "held_out_products", "held_out_types", "held_out_tones", "tiers")
    @classmethod
    def _distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names and len(set(names)) < len(names):
            raise ValueError("names must be distinct")
        return names

    @model_validator(mode="after")
    def _known(self) -> Params:
        for given, known in ((self.held_out_types, TYPES), (self.held_out_tones, TONES), (self.tiers or (), (SEEN, *self.novelties))):
            for name in given:
                if name not in known:
                    raise ValueError(f"{name!r} is not one of {list(known)}; {nearest(name, known)}")
        return self

    @property
    def novelties(self) -> list[str]:
        """Tiers for which something is held out."""
        held = {NEW_COMPANY: self.held_out, NEW_PRODUCT: self.held_out_products, NEW_STYLE: (*self.held_out_types, *self.held_out_tones)}
        return [tier for tier, names in held.items() if names]


def train(params: Params) -> Iterator[Example]:
    return (row for row in _cross_product(params) if row.tier == SEEN)


def evaluation(params: Params) -> Iterator[Example]:
    wanted = params.tiers or params.novelties or [SEEN]
    return (row for row in _cross_product(params) if row.tier in wanted)


@functools.lru_cache(maxsize=1)
def _cross_product(params: Params) -> tuple[Example, ...]:
    """Every row that is new in one respect at most, with its tier."""
    own = companies_in(params.companies_file) if params.companies_file else {}
    names = params.companies
    if names is None:
        names = tuple(slug for slug in (own or company_names()) if slug not in params.held_out)
    if both := sorted(set(names) & set(params.held_out)):
        raise UserError(f"companies {both} are both trained on and held out; take them from one of the lists")
    unknown = set(params.held_out_products)
    rows = []
    for slug in (*names, *params.held_out):
        company = own[slug] if slug in own else company_named(slug, own)
        unknown -= set(company.products)
        for product, (kind, post), tone in cross(company.products, TYPES.items(), TONES):
            new = [
                tier
                for tier, is_new in (
                    (NEW_COMPANY, slug in params.held_out),
                    (NEW_PRODUCT, product in params.held_out_products),
                    (NEW_STYLE, kind in params.held_out_types or tone in params.held_out_tones),
                )
                if is_new
            ]
            if len(new) > 1:
                continue
            fields = {
                "company": company.name, "product": product, "type": kind, "length": post.length, "tone": tone,
                "profile": company.profile, "simple": company.simple_description,
            }  # fmt: skip
            rows.append(Example(row_id(TASK.name, TASK.columns, fields), fields, new[0] if new else SEEN))
    if unknown:
        raise UserError(f"held_out_products {sorted(unknown)} are sold by none of the study's companies; take names from their files")
    return tuple(rows)


def company_names() -> list[str]:
    return sorted(path.stem for path in COMPANIES.glob("*.toml"))


def company_named(slug: str, own: Iterable[str] = ()) -> Company:
    """Raises UserError where the company is not there, not UTF-8 or not as the schema wants it."""
    if slug not in company_names():
        known = [*own, *company_names()]
        raise UserError(f"company {slug!r} does not exist; {nearest(slug, known)}")
    return read_company(COMPANIES / f"{slug}.toml")


@functools.cache
def read_company(path: Path) -> Company:
    return parse_model(Company, _toml(path.read_bytes(), str(path)), path.name)


@functools.cache
def companies_in(file: DataFile) -> dict[str, Company]:
    """A file with a table [slug] for each company, as `datadose companies` writes it."""
    raw = _toml(file.read(), file.path)
    bad = [slug for slug, company in raw.items() if not NAME.fullmatch(slug) or not isinstance(company, dict)]
    if bad or not raw:
        raise UserError(f"{file.path}: wanted one table for each company, [its-short-name], got {bad or 'none'}")
    return {slug: parse_model(Company, company, f"{file.path}: [{slug}]") for slug, company in raw.items()}


def _toml(data: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from error


# ---------------------------------------------------------------- prompts


def sentences_asked(length: str) -> str:
    low, high = LENGTHS[length]
    return f"{low} to {high} sentences" if high else f"{low} sentences or more"


ONLY_THE_POST = "Reply with the text of the post and nothing else: no title, no comment, no explanation."

# What all rows share comes first, then what few rows differ in: an engine with a prefix cache reads it once.
RICH_SYSTEM = f"You write sales posts for social media and know how to win a moment of attention. Every post must {'; '.join(UNIVERSAL)}. {ONLY_THE_POST}"
PLAIN_SYSTEM = "You write for social media."


def rich(fields: Mapping[str, str]) -> Conversation:
    asked = sentences_asked(fields["length"])
    user = (
        f"About {fields['company']}: {fields['profile']}\n"
        f"A post of the type {fields['type']!r} must also {'; '.join(TYPES[fields['type']].criteria)}.\n"
        f"Write a {fields['tone']} {fields['type']} post of {fields['length']} length ({asked}) that sells {fields['product']}. "
        f"Name {fields['product']}, end with a call to action and add hashtags."
    )
    return [{"role": "system", "content": RICH_SYSTEM}, {"role": "user", "content": user}]


def plain(fields: Mapping[str, str]) -> Conversation:
    user = (
        "Write a sales post for my company's product. Reply with the post only.\n"
        f"Company: {fields['company']}. {fields['simple']}\nProduct: {fields['product']}\n"
        f"Length: {sentences_asked(fields['length'])}\nType: {fields['type']}\nTone: {fields['tone']}"
    )
    return [{"role": "system", "content": PLAIN_SYSTEM}, {"role": "user", "content": user}]


def parse(params: Params, fields: Mapping[str, str], text: str, finished: bool) -> Parsed:
    """A post is whatever text came back; blank text is no post, and a text that was cut off is none unless trimmed."""
    answer = text.strip()
    if not answer:
        return Parsed("unparsed", None)
    low, high = LENGTHS[fields["length"]]
    if params.trim:
        ends = [match.end() for match in _SENTENCE_END.finditer(answer)]
        if len(ends) >= low and (not finished or (high is not None and len(ends) > high)):
            return Parsed("ok", answer[: ends[min(len(ends), high or len(ends)) - 1]])
    return Parsed("ok", answer) if finished else Parsed("truncated", None)


RUBRIC = Rubric("sales posts for social media", (
    Criterion("Message Clarity", "the core message is understood at once and cannot be mistaken"),
    Criterion("Brevity", "it says what it has to say in few words and keeps to the length asked for"),
    Criterion("Language Simplicity", "its words and sentences are plain, without jargon"),
    Criterion("Call to Action", "it tells the reader clearly what to do next, and makes that tempting"),
    Criterion("Emotional Appeal", "it stirs a feeling that speaks for the product"),
    Criterion("Target Audience Fit", "it speaks to the people who would buy the product, about what matters to them"),
    Criterion("Timeliness", "it goes with current trends, seasons or events"),
    Criterion("Tone of Voice Consistency", "it keeps the tone asked for and the voice of the brand from the first word to the last"),
    Criterion("Benefit Highlighting", "it shows what the reader gains, not only what the product has"),
    Criterion("Unique Selling Point", "it makes plain what sets this product apart from others"),
    Criterion("Creativity and Originality", "it has an idea of its own and stands out among other posts"),
    Criterion("Social Proof", "it backs its claims with customers, reviews, numbers or awards"),
    Criterion("Hashtag and Keyword Usage", "its hashtags and keywords are relevant, findable and not too many"),
    Criterion("Transparency", "it discloses partnerships and sponsorships where there are any"),
    Criterion("Honesty", "it promises nothing that the product cannot keep and misleads nobody"),
))  # fmt: skip
"""The names are those of Infantino 2024."""


# ---------------------------------------------------------------- exact scores

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)]*(?=\s|$)")
_HASHTAG = re.compile(r"(?<!\w)#\w+")
_CALL = re.compile(
    r"\b(?:add|apply|ask|book|browse|buy|call|check|choose|claim|click|comment|contact|discover|dm|download|enter|explore|find|"
    r"follow|get|give|grab|join|learn|let us know|message|order|pick|pre-?order|register|reply|request|reserve|save|schedule|"
    r"see|send|share|shop|sign up|start|stop by|subscribe|swipe|tag|take|tap|tell us|try|upgrade|visit|vote|watch)\b",
    re.IGNORECASE,
)
_EXTRA = re.compile(
    r"^\W*(?:here(?:'s| is| are)\b[^\n]*:|sure\b|certainly\b|of course\b|(?:sales |social media )?post\s*:|title\s*:|subject\s*:|as an ai\b)"
    r"|\b(?:post type|post length|tone|length|type)\s*:\s|\bi hope this\b|\blet me know if you\b|\bnote:\s",
    re.IGNORECASE,
)


def sentence_count(text: str) -> int:
    """Sentences of a post: ends of sentences, and lines of words that have none; hashtags are not sentences."""
    count = 0
    for line in _HASHTAG.sub("", text).splitlines():
        if not re.search(r"\w", line):
            continue
        count += len(_SENTENCE_END.findall(line))
        tail = _SENTENCE_END.split(line)[-1]
        count += bool(re.search(r"\w", tail))
    return count


def scores(fields: Mapping[str, str], answer: str) -> dict[str, float]:
    """Exact checks, each 0 or 1. The call to action is an imperative of a fixed list in the last two sentences."""
    low, high = LENGTHS[fields["length"]]
    count = sentence_count(answer)
    ending = " ".join(re.split(r"(?<=[.!?…])\s+|\n+", _HASHTAG.sub("", answer).strip())[-2:])
    return {
        "length kept": float(low <= count and (high is None or count <= high)),
        "product named": float(fields["product"].casefold() in answer.casefold()),
        "hashtag": float(bool(_HASHTAG.search(answer))),
        "call to action": float(bool(_CALL.search(ending))),
        "only the post": float(not _EXTRA.search(answer)),
    }


TASK = Task(
    name="posts", version=1, columns=("company", "product", "type", "length", "tone"), strata=("type", "tone", "length"),
    cluster="company", params=Params, train=train, evaluation=evaluation, rich=rich, plain=plain, parse=parse, rubric=RUBRIC, scores=scores,
)  # fmt: skip
