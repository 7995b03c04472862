"""Text under judgment is data: `neutralised` takes from it what a chat template, a protocol or its parser would read as its own.

Recognised is what a reader would take for a token or a heading: in any case, spacing and width, in look-alike letters, with
invisible characters inside. One pass is enough: a match loses every bracket in it, so nothing that overlaps it is left whole.
Ordinary text, emoji and accents among it, is shown as it is.
"""

from __future__ import annotations

import functools
import re
import unicodedata

MAX_CHARS = 6000
"""Of one text; what is longer is cut and says so. About 1,400 tokens, several times the longest answer asked for."""
CUT = " [cut]"
EMPTY = "(empty)"

# Unicode Technical Standard 39, confusables.txt: the Cyrillic, Greek, Armenian, Cherokee and Lisu letters and the small
# capitals that pass for Latin ones. What compatibility forms cover (full width, mathematical, circled) is not listed.
_LATIN = {
    "a": "аαɑᴀАΑᎪꓮ", "b": "вьʙВΒᏴꓐ", "c": "сϲᴄСϹᏟᏣꓚ", "d": "ԁᴅԀᎠꓓ", "e": "еεᴇЕΕᎬꓰ", "f": "ꜰꓝϜ", "g": "ɡɢցԌᏀꓖ", "h": "һнհʜНΗᎻꓧ",
    "i": "іıɩιɪІΙᎥꓲ", "j": "јʝᴊЈᎫꓙ", "k": "кκᴋКΚᏦꓗ", "l": "ӏʟӀᏞꓡł", "m": "мᴍМΜᎷꓟ", "n": "пиηոɴПИΝꓠ", "o": "оοσօᴏøОΟՕꓳ", "p": "рρᴘРΡᏢꓑ",
    "q": "ԛԚ", "r": "гяʀГЯᎡᏒꓣ", "s": "ѕςꜱЅՏᏕᏚꓢ", "t": "тτᴛТΤᎢꓔ", "u": "υսᴜՍꓴ", "v": "νѵᴠѴᏙꓦ", "w": "ԝѡωᴡԜᎳꓪ", "x": "хχХΧꓫ", "y": "уүγʏУҮΥᎩꓬ", "z": "ᴢΖᏃꓜ",
    "[": "⟦〚【〖〔「『⁅⦋❲⟬⌈⌊⎡⸢⸤", "]": "⟧〛】〗〕」』⁆⦌❳⟭⌉⌋⎤⸣⸥", "<": "‹«〈《⟨⟪❬❮❰ᐸ˂≺≪⧼", ">": "›»〉》⟩⟫❭❯❱ᐳ˃≻≫⧽",
    "|": "¦ǀ∣│┃❘❙❚⎮⏐⏽׀।‖∥", "_": "▁‿⁀ˍ‗", "/": "∕⁄⧸╱", ":": "꞉ː∶׃։܃", "#": "♯", "-": "‐‑‒–—―−",
}  # fmt: skip
_LOOKALIKE = {ord(char): latin for latin, chars in _LATIN.items() for char in chars}
for _first in (0x1F150, 0x1F170, 0x1F1E6):  # white letters in black circles and squares, regional indicators
    _LOOKALIKE |= {_first + index: chr(ord("a") + index) for index in range(26)}
_UNSEEN = {"Mn", "Me", "Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}
_FILLERS = "\u115f\u1160\u3164\uffa0\u2800"  # blank, though Unicode counts them as letters and symbols

_LINE_END = re.compile(r"\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_BRACKETS = "<>|[]{}()"
_TOKEN = re.compile(
    r"[\[<{(][^a-z\[\]]{0,20}(?:start|end)[^a-z\[\]]{0,20}(?:pick|explanation)[^a-z\[\]]{0,20}[\]>})]"  # of the answer's format
    r"|<\|.{0,80}?\|>"  # ChatML, Llama 3, Phi, Cohere, DeepSeek
    r"|<{1,2}/?(?:s|sys|system|user|assistant|human|model|bot|tool|think|bos|eos|pad|unk|mask|cls|sep|image|reponame|filename|unused\d+"
    r"|0x[0-9a-f]{2}|[a-z0-9]+(?:_[a-z0-9]+)+)>{1,2}"  # Llama 2, Gemma, StarCoder and whatever is spelt like them
    r"|\[/?(?:inst|sys|bos|eos|cls|sep|pad|unk|mask|gmask|img|think|args|prefix|middle|suffix|control_?\d+|call_?id"
    r"|system_?prompt|available_?tools|tool_?(?:calls|results|content)|img_?(?:break|end))\]"  # Mistral, GLM, BERT
)
_LABEL = re.compile(
    r"(?P<decoration>[\W\d_]*)"
    r"(?P<label>(?P<pair>(?:post|completion)[ab12]|(?:system|user)(?:prompt|message)|(?:baseline|fine-?tuned?)(?:completion|post))"
    r"|request|criteria|formatofyouranswer|prompt|instructions?|system|user|assistant|human|judge)(?P<rest>.*)"
)


def neutralised(text: str) -> str:
    """The text as it is shown to a judge: of at most MAX_CHARS (then a mark of the cut), `(empty)` where nothing can be seen.

    Line ends become \\n; control and bidirectional characters go; half of a surrogate pair becomes U+FFFD.
    """
    text, cut = text[:MAX_CHARS], len(text) > MAX_CHARS
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = "".join(char for char in _LINE_END.sub("\n", text) if _kept(char))
    text = "\n".join(map(_without_heading, _without_tokens(text).split("\n")))
    return (text if _skeleton(text)[0] else EMPTY) + CUT * cut


def _kept(char: str) -> bool:
    # The two joiners hold emoji and Indic and Persian words together.
    return char in "\n\t\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf")


@functools.lru_cache(maxsize=8192)
def _folded(char: str) -> str:
    """What a reader takes the character for: lower case, without marks, ASCII where it looks like it; nothing for blanks."""
    latin = unicodedata.normalize("NFKD", char).translate(_LOOKALIKE).casefold()
    return "".join(part for part in unicodedata.normalize("NFKD", latin) if unicodedata.category(part) not in _UNSEEN and part not in _FILLERS)


def _skeleton(text: str) -> tuple[str, list[int]]:
    """The folded text, and for each of its characters the place in `text` that it comes from."""
    pairs = [(letter, place) for place, char in enumerate(text) for letter in _folded(char)]
    return "".join(letter for letter, _ in pairs), [place for _, place in pairs]


def _without_tokens(text: str) -> str:
    letters, places = _skeleton(text)
    shown = list(text)
    for match in _TOKEN.finditer(letters):
        for index in range(*match.span()):
            if letters[index] in _BRACKETS:
                shown[places[index]] = " "
    return "".join(shown)


def _without_heading(line: str) -> str:
    """The line; where it looks like a heading of the question, without the decoration and marked as a quotation."""
    letters, places = _skeleton(line)
    match = _LABEL.match(letters)
    if match is None:
        return line
    ends = tuple(":(=-|." if match["pair"] else ":")  # "User-generated" and "Post a #selfie" begin ordinary sentences
    if "##" not in match["decoration"] and re.search(r"[^\W_]", match["rest"]) and not match["rest"].startswith(ends):
        return line
    shown = list(line)
    for index in range(match.end("label"), len(letters)):
        if letters[index].isalnum():
            break
        shown[places[index]] = " "
    return "> " + "".join(shown[places[match.start("label")] :])
