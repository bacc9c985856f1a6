"""Help that a plain terminal shows whole, and what was meant by what was mistyped."""

import re
import sys

import pytest

from train.commands.cli import COMMANDS, main
from train.commands.options import WIDTH, filled, joined

RUN = "run configs/digits.py"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "command",
    ["", *COMMANDS, RUN, "run configs/digits_graph.py", "sweep configs/digits.py", "data prepare"],
)
def test_no_line_of_help_is_wider_than_a_plain_terminal(command, terminal, monkeypatch, capsys, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as exit:  # tyro's own help
        status = exit.code
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert status == 0
    assert len(lines) > 5
    assert [line for line in lines if len(line) > WIDTH] == []
    assert lines[0].startswith("usage: python -m train")


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_brief_help_names_options_that_there_are(command, monkeypatch, capsys, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert main([command, "--help"]) == 0
    brief = re.findall(r"^  (--[\w.-]+)", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        main([command, "configs/digits.py", "--help"])
    listed = re.findall(r"--[\w.-]+", capsys.readouterr().out)
    assert len(brief) == {"run": 10, "sweep": 3}[command]
    assert set(brief) <= set(listed)


def test_texts_in_boxes_break_where_the_box_ends():
    box = [
        "│ --epochs INT                 │",
        "│       Passes over            │",
        "│       the images of the      │",
        "│       set.                   │",
        "│ --seed INT   First seed      │",
        "│              of all.         │",
        "│              --processes too │",
    ]
    assert joined(box) == [
        "│ --epochs INT                 │",
        "│       Passes over the images │",
        "│       of the set.            │",
        "│ --seed INT   First seed of   │",
        "│              all.            │",
        "│              --processes too │",
    ]


def test_words_stay_whole_and_colours_take_no_room():
    text = "\x1b[1mword\x1b[0m " * 40  # 16 words fill a line
    lines = filled(text).split("\n")
    assert [line.count("word") for line in lines] == [16, 16, 8]
    assert " ".join(lines) == text.strip()
    assert filled("x" * 100) == "x" * 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rum", "there is no command 'rum': did you mean 'run'? choose from ['run', 'sweep', "),
        (f"{RUN} --recipe smoothin", "has no recipe 'smoothin': did you mean 'smoothing'? choose from ["),
        (f"{RUN} --only symetric", "names no variant: did you mean 'symmetric'? choose from ["),
        (f"{RUN} --model.name resnt20", "unknown name 'resnt20'; did you mean 'resnet20'? valid: "),
        (f"{RUN} --data.name digit", "is no set of images: did you mean 'digits'?"),
        (f"{RUN} --optimizer.learning-rat 1", "Perhaps you meant: --optimizer.learning-rate"),
        ("run configs/digit.py", "there is no experiment file configs/digit.py: did you mean 'digits.py'?"),
        ("data prepar cifar10", "'prepar' is no command for data: did you mean 'prepare'?"),
    ],
)
def test_what_was_meant_is_named(arguments, message, monkeypatch, capsys, pytestconfig, tmp_path):
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setenv("COLUMNS", "400")
    extra = ["--runs-dir", str(tmp_path)] if arguments.startswith("run ") else []
    try:
        status = main([*arguments.split(), *extra])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", "", captured.err + captured.out).split())
    assert not list(tmp_path.iterdir())
