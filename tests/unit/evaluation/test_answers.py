import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.config.choices import AnswerFormat
from opd_ray.evaluation import extract, is_correct
from opd_ray.evaluation.answers import reference, verdict
from opd_ray.evaluation.verdict import Verdict

TINY, NUMBER, BOXED = AnswerFormat.tiny, AnswerFormat.last_number, AnswerFormat.boxed
HASH = AnswerFormat.hash_number
MEGABYTE = 1_000_000


@pytest.mark.parametrize("answer_format", list(AnswerFormat))
def test_every_format_of_the_config_is_known(answer_format: AnswerFormat) -> None:
    assert extract(answer_format, "") is None
    assert not is_correct(answer_format, "", "1")


# tiny


def test_tiny_reads_the_last_line() -> None:
    assert is_correct(TINY, "47a+3=50\n#50", "50")
    assert not is_correct(TINY, "47a+3=50\n#5", "50")
    assert not is_correct(TINY, "#50\n47a+3=50", "50")
    assert extract(TINY, "#50\n") == "50"


# last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 + 24 = 72", "72"),
        ("She sold 72 clips.", "72"),
        ("It costs $1,234.0.", "1234.0"),
        ("It costs $1,234,567.", "1234567"),
        ("about 15%", "15"),
        ("between 1,2", "2"),
        ("1,2345", "2345"),
        ("it fell to -5", "-5"),
        ("it fell to \u22125 degrees", "-5"),
        ("a loss of -$20", "-20"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("costs $.50", ".50"),
        ("version 1.2.3", "3"),
        ("no number at all", None),
        ("#### 72", "72"),
        ("The answer is #### 1,234\nand 5 more words", "1234"),
        ("#### $72\n#### 80\nQuestion 9", "80"),
        ("#### see 12", "12"),
        ("####72", "72"),
        ("### 1. Plan\nso 9", "9"),
        ("\u0663", None),  # a digit, but not one of ours
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert extract(NUMBER, text) == number


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so 1,234.0", "1234"),
        ("so 1234", "1,234"),
        ("$18.00.", "18"),
        ("is 007", "7"),
        ("-0", "0"),
        ("= .5", "0.50"),
        ("The answer is 72.", "48/2 = 24 clips in May.\n48+24 = 72 clips.\n#### 72"),
    ],
)
def test_last_number_compares_by_value(response: str, answer: str) -> None:
    assert is_correct(NUMBER, response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("72 of them", "7"),
        ("72.5", "72"),
        ("-72", "72"),
        ("1,234", "234"),
        ("#### 71 and not 72", "72"),
        ("24", "24 clips in May.\n#### 72"),
        ("0.3333", "0.33333"),
    ],
)
def test_last_number_tells_other_values_apart(response: str, answer: str) -> None:
    assert not is_correct(NUMBER, response, answer)


@given(st.integers(-(10**15), 10**15))
def test_any_integer_is_found_with_and_without_separators(value: int) -> None:
    assert is_correct(NUMBER, f"First 3, then {value:,}.", str(value))
    assert is_correct(NUMBER, f"Work.\n#### {value}\nQ: 5", f"{value:,}")
    assert not is_correct(NUMBER, f"First 3, then {value:,}.", str(value + 1))


# boxed


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"thus \boxed{42}.", "42"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x \right\}}", r"\left\{ x \right\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"{ stray \boxed{5}", "5"),
        (r"} stray \boxed{5} }", "5"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"\boxed{4 \{ }", r"4 \{"),
        (r"\boxed{}", ""),
        (r"\boxed{6", None),
        ("boxed{6}", None),
        ("42", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert extract(BOXED, text) == content


SAME = [
    ("42", "42.0"),
    ("1,000", "1000"),
    (r"10{,}000", "10000"),
    (r"\frac{3}{2}", "1.5"),
    (r"\dfrac{3}{2}", r"\frac32"),
    (r"\tfrac12", "1/2"),
    (r"-\frac{1}{4}", "-0.25"),
    (r"\frac{-1}{4}", r"-\frac{1}{4}"),
    (r"\frac{6}{4}", r"\frac{3}{2}"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90^\circ"),
    (r"50\%", "50"),
    (r"\$18", "18"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"5\text{ cm}", "5"),
    (r"12 \text{ cm}^2", "12"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("x=5", "5"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"x^{2}+1", "x^2 + 1"),
    (r"52_{8}", "52_8"),
    (r"\$5.", "5"),
    ("\u22123", "-3"),
]


@pytest.mark.parametrize(("given_answer", "wanted"), SAME)
def test_boxed_sees_through_notation(given_answer: str, wanted: str) -> None:
    assert is_correct(BOXED, rf"so \boxed{{{given_answer}}}.", wanted)
    assert is_correct(BOXED, rf"so \boxed{{{wanted}}}.", given_answer)


@pytest.mark.parametrize(
    ("given_answer", "wanted"),
    [
        ("42", "43"),
        ("0.333", r"\frac{1}{3}"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        ("3,5,7", "7"),
        ("(1,2)", "(2,1)"),
        ("-3", "3"),
        ("A", "B"),
        ("1/2", "2/1"),
        ("x^2", "x2"),
        (r"\sqrt{12}", r"\sqrt{1}2"),
    ],
)
def test_boxed_tells_other_answers_apart(given_answer: str, wanted: str) -> None:
    assert not is_correct(BOXED, rf"so \boxed{{{given_answer}}}.", wanted)


def test_boxed_reference_may_be_a_whole_solution() -> None:
    assert is_correct(BOXED, r"\boxed{70}", r"First \boxed{3} and so on, hence \boxed{70}.")
    assert not is_correct(BOXED, r"\boxed{3}", r"First \boxed{3} and so on, hence \boxed{70}.")


def test_boxed_needs_a_box_in_the_response() -> None:
    assert not is_correct(BOXED, "70", "70")


def test_the_reference_is_the_bare_answer_or_none() -> None:
    assert reference(TINY, "55") == "55" and reference(TINY, "#55") is None and reference(TINY, "") is None
    for number_format in (NUMBER, HASH):
        assert reference(number_format, "work 5\n#### 1,072") == "1072" and reference(number_format, "two") is None
    assert reference(BOXED, r"so \boxed{\frac12}") == reference(BOXED, r" \frac12 ") == r"\frac12"
    assert reference(BOXED, "  ") is None


@pytest.mark.parametrize(("text", "number"), [("a 3 #### 4 b 5", "4"), ("#### 1\n#### 2", "2"), ("so 7", None)])
def test_hash_number_takes_marked_numbers_only(text: str, number: str | None) -> None:
    assert extract(HASH, text) == number


@pytest.mark.parametrize(
    ("given", "wanted", "found"),
    [
        (None, "5", Verdict.no_answer),
        ("", "5", Verdict.no_answer),
        (r"\dfrac12", r"\frac{1}{2}", Verdict.correct),
        ("204", "205", Verdict.wrong),
        ("50%", "1", None),
        ("0.5", "1", None),
        ("2k+2", "2(k+1)", None),
    ],
)
def test_algebra_is_asked_only_where_it_can_tell(given: str | None, wanted: str, found: Verdict | None) -> None:
    assert verdict(BOXED, given, wanted) is found


# Hostile text: were any of these quadratic, a megabyte would take hours and the test run out of time.

HOSTILE = [
    (BOXED, "open braces", "{" * MEGABYTE),
    (BOXED, "close braces", "}" * MEGABYTE),
    (BOXED, "pairs", "{}" * (MEGABYTE // 2)),
    (BOXED, "open boxes", r"\boxed{" * (MEGABYTE // 7)),
    (BOXED, "nested boxes", r"\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8)),
    (BOXED, "box without brace", r"\boxed " * (MEGABYTE // 7)),
    (BOXED, "box and spaces", r"\boxed" + " " * MEGABYTE),
    (BOXED, "backslashes", "\\" * MEGABYTE),
    (BOXED, "open texts", r"\boxed{" + r"1\text{" * (MEGABYTE // 7) + "}" * (MEGABYTE // 7 + 1)),
    (NUMBER, "digits", "1" * MEGABYTE),
    (TINY, "digits", "1" * MEGABYTE),
    (BOXED, "boxed digits", r"\boxed{" + "1" * MEGABYTE + "}"),
    (BOXED, "boxed fraction", r"\boxed{\frac{" + "1" * (MEGABYTE // 2) + "}{" + "3" * (MEGABYTE // 2) + "}}"),
    (NUMBER, "groups", "1" + ",234" * (MEGABYTE // 4)),
    (BOXED, "boxed groups", r"\boxed{1" + ",234" * (MEGABYTE // 4) + "5}"),
    (NUMBER, "broken groups", "1,23" * (MEGABYTE // 4)),
    (NUMBER, "points", "1." * (MEGABYTE // 2)),
    (NUMBER, "minuses", "-" * MEGABYTE),
    (NUMBER, "hashes", "#" * MEGABYTE),
    (TINY, "hashes", "#" * MEGABYTE),
    (NUMBER, "hashes and spaces", "####" + " " * MEGABYTE),
    (TINY, "hashes and spaces", "####" + " " * MEGABYTE),
    (NUMBER, "hash digits", "#" + "1" * MEGABYTE + "x"),
    (TINY, "hash digits", "#" + "1" * MEGABYTE + "x"),
    (TINY, "hash spaces", "#1" + " " * MEGABYTE + "x"),
    (BOXED, "underscores", r"\boxed{" + "_{" * (MEGABYTE // 3) + "}" * (MEGABYTE // 3 + 1)),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("answer_format", "text"),
    [pytest.param(form, text, id=f"{form.value}-{name}") for form, name, text in HOSTILE],
)
def test_hostile_text_costs_no_more_than_its_length(answer_format: AnswerFormat, text: str) -> None:
    assert not is_correct(answer_format, text, "42")
