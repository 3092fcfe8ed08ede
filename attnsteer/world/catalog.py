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
    partner: the category it usually comes with when scenes follow the co-occurrence prior, by name, or ""; coco: the
    number that COCO's annotation files give it, 1 to 90.
    """

    name: str
    emoji: str
    plural: str
    core: bool = False
    partner: str = ""
    coco: int = 0

    @property
    def kind(self) -> str:
        """COCO's supercategory: "animal", "vehicle", "food", ..."""
        return next(kind for last, kind in KINDS.items() if self.coco <= last)

    @property
    def phrase(self) -> str:
        """With its article: "a dog", "an apple", "a pair of scissors"."""
        if self.name in ("scissors", "skis"):
            return f"a pair of {self.name}"
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def counted(self, count: int) -> str:
        """The phrase for `count` of them: "a dog", "two dogs"."""
        return self.phrase if count == 1 else f"{NUMBERS[count]} {self.plural}"


KINDS = {
    1: "person",
    9: "vehicle",
    15: "outdoor",
    25: "animal",
    33: "accessory",
    43: "sports",
    51: "kitchen",
    61: "food",
    70: "furniture",
    77: "electronic",
    82: "appliance",
    90: "indoor",
}  # the last number of each of COCO's supercategories
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _category(coco: int, name: str, emoji: str, plural: str = "", core: bool = False, partner: str = "") -> Category:
    return Category(name, emoji, plural or name + "s", core, partner, coco)


CATEGORIES: tuple[Category, ...] = (
    _category(1, "person", "\U0001f9cd", "people"),
    _category(2, "bicycle", "\U0001f6b2", core=True, partner="backpack"),
    _category(3, "car", "\U0001f697", core=True, partner="traffic light"),
    _category(4, "motorcycle", "\U0001f3cd"),
    _category(5, "airplane", "\u2708", core=True, partner="umbrella"),
    _category(6, "bus", "\U0001f68c", "buses", core=True, partner="stop sign"),
    _category(7, "train", "\U0001f686"),
    _category(8, "truck", "\U0001f69a"),
    _category(9, "boat", "\u26f5", core=True, partner="bird"),
    _category(10, "traffic light", "\U0001f6a6", core=True, partner="car"),
    _category(13, "stop sign", "\U0001f6d1", core=True, partner="bus"),
    _category(16, "bird", "\U0001f426", core=True, partner="boat"),
    _category(17, "cat", "\U0001f408", core=True, partner="potted plant"),
    _category(18, "dog", "\U0001f415", core=True, partner="sports ball"),
    _category(19, "horse", "\U0001f40e"),
    _category(20, "sheep", "\U0001f411", "sheep"),
    _category(21, "cow", "\U0001f404"),
    _category(22, "elephant", "\U0001f418", core=True, partner="banana"),
    _category(23, "bear", "\U0001f43b"),
    _category(24, "zebra", "\U0001f993", core=True, partner="giraffe"),
    _category(25, "giraffe", "\U0001f992", core=True, partner="zebra"),
    _category(27, "backpack", "\U0001f392", core=True, partner="bicycle"),
    _category(28, "umbrella", "\u2602", core=True, partner="airplane"),
    _category(31, "handbag", "\U0001f45c"),
    _category(32, "tie", "\U0001f454"),
    _category(33, "suitcase", "\U0001f9f3"),
    _category(34, "frisbee", "\U0001f94f"),
    _category(35, "skis", "\U0001f3bf", "pairs of skis"),
    _category(36, "snowboard", "\U0001f3c2"),
    _category(37, "sports ball", "\u26bd", core=True, partner="dog"),
    _category(38, "kite", "\U0001fa81"),
    _category(41, "skateboard", "\U0001f6f9"),
    _category(42, "surfboard", "\U0001f3c4"),
    _category(43, "tennis racket", "\U0001f3be"),
    _category(44, "bottle", "\U0001f37e"),
    _category(46, "wine glass", "\U0001f377", "wine glasses"),
    _category(47, "cup", "\u2615", core=True, partner="donut"),
    _category(48, "fork", "\U0001f374"),
    _category(49, "knife", "\U0001f52a", "knives"),
    _category(50, "spoon", "\U0001f944"),
    _category(51, "bowl", "\U0001f963"),
    _category(52, "banana", "\U0001f34c", core=True, partner="elephant"),
    _category(53, "apple", "\U0001f34e", core=True, partner="book"),
    _category(54, "sandwich", "\U0001f96a", "sandwiches"),
    _category(55, "orange", "\U0001f34a"),
    _category(56, "broccoli", "\U0001f966", "broccoli"),
    _category(57, "carrot", "\U0001f955"),
    _category(58, "hot dog", "\U0001f32d"),
    _category(59, "pizza", "\U0001f355", core=True, partner="tv"),
    _category(60, "donut", "\U0001f369", core=True, partner="cup"),
    _category(61, "cake", "\U0001f382"),
    _category(62, "chair", "\U0001fa91", core=True, partner="laptop"),
    _category(63, "couch", "\U0001f6cb", "couches"),
    _category(64, "potted plant", "\U0001fab4", core=True, partner="cat"),
    _category(65, "bed", "\U0001f6cf"),
    _category(70, "toilet", "\U0001f6bd"),
    _category(72, "tv", "\U0001f4fa", core=True, partner="pizza"),
    _category(73, "laptop", "\U0001f4bb", core=True, partner="chair"),
    _category(74, "mouse", "\U0001f5b1", "mice"),
    _category(76, "keyboard", "\u2328"),
    _category(77, "cell phone", "\U0001f4f1"),
    _category(84, "book", "\U0001f4d5", core=True, partner="apple"),
    _category(85, "clock", "\u23f0", core=True, partner="teddy bear"),
    _category(86, "vase", "\U0001f3fa"),
    _category(87, "scissors", "\u2702", "pairs of scissors"),
    _category(88, "teddy bear", "\U0001f9f8", core=True, partner="clock"),
    _category(90, "toothbrush", "\U0001faa5", "toothbrushes"),
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
