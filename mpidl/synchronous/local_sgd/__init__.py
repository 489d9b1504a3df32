"""Synchronous training that communicates now and then: local steps on every rank, and a round of averaging.

`periodic` is what the algorithms share; then one file per algorithm.
"""
