"""The answer that a response states last, in all kinds of answers."""

import pytest

from spell_megatron.selfplay.parsing import parse_answer
from spell_megatron.selfplay.scoring import rule_score

NUMBER, TEXT, LETTER = "docmath_qa", "doc_general_qa", "doc_mc"
S = "The correct answer is "


def score(task, response, reference):
    return rule_score(task, parse_answer(task, response, truncated=False), reference)


@pytest.mark.parametrize(
    ("response", "right", "wrong"),
    [
        ("Perhaps the answer is Oslo.\nNo: the later report differs.\nThe correct answer is Bergen.", "Bergen", "Oslo"),
        ("The correct answer is Oslo? No. The answer is Bergen.", "Bergen", "Oslo"),
        ("The answer is Bergen. The answer is not Oslo.", "Bergen", "Oslo"),
        ("The answer is not Oslo but Bergen.", "Bergen", "Oslo"),
        ("If the answer is Oslo, the dates clash.\nSo the answer is Bergen.", "Bergen", "Oslo"),
        ("The answer is Bergen; if the answer is Oslo, the dates clash.", "Bergen", "Oslo"),
        ("The correct answer is Bergen, because the answer is based on the second report.", "Bergen", "second report"),
        ("The correct answer is Bergen. The answer is supported by table 2.", "Bergen", "table 2"),
        ("The correct answer is Bergen. Oslo was its rival.", "Bergen", "Oslo"),
        ("The correct answer is St. Albans. Oslo was its rival.", "St. Albans", "Oslo"),
        ("The correct answer is Bergen.\nOslo was its rival.", "Bergen", "Oslo"),
        ("The correct answer is:\nBergen", "Bergen", "Oslo"),
        ("The correct answer is\n\n**Bergen**\n", "Bergen", "Oslo"),
        ("THE CORRECT ANSWER IS BERGEN", "Bergen", "Oslo"),
        ("The **correct answer** is **Bergen**.", "Bergen", "Oslo"),
        ('The correct answer is "Bergen".', "Bergen", "Oslo"),
        ("The answer to this question is Bergen.", "Bergen", "Oslo"),
        ("The correct answer, then, is Bergen.", "Bergen", "Oslo"),
        ("The correct answer (of the two) is Bergen.", "Bergen", "Oslo"),
        ("The correct answer here is\n1. Bergen. Oslo is older.", "Bergen", "Oslo"),
        ("Correct answer \N{EM DASH} Bergen", "Bergen", "Oslo"),
        ("The answer should be Bergen.", "Bergen", "Oslo"),
        ("**Final answer:** Bergen", "Bergen", "Oslo"),
        ("Oslo is older.\n\n## Answer\n\nBergen", "Bergen", "Oslo"),
        ('{"answer": "Bergen"}', "Bergen", "Oslo"),
        ("Oslo is older. <answer>Bergen</answer>", "Bergen", "Oslo"),
        ("Oslo is older. Therefore, Bergen is the correct answer.", "Bergen", "Oslo"),
        (r"\boxed{Oslo} is older. So \boxed{\text{Bergen}}.", "Bergen", "Oslo"),
        (r"\boxed{Oslo} is older. The correct answer is Bergen", "Bergen", "Oslo"),
        ("最终答案：卑尔根。", "卑尔根", "奥斯陆"),
        ("To answer: read the report of Oslo.\nThe answer is Bergen", "Bergen", "Oslo"),
        ("the answer is Oslo</think>The answer is Bergen", "Bergen", "Oslo"),
    ],
)
def test_the_last_statement_of_a_text(response, right, wrong):
    assert score(TEXT, response, right) == 1
    assert score(TEXT, response, wrong) == 0


@pytest.mark.parametrize(
    "response",
    [
        *("Bergen", "I think of Bergen.", "The correct answer is ", "The correct answer is ...", "answers Bergen"),
        *("The correct answer is (insert answer here).", "The answer is not Bergen.", "The answer is correct."),
        *(
            "What is the answer?",
            "This is the correct answer.",
            "Bergen is not the correct answer.",
            "Is Bergen the answer?",
        ),
        *("<think>The answer is Bergen", "The answer is Bergen</think>", "a</think>The answer is Bergen<think>But"),
    ],
)
def test_texts_that_state_nothing(response):
    assert parse_answer(TEXT, response, truncated=False) is None


@pytest.mark.parametrize(
    ("response", "right", "wrong"),
    [
        ("The answer is 8. Let me check. The final answer is 13.", "13", "8"),
        (r"\boxed{8} is a step. Therefore, the answer is 13", "13", "8"),
        (r"The answer is 8? No: \boxed{13}.", "13", "8"),
        (r"First \boxed{8}, then \boxed{13}", "13", "8"),
        ("The answer is (8) in 2019. The answer is 13", "13", "8"),
        ("The answer is 13, since the answer is rounded to 8 digits", "13", "8"),
        ("The answer is 13. The answer is given in section 8.", "13", "8"),
        ("The answer is 13. The answer is not 8.", "13", "8"),
        ("The answer is not 8 but 13.", "13", "8"),
        ("Suppose the answer is 8: too little. The answer is 13.", "13", "8"),
        ("The answer is 13, up from 8.", "13", "8"),
        ("The answer is 13 (8 in 2018).", "13", "8"),
        ("The answer is 26 / 2 = 13.", "13", "26"),
        ("The answer is x = 13, where y = 8", "13", "8"),
        ("The answer is:\n\n13 kg", "13", "8"),
        ("The answer is $\\boxed{13}$.", "13", "8"),
        ("The answer is \\(13\\).", "13", "8"),
        ("The answer is `13`.", "13", "8"),
        ("**Answer**: 13", "13", "8"),
        ("Answer = 13", "13", "8"),
        ("The result follows.\n\n**13**", "13", "8"),
        ("8 + 5\n= 13", "13", "8"),
        ("13", "13", "8"),
        ("13 kg\n\nThis follows from the 8 rows.", "13", "8"),
        ("The final answer (in millions) is 13.", "13", "8"),
        ("<answer>13</answer>", "13", "8"),
        ("8 is too small.\nSo **13** is the answer.", "13", "8"),
        ("The answer is 2*3", "6", "23"),
        ("The answer is -13", "-13", "13"),
        ("The answer is \N{MINUS SIGN}$13", "-13", "13"),
        ("答案是 13 万", "130000", "8"),
    ],
)
def test_the_last_statement_of_a_number(response, right, wrong):
    assert score(NUMBER, response, right) == 1
    assert score(NUMBER, response, wrong) == 0


@pytest.mark.parametrize(
    "response",
    [
        *("The answer is 8 out of 13", "The answer is 8 13", "The answer is 8; 13", "The answer is 8 of 13"),
        *("The answer is 8 or 13", "The answer is 8-13", "The answer is 8, 9 and 13", "The answer is between 8 and 13"),
        *("The answer is 8/13", "The answer is 8:13", "The answer is more than 8", "The answer is 8 or more"),
        *("The answer is 8. Rather, the answer is between 10 and 13.", "The answer is 8.\nThe answer is unknown."),
        *(
            "Step 8. Add the rows.",
            "1. Read it\n8. Add it",
            "The answer is in table 8",
            r"\boxed{8",
            r"\boxed{8 \pm 1}",
        ),
        *(
            "The answer is 8x4",
            "The answer is eight",
            "<think>The answer is 8",
            r"The answer is 8. So \boxed{\text{no}}",
        ),
    ],
)
def test_responses_that_do_not_state_the_one_number(response):
    assert score(NUMBER, response, "8") == 0


LETTERS = {
    "C": [
        *(f"{S}(C)", f"{S}C", f"{S}C.", f"{S}c", f"{S}(c).", f"{S}[C]", f"{S}C)", f'{S}"C"', f"{S}**(C)**", f"{S}Ｃ"),
        *(
            f"{S}option C",
            f"{S}the letter C",
            f"{S}:\n(C)",
            f"{S}: C",
            f"{S}\n\nC",
            f"{S}likely C",
            f"{S}therefore (C)",
        ),
        *(f"{S}C, since the correct answer is derived from a table", f"{S}C because A and B are too low"),
        *(f"{S}C: wages rose", f"{S}(C) wages rose", f"{S}C - wages", f"{S}C. Options A and B are wrong"),
        *(f"{S}C, A is wrong", f"{S}C, not A", f"{S}— C"),
        *(f"{S}not A but C", "The answer is (A).\nWait. The answer is C.", "The answer is C. The answer is not A."),
        *(r"\boxed{C}", r"\boxed{(C)}", r"$\boxed{\text{C}}$", r"\boxed{\mathrm{(C)}}", rf"{S}\textbf{{C}}"),
        *("Answer: C", "**Final answer**: (c)", "答案：C", "The correct option is C.", "The best choice is (C)"),
        *(
            "So option C is correct.",
            "(C) is the correct answer.",
            "<answer>C</answer>",
            "(C)\n\nWages rose.",
            "I choose option C.",
            "C is the answer.",
            "Wages rose.\n\n(C)",
            "Option (C).",
            "C",
            "C) wages",
        ),
    ],
    "A": [f"{S}A", f"{S}A.", f"{S}a", f"{S}(a)", f"{S}A because costs fell", f"{S}A, a decline", f"{S}A: a decline"],
    None: [
        *(
            f"{S}Agriculture",
            f"{S}Because",
            f"{S}Canada",
            f"{S}Debatable",
            f"{S}dubious",
            f"{S}C++",
            f"{S}D.C.",
            f"{S}D-Day",
        ),
        *(f"{S}C's", f"{S}B2", f"{S}A decline in wages", f"{S}a decline in wages", f"{S}Cannot tell", f"{S}E", f"{S}"),
        *(
            f"{S}A and C",
            f"{S}(A) and (C)",
            f"{S}A, C",
            f"{S}A/C",
            f"{S}A & C",
            f"{S}A or C",
            f"{S}(A) or maybe (C)",
            f"{S}A (or C)",
        ),
        *(
            f"{S}both A and C",
            f"{S}neither A nor C",
            f"{S}either A or C",
            f"{S}none of them",
            f"{S}not A",
            r"\boxed{A, C}",
        ),
        *("A decline", "Because", "I think so", "Option C is not correct.", "", "<think>C", f"<think>{S}C"),
    ],
}


@pytest.mark.parametrize(
    ("letter", "response"), [(letter, text) for letter, texts in LETTERS.items() for text in texts]
)
def test_letters(letter, response):
    assert parse_answer(LETTER, response, truncated=False) == letter
    assert parse_answer(LETTER, response, truncated=True) is None
