"""Turns the many spellings of one answer into one: Unicode to LaTeX, no spacing commands, no dollar signs."""

import re
import unicodedata

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "⁄": "/", "∕": "/", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ",
    "∙": r"\cdot ", "⋅": r"\cdot ", "∞": r"\infty ", "°": r"^\circ ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "≤": r"\le ",
    "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ",
    "∖": r"\setminus ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "∈": r"\in ", "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "δ": r"\delta ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ",
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "€": "$", "£": "$", "¥": "$",
}  # fmt: skip
_TABLE = str.maketrans(_SYMBOLS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
TEXT_COMMANDS = "text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|mathit|mathsf|mathcal|boldsymbol|bm|operatorname|rm|bf"

_WRAPPED = re.compile(rf"\\(?:{TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}")
_CASED_WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Z][a-z]{2,}|[A-Z]{4,}|No)(?![A-Za-z])")  # AB and ABC may be products of letters
_CHOICE = re.compile(rf"\\(?:{TEXT_COMMANDS})\s*\{{\s*\(?([A-Za-z])\)?\.?\s*\}}|\(([A-Za-z])\)|([A-Z])")
_LABELLED = re.compile(  # "(B) 12", "\\textbf{(B)} \\frac12", "\\text{(B) }12": no product of B, and no second choice
    rf"(?:\\(?:{TEXT_COMMANDS})\s*\{{\s*)?\(([A-Z])\)(?:\s*\}}\s*:?\s*-?|\s+:?\s*)(?:\.?\d|\\frac|\\sqrt|\\pi)[^A-Z,;=]*"
)
_OPTION = re.compile(rf"(?:\\(?:{TEXT_COMMANDS})\s*\{{\s*)?(?:option|choice)\s+\(?([A-Z])\)?\s*\}}?", re.IGNORECASE)
_SECOND = re.compile(r"(?<![a-z])(?:or|and|not|but)(?![a-z])")
CHOICES = re.compile(r"\(?(?:[A-Z]|[IVX]{2,})\)?(?:\s*(?:,|and|or|, and|, or)\s*\(?(?:[A-Z]|[IVX]{2,})\)?)*")  # "B and (C)", "II"
_REWRITES = [
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+"), lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}"),
    (re.compile(r"\\left\s*\||\\lvert(?![a-zA-Z])"), r"\\lvert "),
    (re.compile(r"\\right\s*\||\\rvert(?![a-zA-Z])"), r"\\rvert "),
    (re.compile(r"\\(?:left|right)\s*\."), " "),
    (re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|biggl|biggr)(?![a-zA-Z])\s*"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<=\d)(?:,\\!\s*| ?\{,\s*\}\s*|\\[,;: ]|,\\ ?!)\s*(?=\d{3}(?!\d))"), ""),  # thousands, however spaced
    (re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\[!,;:> ]|~|\\q?quad|\\(?:displaystyle|limits)(?![a-zA-Z])"), " "),
    (re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*(\\prime(?![a-zA-Z]))"), lambda match: "'" * match.group().count("prime")),
    (re.compile(r"\\(?:Bbb|mathds)(?![a-zA-Z])"), r"\\mathbb"),
    (re.compile(r"\b([AaPp])\.\s?([Mm])\b\.?"), r"\1\2"),
    (re.compile(r"\\phantom\s*(?:\{[^{}]*\})?"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]$]|\$"), " "),
    (re.compile(r"\\%|\\?\bpercent(?:age)?\b|\bpct\b"), "%"),
    (re.compile(r"\^\s*\{?\s*(?:\\circ(?![a-zA-Z])|\\degree(?![a-zA-Z]))\s*\}?"), r"\\degree "),
]


def normalise(text):
    """The answer's canonical LaTeX. Linear in its length; the caller caps that."""
    text = text.strip().strip("*").strip()
    text = _REWRITES[0][0].sub(_REWRITES[0][1], text).translate(_TABLE)
    text = unicodedata.normalize("NFKC", text)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # doubly escaped commands; in a matrix "\\" ends a row
    for pattern, replacement in _REWRITES[1:]:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", text).strip()
    if not text.endswith(".."):
        text = _without_line_ends(text.rstrip(".,; ")).rstrip(".,; ")
    return text


def _without_line_ends(text):
    """"5\\\\": a line that ends within the box. A regular expression would take the square of a long row of backslashes."""
    end = len(text)
    while text.endswith(("\\\\", "\\\\ "), 0, end):
        end -= 2 + (text[end - 1] == " ")
    return text[:end]


def text_key(normalised):
    """What two answers must share to be the same string: blanks and \\text{} dropped, words in lower case."""
    key = _WRAPPED.sub(r"\1", normalised)
    key = re.sub(r"(?<=\d)\s+(?=\d)", "\0", key)  # "1 2" is neither 12 nor 1_2
    return re.sub(r"\s+", "", _CASED_WORD.sub(lambda match: match.group().lower(), key))


def is_words(normalised):
    """True for an answer in plain words ("Tuesday", "two lines", "odd"), which can only be compared as a string."""
    bare = _WRAPPED.sub(r" \1 ", normalised)
    if not re.fullmatch(r"[A-Za-z ,.'-]+", bare) or CHOICES.fullmatch(bare.strip()):
        return False
    return bool(re.search(r"[A-Za-z]{5}" if bare == normalised else r"[A-Za-z]{3}", bare))  # abc may be a product


def same_choice(left, right):
    """True if both name one choice: "(B)", "\\text{b}", "B.". A bare b counts only beside a \\text{B}; else it is a variable."""
    letters = [_choice_letter(side) for side in (left, right)]
    for index, (side, other) in enumerate(((left, right), (right, left))):
        if letters[index] is None and re.fullmatch("[a-z]", side) and "\\" in other:
            letters[index] = side.upper()
    return letters[0] is not None and letters[0] == letters[1]


def _choice_letter(normalised):
    match = _CHOICE.fullmatch(normalised)
    return next(letter for letter in match.groups() if letter).upper() if match else None


def same_label(left, right):
    """True if one side is a bare choice and the other that choice with its value, or in words: B and "(B) 12", "Option B"."""
    letters = [(_choice_letter(side), _label(side)) for side in (left, right)]
    (one, one_label), (other, other_label) = letters
    return (one is not None and one == other_label) or (other is not None and other == one_label)


def _label(normalised):
    match = _OPTION.fullmatch(normalised) or _LABELLED.fullmatch(normalised)
    return match.group(1).upper() if match and not _SECOND.search(normalised) else None
