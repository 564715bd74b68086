"""The parts of benchmarks/gpu.py: each is a list of cases, and a report of what they found."""
