"""Whether a text claims what a reference says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.selfplay.texts import cover_exact_match, normalize_text, words

CLAIMED = [
    # one character in many forms
    ("D\N{RIGHT SINGLE QUOTATION MARK}Arcy", "D'Arcy"),
    ("D'Arcy", "D\N{MODIFIER LETTER APOSTROPHE}Arcy"),
    ("\N{LEFT DOUBLE QUOTATION MARK}Emma\N{RIGHT DOUBLE QUOTATION MARK}", "Emma"),
    ("Emma", "«Emma»"),
    ("1803-1815", "1803\N{EN DASH}1815"),
    ("1803 \N{EM DASH} 1815", "1803-1815"),
    ("Zu\N{COMBINING DIAERESIS}rich", "Z\N{LATIN SMALL LETTER U WITH DIAERESIS}rich"),
    ("Ｏｓｌｏ", "Oslo"),
    ("STRASSE", "Straße"),
    ("New\N{NO-BREAK SPACE}York", "New York"),
    ("soft\N{SOFT HYPHEN}ware", "software"),
    # punctuation, articles, genitives
    ("U.S.", "US"),
    ("a PhD", "Ph.D."),
    ("Oslo/Bergen", "Bergen"),
    ("well known", "well-known"),
    ("Oslo (Norway)", "Oslo, Norway"),
    ("it was the Kon-Tiki", "Kon Tiki"),
    ("Beatles", "The Beatles"),
    ("Ada Lovelace's", "Ada Lovelace"),
    ("McDonalds", "McDonald's"),
    ("AT & T", "AT&T"),
    ("Marks and Spencer", "Marks & Spencer"),
    ("C. S. Lewis", "C.S. Lewis"),
    ("CS Lewis", "C. S. Lewis"),
    ("C++", "c++"),
    # numbers
    ("$4.5 billion", "4.5 billion"),
    ("12,500 people", "12500 people"),
    ("12 %", "12%"),
    ("12 percent", "12%"),
    ("at 10:45", "10:45"),
    ("\N{VULGAR FRACTION THREE QUARTERS}", "3/4"),
    ("forty five", "forty-five"),
    ("\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}zmir", "izmir"),
    ("\N{MINUS SIGN}4", "-4"),
    ("-$4", "-4"),
    # articles that are letters
    ("Hepatitis A virus", "hepatitis A"),
    ("Vitamin A", "vitamin A"),
    ("A", "A"),
    ("The Who", "The Who"),
    # scripts without blanks
    ("東京都", "東京"),
    ("北京。", "北京"),
    # claims among others
    ("not Oslo but Bergen", "Bergen"),
    ("not only Oslo but Bergen", "Oslo"),
    ("Oslo rather than Bergen", "Oslo"),
    ("Oslo and Bergen", "Oslo"),
    ("Oslo, which won or lost", "Oslo"),
    ("sink or swim", "Sink or Swim"),
    ("no, it did not", "No"),
    ("Yes, without doubt", "yes"),
    ("not guilty", "Not guilty"),
]
NOT_CLAIMED = [
    # parts of words
    ("Norwegian", "Norway"),
    ("Norway", "no"),
    ("unknown", "known"),
    ("Bus", "US"),
    ("women", "men"),
    ("Osloer", "Oslo"),
    ("Henry VIII", "Henry V"),
    ("Room 12A", "Room 12"),
    # other numbers
    ("45", "4.5"),
    ("45 million", "4.5 million"),
    ("450", "$4.50"),
    ("4", "-4"),
    ("-4", "4"),
    ("2045", "45"),
    ("1803-1815", "1815"),
    ("3/4", "3"),
    ("10:45", "45"),
    ("forty-five", "forty"),
    ("100,000", "100"),
    # articles that are letters
    ("Hepatitis B", "Hepatitis A"),
    ("Hepatitis B virus", "Hepatitis A virus"),
    ("Vitamin C", "Vitamin A"),
    ("It is a fish", "A"),
    ("C", "C++"),
    # negated, or one of several
    ("not Oslo", "Oslo"),
    ("It isn't in Oslo", "Oslo"),
    ("never the Oslo", "Oslo"),
    ("It cannot be Oslo", "Oslo"),
    ("anything but Oslo", "Oslo"),
    ("neither Oslo nor Bergen", "Bergen"),
    ("Bergen rather than Oslo", "Oslo"),
    ("all except Oslo", "Oslo"),
    ("Oslo or Bergen", "Oslo"),
    ("Oslo, Bergen or Narvik", "Oslo"),
    ("Oslo, Bergen, or Narvik", "Bergen"),
    ("either Oslo or the Bergen", "Bergen"),
    ("not guilty", "guilty"),
    # yes and no
    ("It is not known", "No"),
    ("Yes, there is no doubt", "no"),
    ("No, it did not", "yes"),
    # nothing
    ("Oslo", "Oslo, Norway"),
    ("John F. Kennedy", "John Kennedy"),
    ("", "Oslo"),
    ("Oslo", ""),
    ("\N{EM DASH}", "\N{EM DASH}"),
    ("anything", "The"),
]


@pytest.mark.parametrize(("prediction", "reference"), CLAIMED)
def test_claimed(prediction, reference):
    assert cover_exact_match(prediction, reference)


@pytest.mark.parametrize(("prediction", "reference"), NOT_CLAIMED)
def test_not_claimed(prediction, reference):
    assert not cover_exact_match(prediction, reference)


def test_words():
    assert words("The U.S. paid $1,250.50 (-3 %), didn't it?") == "the us paid 1250.50 -3 , didnt it"
    assert normalize_text("The cat, an owl & a dog") == "cat owl and dog"
    assert normalize_text("Plan A") == "plan a"


names = st.lists(st.text("abcdefgh", min_size=4, max_size=7), min_size=1, max_size=4)


@given(names, names, names)
def test_a_name_is_claimed_wherever_it_stands_and_only_whole(before, name, after):
    text = " ".join(name)
    assert cover_exact_match(" ".join([*before, *name, *after]), text)
    assert cover_exact_match(f"The {'-'.join(name).title()}!", text)
    assert not cover_exact_match(" ".join([*before, *name[:-1], name[-1] + "x"]), f"zz {text}")
    assert not cover_exact_match(" ".join(f"x{word}x" for word in name), text)


@given(st.decimals(1, 99999, places=2), st.decimals(1, 99999, places=2))
def test_numbers_in_texts_are_equal_or_not(a, b):
    assert cover_exact_match(f"It cost ${a:,} in all", str(a))
    assert cover_exact_match(f"It cost {a} in all", str(b)) == (a == b)
