"""From a model and a calibration set to a profile of its layers."""
