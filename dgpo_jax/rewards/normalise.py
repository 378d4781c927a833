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
TEXT_COMMANDS = "text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|mathit|mathsf|operatorname|rm|bf"

_REWRITES = [
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+"), lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}"),
    (re.compile(r"\\left\s*\||\\lvert(?![a-zA-Z])"), r"\\lvert "),
    (re.compile(r"\\right\s*\||\\rvert(?![a-zA-Z])"), r"\\rvert "),
    (re.compile(r"\\(?:left|right)\s*\."), " "),
    (re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|biggl|biggr)(?![a-zA-Z])\s*"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<=\d)(?:,\\!\s*|\{,\}\s*|\\[,;: ]|,\\ ?!)\s*(?=\d{3}(?!\d))"), ""),  # thousands, however spaced
    (re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:displaystyle|limits)(?![a-zA-Z])"), " "),
    (re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
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
        text = text.rstrip(".,; ")
    return text


def text_key(normalised):
    """What two answers must share to be the same string: blanks and \\text{} dropped, words in lower case."""
    key = re.sub(rf"\\(?:{TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}", r"\1", normalised)
    key = re.sub(r"(?<=\d)\s+(?=\d)", "\0", key)  # "1 2" is neither 12 nor 1_2
    key = re.sub(r"\s+", "", key)
    return key.casefold() if re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", key)) else key


def is_words(normalised):
    """True for an answer in plain words ("Tuesday", "two lines", "odd"), which can only be compared as a string."""
    bare = re.sub(rf"\\(?:{TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}", r" \1 ", normalised)
    return bool(re.fullmatch(r"[A-Za-z ,.'-]+", bare) and re.search(r"[A-Za-z]{3}", bare))


def choice_letter(normalised):
    """The letter of a multiple-choice answer: "(B)", "\\text{b}", "B."; None for anything else and for a bare "b"."""
    match = re.fullmatch(rf"\\(?:{TEXT_COMMANDS})\s*\{{\s*\(?([A-Za-z])\)?\.?\s*\}}|\(([A-Za-z])\)|([A-Z])", normalised)
    return next(letter for letter in match.groups() if letter).upper() if match else None
