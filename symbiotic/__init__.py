"""Symbiotic: pre-training of multimodal mixture-of-experts models that understand and generate images.

The package stands on megatron-core. Importing it imports neither torch nor megatron, so that tools which
only read a configuration or a shard start at once.
"""

__version__ = "0.1.0"
