"""The ``convert`` command: published checkpoints to files that say what they are."""
