"""Mutations of the way from corpora to shards: see ``catalogue``."""

from tests.mutations.mutation import Mutation

CORPORA = [
    Mutation(
        name="lines-at-a-cut-read-twice-or-never",
        file="symbiotic/data/readers/jsonl.py",
        old="position, end, count = max(chunk.start - 1, 0), chunk.end - 1, 0",
        new="position, end, count = chunk.start, chunk.end, 0",
        test="tests/data/test_readers.py::test_lines_keep_their_numbers_however_the_file_is_cut",
        why="a line didn't belong to the chunk of its first byte",
    ),
    Mutation(
        name="merge-launders-damage",
        file="symbiotic/data/assembly.py",
        old="if own is not None and own.hexdigest() != block.tokens_sha256:",
        new="if False:",
        test="tests/data/test_merge.py::test_a_changed_byte_of_a_shard_ends_the_merge_without_output",
        why="a changed byte went into a merged shard",
    ),
    Mutation(
        name="image-markers-and-images-mismatch",
        file="symbiotic/data/formats/llava.py",
        old="    if used != len(images):",
        new="    if used < len(images):",
        test="tests/data/test_formats.py::test_what_does_not_fit_is_refused",
        why="a surplus image marker passed",
    ),
]
