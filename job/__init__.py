"""Data-parallel training of AlexNet with Horovod: train, evaluate, measure. Knows batches, and nothing of tar files."""
