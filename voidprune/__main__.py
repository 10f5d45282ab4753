"""`python -m voidprune` is the `voidprune` command."""

from voidprune.cli import main

main()
