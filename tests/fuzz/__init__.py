"""Fuzzers: damaged and hostile input, seeded, each case watched for time and memory. `python -m tests.fuzz --help`."""
