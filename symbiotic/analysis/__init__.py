"""Looking at a trained model and judging it.

Everything here works on an exported Hugging Face folder, in processes that never import megatron-core:

- ``results``: measured figures in the form every report of this repository has, and their targets
- ``judges``: pictures judged without the model (classifier, copies, diversity, Frechet distance)
- ``exports``, ``exported_model``, ``sequences``: from a run to a model that scores, answers and draws
- ``items``, ``evaluation``: held-out items of a corpus, and all that is measured on them, by way of ``reading``,
  ``text``, ``drawing`` and ``expert_counter``
- ``report``, with ``run_log``, ``expert_use``, ``figures``, ``page`` and ``table``: one table and one HTML page
"""
