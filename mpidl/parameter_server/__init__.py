"""The asynchronous parameter server: the center variable lies in RMA windows, and no process serves it.

In `center`, `sharding` says which rank holds which elements, `clock` counts commits, and `center` joins both into
commit and pull; `worker.base` is the optimiser that exchanges with it. Here stands one file per algorithm.
"""
