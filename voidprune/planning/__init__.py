"""From a profile and a budget to a schedule. No torch here."""
