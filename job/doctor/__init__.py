"""The doctor: what is installed, slow or wrong on each node of a job, and which stage of training is the bottleneck.

In: the environment, the machine, the launcher's variables, a folder of shards. Out: `Finding`s, a row per subject. A
node's checks run in one process there; all nodes at the same time. Nothing here needs Horovod or MPI to work: the ranks
exchange what they found through files, and whatever may crash or hang runs in a child process with a time limit.
"""
