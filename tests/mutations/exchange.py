"""Mutations of what goes to Hugging Face and comes from there: see ``catalogue``."""

from tests.mutations.mutation import Mutation

EXCHANGE = [
    Mutation(
        name="ernie-heads-rotated-in-the-wrong-pairs",
        file="symbiotic/huggingface/mapping.py",
        old="parts[:2] = [part.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3) for part in parts[:2]]",
        new="parts[:2] = parts[:2]",
        test="tests/huggingface/test_stock_export.py::test_logits_are_those_of_the_whole_model[ernie4_5_moe]",
        why="an export rotated queries and keys in the wrong pairs",
    ),
    Mutation(
        name="imported-routing-weights-not-normalised",
        file="symbiotic/huggingface/stock.py",
        old='"router_pre_softmax": not config.norm_topk_prob,',
        new='"router_pre_softmax": config.norm_topk_prob,',
        test="tests/huggingface/test_importing.py::test_logits_of_a_stock_mixture[qwen2_moe]",
        why="routing weights were not those of the stock model",
    ),
    Mutation(
        name="a-changed-byte-is-imported",
        file="symbiotic/huggingface/safetensors_reader.py",
        old="if expected is not None and hashlib.sha256(data).hexdigest() != expected:",
        new="if expected is not None and not data:",
        test="tests/huggingface/test_importing.py::test_a_flipped_bit_of_our_own_export_is_named",
        why="a changed byte went into training",
    ),
    Mutation(
        name="guidance-one-step-too-strong",
        file="symbiotic/huggingface/modeling/generation_symbiotic.py",
        old="guided = free + self.scale * (scores - free)",
        new="guided = scores + self.scale * (scores - free)",
        test="tests/huggingface/test_generation.py::test_guidance_is_the_formula",
        why="classifier-free guidance was not its formula",
    ),
    Mutation(
        name="gpt-layers-counted-as-hybrid-ones",
        file="symbiotic/huggingface/megatron_folder.py",
        old="            layer //= 2",
        new="            layer -= 0",
        test="tests/huggingface/test_megatron_import.py::test_logits_of_megatrons_own_models",
        why="layers of a GPTModel checkpoint went to the wrong places",
        fails_with=("symbiotic.errors.CheckpointError",),
    ),
    Mutation(
        name="a-sliding-window-is-imported-as-full-attention",
        file="symbiotic/huggingface/stock.py",
        old='windowed = kinds - {"full_attention"} if kinds else getattr(config, "sliding_window", None)',
        new='windowed = kinds - {"full_attention"}',
        test="tests/huggingface/test_stock.py::test_a_setting_that_counts_is_read_or_refused_by_name",
        why="a model that attends to a window was imported as one that attends to everything",
    ),
    Mutation(
        name="a-picture-depends-on-its-shard",
        file="examples/evaluation/geneval.py",
        old="    torch.manual_seed(seed_of(arguments.seed, index))\n",
        new="    if index == 0:\n        torch.manual_seed(seed_of(arguments.seed, index))\n",
        test="tests/examples/test_evaluation_geneval.py::test_shards_draw_what_one_process_draws",
        why="the pictures of a prompt depended on which process drew them",
    ),
]
