import json

import pytest

from bench.__main__ import local_parts, main
from bench.figures import AtLeast, AtMost, Figure, json_line, number, ratio, table


def test_a_figure_is_its_median_between_its_lowest_and_highest_sample() -> None:
    figure = Figure(name="x", unit="s", samples=(3.0, 1.0, 50.0))
    assert (figure.median, figure.spread) == (3.0, (1.0, 50.0))


def test_an_even_number_of_samples_has_its_median_in_the_middle() -> None:
    assert Figure(name="x", unit="s", samples=(4.0, 1.0, 2.0, 100.0)).median == 3.0


def test_a_figure_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured for x"):
        Figure(name="x", unit="s", samples=())


def test_the_median_decides_whether_a_target_is_met() -> None:
    samples = (1.0, 3.0, 9.0)
    assert Figure(name="x", unit="s", samples=samples).met is None
    assert Figure(name="x", unit="s", samples=samples, target=AtLeast(3)).met is True
    assert Figure(name="x", unit="s", samples=samples, target=AtLeast(4)).met is False
    assert Figure(name="x", unit="s", samples=samples, target=AtMost(3)).met is True
    assert Figure(name="x", unit="s", samples=samples, target=AtMost(2)).met is False


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round was disturbed as a whole; its ratio is not.
    assert ratio("x", (1.0, 10.0, 2.0), (4.0, 40.0, 4.0)).samples == (0.25, 0.25, 0.5)


def test_a_ratio_of_unequal_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio("x", (1.0, 2.0), (1.0,))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.01234, "0.0123"),
        (0.5, "0.500"),
        (0.99999, "1.00"),
        (1.005, "1.00"),
        (12.345, "12.3"),
        (99.99, "100"),
        (100.4, "100"),
        (999.9, "1,000"),
        (95426.3, "95,426"),
    ],
)
def test_numbers_have_three_digits_that_matter(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_lines_up_and_names_missed_targets() -> None:
    figures = [
        Figure(name="long name", unit="1/s", samples=(25_000.0,), target=AtLeast(20_000)),
        Figure(name="x", unit="ms", samples=(3.0, 1.0, 2.0), target=AtMost(1.5)),
        Figure(name="y", unit="ms", samples=(7.0,)),
    ]
    assert table(figures).splitlines() == [
        "           median  unit  lowest .. highest  of  target",
        "long name  25,000  1/s   25,000 .. 25,000    1  >= 20,000  met",
        "x            2.00  ms    1.00 .. 3.00        3  <= 1.50    missed",
        "y            7.00  ms    7.00 .. 7.00        1",
    ]


def test_a_json_line_has_all_of_a_figure() -> None:
    figure = Figure(name="x", unit="ms", samples=(3.0, 1.0, 2.0), target=AtMost(1.5))
    assert json.loads(json_line(figure)) == {
        "name": "x",
        "value": 2.0,
        "unit": "ms",
        "median": 2.0,
        "spread": [1.0, 3.0],
        "samples": [3.0, 1.0, 2.0],
        "target": {"at_most": 1.5},
        "met": False,
    }


def broken(_rounds: int) -> list[Figure]:
    raise RuntimeError("no such luck")


def missed(rounds: int) -> list[Figure]:
    return [Figure(name="slow thing", unit="1/s", samples=(1.0,) * rounds, target=AtLeast(2))]


PARTS = [part.name for part in local_parts()]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Local parts that take no time and miss their targets."""
    for part in PARTS:
        monkeypatch.setattr(f"bench.{part}.measure", missed)
    return monkeypatch


@pytest.mark.parametrize("form", ["--json", "--table", None])
def test_only_a_part_that_cannot_be_measured_makes_the_run_fail(
    form: str | None, parts: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--local", *([form] if form else [])]
    assert main(arguments) == 0
    assert "slow thing" in capsys.readouterr().out
    parts.setattr("bench.reports.measure", broken)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "RuntimeError: no such luck" in shown.err
    assert "slow thing" in shown.out


@pytest.mark.usefixtures("parts")
def test_a_run_prints_a_table_and_json_lines_of_every_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--only", "scan", "--rounds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("slow thing")]
    assert row.split()[-4:] == ["3", ">=", "2.00", "missed"]
    (figure,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert figure["samples"] == [1.0, 1.0, 1.0]
    assert figure["met"] is False


def test_every_part_can_be_measured_alone(
    parts: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in PARTS:
        parts.setattr(f"bench.{part}.measure", broken)
        others = [name for name in PARTS if name != part]
        assert main(["--json", *(f"--only={name}" for name in others)]) == 0
        assert main(["--json", f"--only={part}"]) == 1
        assert len(capsys.readouterr().out.splitlines()) == len(others)
        parts.setattr(f"bench.{part}.measure", missed)


@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_rounds_that_make_no_sense_are_refused(
    rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", rounds])
    assert "--rounds" in capsys.readouterr().err
