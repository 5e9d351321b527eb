"""The whole of sweep.py: resolve, look what is there, run the rest, print the table."""

import sys

from cliplab.report import console
from cliplab.sweeps.formats import write_table
from cliplab.sweeps.plan import make_plan
from cliplab.sweeps.runner import Runner, executor_of
from cliplab.sweeps.spec import Spec
from cliplab.sweeps.table import make_table

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def sweep(spec: Spec) -> int:
    """Run what is missing of an experiment and print its table; the exit code. Raises UserError."""
    plan = make_plan(spec)
    runner = Runner(plan, console(stderr=True))
    runner.check_columns_of_done()
    runner.check()
    if spec.run and runner.missing():
        try:
            runner.run(executor_of(spec, plan))
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
    write_table(make_table(plan, runner), spec.output, sys.stdout)
    return EXIT_FAILED if runner.failures else 0
