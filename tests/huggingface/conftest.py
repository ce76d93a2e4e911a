"""One small corpus for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.huggingface.checkpoints import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))
