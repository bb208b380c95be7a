"""Speed of models in the runtimes that they are deployed in: `vitlinear benchmark`."""
