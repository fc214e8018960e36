"""Run any Python program on n ranks of this machine by Lockstep's launcher: BACKEND N PYTHON ARGUMENTS..."""

import sys

from lockstep.launch import launcher
from lockstep.launch.hostfile import local_hosts
from lockstep.launch.job import Job

backend, ranks, python, *argv = sys.argv[1:]
sys.exit(launcher.run(Job(tuple(argv), local_hosts(int(ranks)), backend=backend, python=python)))
