"""`python -m topology` is `stateferry`."""

from topology.cli import main

main()
