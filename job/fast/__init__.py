"""The same network at the speed of an NVIDIA GPU: Triton kernels and CUDA graphs in place of PyTorch's operators.

In: the model of `job.network`, uint8 batches on the GPU. Out: its loss and gradients, autograd's up to rounding.
"""
