"""A run's records: its folder, states, metrics, curves, environment and trackers."""
