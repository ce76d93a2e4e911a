"""The model: megatron-core's HybridModel with experts that belong to groups.

``partition``, ``placement`` and ``routing`` are plain tables and import neither torch nor megatron; the other
modules import megatron-core and, on a CPU, need the CPU device to be entered first.
"""
