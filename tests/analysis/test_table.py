import io

from rich.console import Console

from symbiotic.analysis.results import Row
from symbiotic.analysis.table import print_rows

ROWS = [
    Row("generation_class_accuracy.digits.final", 0.8125, "share", n=500, chance=0.1, target=0.85, holds=False),
    Row("parameters.final", 2366496, "parameters", target=2366496, holds=True),
]


def test_nothing_is_shortened_however_narrow_the_output_is():
    output = io.StringIO()
    print_rows(ROWS, console=Console(file=output, width=40), title="Report of runs/digits")
    lines = output.getvalue().splitlines()
    assert lines[0].rstrip() == "Report of runs/digits"
    for row, words in ((0, ("0.8125", "500", "0.85", "share", "NO")), (1, ("2,366,496", "parameters", "yes"))):
        (line,) = [line for line in lines if ROWS[row].metric in line]
        assert all(word in line for word in words)
    assert "…" not in output.getvalue()
