"""The commands, a file for each group of them; `topology.cli` puts them together."""
