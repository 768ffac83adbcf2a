"""Evaluation: data readers, metrics with intervals, and many edits in a row that leave the model as it was."""
