"""More companies for the task `posts`, written by a study's teacher into one TOML file that a study names as `companies_file`.

A company is in the file as soon as it is accepted and the file is whole at every moment. Candidates are decided in
the order of attempt and brief, whatever order they arrive in: a run that was killed ends as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import StageError, UserError, WriteError
from pipeline.llm import Completion, LanguageModel, Request, engine_environment, open_model, seed_of
from pipeline.llm.limiter import Limiter, limiter_for
from pipeline.runtime import Runtime
from pipeline.study import Sampling, Study, parse
from pipeline.tasks import DataFile
from pipeline.tasks.posts import Company, companies_in, company_named, company_names
from pipeline.tasks.posts.more_companies import (
    PRODUCTS,
    PRODUCTS_ASKED,
    TEXTS,
    Asked,
    Brief,
    Candidate,
    Refused,
    briefs,
    kind_of,
    question,
    read_answer,
    read_products,
    refusal,
    slug_of,
)

ATTEMPTS = 5
"""Times that a company is asked for from its name on, each with seeds of its own."""
FIELD_TRIES = 6
"""Times that one field of a candidate is asked for before the candidate is refused: a small model misses the form now and then."""
NAME_TOKENS, TEXT_TOKENS = 24, 160


class Outcome(NamedTuple):
    """there: companies in the file. added: of them in this run. refused: reason -> candidates of this run."""

    there: int
    added: int
    refused: Counter[str]


async def write_company(model: LanguageModel, sampling: Sampling, slot: int, brief: Brief, attempt: int, seed: int) -> Candidate:
    """One candidate, asked for field by field. A function of its arguments alone: not of the batch, not of other candidates."""
    examples = {slug: company_named(slug) for slug in company_names()}
    written: dict[str, str] = {}

    async def ask(field: str, number: int) -> Completion:
        # A field's tries show the same examples: an engine with a prefix cache reads them once (a second a try on a CPU).
        conversation = question(field, brief, written, examples, random.Random(seed_of("company examples", slot, attempt, seed, field)))
        asked = sampling.model_copy(update={"max_tokens": NAME_TOKENS if field == "name" else TEXT_TOKENS, "stop": () if field == "products" else ("\n",)})
        return await model.complete(Request(conversation, asked, seed_of("company", slot, attempt, seed, field, number)))

    for field in ("name", *TEXTS):
        for number in range(FIELD_TRIES):
            answer = await ask(field, number)
            value = read_answer(field, answer.text, answer.status == "ok")
            if isinstance(value, str):
                break
        if isinstance(value, Refused):
            return value
        written[field] = value
    named: dict[str, str] = {}
    for number in range(FIELD_TRIES):
        answer = await ask("products", number)
        for product in read_products(answer.text, answer.status == "ok"):
            named.setdefault(kind_of(product), product)
        if len(named) >= PRODUCTS_ASKED:
            break
    named.pop(kind_of(written["name"]), None)  # the company is not a product of its own
    products = list(named.values())[: PRODUCTS[1]]
    if len(products) < PRODUCTS[0]:
        return Refused(f"products: fewer than {PRODUCTS[0]} usable ones")
    return parse(Company, {**written, "industry": brief.industry, "size": brief.size, "products": products}, f"company {slot}")


def fill(path: Path, count: int, seed: int, asked: Asked, say: Callable[[str], None]) -> Outcome:
    """Ask until the file at `path` holds `count` companies or every brief had its attempts; each is written when accepted.

    Companies that are in the file already count, whoever wrote them. Raises UserError for a file that is none of
    companies, WriteError where it cannot be written.
    """
    there = read_companies(path)
    others = {slug: company_named(slug) for slug in company_names()} | there
    taken = {(company.industry, company.size) for company in there.values()}
    open_slots = [(slot, brief) for slot, brief in enumerate(itertools.islice(briefs(seed), count)) if (brief.industry, brief.size) not in taken]
    open_slots = open_slots[: max(0, count - len(there))]
    before, refused = len(there), Counter[str]()
    for attempt in range(ATTEMPTS if open_slots else 0):
        left = []
        for place, candidate in zip(open_slots, asked(open_slots, attempt), strict=True):
            problem = candidate.reason if isinstance(candidate, Refused) else refusal(candidate, others)
            if isinstance(candidate, Refused) or problem:
                refused[problem or ""] += 1
                left.append(place)
                continue
            slug = slug_of(candidate.name)
            _append(path, slug, candidate)
            there[slug] = others[slug] = candidate
            say(f"{len(there)} of {count}: {candidate.name} ({candidate.industry}), {len(candidate.products)} products")
        open_slots = left
        if not open_slots:
            break
    if read_companies(path) != there:
        raise WriteError(f"{path} was changed by another program meanwhile; run the command again")
    return Outcome(len(there), len(there) - before, refused)


def read_companies(path: Path) -> dict[str, Company]:
    """Slug -> company; none where the file is not there. Raises UserError for a file that is none of companies."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"--out {path} cannot be read ({error}); name a file of companies, or one that is not there yet") from error
    return dict(companies_in(DataFile(path=str(path), sha256=hashlib.sha256(data).hexdigest())))


def _append(path: Path, slug: str, company: Company) -> None:
    """The file with one table more, by a rename: what stands in it stays as it is, comments too."""
    import tomlkit

    products = tomlkit.array()
    products.extend(company.products)
    table = tomlkit.dumps({slug: {**company.model_dump(exclude={"products"}), "products": products.multiline(True)}})
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        old = path.read_bytes() if path.exists() else b""
        with part.open("wb") as file:
            file.write((old.rstrip(b"\n") + b"\n\n" if old else b"") + table.encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise WriteError(f"--out {path} cannot be written ({error}); what was accepted before stays. Make room or name another folder") from error
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- the teacher


class Writer:
    """The actor: one engine, many companies at once."""

    def __init__(self, study: str, runtime: str, seed: int, limiter: Limiter | None) -> None:
        loaded = Study.model_validate_json(study)
        assert loaded.synthesis.teacher is not None
        self._sampling, self._seed = loaded.synthesis.sampling, seed
        self._model: LanguageModel = open_model(loaded.synthesis.teacher, Runtime.model_validate_json(runtime), loaded.precision, limiter=limiter)

    async def write(self, slot: int, brief: Brief, attempt: int) -> Candidate:
        return await write_company(self._model, self._sampling, slot, brief, attempt, self._seed)


def write_companies(study: Study, runtime: Runtime, count: int, seed: int, path: Path, say: Callable[[str], None]) -> Outcome:
    """Fill the file at `path` up to `count` companies by the study's teacher; a full file starts nothing.

    Raises UserError for a study that has no teacher of posts, StageError where the teacher failed.
    """
    if study.task["name"] != "posts":
        raise UserError(f"study {study.name!r} is of the task {study.task['name']!r}; only 'posts' has companies: name a study of it")
    if study.synthesis.teacher is None:
        raise UserError(f"study {study.name!r} has no synthesis.teacher, who would write the companies; give it one, e.g. 'vllm/...'")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} is not there; make it, or name another")
    if count <= len(read_companies(path)):
        return fill(path, count, seed, lambda slots, attempt: iter(()), say)
    import ray

    from pipeline.stages.workers import ensure_ray, root_cause, worker_environment

    ensure_ray(runtime)
    teacher, workers = study.synthesis.teacher, min(runtime.answer_workers, count)
    options = {
        "num_cpus": 1, "num_gpus": runtime.gpus_per_worker, "max_concurrency": runtime.requests_in_flight,
        "runtime_env": worker_environment(engine_environment(teacher, runtime), workers),
    }  # fmt: skip
    limiter = limiter_for(teacher, runtime)
    writers = [ray.remote(Writer).options(**options).remote(study.model_dump_json(), runtime.model_dump_json(), seed, limiter) for _ in range(workers)]

    def asked(slots: Sequence[tuple[int, Brief]], attempt: int) -> Iterator[Candidate]:
        waiting = [writers[slot % workers].write.remote(slot, brief, attempt) for slot, brief in slots]
        return (ray.get(candidate) for candidate in waiting)

    before = len(read_companies(path))
    try:
        return fill(path, count, seed, asked, say)
    except ray.exceptions.RayError as error:
        cause = root_cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        raise StageError("companies", {"teacher": f"{type(cause).__name__}: {cause}"}, len(read_companies(path)) - before) from error
    finally:
        for writer in writers:
            ray.kill(writer)
