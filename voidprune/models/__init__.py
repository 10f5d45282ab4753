"""What a decoder LM is: families as data, checkpoints as bytes, and the one door to transformers."""
