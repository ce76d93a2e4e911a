"""The tiny corpus, written once a session."""

from pathlib import Path

import pytest

from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
