"""Layers that stay learn to do without those that went."""
