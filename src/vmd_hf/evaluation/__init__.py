"""Measurements of a trained model, one subject a file, each as rows of numbers (see `tables`); `tasks` puts them
together for the command `evaluate`."""
