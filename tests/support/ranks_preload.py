"""Imported once by the server process that forks the workers of tests.support.ranks."""

from symbiotic.distributed.cpu_device import enter_cpu_device

enter_cpu_device()
