"""A training run: its step, the state that it resumes from, its log, what it prints, and where its time goes.

In: batches and a network. Out: the run directory (checkpoints, metrics.jsonl, timings.json) and lines on the screen.
"""
