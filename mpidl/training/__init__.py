"""The loop behind `mpidl train`; nothing is imported here, so that the command line's help needs no torch.

settings    what the user asked for, a frozen value
job         loads a job file and refuses what it lacks
session     one run from the first rank's start to the summary, in order
loop        the epoch loop, one for both ways
ways        what the loop must know of each way: weights of batches, records, the model to save
stop        a request to stop, noted by a signal handler
data        loaders: shuffled shares for training, exact shares for evaluation
evaluation  held-out loss and accuracy over all ranks
recording   metrics and progress, written while training
checkpoint  what a checkpoint is: files under a manifest, whole or refused by name
saving      when a checkpoint is written, by which rank, and what is in it
resuming    which checkpoint a run goes on from, and how each rank takes up its part
randomness  the random numbers of one rank
outputs     the output folder: metrics and summary, each written so that it is whole or absent
agreement   how ranks refuse alike
progress    what a person sees
plotting    finished runs as a picture
"""
