"""The proof of speed: every claim about cost as a ratio of two timings of one run.

`python -m benchmarks` prints the table and writes it as JSON; `python -m benchmarks
scale` shows how a probe grows with its evaluation batch. Models are made from
configurations with random weights: nothing is downloaded.
"""
