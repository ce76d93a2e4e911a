"""Join shards of one vocabulary, such as those of a job array, into one.

    python tools/merge_data.py shards/corpus-*-of-00008 --output shards/corpus --vocabulary vocabulary.json

Documents keep their order: shards as given, and the documents of each as they stand. Any changed byte of a shard ends
the run before there is an output. The shards stay where they are.
"""

import argparse
from pathlib import Path

from symbiotic.data.merge import merge_shards
from symbiotic.data.shards import shard_path
from symbiotic.errors import exits_on_user_error
from symbiotic.tokens.vocabulary import VocabularyLayout

_MANIFEST = ".manifest.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="shards, without ending or by their files")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the shard to write")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary layout (JSON) of the shards")
    return parser.parse_args()


def shard_prefixes(words: list[str]) -> list[Path]:
    """Prefixes of the command line; of a shell's ``corpus-*`` only the manifests count."""
    prefixes: list[Path] = []
    for word in words:
        if shard_path(word, _MANIFEST).exists():
            prefixes.append(Path(word))
        elif word.endswith(_MANIFEST):
            prefixes.append(Path(word.removesuffix(_MANIFEST)))
        elif not Path(word).exists():
            prefixes.append(Path(word))  # refused by its name when it is opened
    return prefixes


@exits_on_user_error
def main() -> None:
    """Merge as the command line says."""
    arguments = parse_arguments()
    prefixes = shard_prefixes(arguments.prefixes)
    vocabulary = VocabularyLayout.load(arguments.vocabulary)
    manifest = merge_shards(prefixes, output=arguments.output, vocabulary=vocabulary)
    print(
        f"{arguments.output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens of "
        f"{len(prefixes)} shards"
    )


if __name__ == "__main__":
    main()
