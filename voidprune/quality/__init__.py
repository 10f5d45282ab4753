"""Is the export right, how good is it, how fast is it."""
