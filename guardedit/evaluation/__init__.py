"""Evaluation: data readers, metrics with intervals, and many edits, each of which leaves the model as it was."""
