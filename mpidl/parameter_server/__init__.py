"""The asynchronous parameter server: the center variable lies in RMA windows, and no process serves it.

`sharding` says which rank holds which elements, `clock` counts commits, `server` joins both into commit and pull,
`worker` is the optimiser that exchanges with it; then one file per algorithm.
"""
