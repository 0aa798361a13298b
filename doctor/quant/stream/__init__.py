"""Rounding to nearest without a model: tensor by tensor, shard by shard, at the pace of the disk.

Where codes are chosen from a weight alone, no layer need run. Linears are chosen from names and headers as a run with
calibration chooses them; rows of a weight are read, rounded and written, a few MiB at a time (`run`).
"""
