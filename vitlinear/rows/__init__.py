"""Rows of maps: the steps of a model, and how far its layers look; for streaming and parallel."""
