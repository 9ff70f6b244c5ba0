"""The words of the stories: characters, places, things, weather, feelings. All made for this project."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of character: what it is called, how it moves and sounds, where it lives."""

    noun: str
    moves: tuple[str, ...]
    home: str


KINDS = (
    Kind("cat", ("crept", "jumped", "walked"), "a warm house"),
    Kind("dog", ("ran", "trotted", "raced"), "a red barn"),
    Kind("rabbit", ("hopped", "jumped", "ran"), "a hole under the hill"),
    Kind("fox", ("trotted", "slipped", "ran"), "a den in the woods"),
    Kind("bear", ("walked", "stomped", "climbed"), "a deep cave"),
    Kind("mouse", ("scurried", "ran", "tiptoed"), "a tiny hole in the wall"),
    Kind("duck", ("waddled", "swam", "walked"), "a nest by the pond"),
    Kind("owl", ("flew", "glided", "flapped"), "an old oak tree"),
    Kind("frog", ("hopped", "swam", "leaped"), "a quiet pond"),
    Kind("horse", ("galloped", "trotted", "walked"), "a big stable"),
    Kind("squirrel", ("climbed", "ran", "jumped"), "a hollow tree"),
    Kind("turtle", ("crawled", "walked", "swam"), "a sandy bank"),
    Kind("hedgehog", ("shuffled", "walked", "rolled"), "a pile of leaves"),
    Kind("girl", ("walked", "ran", "skipped"), "a small house"),
    Kind("boy", ("walked", "ran", "skipped"), "a blue house"),
)

NAMES = {
    "she": ("Lily", "Mia", "Anna", "Rosa", "Nora", "Ella", "Ruby", "Ivy", "Daisy", "Tina", "Maya", "Luna"),
    "he": ("Tom", "Max", "Ben", "Sam", "Leo", "Finn", "Oscar", "Jack", "Milo", "Hugo", "Toby", "Noah"),
}
ONLY = {"girl": "she", "boy": "he"}

TRAITS = ("little", "kind", "curious", "brave", "shy", "clever", "quiet", "happy", "sleepy", "gentle", "funny", "young")

PLACES = (
    "the forest", "the garden", "the park", "the river", "the beach", "the meadow", "the market", "the farm",
    "the hill", "the lake", "the village", "the school", "the bridge", "the orchard",
)  # fmt: skip

THINGS = (
    "ball", "kite", "hat", "book", "drum", "boat", "bell", "lamp", "key", "basket", "ring", "blanket", "scarf",
    "whistle", "shell", "cup", "flower", "button", "map", "wagon",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "golden", "silver", "purple", "white", "orange", "pink")
FOODS = (
    "apples", "berries", "carrots", "nuts", "bread", "cookies", "cheese", "soup", "pears", "honey cakes", "pancakes",
    "plums",
)  # fmt: skip
MORNINGS = (
    "One day",
    "One morning",
    "One sunny day",
    "One afternoon",
    "One windy day",
    "Early one morning",
    "One spring day",
)
"""Ways to begin the plot."""
WEATHER = (
    "The sun was shining and the sky was blue.", "The birds were singing in the trees.", "A soft wind was blowing.",
    "The air smelled of flowers.", "The grass was wet and green.", "White clouds moved across the sky.",
    "It was warm and quiet.",
)  # fmt: skip
GLAD = ("happy", "proud", "glad", "very happy", "full of joy")
SAD = ("sad", "worried", "unhappy", "very sad", "upset")
HIDING = (
    "under a bush", "behind a tree", "inside a hollow log", "under a pile of leaves", "next to a big stone",
    "at the bottom of a basket", "in the tall grass", "behind the old door",
)  # fmt: skip
LESSONS = {
    "share": ("Sharing makes every day better.", "A thing is twice as nice when it is shared.", "It is good to share."),
    "help": (
        "It is good to help others.",
        "Small friends can be a big help.",
        "Helping made everyone feel warm inside.",
    ),
    "brave": ("Being brave means trying even when you are afraid.", "Even the smallest heart can be brave."),
    "friend": ("A new friend can be found anywhere.", "It is easy to make a friend when you are kind."),
    "patience": ("Good things take time.", "If you keep trying, you will learn.", "Every day a little is enough."),
    "honest": ("It is always best to tell the truth.", "The truth is easier to carry than a lie."),
    "care": ("Taking care of things makes them last.", "A careful friend is a good friend."),
}
