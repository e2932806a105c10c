"""A small fictional world: documents whose questions have known answers.

A cluster holds one document per entity (a city, a company or a person). A document states three or
four facts about its entity, and entities of a cluster refer to each other, so that questions need one
document or two. Every value is one word or number. No value is a substring of another one, so that a
text check by substring cannot accept a wrong value; numbers lie between 48 and 99, so that no two are
equal under the numeric check (0.15 % relative, or a factor of 100, 1,000, ...). Years are asked as text,
because neighbours differ by less than 0.15 %.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

GENERAL = "doc_general_qa"
MATH = "docmath_qa"


def _make_names() -> dict[str, list[str]]:
    """Invented names per kind; the ending tells the kind."""
    rng = random.Random(7)
    counts = {"person": 48, "city": 40, "company": 32, "country": 32}
    endings = {
        "person": "aoi",
        "city": ("burg", "ton", "ville"),
        "company": ("corp", "tek", "soft"),
        "country": ("land", "stan"),
    }
    names: dict[str, list[str]] = {}
    taken: list[str] = []
    for kind, count in counts.items():
        names[kind] = []
        while len(names[kind]) < count:
            syllables = (
                rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "n", "r", "l", "s"))
                for _ in range(2)
            )
            name = "".join(syllables) + rng.choice(endings[kind])
            if not any(name in other or other in name for other in taken):
                taken.append(name)
                names[kind].append(name.capitalize())
    return names


VALUES: dict[str, list[str]] = {
    **_make_names(),
    "product": (
        "lamps boats clocks knives shoes tables carpets engines pianos ropes mirrors bottles paints bicycles "
        "candles cameras drums gloves helmets kites ladders needles ovens pencils radios saddles tents "
        "umbrellas violins wheels blankets bricks"
    ).split(),
    "job": (
        "baker doctor painter pilot farmer singer lawyer teacher miner poet judge sailor tailor chemist "
        "nurse actor butcher carpenter diver fisher gardener hunter jeweller librarian"
    ).split(),
    "year": [str(year) for year in range(1600, 1648)],
    "number": [str(number) for number in range(48, 100) if not 60 <= number <= 64],
}
"""Values of every kind; names of entities are the kinds person, city and company."""


@dataclass(frozen=True)
class Attribute:
    """What a document may state of its entity."""

    statement: str
    """Sentence of the document; {e} is the entity, {v} the value."""
    question: str
    """Question for the value; {e} is the entity or a phrase that leads to it."""
    values: str
    """Kind of the value, a key of VALUES."""
    link: str = ""
    """Phrase for the value as an entity, used in two-hop questions; empty if the value has no document."""


ATTRIBUTES: dict[str, dict[str, Attribute]] = {
    "city": {
        "country": Attribute("{e} is a city in {v}.", "In which country is {e}?", "country"),
        "mayor": Attribute(
            "The mayor of {e} is {v}.", "Who is the mayor of {e}?", "person", "the mayor of {e}"
        ),
        "founded": Attribute("{e} was founded in {v}.", "When was {e} founded?", "year"),
        "bridges": Attribute("{e} has {v} bridges.", "How many bridges does {e} have?", "number"),
        "parks": Attribute("{e} has {v} parks.", "How many parks does {e} have?", "number"),
    },
    "company": {
        "seat": Attribute(
            "{e} is a company based in {v}.",
            "In which city is {e} based?",
            "city",
            "the city where {e} is based",
        ),
        "head": Attribute("The head of {e} is {v}.", "Who is the head of {e}?", "person", "the head of {e}"),
        "product": Attribute("{e} makes {v}.", "What does {e} make?", "product"),
        "workers": Attribute("{e} employs {v} workers.", "How many workers does {e} employ?", "number"),
        "ships": Attribute("{e} owns {v} ships.", "How many ships does {e} own?", "number"),
    },
    "person": {
        "home": Attribute(
            "{e} lives in {v}.", "In which city does {e} live?", "city", "the city where {e} lives"
        ),
        "job": Attribute("{e} works as a {v}.", "What is the job of {e}?", "job"),
        "born": Attribute("{e} was born in {v}.", "When was {e} born?", "year"),
        "medals": Attribute("{e} won {v} medals.", "How many medals did {e} win?", "number"),
        "books": Attribute("{e} wrote {v} books.", "How many books did {e} write?", "number"),
    },
}


@dataclass(frozen=True)
class Entity:
    """One document: an entity, its facts and the text that states them."""

    name: str
    kind: str
    facts: dict[str, str]
    text: str


@dataclass(frozen=True)
class Fact:
    """A question about a cluster with its answer."""

    task: str
    text: str
    answer: str
    values: str
    """Kind of the answer, a key of VALUES."""
    documents: tuple[str, ...]
    """Names of the entities whose documents are needed: one, or two in order."""


def make_cluster(rng: random.Random, size: int, of: Sequence[str] = tuple(ATTRIBUTES)) -> list[Entity]:
    """Draw `size` entities of the given kinds; references go to the cluster's entities with probability 0.7."""
    kinds: dict[str, str] = {}
    while len(kinds) < size:
        kind = rng.choice(of)
        kinds.setdefault(rng.choice(VALUES[kind]), kind)
    entities = []
    for name, kind in kinds.items():
        numeric = [a for a, attribute in ATTRIBUTES[kind].items() if attribute.values == "number"]
        verbal = [a for a in ATTRIBUTES[kind] if a not in numeric]
        chosen = rng.sample(numeric, rng.choice((1, 1, 2))) + rng.sample(verbal, 2)
        if len(chosen) == 3 and rng.random() < 0.5:
            chosen = chosen[:1] + verbal
        rng.shuffle(chosen)
        facts = {}
        for key in chosen:
            values = ATTRIBUTES[kind][key].values
            near = [other for other, other_kind in kinds.items() if other_kind == values and other != name]
            pool = near if near and rng.random() < 0.7 else [v for v in VALUES[values] if v != name]
            facts[key] = rng.choice(pool)
        text = " ".join(
            ATTRIBUTES[kind][key].statement.format(e=name, v=value) for key, value in facts.items()
        )
        entities.append(Entity(name, kind, facts, text))
    return entities


def questions(entities: Sequence[Entity]) -> list[Fact]:
    """All questions that these documents answer: of one hop, then of two.

    Their texts are distinct, so `{fact.text: fact.answer for fact in questions(entities)}` is an oracle.
    Two-hop questions that name their own answer or start are left out.
    """
    by_name = {entity.name: entity for entity in entities}

    def ask(entity: Entity, subject: str, documents: tuple[str, ...]) -> list[Fact]:
        facts = []
        for key, value in entity.facts.items():
            attribute = ATTRIBUTES[entity.kind][key]
            task = MATH if attribute.values == "number" else GENERAL
            facts.append(Fact(task, attribute.question.format(e=subject), value, attribute.values, documents))
        return facts

    single = [fact for entity in entities for fact in ask(entity, entity.name, (entity.name,))]
    double = []
    for entity in entities:
        for key, value in entity.facts.items():
            link = ATTRIBUTES[entity.kind][key].link
            if link and value in by_name:
                subject = link.format(e=entity.name)
                found = ask(by_name[value], subject, (entity.name, value))
                double += [fact for fact in found if fact.answer != entity.name]
    return single + double


def draw_question(rng: random.Random, facts: Sequence[Fact], task: str, two_hop: float = 0.4) -> Fact | None:
    """Draw a question of `task` from `facts`, of two hops with probability `two_hop` where there is one."""
    hops = 2 if rng.random() < two_hop else 1
    fitting = [fact for fact in facts if fact.task == task]
    wanted = [fact for fact in fitting if len(fact.documents) == hops] or fitting
    return rng.choice(wanted) if wanted else None


def wrong_answer(rng: random.Random, facts: Sequence[Fact], fact: Fact) -> str:
    """A value of the same kind as the answer but not equal to it, preferably out of the same documents."""
    near = [other.answer for other in facts if other.values == fact.values and other.answer != fact.answer]
    if near and rng.random() < 0.7:
        return rng.choice(near)
    return rng.choice([value for value in VALUES[fact.values] if value != fact.answer])
