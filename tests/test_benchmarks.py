"""The benchmarks run, and the page shows the results that are kept. No test asserts a time."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from benchmarks import bench_convert, bench_data, table
from benchmarks.bench_data import TARGETS, Comparison, write_corpus
from benchmarks.bench_router import cases
from symbiotic.analysis.results import Row, apply_targets, missed, read_results
from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.preprocess import PreprocessOptions, preprocess
from tests.support.repository import ROOT

BENCHMARKS = {
    "bench_router": "router.step_ratio_to_stock.16x2.fp32",
    "bench_data": "data.share_of_tokenizer_ceiling",
    "bench_convert": "convert.export_ratio_to_copy",
}
"""Module -> a row that its smoke run prints."""


def test_the_page_shows_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PAGE", tmp_path / "README.md")
    table.write_page()
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8") == written
    assert {path.stem for path in table.RESULTS.glob("*.json")} <= set(table.TITLES)


def test_the_router_results_have_every_promised_row():
    rows, facts = read_results(table.RESULTS / "router.json")
    targets = {row.metric: row.target for row in rows if row.target is not None}
    assert targets == {f"router.step_ratio_to_stock.{case.name}": 1.03 for case in cases(smoke=False)}
    assert facts["command"] == "make bench-router" and facts["machine"] and facts["date"]


@pytest.mark.parametrize("name", ["data", "convert"])
def test_the_results_have_every_promised_row(name):
    rows, facts = read_results(table.RESULTS / f"{name}.json")
    promised = {target.metric for target in {"data": bench_data, "convert": bench_convert}[name].TARGETS}
    assert {row.metric for row in rows if row.holds is not None} == promised
    assert facts["command"] == f"make bench-{name}" and facts["machine"] and facts["date"]


def test_what_preprocessing_is_not_measured_against_is_a_miss():
    """Without a checkout of Megatron-LM or without gigatoken a row has no value, and the benchmark fails."""
    rows = {row.metric: row for row in apply_targets([Row("data.share_of_tokenizer_ceiling", 0.95, "share")], TARGETS)}
    wanted = {f"data.preprocess_ratio_to_megatron_lm.{name}" for name in ("sentencepiece", "gigatoken")}
    assert wanted | {"data.sample_read_us.4k"} < {row.metric for row in missed(rows.values())}
    assert rows["data.share_of_tokenizer_ceiling"].holds
    loaded = [Row("data.sample_read_us.4k", 207.0, "us"), Row("data.sample_pieces.4k", 2.5, "pieces")]
    rows = {row.metric: row for row in apply_targets(loaded, TARGETS)}
    assert (rows["data.sample_read_us.4k"].target, rows["data.sample_read_us.4k"].holds) == (207.5, True)


def test_tokens_of_both_tools_are_compared_with_the_end_of_documents(tmp_path):
    """A shard as Megatron's builder writes it, from the same model with one piece more."""
    corpus = write_corpus(tmp_path, megabytes=0.02, pieces=400)
    comparison = Comparison(corpus, workers=1, megatron_lm=tmp_path, console=Console())
    files = EncoderFiles(vocabulary=corpus.vocabulary, tokenizer=corpus.model)
    preprocess(
        [tmp_path / "few.jsonl"],
        output=tmp_path / "ours_sentencepiece",
        files=files,
        options=PreprocessOptions(format="text"),
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(corpus.model_with_eod))
    texts = [json.loads(line)["text"] for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    documents = [[*processor.encode(text), processor.eos_id()] for text in texts]
    for wrong, expected in ((False, 1.0), (True, 0.0)):
        documents[-1][0] += wrong
        prefix = str(tmp_path / "theirs_text_document")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        assert comparison.same_tokens("sentencepiece") == expected


def test_every_benchmark_has_a_make_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for module in BENCHMARKS:
        assert f"\n{module.replace('_', '-')}: setup\n\t$(PYTHON_VENV) -m benchmarks.{module}\n" in makefile


@pytest.mark.slow
@pytest.mark.parametrize("module", BENCHMARKS)
def test_a_benchmark_runs(module):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--smoke"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert BENCHMARKS[module] in result.stdout
