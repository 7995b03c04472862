"""Studies whose companies are in a file of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.runs import SMALL

COMPANY = """
[{slug}]
name = "{name}"
description = "Sells kites by post."
industry = "toys"
mission = "More wind."
offering = "Kites and line."
size = "4 people"
history = "Since 2019."
audience = "Families by the sea."
simple_description = "Kites by post."
products = ["{name} One", "{name} Two"]
"""


def study_with_companies(folder: Path, count: int, **task: Any) -> Path:
    """The small study in `folder`, for `count` companies of which it names a file."""
    (folder / "mine.toml").write_text("".join(COMPANY.format(slug=f"kite-{index}", name=f"Kite {index}") for index in range(count)))
    more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in task.items())
    text = SMALL.replace('companies = ["penrook"]\nheld_out = ["wrenfold-software"]\n', f'companies_file = "mine.toml"\n{more}')
    (folder / "mine-study.toml").write_text(text)
    return folder / "mine-study.toml"
