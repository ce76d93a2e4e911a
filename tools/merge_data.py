"""Join shards of one vocabulary, such as those of a job array, into one.

    python tools/merge_data.py shards/corpus-*-of-00008* --output shards/corpus --vocabulary vocabulary.json

Of a job array every job must be done; one whose share held no document has left a record of it instead of a shard.
Documents keep their order: shards as given, and the documents of each as they stand. Any changed byte of a shard ends
the run before there is an output. The shards stay where they are.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

from symbiotic.data.chunked_run import read_json
from symbiotic.data.merge import merge_shards
from symbiotic.data.plan import JobShare, Splits, output_prefix
from symbiotic.data.preprocess import RUN_SUFFIX
from symbiotic.data.shards import FILE_SUFFIXES
from symbiotic.errors import DataError, exits_on_user_error
from symbiotic.files import make_folder, reporting_full_disk
from symbiotic.tokens.vocabulary import VocabularyLayout

ENDINGS = (".manifest.json", *FILE_SUFFIXES.values(), RUN_SUFFIX, ".rejected.jsonl", ".parts")
"""What stands behind a prefix on disk: a shell's ``corpus-*`` names all of these."""

ANY_JOB = "-00000-of-00000"
"""As long as the job's part of every name."""

JOB = re.compile(r"(?P<corpus>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})")
"""The name of one job's shard."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="shards, without ending or by their files")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the shard to write")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary layout (JSON) of the shards")
    return parser.parse_args()


def shard_prefixes(words: list[str]) -> list[Path]:
    """Prefixes of the command line, each once; what a prefix lacks is named when its shard is opened.

    Raises:
        DataError: a job of an array has left no file.
    """
    prefixes: list[Path] = []
    for word in words:
        ending = next((ending for ending in ENDINGS if word.endswith(ending)), "")
        prefix = Path(word.removesuffix(ending))
        if not ending or prefix not in prefixes:
            prefixes.append(prefix)
    check_jobs(prefixes)
    return prefixes


def records_by_job(folder: Path) -> dict[str, list[Path]]:
    """The records of finished jobs in a folder, by the job's part of their name, ``-00001-of-00004``."""
    found = defaultdict(list)
    for path in folder.glob(f"*{RUN_SUFFIX}"):
        prefix = path.name.removesuffix(RUN_SUFFIX)
        found[prefix[-len(ANY_JOB) :]].append(path)
    return found


def has_no_document(prefix: Path, records: dict[str, list[Path]]) -> bool:
    """Whether the job of an array is done and its share held no document for this shard: its record says so.

    A record is named after the corpus without the split: ``web-00001-of-00004`` for ``web_train-00001-of-00004``.
    """
    corpus, job = prefix.name[: -len(ANY_JOB)], prefix.name[-len(ANY_JOB) :]
    for path in records.get(job, []):
        record = read_json(path)
        if record is None or prefix.name in record["shards"]:
            continue
        splits = Splits(tuple((name, share) for name, share in record["fingerprint"]["split"]))
        whole = path.name.removesuffix(job + RUN_SUFFIX)
        names = [output_prefix(whole, split=name, job=JobShare()).name for name in splits.names]
        if corpus in names:
            return True
    return False


def check_jobs(prefixes: list[Path]) -> None:
    """Every job of an array is among the prefixes."""
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for prefix in prefixes:
        if match := JOB.fullmatch(str(prefix)):
            found[match["corpus"], int(match["count"])].add(int(match["index"]))
    for (corpus, count), indices in found.items():
        absent = sorted(set(range(count)) - indices)
        records = records_by_job(Path(corpus).parent) if absent else {}
        missing = [
            index for index in absent if not has_no_document(Path(f"{corpus}-{index:05d}-of-{count:05d}"), records)
        ]
        if missing:
            raise DataError(
                f"{corpus}-{missing[0]:05d}-of-{count:05d} is not among the shards ({len(missing)} of {count} are "
                "missing); run these jobs first"
            )


@exits_on_user_error
def main() -> None:
    """Merge as the command line says."""
    arguments = parse_arguments()
    prefixes = shard_prefixes(arguments.prefixes)
    vocabulary = VocabularyLayout.load(arguments.vocabulary)
    make_folder(arguments.output.parent, remedy="give another --output")
    with reporting_full_disk(arguments.output, remedy="make room and start again"):
        manifest = merge_shards(prefixes, output=arguments.output, vocabulary=vocabulary)
    print(
        f"{arguments.output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens of "
        f"{len(prefixes)} shards"
    )


if __name__ == "__main__":
    main()
