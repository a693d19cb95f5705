from composable.cli.routing import Coloured, Marked, choose_format

NAMES = ("backbone", None, "german", "legal")
PIECES = (("It ", [1, 0, 0, 0]), ("ist ", [0.2, 0, 0.8, 0]), ("so", [0.4, 0, 0.6, 0]))


def test_marks_stand_where_trust_changes():
    display = Marked(NAMES)
    assert [display.piece(*piece) for piece in PIECES] == ["[backbone]It ", "[german]ist ", "so"]
    assert display.end() == ""
    assert display.piece(*PIECES[2]) == "[german]so"  # a new turn says it again


def test_colours_have_a_legend_of_those_that_were_used():
    display = Coloured(NAMES)
    shown = [display.piece(*piece) for piece in PIECES]
    assert shown[0] == "It "
    assert shown[1] == "\x1b[33mist \x1b[0m"
    assert display.end() == "\nbackbone  \x1b[33mgerman\x1b[0m"


def test_nothing_is_added_where_nobody_asked():
    assert choose_format(NAMES, is_wanted=False).piece("It ", [1, 0, 0, 0]) == "It "


def test_what_is_not_a_terminal_gets_marks():
    assert isinstance(choose_format(NAMES, is_wanted=True), Marked)
