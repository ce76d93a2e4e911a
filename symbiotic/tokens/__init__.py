"""Token types, the vocabulary layout and interleaved documents."""
