"""Evaluation: data readers, metrics with intervals, and many edits that leave the model as it was.

readers.py    a file into cases (cases.py), by its form (forms.py); filling.py adds what a record leaves open
methods.py    what is evaluated: a weight edit, or anything that is in force for a while and may put prompts differently
protocol.py   alone, in batches, in sequence; stepping.py takes one group of cases through its steps
asking.py     every prompt of a case; measuring.py both sides of it, by scoring.py and generation.py
metrics.py    from scores to a case's metrics; fluency.py those of texts
extras.py     what costs more: far.py control text, ability.py reasoning and language
run.py        many cases, resumable (state.py, solved.py); datasets.py with a workspace's kit
summary.py    figures with intervals (bootstrap.py); plot.py the curve over the number of edits
"""
