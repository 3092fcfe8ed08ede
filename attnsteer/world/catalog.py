"""The categories of the world: COCO names that exist as Noto emoji.

`CATEGORIES` has all of them; those with `core=True` are what the shipped models were trained on. A new category is one
line here and a rebuilt atlas (`python -m attnsteer.world.sprites`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """One kind of object.

    name: the COCO category name; emoji: the character drawn; plural: "dogs"; core: whether the shipped models know it;
    partner: the category it usually comes with when scenes follow the co-occurrence prior, by name, or "".
    """

    name: str
    emoji: str
    plural: str
    core: bool = False
    partner: str = ""

    @property
    def phrase(self) -> str:
        """With its article: "a dog", "an apple", "a pair of scissors"."""
        if self.name in ("scissors", "skis"):
            return f"a pair of {self.name}"
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def counted(self, count: int) -> str:
        """The phrase for `count` of them: "a dog", "two dogs"."""
        return self.phrase if count == 1 else f"{NUMBERS[count]} {self.plural}"


NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _category(name: str, emoji: str, plural: str = "", core: bool = False, partner: str = "") -> Category:
    return Category(name, emoji, plural or name + "s", core, partner)


CATEGORIES: tuple[Category, ...] = (
    _category("person", "\U0001f9cd", "people"),
    _category("bicycle", "\U0001f6b2", core=True, partner="backpack"),
    _category("car", "\U0001f697", core=True, partner="traffic light"),
    _category("motorcycle", "\U0001f3cd"),
    _category("airplane", "\u2708", core=True, partner="umbrella"),
    _category("bus", "\U0001f68c", "buses", core=True, partner="stop sign"),
    _category("train", "\U0001f686"),
    _category("truck", "\U0001f69a"),
    _category("boat", "\u26f5", core=True, partner="bird"),
    _category("traffic light", "\U0001f6a6", core=True, partner="car"),
    _category("stop sign", "\U0001f6d1", core=True, partner="bus"),
    _category("bird", "\U0001f426", core=True, partner="boat"),
    _category("cat", "\U0001f408", core=True, partner="potted plant"),
    _category("dog", "\U0001f415", core=True, partner="sports ball"),
    _category("horse", "\U0001f40e"),
    _category("sheep", "\U0001f411", "sheep"),
    _category("cow", "\U0001f404"),
    _category("elephant", "\U0001f418", core=True, partner="banana"),
    _category("bear", "\U0001f43b"),
    _category("zebra", "\U0001f993", core=True, partner="giraffe"),
    _category("giraffe", "\U0001f992", core=True, partner="zebra"),
    _category("backpack", "\U0001f392", core=True, partner="bicycle"),
    _category("umbrella", "\u2602", core=True, partner="airplane"),
    _category("handbag", "\U0001f45c"),
    _category("tie", "\U0001f454"),
    _category("suitcase", "\U0001f9f3"),
    _category("frisbee", "\U0001f94f"),
    _category("skis", "\U0001f3bf", "pairs of skis"),
    _category("snowboard", "\U0001f3c2"),
    _category("sports ball", "\u26bd", core=True, partner="dog"),
    _category("kite", "\U0001fa81"),
    _category("skateboard", "\U0001f6f9"),
    _category("surfboard", "\U0001f3c4"),
    _category("tennis racket", "\U0001f3be"),
    _category("bottle", "\U0001f37e"),
    _category("wine glass", "\U0001f377", "wine glasses"),
    _category("cup", "\u2615", core=True, partner="donut"),
    _category("fork", "\U0001f374"),
    _category("knife", "\U0001f52a", "knives"),
    _category("spoon", "\U0001f944"),
    _category("bowl", "\U0001f963"),
    _category("banana", "\U0001f34c", core=True, partner="elephant"),
    _category("apple", "\U0001f34e", core=True, partner="book"),
    _category("sandwich", "\U0001f96a", "sandwiches"),
    _category("orange", "\U0001f34a"),
    _category("broccoli", "\U0001f966", "broccoli"),
    _category("carrot", "\U0001f955"),
    _category("hot dog", "\U0001f32d"),
    _category("pizza", "\U0001f355", core=True, partner="tv"),
    _category("donut", "\U0001f369", core=True, partner="cup"),
    _category("cake", "\U0001f382"),
    _category("chair", "\U0001fa91", core=True, partner="laptop"),
    _category("couch", "\U0001f6cb", "couches"),
    _category("potted plant", "\U0001fab4", core=True, partner="cat"),
    _category("bed", "\U0001f6cf"),
    _category("toilet", "\U0001f6bd"),
    _category("tv", "\U0001f4fa", core=True, partner="pizza"),
    _category("laptop", "\U0001f4bb", core=True, partner="chair"),
    _category("mouse", "\U0001f5b1", "mice"),
    _category("keyboard", "\u2328"),
    _category("cell phone", "\U0001f4f1"),
    _category("book", "\U0001f4d5", core=True, partner="apple"),
    _category("clock", "\u23f0", core=True, partner="teddy bear"),
    _category("vase", "\U0001f3fa"),
    _category("scissors", "\u2702", "pairs of scissors"),
    _category("teddy bear", "\U0001f9f8", core=True, partner="clock"),
    _category("toothbrush", "\U0001faa5", "toothbrushes"),
)

BY_NAME: dict[str, Category] = {category.name: category for category in CATEGORIES}
CORE: tuple[str, ...] = tuple(category.name for category in CATEGORIES if category.core)

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "gray": (150, 152, 156),
    "black": (36, 36, 40),
    "red": (214, 92, 84),
    "green": (118, 190, 110),
    "blue": (104, 158, 232),
    "yellow": (246, 222, 110),
    "pink": (244, 172, 200),
}
FRAMES: dict[str, tuple[int, int, int]] = {
    "red": (204, 28, 40),
    "green": (16, 128, 56),
    "blue": (28, 64, 204),
    "yellow": (252, 204, 0),
    "purple": (132, 40, 168),
}


def find(name: str) -> Category:
    """The category called `name`.

    Raises:
        ValueError: there is none; the sentence lists all names.
    """
    if name not in BY_NAME:
        raise ValueError(f"No category {name!r}; the world has {', '.join(BY_NAME)}.")
    return BY_NAME[name]
