"""Probe, sweep and attribute a checkpoint from Python.

    python examples/from_python.py configs/demo.yaml runs/from-python

`make demo` makes the checkpoint of configs/demo.yaml.
"""

import sys

from entropy_ddp.api import open_run


def main(config: str, out: str) -> None:
    """Print the answer, the linear regime, and the tokens of U that matter most.

    Args:
        config: YAML file of the run.
        out: folder for the results of the probe.
    """
    run = open_run(config)
    print(run)

    measured = run.probe()
    print(measured)
    measured.save(out)

    # The same passes with an estimator of less variance.
    better = run.probe(linear={"score": "to_go", "baseline": "ridge"}).results
    print(f"standard error of the slope: {measured.results.linear.se:.3g}, with to_go")
    print(f"and ridge {better.linear.se:.3g}")

    swept = run.sweep(sweep={"num_points": 4}).results
    for point in swept.sweep or []:
        print(f"eta {point.eta:.2e}: true {point.delta_h_true:+.3e}, ", end="")
        print(f"first order {point.delta_h1:+.3e}")

    tokens = run.attribute().tokens
    for row in sorted(tokens, key=lambda row: -abs(row["share"]))[:5]:
        token = row.get("text", row["token_id"])
        print(f"{row['share']:+.2e} nats by {token!r}, line {row['index'] + 1}")


if __name__ == "__main__":
    main(*sys.argv[1:])
