"""Cleaning, words, and cuts, in many scripts."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spell_megatron.corpus.texts import clean, count_words, split_text, words


def test_words():
    assert words("It's a\tTEST_case: naïve 3.14!") == ["it", "s", "a", "test", "case", "naïve", "3", "14"]
    assert words("東京タワーは333m、high") == list("東京タワ") + ["ー", "は", "333m", "high"]
    assert words("--- !!!") == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("नमस्ते दुनिया, यह हिन्दी है।", 5),  # vowel signs are marks
        ("এটি একটি বাংলা বাক্য", 4),
        ("இது ஒரு தமிழ் வாக்கியம்", 4),
        ("هٰذِهِ جُمْلَةٌ عَرَبِيَّةٌ", 3),  # vowel points
        ("שָׁלוֹם עוֹלָם", 2),
        ("Tiếng Việt có dấu", 4),
        ("이것은 한국어 문장입니다", 3),
        ("ภาษาไทย", 7),  # no blanks: every letter is a word
        ("你好，世界。", 4),
        ("コーヒー・カップ", 7),  # the dot is none
        ("𠮷野家", 3),  # beyond U+FFFF
    ],
)
def test_words_of_other_scripts(text, number):
    assert len(words(text)) == number
    assert words(unicodedata.normalize("NFD", text)) == words(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Près du café, où", "Pre\u0300s du cafe\u0301, ou\u0300"),
        ("hyphenation", "hyphen\u00adation"),
        ("می\u200cخواهم", "میخواهم"),  # a joiner that some leave out
        ("क्\u200dष", "क्ष"),
        ("العربية", "العـــربية"),
        ("ﻻ", "لا"),  # a form that PDF files have
        ("financial", "ﬁnancial"),
        ("２０２４年", "2024年"),
        ("一見", "⼀⾒"),  # radicals, which PDF files have instead of the characters
        ("ｶﾞｽ", "ガス"),
        ("word", "wo\ufeffrd"),
        ("İstanbul", "I\u0307stanbul"),
    ],
)
def test_equal_words_need_not_be_equal_bytes(one, other):
    assert words(f"{one} and™ {other}")[:1] == words(f"{other} and")[:1]
    assert words(one) == words(other)


def test_signs_and_invisible_blanks_separate_words():
    assert words("Brand™ and №7") == ["brand", "and", "7"]
    assert words("one\u200btwo\u00a0three\u2028four") == ["one", "two", "three", "four"]


LATIN = st.text(
    st.one_of(st.characters(max_codepoint=0x17F, exclude_characters="\u00adİ"), st.sampled_from("’“”—…€")), max_size=60
)


@given(LATIN)
def test_words_of_european_text_are_runs_of_letters_and_digits(text):
    """As they were before other scripts were looked at: old results stay."""
    assert words(text) == re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    if text.isascii():
        assert words(text) == re.findall(r"[a-z0-9]+", text.lower())
        assert count_words(text) == len(text.split())


def test_counted_words_are_those_of_a_reader():
    assert count_words("It's well-known: 3.14 — yes") == 5
    assert count_words("东京塔高333米。 The end.") == 8
    assert count_words("ภาษาไทย ภาษาลาว") == 14
    assert count_words("यह हिन्दी है।") == 3


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("one\x0btwo", "one\ntwo"),  # slides
        ("one\ftwo", "one\n\ntwo"),
        ("one\x85two\u2028three\u2029four", "one\ntwo\nthree\n\nfour"),
        ("one\x1etwo\x1fthree", "one\ntwo three"),
        ("one\r\ntwo\rthree\r\r\nfour", "one\ntwo\nthree\nfour"),
        ("N\bNA\bAM\bME\bE", "NAME"),  # bold of nroff
        ("N\bN\bN\bNA\bA\bA", "NA"),
        ("_\bN_\bA and N\b_A\b_", "NA and NA"),  # underlined, both ways
        ("title\b\b\b\b\b_____ here", "title here"),
        ("_____\b\b\b\b\btitle", "title"),
        ("+\bo item", "o item"),
        ("teh\b\bhe end", "the end"),  # as typed
        ("\bx\nA\bA", "x\nA"),
        ("\x1b[1mNAME\x1b[0m \x1b[38;5;12mblue\x1b[m", "NAME blue"),
        ("\x1b]8;;http://a.b\x1b\\link\x1b]8;;\x07 \x1b(Bplain\x1b7", "link plain"),
        ("\x1b]0;unfinished\nnext", "next"),
        ("hyphen\u00adation and hyphen\u00ad\nation", "hyphenation and hyphenation"),
        ("end.\n\ufeffStart", "end.\nStart"),
        ("don\x92t \x93quote\x94 \x96 \x9d", "don’t “quote” –"),  # Windows read as Latin-1
        ("می\u200cخواهم क्\u200dष a\u00a0b\tc\u200bd", "می\u200cخواهم क्\u200dष a\u00a0b\tc\u200bd"),
        ("a\x00b\x07c\x7f", "abc"),
        ("\ud800 lone", "? lone"),
        ("x  \n\n\n\n\n\ny", "x\n\n\ny"),
    ],
)
def test_control_characters_mean_something(given, wanted):
    assert clean(given) == wanted


@pytest.mark.parametrize(
    "part", ["\r", "\r\r\n", "a\b", "\x1b[", "\x1b]", "e\u0301", "\u0301", "\xad", "。", "」", " ", "\f", "\u200d"]
)
def test_texts_of_one_sign_take_no_longer_than_others(part):
    """Patterns that look again and again at the same text take minutes for these."""
    text = part * (300_000 // len(part)) + "\n" + "x" * 100_000 + "\n\b"
    assert len(clean(text)) <= len(text) and len(words(text)) <= len(text)
    assert "".join(split_text(text, 8000)).replace("\n", "") == text.replace("\n", "")


def test_cuts_by_another_length():
    text = " ".join(f"This is sentence {n}, which has {n % 7} parts." for n in range(30))
    pieces = split_text(text, 25, lambda piece: len(piece.split()))
    assert max(len(piece.split()) for piece in pieces) <= 25 and " ".join(pieces).split() == text.split()
    assert split_text("x", 0, lambda piece: 5) == ["x"]  # what cannot be cut stays


@pytest.mark.parametrize(
    ("sentence", "end"),
    [
        ("今天天气很好，我们去公园散步", "。"),
        ("他说：「我们今天去公园散步吗", "？」"),
        ("本当に美しい景色ですね", "！"),
        ("यह एक छोटा सा वाक्य है", "। "),
        ("هذه جملة قصيرة جدا، هل تفهمها", "؟ "),
        ("یہ ایک چھوٹا سا جملہ ہے", "۔ "),
        ("ይህ አጭር ዓረፍተ ነገር ነው", "። "),
        ("Սա կարճ նախադասություն է", "։ "),
        ("នេះជាប្រយោគខ្លីមួយ", "។ "),
        ("This is a short sentence", ". "),
    ],
)
def test_cuts_come_after_sentences(sentence, end):
    pieces = split_text((sentence + end) * 3, 2 * len(sentence + end))  # the middle is inside a sentence
    assert sorted(pieces) == [sentence + end, (sentence + end) * 2]


def test_cuts_come_between_clauses_or_at_blanks_where_no_sentence_ends():
    assert sorted(split_text("春夏秋冬，" * 3, 10)) == ["春夏秋冬，", "春夏秋冬，" * 2]
    assert sorted(split_text("ภาษาไทย " * 3, 16)) == ["ภาษาไทย ", "ภาษาไทย " * 2]  # Thai ends sentences with blanks


def test_cuts_leave_marks_with_their_letters():
    assert split_text("e\u0301" * 3, 3) == ["e\u0301", "e\u0301", "e\u0301"]
    family = "\U0001f468\u200d\U0001f469"
    assert split_text(family * 3, 5) == [family] * 3
    assert "".join(split_text("\u0301" * 9, 2)) == "\u0301" * 9
