"""Local SGD: every rank takes local steps, and after each communication window all ranks average.

`periodic` holds what the algorithms share; each algorithm has one file.
"""
