"""The steps that a user asks for, put together from the rooms above.

Each takes values and returns values; writing artefacts is left to the caller where there is one.
"""
