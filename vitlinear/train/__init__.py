"""Training of classifiers on timm's own pieces: the ``train`` and ``compare-runs`` commands.

A run goes through these modules in this order: `run` (the command), `config` (its flags as typed
objects), `setup` (model, data, task, optimiser and schedule built from them), `resume`, `epochs`,
`loop` (one epoch), `updater` (one update). `record` writes what a run leaves.
"""
