"""Tests of comparing answers by value."""

from __future__ import annotations

import pytest

from llm_trm.data.grading import is_correct


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("8", "8", True),
        ("9", "8", False),
        ("The answer is 72.", "48/2 = <<48/2=24>>24 clips.\n#### 72", True),
        ("First 72, and then 73.", "#### 72", False),
        ("$1,000.00", "#### 1000", True),
        ("-5", "5", False),
        ("It costs .5 dollars", "0.50", True),
        ("1/2", "0.5", True),
        ("no number at all", "5", False),
        ("", "5", False),
        (r"so it is $\boxed{\frac{1}{2}}$.", r"Thus we have \boxed{\dfrac{1}{2}}.", True),
        (r"\boxed{12} and 13", r"we get $\boxed{12}$", True),
        (r"\boxed{3}", r"we get $\boxed{12}$", False),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"so \boxed{(3,\frac{\pi}{2})}", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"it is -\frac{3}{4}", "-0.75", True),
        ("2.5/5", "1/2", True),
        ("so it is 10-5", "5", True),
        ("x = -5", "-5", True),
        ("\N{MINUS SIGN}5", "-5", True),
        ("1,2,3", "3", True),
        ("1,0000", "1000", False),
        ("#### 72\nQuestion: What is 5+5?", "72", True),
        ("####\n72 apples", "72", True),
        ("Paris", "Paris", True),
        ("London", "Paris", False),
        ("Paris", "It is in France.\nIt is Paris.", None),
        ("Paris", "", None),
    ],
)
def test_final_answers_are_compared(response: str, answer: str, correct: bool | None) -> None:
    assert is_correct(response, answer) is correct
