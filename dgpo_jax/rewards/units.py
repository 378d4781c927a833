"""Words after a number: which are units, which units differ in kind, and which words are powers of ten.

A unit is dropped from the value, so that "12 cm" is 12. A letter is never a unit unless it stands in \\text{} or \\mathrm{}
or after the slash of a unit ("km/h"), and short abbreviations that may be a product of letters (2mg is two m g) are units only
with a blank before them. Where both answers name units of one group and share none, they differ: 5 m is not 5 cm.
"""

import re


def _words(text):
    return frozenset(text.split())


# group -> the spellings of one unit on each line, all of which are that unit
_GROUPS = {
    "measure": """
        m meter meters metre metres
        cm centimeter centimeters centimetre centimetres
        mm millimeter millimeters millimetre millimetres
        km kilometer kilometers kilometre kilometres kph kmh
        dm
        nm nanometer nanometers
        inch inches in
        foot feet ft
        yard yards yd yds
        mile miles mi mph
        g gram grams
        kg kilogram kilograms kgs
        mg milligram milligrams
        ton tons tonne tonnes
        pound pounds lb lbs
        ounce ounces oz
        l liter liters litre litres
        ml milliliter milliliters
        gallon gallons
        cup cups
        s sec secs second seconds
        min mins minute minutes
        h hr hrs hour hours
        day days
        week weeks
        month months
        year years yr yrs
        j joule joules
        kj
        n newton newtons
        w watt watts
        v volt volts
        hz hertz
        pa pascal pascals
        mol moles mole
        acre acres
    """,
    "temperature": """
        c celsius centigrade
        f fahrenheit
        k kelvin
    """,
    "angle": """
        rad radian radians
        degree degrees deg
    """,
    "money": """
        dollar dollars usd
        cent cents
        euro euros eur
        yuan rmb
        rupee rupees
        pence penny pennies
        yen
    """,
    "time of day": """
        am
        pm
    """,
    "direction": """
        north
        south
        east
        west
        left
        right
        up upward upwards
        down downward downwards
        clockwise
        counterclockwise anticlockwise
        gain profit
        loss
    """,
}
_KINDS = {
    word: (group, line.split()[0]) for group, lines in _GROUPS.items() for line in lines.strip().splitlines() for word in line.split()
}
_COUNTED = _words(
    "unit units square cubic sq cu person people student students point points apple apples way ways time times per each item "
    "items pieces piece pairs pair digits digit sides side edges vertices marbles books cookies coins balls cards hz coulombs"
)
# Words that stand for units without \text{}: no single letters, and nothing that a formula may need.
BARE = (frozenset(word for word, (group, _) in _KINDS.items() if group in ("measure", "temperature", "money", "angle")) | _COUNTED) - _words(
    "m g l s h j n w v c f k in min up"
)
LIKE_LETTERS = _words("mg ml nm dm ft hr yd mi oz pa kj mol deg")  # may be products: a unit only with a blank before it
AFTER_SLASH = _words("h s m g l L N J W V A K C F min kg")
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def names_a_unit(words):
    """True if one of the words is a unit, or what is often counted; a single letter is one only in its own case."""
    found = re.findall(r"[A-Za-zµ]+", words.replace(".", ""))
    return any(word in AFTER_SLASH if len(word) == 1 else word.lower() in _KINDS or word.lower() in _COUNTED for word in found)


def kinds(tokens, text=""):
    """The units that an answer names: a dict from group to set. `text` is the answer before it lost its dollar signs."""
    found = {"money": {"dollar"}} if "\\$" in text else {}
    if "\\circ" in text or "°" in text:
        found["angle"] = {"degree"}
    for token in tokens:
        if token.kind == "text":
            for word in re.findall(r"[a-z]+", token.value.lower().replace(".", "")):
                if word in _KINDS:
                    group, name = _KINDS[word]
                    found.setdefault(group, set()).add(name)
    return found


def clash(left, right):
    """True if two answers, (tokens, text) each, name units of one group and have none in common, or money and an angle."""
    left, right = kinds(*left), kinds(*right)
    if any("money" in one and "angle" in other for one, other in ((left, right), (right, left))):
        return True
    return any(left[group].isdisjoint(right[group]) for group in left.keys() & right.keys())
