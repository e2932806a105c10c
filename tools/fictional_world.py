"""A small fictional world: documents whose questions have known answers.

A cluster holds one document per entity (a city, a company or a person). A document states four or
five facts about its entity, each as "The RELATION of ENTITY is VALUE.", and entities of a cluster refer to
each other, so that questions need one document or two. Every value is one word or number. No value is a
substring of another one, so that a text check by substring cannot accept a wrong value; numbers lie between
48 and 99, so that no two are equal under the numeric check (0.15 % relative, or a factor of 100, 1,000, ...).
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
    "animal": (
        "badger camel dolphin eagle falcon giraffe hedgehog iguana jackal kangaroo leopard monkey newt otter "
        "panther rabbit salmon tiger vulture walrus yak zebra beaver crocodile donkey elephant ferret goose "
        "heron lobster moose ostrich"
    ).split(),
    "number": [str(number) for number in range(48, 100) if not 60 <= number <= 64],
}
"""Values of every kind; names of entities are the kinds person, city and company."""


RELATIONS: dict[str, dict[str, str]] = {
    "city": {
        "country": "country",
        "mayor": "person",
        "twin": "city",
        "symbol": "animal",
        "area": "number",
        "height": "number",
    },
    "company": {
        "product": "product",
        "head": "person",
        "seat": "city",
        "rival": "company",
        "staff": "number",
        "fleet": "number",
    },
    "person": {
        "job": "job",
        "friend": "person",
        "home": "city",
        "pet": "animal",
        "age": "number",
        "weight": "number",
    },
}
"""Per kind of entity, what a document may state of it, and the kind of the value (a key of VALUES)."""


def statement(relation: str, entity: str, value: str) -> str:
    """The sentence of a document for a fact."""
    return f"The {relation} of {entity} is {value}."


def question_for(relation: str, subject: str) -> str:
    """The question for a value; `subject` is an entity, or "the RELATION of ENTITY" that leads to one."""
    return f"What is the {relation} of {subject}?"


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
    relation: str
    """The relation asked for; in a two-hop question the last one, which is named first."""
    values: str
    """Kind of the answer, a key of VALUES."""
    documents: tuple[str, ...]
    """Names of the entities whose documents are needed: one, or two in order."""


def make_cluster(rng: random.Random, size: int) -> list[Entity]:
    """Draw `size` entities; references go to the cluster's own entities with probability 0.5.

    Most entities of a cluster are of one kind, so that several documents state the relation that a question
    asks for and only its entity tells which one to read.
    """
    main = rng.choice(tuple(RELATIONS))
    kinds: dict[str, str] = {}
    while len(kinds) < size:
        kind = main if rng.random() < 0.9 else rng.choice(tuple(RELATIONS))
        kinds.setdefault(rng.choice(VALUES[kind]), kind)
    entities = []
    for name, kind in kinds.items():
        numeric = [relation for relation, values in RELATIONS[kind].items() if values == "number"]
        verbal = [relation for relation in RELATIONS[kind] if relation not in numeric]
        chosen = rng.sample(numeric, rng.choice((1, 2))) + rng.sample(verbal, 3)
        rng.shuffle(chosen)
        facts = {}
        for relation in chosen:
            values = RELATIONS[kind][relation]
            near = [other for other, other_kind in kinds.items() if other_kind == values and other != name]
            pool = near if near and rng.random() < 0.5 else [v for v in VALUES[values] if v != name]
            facts[relation] = rng.choice(pool)
        text = " ".join(statement(relation, name, value) for relation, value in facts.items())
        entities.append(Entity(name, kind, facts, text))
    return entities


def questions(entities: Sequence[Entity]) -> list[Fact]:
    """All questions that these documents answer: of one hop, then of two.

    Their texts are distinct, so `{fact.text: fact.answer for fact in questions(entities)}` is an oracle.
    Two-hop questions that name their own answer are left out.
    """
    by_name = {entity.name: entity for entity in entities}

    def ask(entity: Entity, subject: str, documents: tuple[str, ...]) -> list[Fact]:
        facts = []
        for relation, value in entity.facts.items():
            values = RELATIONS[entity.kind][relation]
            task = MATH if values == "number" else GENERAL
            facts.append(Fact(task, question_for(relation, subject), value, relation, values, documents))
        return facts

    single = [fact for entity in entities for fact in ask(entity, entity.name, (entity.name,))]
    double = []
    for entity in entities:
        for relation, value in entity.facts.items():
            if value in by_name:
                found = ask(by_name[value], f"the {relation} of {entity.name}", (entity.name, value))
                double += [fact for fact in found if fact.answer != entity.name]
    return single + double


def relation_baseline(entities: Sequence[Entity], fact: Fact) -> float:
    """Chance of being right for a reader who picks any value that the documents state for the relation."""
    stated = [entity.facts[fact.relation] for entity in entities if fact.relation in entity.facts]
    return stated.count(fact.answer) / len(stated)


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
