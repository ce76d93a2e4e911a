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
    Mutation(
        name="batches-as-full-as-they-come",
        file="symbiotic/data/image_tokens_chunk.py",
        old="np.zeros((self._batch_size, *shape), dtype=np.uint8)",
        new="np.zeros((len(slots), *shape), dtype=np.uint8)",
        test="tests/data/test_tokenize_images.py::test_batches_are_of_one_size_and_always_full",
        why="an image's codes depended on its neighbours",
    ),
    Mutation(
        name="missing-weights-of-a-codec",
        file="symbiotic/data/codecs/pretrained.py",
        old="    if faults:\n",
        new="    if faults.get('error_msgs'):\n",
        test="tests/data/test_neural_codecs.py::test_weights_that_are_missing_left_over_or_misshaped_are_named",
        why="a corpus was written with random weights",
    ),
    Mutation(
        name="special-tokens-in-a-text",
        file="symbiotic/tokens/tokenizers_json.py",
        old="encode_special_tokens = True",
        new="encode_special_tokens = False",
        test="tests/tokens/test_tokenizers_json.py::test_no_template_truncation_or_special_token_touches_a_text",
        why="a text that spells a control became that control",
    ),
    Mutation(
        name="changed-pictures-on-resume",
        file="symbiotic/data/chunked_run.py",
        old="            self._check_images(len(chunks))\n",
        new="",
        test="tests/data/test_tokenize_images.py::test_changed_pictures_are_refused_on_resume",
        why="old codes stood for new pictures",
    ),
]
