"""The jobs as functions of (config, world, out, progress)."""

from functools import partial

from entropy_ddp.probe.pipeline import run

run_probe = partial(run, "probe")
run_sweep = partial(run, "sweep")
run_attribution = partial(run, "attribute")
run_audit = partial(run, "audit")
