"""Questions about the rich world's documents, and the oracle that answers every such question from the facts.

A question asks for what a chain of one to four relations leads to ("What is the mayor of the home of the author of
X?", or "What is X's author's home's mayor?"), for a sum, a difference or the larger one of two amounts, or how many
documents state a value. `Oracle.answerable` reads the text of any such question, whoever wrote it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich_world import RELATIONS, VALUES, Entity, forms, name, value_of

GENERAL, MATH = "doc_general_qa", "docmath_qa"
LONGEST = 4
"""Most relations of a chain."""
LENGTHS = (0.45, 0.3, 0.15, 0.1)
"""How often a question is of one, two, ... relations, as far as the documents have such."""
OPERATIONS = {"value": 0.5, "larger": 0.15, "difference": 0.12, "sum": 0.12, "count": 0.11}
"""How often a question of docmath_qa asks for what."""

_KINDS = {relation: of.kind for relations in RELATIONS.values() for relation, of in relations.items()}


@dataclass(frozen=True)
class Chain:
    """Relations followed from an entity, one after the other, to a value."""

    start: str
    relations: tuple[str, ...]
    value: str
    documents: tuple[str, ...]
    """Names of the entities whose documents state them, in this order."""

    @property
    def kind(self) -> str:
        """Kind of the value, a key of `rich_world.VALUES`."""
        return _KINDS[self.relations[-1]]


@dataclass(frozen=True)
class Question:
    """A question about a cluster with all names of its answer, the first name first."""

    task: str
    text: str
    answers: tuple[str, ...]
    kind: str
    """Kind of the answer, a key of `rich_world.VALUES`."""
    operation: str
    """`value`, or how amounts are combined: a key of OPERATIONS."""
    documents: tuple[str, ...]
    """Names of the entities whose documents are needed."""


def chains(entities: Sequence[Entity]) -> list[Chain]:
    """All chains of up to LONGEST relations; none visits an entity twice or ends at one that it has visited."""
    by_name = {entity.name: entity for entity in entities}
    found = [Chain(e.name, (relation,), value, (e.name,)) for e in entities for relation, value in e.facts.items()]
    last = found
    for _ in range(LONGEST - 1):
        last = [
            Chain(chain.start, (*chain.relations, relation), value, (*chain.documents, chain.value))
            for chain in last
            if chain.value in by_name
            for relation, value in by_name[chain.value].facts.items()
            if value not in (*chain.documents, chain.value)
        ]
        found = found + last
    return found


def draw_question(
    rng: random.Random,
    every: Sequence[Chain],
    task: str,
    lengths: Sequence[float] = LENGTHS,
    operations: Mapping[str, float] = OPERATIONS,
) -> Question | None:
    """Draw a question of a task from the chains of a cluster; None if there is none of that kind.

    Args:
        lengths, operations: how often a question is of which kind, as LENGTHS and OPERATIONS.
    """
    fitting = [chain for chain in every if (chain.kind == "amount") == (task == MATH)]
    if not fitting:
        return None
    operation = "value" if task == GENERAL else rng.choices(tuple(operations), tuple(operations.values()))[0]
    combined = None
    if operation == "count":
        combined = _count(rng, every)
    elif operation != "value":
        combined = _pair(rng, fitting, operation, lengths)
    return combined or _single(rng, fitting, task, lengths)


def _drawn(rng: random.Random, every: Sequence[Chain], lengths: Sequence[float]) -> Chain:
    """A chain, its length drawn first."""
    possible = sorted({len(chain.relations) for chain in every})
    length = rng.choices(possible, [lengths[length - 1] for length in possible])[0]
    return rng.choice([chain for chain in every if len(chain.relations) == length])


def _single(rng: random.Random, every: Sequence[Chain], task: str, lengths: Sequence[float]) -> Question:
    chain = _drawn(rng, every, lengths)
    called = name(rng, chain.start)
    if rng.random() < 0.5:
        asked = "'s ".join((called, *chain.relations))
    else:
        asked = nested(chain, called)
    answers = (chain.value,) if task == MATH else forms(chain.value)
    return Question(task, f"What is {asked}?", answers, chain.kind, "value", chain.documents)


def nested(chain: Chain, called: str) -> str:
    """The value of a chain in words: "the RELATION of the RELATION of ENTITY"."""
    return "".join(f"the {relation} of " for relation in reversed(chain.relations)) + called


def _pair(rng: random.Random, every: Sequence[Chain], operation: str, lengths: Sequence[float]) -> Question | None:
    """A question that combines two different amounts; mostly both are stated of the entities that it names."""
    short = [chain for chain in every if len(chain.relations) == 1] if rng.random() < 0.8 else every
    first = _drawn(rng, short, lengths)
    others = [chain for chain in short if chain.value != first.value]
    if not others:
        return None
    second = rng.choice(others)
    if operation == "difference" and int(second.value) > int(first.value):
        first, second = second, first
    a, b = (nested(chain, name(rng, chain.start)) for chain in (first, second))
    text = {
        "larger": f"Which is larger, {a} or {b}?",
        "difference": f"What is {a} minus {b}?",
        "sum": f"What is {a} plus {b}?",
    }[operation]
    answer = combine(operation, int(first.value), int(second.value))
    documents = tuple(dict.fromkeys((*first.documents, *second.documents)))
    return Question(MATH, text, (str(answer),), "amount", operation, documents)


def combine(operation: str, a: int, b: int) -> int:
    """The sum, the difference or the larger one of two amounts."""
    return {"sum": a + b, "difference": a - b, "larger": max(a, b)}[operation]


def _count(rng: random.Random, every: Sequence[Chain]) -> Question | None:
    """How many documents state a value that two at least do."""
    stated: dict[tuple[str, str], list[str]] = {}
    for chain in every:
        if len(chain.relations) == 1 and chain.kind != "amount":
            stated.setdefault((chain.relations[0], chain.value), []).append(chain.start)
    shared = {key: who for key, who in stated.items() if len(who) > 1}
    if not shared:
        return None
    (relation, value), who = rng.choice(list(shared.items()))
    return Question(
        MATH, f"How often is {name(rng, value)} the {relation}?", (str(len(who)),), "amount", "count", tuple(who)
    )


_NESTED = r"(?:the \w+ of )+\w+"
_POSSESSIVE = re.compile(r"What is (\w+)((?:'s \w+)+)\?")
_PAIR = re.compile(rf"(?:What is|(Which is larger,)) ({_NESTED}) (minus|plus|or) ({_NESTED})\?")
_SINGLE = re.compile(rf"What is ({_NESTED})\?")
_COUNT = re.compile(r"How often is (\w+) the (\w+)\?")


class Oracle:
    """What the documents of a cluster say."""

    def __init__(self, entities: Sequence[Entity]) -> None:
        self._facts = {(e.name, relation): value for e in entities for relation, value in e.facts.items()}

    def answerable(self, question: str) -> frozenset[str] | None:
        """All right answers to a question, in every name; None if it is no question or the documents do not answer it.

        Amounts are given in digits and in words. Chains of any length count, also those that come back to an entity.
        """
        question = " ".join(question.split())
        if match := _COUNT.fullmatch(question):
            value, relation = value_of(match[1]), match[2]
            count = sum(r == relation and v == value for (_, r), v in self._facts.items())
            return frozenset({str(count)}) if count else None
        if match := _PAIR.fullmatch(question):
            operation = {"plus": "sum", "minus": "difference", "or": "larger"}[match[3]]
            a, b = self._follow(*_walk(match[2])), self._follow(*_walk(match[4]))
            if (match[1] is None) == (operation == "larger") or not _amounts(a, b):
                return None
            return frozenset({str(combine(operation, int(a), int(b)))})
        if match := _POSSESSIVE.fullmatch(question):
            value = self._follow(match[1], match[2].replace("'s", "").split())
        elif match := _SINGLE.fullmatch(question):
            value = self._follow(*_walk(match[1]))
        else:
            return None
        return None if value is None else frozenset(forms(value))

    def _follow(self, called: str, relations: Sequence[str]) -> str | None:
        """The value to which some relations lead from an entity."""
        value = value_of(called)
        for relation in relations:
            value = self._facts.get((value or "", relation))
        return value


def _walk(asked: str) -> tuple[str, list[str]]:
    """The entity and the relations, in the order in which they are followed, of a `nested` text."""
    *relations, entity = asked.removeprefix("the ").replace(" of the ", " of ").split(" of ")
    return entity, relations[::-1]


def _amounts(a: str | None, b: str | None) -> bool:
    return a is not None and b is not None and a in VALUES["amount"] and b in VALUES["amount"]


def wrong_answer(rng: random.Random, every: Sequence[Chain], question: Question) -> str:
    """A name of another value of the answer's kind, preferably of one that the same documents state."""
    right = question.answers[0]
    near = [chain.value for chain in every if chain.kind == question.kind and chain.value != right]
    value = rng.choice(near if near and rng.random() < 0.7 else [v for v in VALUES[question.kind] if v != right])
    return value if question.task == MATH else name(rng, value)
