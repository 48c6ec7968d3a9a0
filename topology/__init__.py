"""The Faust application around `pipeline`: agents, topics, transports, settings, command line."""
