"""Running a model under a schedule: the torch reference, and onnxruntime sessions that must equal it."""
