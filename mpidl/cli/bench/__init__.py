"""What `mpidl bench` measures and how; nothing is imported here, so that the command line's help needs no torch.

targets           what is to be reached, against whom: one table
importing         what `import mpidl` adds to the start of Python
pack              many tensors into one buffer, against memcpy and torch
allreduce         sums over ranks, against MPI itself, gloo and memcpy
training          whole steps of two models, against torch DDP and trainers that do not communicate
parameter_server  commits and pulls, against the plain one-sided calls
models            the networks of `training`, and the tensors of `pack`
gloo              torch.distributed on the ranks that MPI started
harness           contenders take turns, round after round; their results are checked in the same run
ranks             who measures together: a communicator, or one process alone
machine           pins a rank to a core; hardware, versions, load
ratios            medians, quartiles, bootstrap
judging           targets against results: met, missed, undecided, failed
results           one run as JSON lines
report            results as a page of Markdown
plot              results as a PNG
session           one run, in order
progress          what a person sees meanwhile
"""
