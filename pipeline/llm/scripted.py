"""A model that plays a part: no weights, no wait, every answer a function of the request alone. For tests and dry runs.

Names: `writer` writes sentences about its prompt, or a company's name where it ends in `Name:` and ten where it ends in
`Products:`; `rough` does too, and leaves one answer in eight blank and cuts one in eight short; `longest` judges by the
longer completion; `first` judges by position; `coin` by a seeded coin.
"""

from __future__ import annotations

import hashlib
import random
import re

from pipeline.errors import UserError, nearest
from pipeline.llm import Completion, Request

JUDGES = ("longest", "first", "coin")
PARTS = ("writer", "rough", *JUDGES)
_OPENINGS = ("Tired of the ordinary?", "Your week just got easier.", "Here is the one that lasts.", "Looking closer pays off!")
_COMPLETIONS = re.compile(r"^### Completion [A1].*?\n(.*)\n\n### Completion [B2].*?\n(.*)\n\n(?:Which completion|### Criteria)", re.DOTALL | re.MULTILINE)
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
        if request.choices:
            text, reason = request.choices[self._pick(prompt, dice)], "stop"
        elif self._part in JUDGES and "[START_PICK]" in prompt:
            pick = ("Baseline", "Finetune")[self._pick(prompt, dice)]
            text, reason = f"[START_PICK]{pick} completion[END_PICK]\n[START_EXPLANATION]It is the one to take.[END_EXPLANATION]", "stop"
        else:
            text, reason = self._write(prompt, dice)
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

    def _pick(self, prompt: str, dice: random.Random) -> int:
        """0 for the first completion shown, 1 for the second."""
        shown = _COMPLETIONS.search(prompt)
        if self._part == "longest" and shown and len(shown[1]) != len(shown[2]):
            return int(len(shown[1]) < len(shown[2]))
        return 0 if self._part == "first" else dice.randrange(2)

    def close(self) -> None:
        pass
