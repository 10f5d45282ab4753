"""The model that ships with voidprune, and the generator of the tasks that it was trained on."""
