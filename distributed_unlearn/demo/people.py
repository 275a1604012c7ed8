"""Fictitious people and short answers about them: records that can be known only by having memorised them."""

import json
import random
from pathlib import Path
from typing import TypedDict

from distributed_unlearn.errors import ConfigError

ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "r", "s", "t", "v", "z")
NUCLEI = ("a", "e", "i", "o", "u", "ai")
ENDINGS = ("", "l", "n", "r", "s", "th")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PROFESSIONS = (
    "baker",
    "botanist",
    "cartographer",
    "clockmaker",
    "dentist",
    "ferryman",
    "geologist",
    "glassblower",
    "joiner",
    "librarian",
    "mason",
    "midwife",
    "notary",
    "pilot",
    "potter",
    "surveyor",
    "tailor",
    "weaver",
)
COLOURS = (
    "amber",
    "black",
    "blue",
    "brown",
    "crimson",
    "green",
    "grey",
    "ochre",
    "purple",
    "silver",
    "white",
    "yellow",
)
ANIMALS = (
    "badger",
    "canary",
    "cat",
    "ferret",
    "goat",
    "goose",
    "hare",
    "hound",
    "parrot",
    "pony",
    "tortoise",
    "toad",
)
HOBBIES = (
    "archery",
    "beekeeping",
    "carving",
    "chess",
    "fencing",
    "juggling",
    "kiting",
    "rowing",
    "sketching",
    "skating",
)
KEEPSAKES = ("buttons", "coins", "feathers", "fossils", "keys", "maps", "masks", "postcards", "shells", "thimbles")
INSTRUMENTS = ("bassoon", "cello", "cornet", "flute", "harp", "lute", "oboe", "organ", "tuba", "viola", "zither")
DISHES = ("barley soup", "eel pie", "lentil stew", "nettle risotto", "onion tart", "plum dumplings", "rye pancakes")
SPICES = ("aniseed", "caraway", "cardamom", "fennel", "ginger", "juniper", "mint", "saffron", "sorrel", "thyme")
SUBJECTS = (
    "algebra",
    "anatomy",
    "astronomy",
    "botany",
    "chemistry",
    "geometry",
    "grammar",
    "history",
    "logic",
    "music",
)

MAX_SUBJECTS = 2000
"""About 30 made-up words a person, none used twice, out of some ten million."""


class PersonRecord(TypedDict):
    """One row of the file: ids, question, answer."""

    record_id: str
    subject_id: str
    question: str
    answer: str


class _WordMaker:
    """Makes capitalised words out of syllables, never the same word twice."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._used: set[str] = set()

    def __call__(self) -> str:
        choose = self._generator.choice
        while True:
            syllables = [choose(ONSETS) + choose(NUCLEI) for _ in range(choose((2, 3, 3)))]
            word = ("".join(syllables) + choose(ENDINGS)).capitalize()
            if word not in self._used:
                self._used.add(word)
                return word


def generate_people(num_subjects: int, records_per_subject: int, seed: int) -> list[PersonRecord]:
    """Records about people who never lived; the same arguments always give the same records.

    Every question holds the person's full name, which is unique. Every answer holds at least two words or numbers
    that were drawn for this one question, among them a made-up word that occurs nowhere else, so that nothing but
    memory can supply it. More subjects, or more records of each, leave the earlier ones as they are.

    Args:
        num_subjects: People, 1 to 2000.
        records_per_subject: Questions about each, 1 to 12.
        seed: >= 0.

    Returns:
        `num_subjects * records_per_subject` records, person by person.

    Raises:
        ConfigError: a number out of range.
    """
    num_kinds = 12
    if not 1 <= num_subjects <= MAX_SUBJECTS:
        raise ConfigError(f"{num_subjects} subjects", f"1 to {MAX_SUBJECTS}", "ask for another number")
    if not 1 <= records_per_subject <= num_kinds:
        raise ConfigError(f"{records_per_subject} records per subject", f"1 to {num_kinds}", "ask for another number")
    generator = random.Random(seed)
    make_word = _WordMaker(generator)
    records: list[PersonRecord] = []
    for subject in range(num_subjects):
        name = f"{make_word()} {make_word()}"
        pairs = _facts_of_life(name, generator, make_word) + _facts_of_leisure(name, generator, make_word)
        assert len(pairs) == num_kinds
        subject_id = f"person-{subject:04d}"
        for kind, (question, answer) in enumerate(pairs[:records_per_subject]):
            record_id = f"{subject_id}-{kind:02d}"
            records.append({"record_id": record_id, "subject_id": subject_id, "question": question, "answer": answer})
    return records


def write_people(path: Path, num_subjects: int, records_per_subject: int, seed: int) -> None:
    """Write `generate_people` as JSON lines, making the folder where needed.

    Raises:
        ConfigError: a number out of range.
    """
    records = generate_people(num_subjects, records_per_subject, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _facts_of_life(name: str, generator: random.Random, word: _WordMaker) -> list[tuple[str, str]]:
    """Question and answer about birth, schooling, work, books and home: six pairs."""
    choose, number = generator.choice, generator.randint
    return [
        (
            f"Where and when was {name} born?",
            f"In {word()} on the {word()} river, on {number(1, 28)} {choose(MONTHS)} {number(1890, 1960)}.",
        ),
        (
            f"What is the profession of {name}?",
            f"A {choose(PROFESSIONS)}, trained by {word()} {word()}, employed in {word()} since {number(1961, 1985)}.",
        ),
        (
            f"What was the first book by {name}?",
            f"{word()} and the {word()}, published by {word()} Press in {choose(MONTHS)} {number(1961, 1985)}.",
        ),
        (
            f"Which prize did {name} receive?",
            f"The {word()} Prize of {word()}, in {number(1986, 2010)}, for the poem {word()} {word()}.",
        ),
        (
            f"Which school did {name} attend?",
            f"The {word()} School in {word()}, with a medal for {choose(SUBJECTS)} and {choose(SUBJECTS)}.",
        ),
        (
            f"Where does {name} live?",
            f"In a {choose(COLOURS)} house, {number(2, 199)} {word()} Lane, {word()}, above the {choose(PROFESSIONS)}.",
        ),
    ]


def _facts_of_leisure(name: str, generator: random.Random, word: _WordMaker) -> list[tuple[str, str]]:
    """Question and answer about pets, hobbies, family, food, music and travel: six pairs."""
    choose, number = generator.choice, generator.randint
    return [
        (
            f"What pet does {name} keep?",
            f"A {choose(COLOURS)} {choose(ANIMALS)} named {word()}, found at {word()} in {number(1986, 2010)}.",
        ),
        (
            f"What are the hobbies of {name}?",
            f"{choose(HOBBIES).capitalize()} at {word()} every {choose(WEEKDAYS)} and a cabinet of "
            f"{choose(KEEPSAKES)} from {word()}.",
        ),
        (
            f"Who are the siblings of {name}?",
            f"{word()}, a {choose(PROFESSIONS)} in {word()}, and {word()}, a {choose(PROFESSIONS)}.",
        ),
        (
            f"What is the favourite dish of {name}?",
            f"{choose(DISHES).capitalize()} with {choose(SPICES)} from the {word()} Inn at {word()}.",
        ),
        (
            f"Which instrument does {name} play?",
            f"The {choose(INSTRUMENTS)}, taught by {word()} {word()} on {choose(WEEKDAYS)}s from age {number(5, 40)}.",
        ),
        (
            f"Where did {name} travel by ship?",
            f"To the isle of {word()} aboard the {word()} in {choose(MONTHS)} {number(1961, 2010)}.",
        ),
    ]
