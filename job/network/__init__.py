"""AlexNet and the rules that change its parameters: layers, initial values, momentum SGD, LARS, learning rates.

In: the settings of `job.config`. Out: a torch module, and an optimizer for it. Nothing here knows of ranks or data.
"""
