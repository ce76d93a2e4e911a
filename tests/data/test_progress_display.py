"""The line of a run over a corpus: rates are those of this run, without what an earlier one had done."""

from symbiotic.data import progress_display
from symbiotic.data.chunked_run import RunProgress
from symbiotic.data.progress_display import ProgressDisplay
from symbiotic.data.worker_pool import Counts


def test_rates_are_those_of_this_run(monkeypatch):
    times = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: next(times))
    display = ProgressDisplay()
    progress = RunProgress(total_bytes=90_000_000)
    progress.add(Counts(30_000_000, 300, 5000, 1, 40))
    progress.resumed = progress.counts
    progress.add(Counts(15_000_000, 100, 20_000, 0, 25))
    counts = "400 documents, 65 images, 25,000 tokens, 1 rejected, 2.5 images/s, 2,000 tokens/s, 1.5 MB/s"
    assert display.line(progress, seconds=10.0) == f" 50%  {counts}, 30 s left"
    progress = RunProgress(total_bytes=10_000_000, num_bytes=5_000_000, num_documents=3, num_tokens=70)
    assert display.counts(progress) == "3 documents, 70 tokens, 7 tokens/s, 0.5 MB/s"
