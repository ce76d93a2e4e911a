import json

import pytest

from symbiotic.training.exits import EXIT_FILE, Verdict, read_verdict


@pytest.mark.parametrize(("verdict", "code"), [("finished", 0), ("failed", 1), ("stopped_resumable", 75)])
def test_a_verdict_is_a_file_and_an_exit_code(tmp_path, verdict, code):
    Verdict(verdict, 12, "why").write(tmp_path)
    assert json.loads((tmp_path / EXIT_FILE).read_text()) == {"verdict": verdict, "step": 12, "reason": "why"}
    assert read_verdict(tmp_path).exit_code == code


def test_no_verdict_yet(tmp_path):
    assert read_verdict(tmp_path) is None
