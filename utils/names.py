"""Class names in the text of a log line: their plurals, and how many objects of each class there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

UNCHANGED = ("sheep", "skis")  # of COCO's names, those that no rule of `plural` covers


def plural(noun: str) -> str:
    """The plural of a class name by rule, as the log writes it.

    After ss, us, is, as, x, z, ch and sh comes `es`; a consonant and y become `ies`; other names that end in s are
    plurals already and stay; all others get an `s`, also where English has another form (persons, mouses). Names in
    scripts without upper and lower case, such as Chinese, have no plural.

        >>> [plural(name) for name in ("cross", "bus", "berry", "scissors", "person", "红绿灯")]
        ['crosses', 'buses', 'berries', 'scissors', 'persons', '红绿灯']
    """
    word = noun.lower()
    caseless = noun[-1:].isalpha() and noun[-1:].lower() == noun[-1:].upper()
    if caseless or word.endswith(UNCHANGED):
        return noun
    if word.endswith(("ss", "us", "is", "as", "x", "z", "ch", "sh")):
        return f"{noun}es"
    if word.endswith("y") and word[-2:-1] not in (*"aeiou", ""):
        return f"{noun[:-1]}ies"
    return noun if word.endswith("s") else f"{noun}s"


def counted(names: Mapping[int, str], class_indices: Iterable[int]) -> str:
    """How many objects of which class, in the order of the classes: the text of a log line.

    >>> counted({0: "person", 27: "tie"}, [27, 0, 0])
    '2 persons, 1 tie'
    >>> counted({0: "person"}, [])
    '(no detections)'
    """
    counts = sorted(Counter(int(index) for index in class_indices).items())
    parts = [f"{n} {plural(name) if n > 1 else name}" for n, name in ((n, names[index]) for index, n in counts)]
    return ", ".join(parts) or "(no detections)"
