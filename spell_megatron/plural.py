"""How many of a thing, in words for users."""


def counted(number: int, thing: str) -> str:
    """A number with its noun: `1 step`, `2,000 steps`. `thing` is the noun in the singular, whose plural ends in s."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
