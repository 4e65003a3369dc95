"""Subjects, styles and the wordings of captions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from legomole.nano.words import with_articles


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


NEW_SUBJECTS = _names("""
fox, tiger, unicorn, elephant, rabbit, koala, penguin, owl, turtle, octopus, crab, butterfly, ladybug, snail, shark,
rooster, cactus, sunflower, tulip, mushroom, pineapple, strawberry, cherries, carrot, avocado, banana, pizza, hamburger,
doughnut, lollipop, croissant, eggplant, popcorn, castle, volcano, helicopter, rocket, bicycle, sailboat, tractor,
umbrella, rainbow, snowflake, anchor, ambulance, trophy, balloon, crown, guitar, violin, key, hammer, scissors, camera,
candle, bomb, backpack, telescope, microscope, envelope, bell, gem, drum, scorpion""")
"""Subjects that the base model never sees."""

BASE_SUBJECTS = _names("""
monkey, gorilla, dog, wolf, cat, lion, horse, cow, pig, camel, mouse, hamster, bear, panda, paw prints, chicken,
baby chick, dove, eagle, duck, frog, crocodile, snake, dragon, whale, dolphin, tropical fish, spiral shell, ant,
honeybee, spider, cherry blossom, rose, seedling, evergreen tree, palm tree, four leaf clover, maple leaf, grapes,
watermelon, lemon, apple, pear, peach, kiwi fruit, tomato, ear of corn, hot pepper, bread, cheese, french fries,
sushi, soft ice cream, cookie, birthday cake, candy, honey pot, hot beverage, wine glass, cocktail glass, tropical
drink, beer mug, house, church, tent, bus, car, motorcycle, traffic light, stop sign, airplane, hourglass, watch,
alarm clock, crescent moon, sun, star, cloud, lightning, snowman, fire, droplet, wave, jack-o-lantern, christmas
tree, gift, soccer ball, basketball, american football, tennis ball, crystal ball, die, artist palette, glasses,
necktie, shirt, dress, high-heeled shoe, top hat, graduation cap, ring, megaphone, microphone, headphones, trumpet,
telephone, laptop, floppy disk, television, magnifying glass, light bulb, open book, scroll, package, pencil,
paintbrush, lock, shield, wrench, gear, balance scale, pill, door, statue, warning, yin yang, recycling symbol,
heart""")

SUBJECTS = (*BASE_SUBJECTS, *NEW_SUBJECTS)

LABELS = {
    "monkey": "monkey face", "dog": "dog face", "cat": "cat face", "tiger": "tiger face", "horse": "horse face",
    "cow": "cow face", "pig": "pig face", "mouse": "mouse face", "rabbit": "rabbit face", "dragon": "dragon face",
    "whale": "spouting whale", "ladybug": "lady beetle", "apple": "red apple", "cheese": "cheese wedge",
    "car": "automobile", "traffic light": "vertical traffic light",
    "hourglass": "hourglass done", "lightning": "high voltage", "snowman": "snowman without snow",
    "wave": "water wave", "christmas tree": "Christmas tree", "gift": "wrapped gift", "tennis ball": "tennis",
    "die": "game die", "shirt": "t-shirt", "headphones": "headphone",
    "magnifying glass": "magnifying glass tilted left", "lock": "locked", "statue": "moai",
    "heart": "heart suit", "gem": "gem stone",
}  # fmt: skip
"""Subject -> its label in `emojibase-data`, where they differ."""

HAND_STYLES = ("glossy", "flat", "cartoon", "retro", "simple")
"""Coloured drawings as their artists made them, with which the base model begins."""
BASE_STYLES = (*HAND_STYLES, "ink", "night", "chalk", "sepia", "sketch")
NEW_STYLES = ("comic", "woodcut", "blueprint", "neon", "sticker", "pixel", "duotone", "negative")
"""Styles that the base model never sees."""

STYLES = (*BASE_STYLES, *NEW_STYLES)

# {s}: subject, {k}: style, {w}: keyword
WORDINGS = (
    "a {s}, {k} style",
    "{k} {s} emoji",
    "a {k} picture of a {s}",
    "{s}, {w}, {k}",
    "this picture shows a {s} in {k} style on a plain background",
    "a single {s} in the middle, nothing else, with a {k} look",
)
UNSEEN_WORDINGS = ("please paint one {k} {s}", "an icon of the {s} made in {k} style")
"""Wordings that neither training nor calibration uses."""

# six wordings as in `WORDINGS`, then two that no training uses; {a}: subject on the left, {b}: on the right, {k}: style
_SCENE_WORDINGS = (
    "a {a} on the left and a {b} on the right, {k} style",
    "{k} emoji, {a} left, {b} right",
    "a {k} picture of a {a} left and a {b} right",
    "{a} on the left, {b} on the right, {k}",
    "left a {a}, right a {b}, in {k} style",
    "one {a} on the left, one {b} on the right, {k} look",
    "please paint a {a} left, a {b} right, {k}",
    "a {k} image of a {a} left and a {b} right",
)
# the same for one subject; {s}: the subject, {p}: its side
_HALF_WORDINGS = (
    "a {s} on the {p}, {k} style",
    "{k} emoji, {s} {p}",
    "a {k} picture of a {s} {p}",
    "{s} on the {p}, {k}",
    "{p} a {s}, in {k} style",
    "one {s} on the {p}, {k} look",
    "please paint a {s} {p}, {k}",
    "a {k} image of a {s} {p}",
)

_KEYWORDS = {
    "animal": """monkey, gorilla, dog, wolf, cat, lion, horse, cow, pig, camel, mouse, hamster, bear, panda, paw prints,
        frog, crocodile, snake, fox, tiger, elephant, rabbit, koala, turtle, snail, scorpion""",
    "bird": "chicken, baby chick, dove, eagle, duck, penguin, owl, rooster",
    "ocean": "whale, dolphin, tropical fish, spiral shell, wave, octopus, crab, shark, sailboat, anchor",
    "insect": "ant, honeybee, spider, butterfly, ladybug",
    "magic": "dragon, unicorn, crystal ball, top hat",
    "plant": """cherry blossom, rose, seedling, evergreen tree, palm tree, four leaf clover, maple leaf, cactus,
        sunflower, tulip, mushroom""",
    "fruit": "grapes, watermelon, lemon, apple, pear, peach, kiwi fruit, pineapple, strawberry, cherries, banana",
    "vegetable": "tomato, ear of corn, hot pepper, carrot, avocado, eggplant",
    "food": "bread, cheese, french fries, sushi, honey pot, pizza, hamburger, croissant, popcorn",
    "sweet": "soft ice cream, cookie, birthday cake, candy, doughnut, lollipop",
    "drink": "hot beverage, wine glass, cocktail glass, tropical drink, beer mug",
    "building": "house, church, tent, door, statue, castle",
    "vehicle": "bus, car, motorcycle, airplane, helicopter, rocket, bicycle, tractor, ambulance",
    "road": "traffic light, stop sign, warning",
    "time": "hourglass, watch, alarm clock",
    "weather": "crescent moon, sun, star, cloud, lightning, droplet, umbrella, rainbow",
    "winter": "snowman, christmas tree, snowflake",
    "light": "fire, light bulb, candle, volcano",
    "celebration": "jack-o-lantern, gift, balloon, graduation cap",
    "sport": "soccer ball, basketball, american football, tennis ball, trophy",
    "game": "die, heart",
    "art": "artist palette, pencil, paintbrush",
    "clothing": "glasses, necktie, shirt, dress, high-heeled shoe, crown, backpack",
    "jewel": "ring, gem",
    "music": "megaphone, microphone, headphones, trumpet, guitar, violin, bell, drum",
    "office": "telephone, laptop, floppy disk, television, open book, scroll, package, envelope, camera",
    "science": "magnifying glass, telescope, microscope",
    "tool": "lock, shield, wrench, gear, balance scale, pill, key, hammer, scissors, bomb",
    "symbol": "yin yang, recycling symbol",
}
KEYWORDS = {subject: keyword for keyword, names in _KEYWORDS.items() for subject in _names(names)}
"""Subject -> a word for its kind, in one of `WORDINGS`."""

SYNONYMS = {
    "fox": "vixen", "unicorn": "magical horned pony", "elephant": "mammoth", "penguin": "antarctic bird",
    "owl": "night bird", "turtle": "tortoise", "octopus": "squid", "crab": "lobster",
    "butterfly": "moth", "snail": "slug", "cactus": "desert plant with spines",
    "sunflower": "large yellow flower", "mushroom": "fungus", "pineapple": "spiky tropical fruit",
    "strawberry": "red berry",
    "pizza": "pepperoni slice", "doughnut": "glazed donut", "castle": "fortress", "helicopter": "chopper",
    "rocket": "spaceship", "bicycle": "bike", "umbrella": "parasol", "guitar": "ukulele",
    "crown": "royal tiara",
}  # fmt: skip
"""Subject of a LoRA -> words for it that no caption uses."""

LORA_SUBJECTS = tuple(SYNONYMS)


def caption(subject: str, style: str, wording: str = WORDINGS[0]) -> str:
    """Format a wording with subject and style; a keyword that the subject lacks is left out."""
    text = wording.format(s=subject, k=style, w=KEYWORDS.get(subject, ""))
    return _with_articles(text.replace(", , ", ", "), (subject,))


def scene_captions(left: str, right: str, style: str) -> list[str]:
    """Return six captions of a scene, then two in wordings that no training uses; an empty name is an empty half."""
    if left and right:
        texts = [w.format(a=left, b=right, k=style) for w in _SCENE_WORDINGS]
    else:
        texts = [w.format(s=left or right, p="left" if left else "right", k=style) for w in _HALF_WORDINGS]
    return [_with_articles(text, (left, right)) for text in texts]


def _with_articles(text: str, subjects: Sequence[str]) -> str:
    for subject, article in itertools.product({*subjects} & _PLURALS, ("a", "one", "a single")):
        text = text.replace(f"{article} {subject}", subject)
    return with_articles(text)


_PLURALS = frozenset(
    _names("""paw prints, grapes, bread, french fries, glasses, headphones, cherries, popcorn,
    scissors""")
)


def captions(subject: str, style: str) -> Sequence[str]:
    """Return a caption in each of `WORDINGS`."""
    return [caption(subject, style, wording) for wording in WORDINGS]
