"""Makes short stories: a plot, a cast that stays itself, and many ways to say each thing. Deterministic by seed.

Every plot is a function of a `Teller`, which holds the cast and the random choices. `story(seed)` picks a plot;
`conversation(seed)` wraps a story in the request that asks for it.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import vocabulary as words


@dataclass(frozen=True)
class Character:
    """Someone in a story."""

    name: str
    kind: words.Kind
    pronoun: str
    trait: str

    @property
    def they(self) -> str:
        """She or he, at the beginning of a sentence."""
        return self.pronoun.capitalize()

    @property
    def their(self) -> str:
        """Her or his."""
        return "her" if self.pronoun == "she" else "his"

    @property
    def them(self) -> str:
        """Her or him."""
        return "her" if self.pronoun == "she" else "him"


@dataclass(frozen=True)
class Wish:
    """What a request may fix: the kind and name of the hero, the place, the thing. None: anything."""

    noun: str | None = None
    name: str | None = None
    place: str | None = None
    thing: str | None = None


class Teller:
    """The cast and the choices of one story."""

    def __init__(self, rng: random.Random, wish: Wish) -> None:
        self.rng = rng
        self.hero = self._character(wish.noun, wish.name, ())
        self.friend = self._character(None, None, (self.hero.name, self.hero.kind.noun))
        self.elder = self._character(
            None, None, (self.hero.name, self.friend.name, self.hero.kind.noun, self.friend.kind.noun)
        )
        self.place = wish.place or rng.choice(words.PLACES)
        self.thing = wish.thing or rng.choice(words.THINGS)
        self.colour = rng.choice(words.COLOURS)
        self.food = rng.choice(words.FOODS)
        self.lesson = ""

    def _character(self, noun: str | None, name: str | None, taken: tuple[str, ...]) -> Character:
        rng = self.rng
        kinds = [k for k in words.KINDS if (k.noun == noun if noun else k.noun not in taken)]
        kind = rng.choice(kinds)
        pronoun = words.ONLY.get(kind.noun, rng.choice(("she", "he")))
        if name:
            pronoun = words.ONLY.get(kind.noun, "she" if name in words.NAMES["she"] else "he")
        names = [n for n in words.NAMES[pronoun] if n not in taken]
        return Character(name or rng.choice(names), kind, pronoun, rng.choice(words.TRAITS))

    def say(self, *options: str) -> str:
        """Returns one of several ways to say something."""
        return self.rng.choice(options)

    def opening(self) -> str:
        """Returns who the hero is."""
        h, place = self.hero, self.place
        first = self.say(
            f"Once upon a time, there was a {h.trait} {h.kind.noun} named {h.name}.",
            f"Once upon a time, a {h.trait} {h.kind.noun} named {h.name} lived in {h.kind.home}.",
            f"{h.name} was a {h.trait} {h.kind.noun} who lived in {h.kind.home}.",
            f"There once was a {h.kind.noun} named {h.name}. {h.they} was very {h.trait}.",
        )
        second = self.say(
            f"{h.name} loved to play near {place}.",
            f"Every day, {h.name} went to {place}.",
            f"{h.they} liked {self.food} and long walks to {place}.",
            f"{h.they} had a friend named {self.friend.name}, a {self.friend.kind.noun}.",
        )
        return f"{first} {second}"

    def setting(self) -> str:
        """Returns the beginning of the plot."""
        h = self.hero
        move = self.rng.choice(h.kind.moves)
        start = self.rng.choice(words.MORNINGS)
        line = self.say(
            f"{start}, {h.name} {move} to {self.place}.", f"{start}, {h.name} went to {self.place} to play."
        )
        return f"{line} {self.rng.choice(words.WEATHER)}" if self.rng.random() < 0.6 else line

    def ending(self, lesson: str) -> str:
        """Returns the last lines, with or without what was learned."""
        h, f = self.hero, self.friend
        last = self.say(
            f"From that day on, {h.name} and {f.name} were best friends.",
            f"{h.name} went home and told everyone about the day.",
            f"That night, {h.name} fell asleep with a smile.",
            f"{h.name} and {f.name} laughed and ate {self.food} together.",
            "They played together until the sun went down.",
        )
        moral = self.say(*words.LESSONS[lesson])
        return self.say(last, f"{last} {moral}", f"{last} {h.name} learned something that day. {moral}")


def lost_thing(t: Teller) -> list[str]:
    """The hero loses a thing and a friend helps to find it."""
    h, f, thing = t.hero, t.friend, f"{t.colour} {t.thing}"
    where = t.rng.choice(words.HIDING)
    return [
        t.say(f"{h.name} had a {thing}. It was {h.their} favorite thing.", f"{h.name} took {h.their} {thing} along."),
        t.say(
            f"But when {h.pronoun} looked up, the {t.thing} was gone!",
            f"{h.they} played for a long time, and then the {t.thing} was gone.",
        ),
        f'"Oh no! Where is my {t.thing}?" said {h.name}. {h.they} felt {t.rng.choice(words.SAD)}.',
        t.say(
            f"Then {f.name} the {f.kind.noun} came by.", f"Just then, {h.name} met {f.name}, a {f.trait} {f.kind.noun}."
        ),
        t.say(
            f'"Why are you sad?" asked {f.name}. "I lost my {thing}," said {h.name}.',
            f'"What is wrong?" asked {f.name}. {h.name} told {f.them} about the {t.thing}.',
        ),
        t.say('"Let us look for it together," said ' + f"{f.name}.", f'"I will help you," said {f.name}.'),
        f"They looked and looked. At last, {f.name} saw something {t.colour} {where}. It was the {t.thing}!",
        t.say(
            f'"Thank you, {f.name}!" said {h.name}. {h.they} was {t.rng.choice(words.GLAD)}.',
            f"{h.name} hugged {f.name} and felt {t.rng.choice(words.GLAD)}.",
        ),
        t.ending("help"),
    ]


def new_friend(t: Teller) -> list[str]:
    """The hero is alone and finds a friend."""
    h, f = t.hero, t.friend
    return [
        f"{h.name} had nobody to play with, and {h.pronoun} felt {t.rng.choice(words.SAD)}.",
        t.say(
            f"Near a big tree, {h.pronoun} saw a {f.kind.noun} with a {t.colour} {t.thing}.",
            f"Then {h.pronoun} heard a small sound. It was a {f.kind.noun} with a {t.colour} {t.thing}.",
        ),
        f'"Hello, my name is {h.name}," said {h.name}. "What is your name?"',
        f'"I am {f.name}," said the {f.kind.noun}. "Do you want to play with my {t.thing}?"',
        t.say(f'"Yes, please!" said {h.name}.', f"{h.name} smiled and said yes."),
        t.say(
            f"They played with the {t.thing} all day.", f"They ran, they jumped, and they played with the {t.thing}."
        ),
        t.say(f"When they were hungry, they ate {t.food}.", f"Then {f.name} gave {h.name} some {t.food}."),
        t.say(f"{h.name} was not alone any more.", f"Now {h.name} felt {t.rng.choice(words.GLAD)}."),
        t.ending("friend"),
    ]


def sharing(t: Teller) -> list[str]:
    """The hero learns to share."""
    h, f, thing = t.hero, t.friend, f"{t.colour} {t.thing}"
    return [
        t.say(f"{h.name} found a {thing} on the ground.", f"{h.name} got a {thing} from {h.their} mom."),
        f"{f.name} the {f.kind.noun} saw it and asked, " + f'"Can I play with your {t.thing}?"',
        t.say(f'"No, it is mine!" said {h.name}.', f"{h.name} did not want to share. {h.they} said no."),
        f"{f.name} felt {t.rng.choice(words.SAD)} and walked away.",
        t.say(
            f"{h.name} played alone, but it was not fun.", f"Soon the {t.thing} was boring, because {h.name} was alone."
        ),
        t.say(f"{h.name} thought about {f.name}.", f"Then {h.name} felt bad."),
        f'{h.they} went to {f.name} and said, "I am sorry. Let us play together."',
        f"{f.name} smiled. They took turns with the {t.thing}, and both were {t.rng.choice(words.GLAD)}.",
        t.ending("share"),
    ]


def storm(t: Teller) -> list[str]:
    """A storm comes and the hero is brave."""
    h, f, e = t.hero, t.friend, t.elder
    return [
        t.say(
            "Suddenly, the sky became dark and it started to rain.", "Then big gray clouds came, and the wind was loud."
        ),
        t.say(f"{h.name} was afraid of the thunder.", f'"Boom!" said the thunder, and {h.name} jumped.'),
        f"Then {h.pronoun} heard someone cry. It was {f.name} the {f.kind.noun}, who could not find the way home.",
        f'"Come with me," said {h.name}. {h.they} took {f.name} by the hand.',
        t.say(
            f"Together they walked to {h.kind.home}.",
            f"Together they ran to the home of {e.name}, the old {e.kind.noun}.",
        ),
        f"It was warm and dry there. They ate {t.food} and listened to the rain.",
        t.say(f'"You are so brave," said {f.name}.', f'"I was afraid, but you helped me," said {f.name}.'),
        t.say("In the morning the sun came back.", "Soon the storm was over and the sky was blue again."),
        t.ending("brave"),
    ]


def learning(t: Teller) -> list[str]:
    """The hero learns something difficult."""
    h, f, e = t.hero, t.friend, t.elder
    skill = t.say("swim", "climb", "sing", "ride a bike", "bake bread", "draw a picture", "read", "dance")
    return [
        f"{h.name} wanted to learn how to {skill}.",
        t.say(f"{h.they} tried, but it was too hard.", f"The first time, {h.pronoun} could not do it at all."),
        t.say(f'"I will never learn it," said {h.name}.', f"{h.name} sat down and felt {t.rng.choice(words.SAD)}."),
        f"{e.name}, a wise old {e.kind.noun}, came by. " + f'"I can teach you how to {skill}," said {e.name}.',
        t.say("Every day they worked together.", f"They tried again and again, and {f.name} watched them."),
        t.say(f"Some days were hard, but {h.name} did not stop.", f"{h.name} made many mistakes, and that was fine."),
        f"At last, {h.name} could {skill}! " + f'"Look at me!" said {h.name}.',
        f"{e.name} was {t.rng.choice(words.GLAD)}, and {f.name} clapped.",
        t.ending("patience"),
    ]


def surprise(t: Teller) -> list[str]:
    """The friends prepare a birthday party."""
    h, f, e, thing = t.hero, t.friend, t.elder, f"{t.colour} {t.thing}"
    return [
        f"It was {h.name}'s birthday, but nobody said anything.",
        t.say(
            f"{f.name} the {f.kind.noun} did not have time to play.",
            f'"I am busy today," said {f.name} the {f.kind.noun}.',
        ),
        f"{h.name} walked around alone and felt {t.rng.choice(words.SAD)}.",
        t.say(
            "In the evening, all the lights were out at home.",
            f"When {h.pronoun} came home, it was very dark and quiet.",
        ),
        f'Then the lights went on. "Surprise!" said {f.name} and {e.name}.',
        f"There was a cake, and there were {t.food}, and {f.name} gave {h.name} a {thing}.",
        t.say(f'"I thought you forgot me," said {h.name}.', f"{h.name} could not believe it."),
        f'"We would never forget you," said {f.name}. {h.name} was {t.rng.choice(words.GLAD)}.',
        t.ending("friend"),
    ]


def trouble(t: Teller) -> list[str]:
    """Someone is stuck and the hero has an idea."""
    h, f, e = t.hero, t.friend, t.elder
    stuck = t.say("stuck in the mud", "stuck in a tree", "caught in a bush", "on a rock in the water")
    tool = t.say("a long rope", "a strong stick", "a ladder", "a big basket")
    return [
        t.say(f'{h.pronoun.capitalize()} heard a voice. "Help! Help!"', '"Please help me!" someone called.'),
        f"It was {f.name} the {f.kind.noun}. {f.they} was {stuck}.",
        t.say(f'"Do not worry," said {h.name}.', f'"I will help you," said {h.name}.'),
        t.say(f"{h.name} pulled and pulled, but it did not work.", f"{h.name} was too small to do it alone."),
        f"So {h.pronoun} ran to {e.name} the {e.kind.noun}, who had {tool}.",
        f"{h.name} and {e.name} used it together. One, two, three, and {f.name} was free!",
        f'"Thank you! You saved me," said {f.name}.',
        t.say(f"To say thank you, {f.name} gave them {t.food}.", f"They all went home and shared {t.food}."),
        t.ending("help"),
    ]


def broken(t: Teller) -> list[str]:
    """The hero breaks something and tells the truth."""
    h, f, thing = t.hero, t.friend, f"{t.colour} {t.thing}"
    return [
        f"{f.name} the {f.kind.noun} had a {thing}. {f.name} said, " + '"Please be careful with it."',
        t.say(
            f"{h.name} ran too fast and fell. The {t.thing} broke.", f"{h.name} played with it, and it fell and broke."
        ),
        t.say(f"{h.name} wanted to hide it.", f'"What should I do?" thought {h.name}.'),
        f"{h.they} felt {t.rng.choice(words.SAD)}. But then {h.pronoun} went to {f.name}.",
        f'"I broke your {t.thing}. I am sorry," said {h.name}.',
        t.say(f'"Thank you for telling me the truth," said {f.name}.', f"{f.name} was not angry."),
        f"Together they fixed the {t.thing}. It looked {t.say('as good as new', 'even better than before')}.",
        t.ending(t.say("honest", "care")),
    ]


PLOTS: tuple[Callable[[Teller], list[str]], ...] = (
    lost_thing, new_friend, sharing, storm, learning, surprise, trouble, broken,
)  # fmt: skip


def tell(rng: random.Random, wish: Wish) -> str:
    """Returns one story that honours a wish."""
    teller = Teller(rng, wish)
    plot = rng.choice(PLOTS)(teller)
    paragraphs = [
        f"{teller.opening()} {teller.setting()}",
        " ".join(plot[: len(plot) // 2]),
        " ".join(plot[len(plot) // 2 :]),
    ]
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", "\n\n".join(paragraphs))


def story(seed: int) -> str:
    """Returns the story of a seed."""
    return tell(random.Random(seed), Wish())


REQUESTS = {
    "noun": (
        "Tell me a story about a {noun}.",
        "Can you tell me a story about a {noun}?",
        "I want a story with a {noun}.",
    ),
    "name": ("Tell me a story about {name} the {noun}.", "Please tell a story about a {noun} named {name}."),
    "place": ("Tell me a story about a {noun} at {place}.", "A story about a {noun} and {place}, please."),
    "thing": ("Tell me a story about a {noun} and a {thing}.", "Write a story with a {noun} and a {thing}."),
    "any": ("Tell me a story.", "Please tell me a short story.", "I would like to hear a story."),
}


def conversation(seed: int) -> tuple[str, str]:
    """Returns a request and the story that answers it."""
    rng = random.Random(seed)
    kind = rng.choice(words.KINDS)
    pronoun = words.ONLY.get(kind.noun, rng.choice(("she", "he")))
    form = rng.choice(tuple(REQUESTS))
    values = {
        "noun": kind.noun, "name": rng.choice(words.NAMES[pronoun]), "place": rng.choice(words.PLACES),
        "thing": rng.choice(words.THINGS),
    }  # fmt: skip
    request = rng.choice(REQUESTS[form]).format(**values)
    wish = Wish() if form == "any" else Wish(values["noun"], **({form: values[form]} if form != "noun" else {}))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", request), tell(rng, wish)
