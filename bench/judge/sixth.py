"""The sixth round: `focus` as the integrations would take it, and what a relevance that means nothing does to it.

python -m bench.judge evaluate --seed 0 --split sixth      # its settings on other scenes of the validation pictures
python -m bench.judge evaluate --seed 0 --split test6 --images 480     # what RULE.md lets through, not seen before
python -m bench.judge evaluate --seed 0 --split test7 --images 480     # once more, by another rule
python -m bench.judge report --split test6                 # results/test6.md; sixth.md likewise
"""

from .evaluate import Setting
from .second import DEFAULT

FOCUS = Setting("focus", source="words", reduce="max")


def sixth() -> list[Setting]:
    """The candidate, other values of its knobs, and it and the default with a relevance of chance and of wrong sign."""
    return [
        DEFAULT,
        FOCUS,
        Setting("focus", {"survivors": 1.5}, "words", "max"),
        Setting("focus", {"survivors": 3.0}, "words", "max"),
        Setting("focus", {"least": 0.25, "most": 0.5}, "words", "max"),
        Setting("focus", {"most": 0.75}, "words", "max"),
        Setting("focus", {"floor": 0.6}, "words", "max"),
        *wrong(),
        Setting("dpp"),
    ]


def wrong() -> list[Setting]:
    """A relevance of the words that is dealt out to the tokens by chance, and one that is turned round."""
    found = []
    for one in (DEFAULT, FOCUS):
        found.append(Setting(one.method, one.options, "chance", "max"))
        found.append(Setting(one.method, {**one.options, "negate": True}, "words", "max"))
    return found


def opened() -> list[Setting]:
    """Rule 20: what the sixth test split is opened for."""
    return [
        DEFAULT,
        FOCUS,
        *wrong(),
        *(Setting(name) for name in ("dpp", "divprune", "random")),
        Setting("cdpruner", source="pair"),
        Setting("relevance", source="evidence"),
    ]


def again() -> list[Setting]:
    """Rule 22: what the seventh test split is opened for."""
    return [s for s in opened() if not s.options.get("negate")]
