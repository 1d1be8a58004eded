"""`lamamba bench`: how long the network takes on this device, beside DiT and mamba-ssm in the same run.

How it is measured, and what the figures mean, is in `docs/performance.md`.
"""
