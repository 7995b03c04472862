"""A model that plays a part: no weights, no wait, every answer a function of the request alone. For tests and dry runs.

Names: `writer` writes sentences about its prompt, or a company's name where it ends in `Name:` and ten where it ends in
`Products:`; `rough` does too, and leaves one answer in eight blank and cuts one in eight short; `longest` judges by the
longer post; `first` judges by position; `coin` by a seeded coin.
"""

from __future__ import annotations

import hashlib
import random
import re

from pipeline.errors import UserError, nearest
from pipeline.llm import Completion, Request

PARTS = ("writer", "rough", "longest", "first", "coin")
_OPENINGS = ("Tired of the ordinary?", "Your week just got easier.", "Here is the one that lasts.", "Looking closer pays off!")
_SYLLABLES = ("ba", "do", "fen", "gil", "kor", "lum", "mar", "nes", "rik", "tol")
_ENDINGS = ("Order yours today.", "Visit us this week.", "Try it now!", "Tell us what you think.")


class ScriptedModel:
    def __init__(self, part: str) -> None:
        if part not in PARTS:
            raise UserError(f"scripted model {part!r} does not exist; {nearest(part, PARTS)}")
        self._part = part

    async def complete(self, request: Request) -> Completion:
        prompt = "\n".join(message["content"] for message in request.conversation)
        weights = request.adapter.path / "adapter_model.safetensors" if request.adapter else None
        known = hashlib.sha256(weights.read_bytes()).hexdigest() if weights and b"zero" not in weights.read_bytes() else "base"
        dice = random.Random(f"{known}|{request.seed}|{prompt}")
        text, reason = (self._choose(prompt, request.choices, dice), "stop") if request.choices else self._write(prompt, dice)
        ids = tuple(prompt.encode())
        logprobs = tuple(-random.Random(f"{known}|{index}").random() for index in range(len(ids) - 1)) if request.prompt_logprobs else None
        return Completion(text, reason, ids, len(text.split()), logprobs)

    def _write(self, prompt: str, dice: random.Random) -> tuple[str, str]:
        if self._part == "rough" and (fate := dice.randrange(8)) < 2:
            return ("", "stop") if fate == 0 else ("It begins well and", "length")
        if label := re.search(r"(?:Name|Products):$", prompt):
            industry = re.findall(r"^Industry: (.+)$", prompt, re.MULTILINE)[-1].split()[0]
            stems = ["".join(dice.choice(_SYLLABLES) for _ in range(3)).capitalize() for _ in range(10)]
            return f"{stems[0]} {industry} Works" if label[0] == "Name:" else "\n".join(f"{stem} {industry}" for stem in stems), "stop"
        product = re.search(r"^Product: (.+)$", prompt, re.MULTILINE)
        named = product[1] if product else "This"
        words = sorted(set(re.findall(r"[a-z]{5,}", prompt)))
        middle = [f"{named} brings {dice.choice(words)} and {dice.choice(words)} together." for _ in range(dice.randint(1, 6))]
        return " ".join([dice.choice(_OPENINGS), *middle, dice.choice(_ENDINGS), f"#{dice.choice(words)}"]), "stop"

    def _choose(self, prompt: str, choices: tuple[str, ...], dice: random.Random) -> str:
        if self._part == "first":
            return choices[0]
        posts = re.search(r"Post A:\n(.*)\n\nPost B:\n(.*)\n\n", prompt, re.DOTALL)
        if self._part == "longest" and posts and len(posts[1]) != len(posts[2]):
            return choices[0] if len(posts[1]) > len(posts[2]) else choices[1]
        return dice.choice(choices)

    def close(self) -> None:
        pass
