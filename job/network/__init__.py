"""AlexNet and the rules that change its parameters: layers, initial or published weights, SGD, LARS, learning rates.

In: the settings of `job.config`, files of weights. Out: a torch module, and an optimizer for it. Nothing here knows of
ranks or data.
"""
