"""Read whole shards and refuse any changed byte, size, count or manifest.

    python tools/verify_data.py shards/digits_train shards/text_train --vocabulary vocabulary.json

With --vocabulary every token id is checked against the type of its segment as well. Every shard is looked at;
the exit code is 1 if one of them is wrong.
"""

import argparse
import sys
from pathlib import Path

from symbiotic.data.shards import verify_shard
from symbiotic.errors import DataError, exits_on_user_error
from symbiotic.tokens.vocabulary import VocabularyLayout


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", type=Path, nargs="+", metavar="PREFIX", help="path of a shard without ending")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary layout (JSON) that the shards were written with")
    return parser.parse_args()


@exits_on_user_error
def main() -> int:
    """Verify every shard and say what it holds."""
    arguments = parse_arguments()
    vocabulary = VocabularyLayout.load(arguments.vocabulary) if arguments.vocabulary else None
    faults = 0
    for prefix in arguments.prefixes:
        try:
            manifest = verify_shard(prefix, vocabulary=vocabulary)
        except DataError as error:
            faults += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        types = ", ".join(f"{name} {counts['tokens']}" for name, counts in manifest["by_type"].items())
        print(f"{prefix}: {manifest['documents']} documents, {manifest['tokens']} tokens ({types})")
    return 1 if faults else 0


if __name__ == "__main__":
    main()
