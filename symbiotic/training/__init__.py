"""Training: stages and learning rates by role, the step with its losses, the Trainer, its callbacks and checkpoints.

``stages``, ``schedule``, ``roles`` and ``throughput`` are plain tables and import neither torch nor megatron.
"""
