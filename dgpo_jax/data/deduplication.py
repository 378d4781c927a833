"""When two problems are the same text: case, blanks, punctuation and the spellings of one formula set aside."""

import re
import unicodedata

# NFKC makes "x²" into "x2"; what stands above the line is an exponent, and 10² is not 102.
_SUPERSCRIPTS = {digit: f"^{number}" for number, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_SIGNS = {"’": "'", "‘": "'", "“": '"', "”": '"', "−": "-", "–": "-", "—": "-"}
_SIGNS |= {"×": r"\times ", "·": r"\cdot "}
_ONE_WAY = str.maketrans(_SUPERSCRIPTS | _SIGNS)
# After the text was put into lower case:
_LAYOUT = re.compile(
    r"\\(?:left|right|bigg?[lr]?|displaystyle|limits|q?quad|[hv]space\*?\{[^{}]*\})(?![a-z])|\\[!,;:> \\()\[\]]|[~$]"
)
_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|,\\!)(?=\d{3}(?!\d))")
_SPELLINGS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "leq": "le",
    "geq": "ge",
    "neq": "ne",
    "dbinom": "binom",
    "tbinom": "binom",
}
_NO_BLANKS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts without blanks: a character is a word
_TOKEN = re.compile(rf"\d+(?:\.\d+)?|\.\d+|[{_NO_BLANKS}]|[^\W\d_{_NO_BLANKS}]+|\S")
_UNHEARD = frozenset('.,;:?"`\\&')  # punctuation without which a formula means the same
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)


def tokenise(text: str) -> list[str]:
    """Words, numbers and signs, in lower case; what only the layout or the sentence needs is left out.

    "$\\left(3,\\,-4\\right)$." and "(3, -4)" give the same; "3 + 4" and "3 - 4" do not, nor do "x^{12}" and "x^1 2".
    """
    text = unicodedata.normalize("NFKC", text.translate(_ONE_WAY)).casefold()
    text = _LAYOUT.sub(" ", _STYLE.sub(r" \1 ", _THOUSANDS.sub("", text)))
    return _unbrace([_SPELLINGS.get(token, token) for token in _TOKEN.findall(text) if token not in _UNHEARD])


def _unbrace(tokens):
    """Leaves out braces around a single token: x^{2} is x^2. (A lone digit is all that a bare exponent takes.)"""
    if "{" not in tokens:
        return tokens
    kept, place = [], 0
    while place < len(tokens):
        if tokens[place] == "{" and tokens[place + 2 : place + 3] == ["}"] and len(tokens[place + 1]) == 1:
            kept.append(tokens[place + 1])
            place += 3
        else:
            kept.append(tokens[place])
            place += 1
    return kept


def words(text: str) -> list[str]:
    """Words and numbers alone, in order: what n-grams are made of. The code of a drawing ([asy]) is left out."""
    return [token for token in tokenise(_DRAWING.sub(" ", text)) if token[-1].isalnum()]


def text_key(text: str) -> str:
    """The same for two problems that are the same text."""
    return " ".join(tokenise(text))
