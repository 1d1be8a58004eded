"""`lamamba bench serve` and `lamamba bench batching`: a server under load, beside other ways to batch.

How load is made, and what the figures mean, is in `docs/serving-performance.md`.
"""
