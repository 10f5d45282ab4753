"""From a model and a schedule to files that others can load. No torch here."""
