"""The demo: real processes ferry real blocks on one machine, and everything that is claimed about it is checked.

It starts what a user would start, in a directory of its own: workers and commands of `stateferry`, over the embedded
log. What it shows beside their answers it reads where anybody can read it: on the diffs topic and in the archive.

    processes.py  workers and commands as child processes, ended whatever happens
    wire.py       the diffs topic, read along: changes, bytes, reorgs
    screen.py     what is shown meanwhile and at the end
    facts.py      what was found, and whether it all agrees
    walk.py       the acts, in order
"""
