"""Look into a shard: counts by type, lengths, and documents as text with their images.

    python tools/inspect_data.py shards/corpus
    python tools/inspect_data.py shards/corpus --document doc-17 --vocabulary vocabulary.json \
        --tokenizer tokenizer.model --codec codec/ --images look/
    python tools/inspect_data.py shards/corpus --html report.html --vocabulary vocabulary.json \
        --tokenizer tokenizer.model --codec codec/

A document is named by its id or its number from 0. The HTML page needs no other file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from symbiotic.data.codecs import load_codec, png_bytes
from symbiotic.data.inspection import DocumentViewer, Histogram, ShownSegment, length_histograms
from symbiotic.data.shards import Shard
from symbiotic.errors import DataError, exits_on_user_error
from symbiotic.files import make_folder, make_folder_for, replacing, write_text
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout

_BAR = 40
"""Characters of the longest bar of a histogram."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="path of a shard without ending")
    parser.add_argument("--document", action="append", default=[], help="id or number of a document; may be repeated")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary layout (JSON) of the shard, to show documents")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model or tokenizer.json, to show documents")
    parser.add_argument("--codec", type=Path, help="folder of the image codec, to decode images")
    parser.add_argument("--images", type=Path, help="folder to write the images of the documents to, as PNG")
    parser.add_argument("--html", type=Path, help="page to write, with the documents or else the first ones")
    parser.add_argument("--count", type=int, default=8, help="first documents on the page (default 8)")
    return parser.parse_args()


def print_summary(shard: Shard, histograms: Sequence[Histogram], console: Console) -> None:
    """Counts by type, licences and lengths."""
    for table in summary_tables(shard):
        printed = Table(*table["heads"], title=table["title"], title_justify="left")
        for row in table["rows"]:
            printed.add_row(*row)
        console.print(printed)
    for histogram in histograms:
        largest = int(histogram.counts.max())
        console.print(f"\n{describe(histogram)}", highlight=False)
        for name, count in histogram.rows():
            console.print(f"{name:>25}  {'█' * -(-count * _BAR // largest)} {count:,}", highlight=False)


def describe(histogram: Histogram) -> str:
    """Name, shortest, mean and longest."""
    return (
        f"{histogram.name}: {int(histogram.counts.sum()):,} of {histogram.least:,} to {histogram.most:,} tokens, "
        f"mean {histogram.mean:,.1f}"
    )


def summary_tables(shard: Shard) -> list[dict[str, Any]]:
    """Tables by token type and by licence, as text."""
    kinds = [
        [name, *(f"{counts[unit]:,}" for unit in ("segments", "tokens", "loss_tokens"))]
        for name, counts in shard.manifest["by_type"].items()
    ]
    licences = pc.value_counts(shard.read_documents().column("license")).to_pylist()
    licences.sort(key=lambda entry: (-entry["counts"], str(entry["values"])))
    return [
        {"title": "By type", "heads": ("type", "segments", "tokens", "with loss"), "rows": kinds},
        {
            "title": "By licence",
            "heads": ("licence", "documents"),
            "rows": [[entry["values"] or "not named", f"{entry['counts']:,}"] for entry in licences[:20]],
        },
    ]


def document_text(segments: Sequence[ShownSegment]) -> str:
    """A document as lines: what each segment is, then its text."""
    lines = []
    for number, segment in enumerate(segments):
        loss = "" if segment.loss else ", no loss"
        lines.append(f"[{number}: {segment.kind}, {segment.num_tokens} tokens{loss}]\n{segment.text}")
    return "\n".join(lines)


def write_images(folder: Path, document: int, segments: Sequence[ShownSegment]) -> None:
    """Write the images of a document as ``DOCUMENT.SEGMENT.png``."""
    for number, segment in enumerate(segments):
        if segment.pixels is not None:
            with replacing(folder / f"{document}.{number}.png") as file:
                file.write(png_bytes(segment.pixels))


def write_page(
    path: Path, shard: Shard, *, histograms: Sequence[Histogram], documents: dict[int, list[ShownSegment]]
) -> None:
    """Write the HTML page."""
    # Matplotlib takes a second to load and only the page needs it.
    from symbiotic.analysis import page
    from symbiotic.analysis.figures import Picture, as_svg, new_figure

    def bars(histogram: Histogram) -> Picture:
        figure = new_figure(6, 2.2)
        axes = figure.subplots()
        names, counts = zip(*histogram.rows(), strict=True)
        axes.bar(range(len(names)), counts)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        axes.set_ylabel(f"{histogram.name}s")
        return as_svg(figure, alternative=f"Lengths of {histogram.name}s")

    sections = [
        page.Section(table["title"], "", table=page.Table(table["heads"], table["rows"]))
        for table in summary_tables(shard)
    ]
    sections.append(page.Section("Lengths", "In tokens as stored.", [(bars(one), describe(one)) for one in histograms]))
    for number, segments in documents.items():
        pictures = [
            (Picture(png_bytes(segment.pixels), "image/png", f"image of segment {place}"), f"{place}: {segment.kind}")
            for place, segment in enumerate(segments)
            if segment.pixels is not None
        ]
        rows = [
            [str(place), segment.kind, "yes" if segment.loss else "no", f"{segment.num_tokens:,}", segment.text]
            for place, segment in enumerate(segments)
        ]
        table = page.Table(("segment", "type", "loss", "tokens", "content"), rows)
        sections.append(page.Section(f"Document {number}", "", pictures, table=table))
    facts = {"shard": shard.prefix.name, "documents": f"{shard.num_documents:,}", "tokens": f"{shard.num_tokens:,}"}
    facts |= {"vocabulary": shard.manifest["vocabulary"], "digest": shard.digest}
    write_text(path, page.render_page(f"Shard {shard.prefix.name}", facts=facts, rows=[], sections=sections))


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that don't go together, and outputs that can't be written.

    Raises:
        UserError: naming one of them.
    """
    if arguments.document and not (arguments.vocabulary and arguments.tokenizer):
        raise DataError("--document needs --vocabulary and --tokenizer; give the files of the corpus")
    if arguments.images and not (arguments.codec and (arguments.document or arguments.html)):
        raise DataError("--images needs --codec, and --document or --html; add them")
    if arguments.codec and not (arguments.vocabulary and arguments.tokenizer):
        raise DataError("--codec needs --vocabulary and --tokenizer; give the files of the corpus")
    if arguments.count < 1:
        raise DataError(f"--count {arguments.count} must be at least 1")
    if arguments.images:
        make_folder(arguments.images)
    if arguments.html:
        make_folder_for(arguments.html)


@exits_on_user_error
def main() -> None:
    """Show what the command line asks for."""
    arguments = parse_arguments()
    check_options(arguments)
    vocabulary = VocabularyLayout.load(arguments.vocabulary) if arguments.vocabulary else None
    shard = Shard.open(arguments.prefix, vocabulary=vocabulary)
    histograms = length_histograms(shard)
    documents: dict[int, list[ShownSegment]] = {}
    if vocabulary is not None and arguments.tokenizer is not None:
        codec = load_codec(arguments.codec) if arguments.codec else None
        viewer = DocumentViewer(shard, vocabulary=vocabulary, tokenizer=Tokenizer(arguments.tokenizer), codec=codec)
        wanted = [viewer.find(word) for word in arguments.document]
        if not wanted and arguments.html:
            wanted = list(range(min(arguments.count, shard.num_documents)))
        documents = {number: viewer.show(number) for number in wanted}
    console = Console()
    if not arguments.document:
        print_summary(shard, histograms, console)
    else:
        rows = shard.read_documents()
        for number, segments in documents.items():
            row = rows.slice(number, 1).to_pylist()[0]
            print(f"document {number}: {row['id']} ({row['source_file']}:{row['line']})\n{document_text(segments)}")
    if arguments.images is not None:
        for number, segments in documents.items():
            write_images(arguments.images, number, segments)
    if arguments.html is not None:
        write_page(arguments.html, shard, histograms=histograms, documents=documents)
        print(f"{arguments.html}: written")


if __name__ == "__main__":
    main()
