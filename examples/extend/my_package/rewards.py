"""A reward that prefers short questions."""

ENOUGH_WORDS = 20


def short_questions(mean: float, question: str, reference: str) -> float:
    """1 for a question that half of the answers get right, less for others, and half as much for long ones."""
    reward = 1 - 2 * abs(mean - 0.5)
    return reward if len(question.split()) <= ENOUGH_WORDS else reward / 2
