"""A richer fictional world: every value has two names, every fact two sentences, and entities lead to each other.

A cluster holds one document per entity (a person, a town, a company or a book) with five facts. A person, a place or a
thing has a first name and a byname, as Florence and Firenze, doctor and physician, January and Wolfmoon are one. The
pairs belong to the language (`forms`): no document states them. Documents and questions use either, the first one
more often. No word of one name is a word of another, so a text check accepts none but the name it was given.
Amounts are whole numbers from 2 to 20; documents write them in digits or words.
`rich_questions` asks about such documents and knows the answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BYNAMES = 0.3
"""How often a document or a question uses the second name of something."""
LINKS = 0.65
"""How often a fact that can lead to another document of the cluster does."""
MAIN_SHARE = 0.6
"""How many entities of a cluster are of its main kind, besides those drawn from all kinds."""

ENDINGS = {
    "person": (40, "oi", "ax"),
    "town": (32, "burg", "stad"),
    "company": (24, "corp", "tek"),
    "book": (24, "iad", "saga"),
    "country": (16, "land", "mark"),
}
"""Per kind of invented names: how many, and the endings of first names and bynames."""

COMMON = {
    "job": (
        "doctor/physician lawyer/attorney teacher/tutor sailor/mariner farmer/peasant singer/vocalist cook/chef "
        "poet/bard guard/sentry soldier/warrior priest/cleric judge/magistrate butler/valet miner/collier monk/friar "
        "clerk/scribe"
    ),
    "goods": (
        "lamps/lanterns boats/vessels carpets/rugs coats/jackets sofas/couches bags/sacks stoves/ovens bikes/bicycles "
        "cars/autos shoes/footwear jars/pots caps/hats gems/jewels drapes/curtains spectacles/glasses timber/lumber"
    ),
    "animal": (
        "rabbit/bunny dog/hound horse/steed cat/tomcat pig/swine ox/bullock puma/cougar caribou/reindeer "
        "groundhog/woodchuck ladybird/ladybug firefly/glowworm gnu/wildebeest skunk/polecat rooster/cockerel "
        "donkey/burro stag/hart"
    ),
    "month": (
        "January/Wolfmoon February/Snowmoon March/Sapmoon April/Pinkmoon May/Flowermoon June/Strawmoon July/Hotmoon "
        "August/Grainmoon September/Cornmoon October/Leafmoon November/Frostmoon December/Coldmoon"
    ),
}
"""Per kind of common words: pairs of synonyms."""

NUMBER_WORDS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()


def _names() -> dict[str, dict[str, str]]:
    """The byname of every first name, per kind."""
    rng = random.Random("names of the rich world")
    names: dict[str, dict[str, str]] = {}
    stems: set[str] = set()
    for kind, (count, first, second) in ENDINGS.items():
        names[kind] = {}
        while len(names[kind]) < count:
            syllables = (rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") + rng.choice("nrls") for _ in range(2))
            stem = "".join(syllables).capitalize()
            if stem not in stems:
                stems.add(stem)
                names[kind][stem + first] = stem + second
    for kind, pairs in COMMON.items():
        names[kind] = {a: b for a, _, b in (pair.partition("/") for pair in pairs.split())}
    names["amount"] = {str(number): word for number, word in enumerate(NUMBER_WORDS, start=2)}
    return names


VALUES: dict[str, dict[str, str]] = _names()
"""Per kind of value, its first names with their bynames. A value is known by its first name."""
_FIRST = {form: first for pairs in VALUES.values() for first, second in pairs.items() for form in (first, second)}
_SECOND = {first: second for pairs in VALUES.values() for first, second in pairs.items()}


def value_of(form: str) -> str | None:
    """The value that a name means; None if it is no name."""
    return _FIRST.get(form)


def forms(value: str) -> tuple[str, ...]:
    """The names of a value, the first name first; a number beyond the amounts has one."""
    return (value, _SECOND[value]) if value in _SECOND else (value,)


def name(rng: random.Random, value: str) -> str:
    """One of the names of a value."""
    return _SECOND[value] if rng.random() < BYNAMES else value


@dataclass(frozen=True)
class Relation:
    """What a document may state of an entity: the kind of its value, and its other sentence.

    The first sentence is always "The RELATION of ENTITY is VALUE."
    """

    kind: str
    sentence: str


RELATIONS: dict[str, dict[str, Relation]] = {
    "person": {
        "home": Relation("town", "{entity} lives in {value}."),
        "friend": Relation("person", "{entity} trusts {value}."),
        "employer": Relation("company", "{entity} works for {value}."),
        "job": Relation("job", "{entity} serves as {value}."),
        "pet": Relation("animal", "{entity} feeds the {value}."),
        "birthday": Relation("month", "{entity} celebrates in {value}."),
        "wage": Relation("amount", "{entity} earns {value}."),
        "debt": Relation("amount", "{entity} owes {value}."),
    },
    "town": {
        "mayor": Relation("person", "{value} governs {entity}."),
        "twin": Relation("town", "{entity} pairs with {value}."),
        "country": Relation("country", "{entity} belongs to {value}."),
        "symbol": Relation("animal", "{entity} honours the {value}."),
        "fair": Relation("month", "{entity} trades in {value}."),
        "height": Relation("amount", "{entity} rises {value}."),
        "area": Relation("amount", "{entity} covers {value}."),
    },
    "company": {
        "founder": Relation("person", "{value} founded {entity}."),
        "seat": Relation("town", "{entity} resides in {value}."),
        "rival": Relation("company", "{entity} fights {value}."),
        "product": Relation("goods", "{entity} sells {value}."),
        "start": Relation("month", "{entity} opened in {value}."),
        "staff": Relation("amount", "{entity} employs {value}."),
        "fleet": Relation("amount", "{entity} drives {value}."),
    },
    "book": {
        "author": Relation("person", "{value} wrote {entity}."),
        "publisher": Relation("company", "{value} prints {entity}."),
        "setting": Relation("town", "{entity} plays in {value}."),
        "hero": Relation("job", "{entity} praises the {value}."),
        "release": Relation("month", "{entity} appeared in {value}."),
        "length": Relation("amount", "{entity} lasts {value}."),
        "price": Relation("amount", "{entity} costs {value}."),
    },
}
"""Per kind of entity, its relations by name. The names differ between kinds."""


@dataclass(frozen=True)
class Entity:
    """One document: an entity, its facts (relation -> value) and the text that states them."""

    name: str
    kind: str
    facts: Mapping[str, str]
    text: str


def make_cluster(rng: random.Random, size: int) -> list[Entity]:
    """Draw `size` entities, most of one kind so that several documents state the relation that a question asks for."""
    main = rng.choice(tuple(RELATIONS))
    kinds: dict[str, str] = {}
    while len(kinds) < size:
        kind = main if rng.random() < MAIN_SHARE else rng.choice(tuple(RELATIONS))
        kinds.setdefault(rng.choice(tuple(VALUES[kind])), kind)
    return [_entity(rng, entity, kind, kinds) for entity, kind in kinds.items()]


def _entity(rng: random.Random, entity: str, kind: str, kinds: Mapping[str, str]) -> Entity:
    """An entity with two relations that lead on, one other and both of its amounts; `kinds` are its cluster's."""
    groups: dict[str, list[str]] = {"leads on": [], "other": [], "amount": []}
    for relation, of in RELATIONS[kind].items():
        groups["leads on" if of.kind in RELATIONS else "amount" if of.kind == "amount" else "other"].append(relation)
    chosen = [*rng.sample(groups["leads on"], 2), rng.choice(groups["other"]), *groups["amount"]]
    rng.shuffle(chosen)
    facts = {relation: _value(rng, entity, RELATIONS[kind][relation].kind, kinds) for relation in chosen}
    called = name(rng, entity)
    return Entity(entity, kind, facts, " ".join(sentence(rng, kind, r, called, v) for r, v in facts.items()))


def _value(rng: random.Random, entity: str, kind: str, kinds: Mapping[str, str]) -> str:
    near = [other for other, other_kind in kinds.items() if other_kind == kind and other != entity]
    pool: Sequence[str] = near if near and rng.random() < LINKS else [v for v in VALUES[kind] if v != entity]
    return rng.choice(pool)


def sentence(rng: random.Random, kind: str, relation: str, called: str, value: str) -> str:
    """A sentence for a fact about an entity of that kind, which the document calls `called`."""
    form = RELATIONS[kind][relation].sentence if rng.random() < 0.5 else f"The {relation} of {{entity}} is {{value}}."
    return form.format(entity=called, value=name(rng, value))
