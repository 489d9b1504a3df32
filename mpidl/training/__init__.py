"""The loop behind `mpidl train`; nothing is imported here, so that the command line's help needs no torch.

settings    what the user asked for, a frozen value
job         loads a job file and refuses what it lacks
algorithms  the choices of --algorithm, and what --set takes
run         one run from its first check to the summary, in order
loop        the epoch loop, the same for every algorithm
strategies  what the loop must know of each kind of algorithm: weights of batches, records, the model to save
stop        a request to stop, noted by a signal handler
data        loaders: shuffled shares for training, exact shares for evaluation
evaluation  held-out loss and accuracy over all ranks
metrics     metrics and progress, written while training
snapshot    what a checkpoint holds of one rank
checkpoint  what a checkpoint is: files under a manifest, whole or refused by name
saving      when a checkpoint is written, and by which rank
resuming    which checkpoint a run goes on from, and how each rank takes up its part
randomness  the random numbers of one rank
outputs     the output folder: metrics and summary, each written so that it is whole or absent
refusal     how ranks refuse alike
progress    a bar or lines for the terminal
plotting    finished runs as a picture
"""
