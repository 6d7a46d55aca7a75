"""Where a run is tracked besides its own files: TensorBoard, Weights & Biases, MLflow (`--track`).

In: settings, values of steps and validations, events, the summary, from rank 0. Out: what each tracker keeps.
`tracker` has the interface and its null object; trackers that speak to a server live in processes of their own
(`apart` here, `child` there), so that nothing that happens to them reaches the training.
"""
