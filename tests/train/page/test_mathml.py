"""Formulas: every letter, number and sign in an element of its own, and nothing else in between."""

from xml.etree import ElementTree

from train.page.mathml import formula, over, root, row, sub, sup, words


def test_a_formula_is_well_formed_mathml():
    text = formula("|x|<3.5", words("a < b"), over(sub("x", "i"), root("n")), sup(row("‖K‖"), "2"))
    (math,) = ElementTree.fromstring(text)
    assert math.tag == "math"
    tokens = [(element.tag, element.text) for element in math.iter() if element.text]
    assert tokens == [
        ("mo", "|"), ("mi", "x"), ("mo", "|"), ("mo", "<"), ("mn", "3.5"), ("mtext", "\xa0a < b\xa0"),
        ("mi", "x"), ("mi", "i"), ("mi", "n"), ("mo", "‖"), ("mi", "K"), ("mo", "‖"), ("mn", "2"),
    ]  # fmt: skip
