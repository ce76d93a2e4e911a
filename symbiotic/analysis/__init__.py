"""Looking at a trained model and judging it.

Everything here works on an exported Hugging Face folder, in processes that never import megatron-core:

- ``results``: measured figures in the form every report of this repository has, and their targets
- ``judges``: pictures judged without the model (classifier, copies, diversity, Frechet distance)
- ``sequences``, ``exported_model``: documents as model inputs; scoring and drawing with an exported model
- ``reading``, ``text``, ``drawing``, ``expert_use``: the measurements
- ``run_log``, ``figures``, ``page``: from a run's log and the measurements to one HTML page
"""
