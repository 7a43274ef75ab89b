"""The loop of the fuzz tests: damaged inputs by fixed random numbers, of which each is used or refused, silently.

`BRIXEL_FUZZ=20000` in the environment sets the count of every test, `BRIXEL_FUZZ_FIRST=1000` the number of the first
case: a case depends on its number alone, so `BRIXEL_FUZZ=1 BRIXEL_FUZZ_FIRST=1234` repeats the one that failed.
"""

import collections
import os
import random
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from brixel.errors import BrixelError

Case = tuple[str, Callable[[], object]]
"""What is damaged, for the message of a failure; and what reads it."""

_SHOWN = 20  # failures in the message


@dataclass(frozen=True)
class Fuzz:
    """Runs damaged cases; see :meth:`run`."""

    capfd: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture
    record_property: Callable[[str, object], None]

    def run(
        self,
        name: str,
        make_case: Callable[[random.Random], Case],
        *,
        count: int,
        refusals: type[Exception] | tuple[type[Exception], ...] = BrixelError,
        limit_s: float = 5.0,
    ) -> None:
        """Every case returns or raises one of `refusals`, without warnings, log lines and output, in `limit_s` of CPU.

        `make_case` damages an input by the random numbers that it gets. Assertions of what reads it count as failures.
        """
        first, count = int(os.environ.get("BRIXEL_FUZZ_FIRST", "0")), int(os.environ.get("BRIXEL_FUZZ", count))
        outcomes: collections.Counter[str] = collections.Counter()
        failures: list[str] = []
        slowest_s = 0.0
        for number in range(first, first + count):
            label, read = make_case(random.Random(f"{name} {number}"))
            start_s = time.process_time()
            outcome, problems = self._outcome(read, refusals)
            taken_s = time.process_time() - start_s
            slowest_s = max(slowest_s, taken_s)
            outcomes[outcome] += 1
            problems += [f"took {taken_s:.1f} s"] if taken_s > limit_s else []
            failures += [f"case {number}, {label}: {problem}" for problem in problems]
        tally = ", ".join(f"{times} {outcome}" for outcome, times in sorted(outcomes.items()))
        summary = f"{name}: {count} damaged inputs from number {first}: {tally}; slowest {slowest_s:.1f} s"
        self.record_property("summary", summary)
        assert not failures, "\n".join([summary, f"{len(failures)} failures:", *failures[:_SHOWN]])

    def _outcome(
        self, read: Callable[[], object], refusals: type[Exception] | tuple[type[Exception], ...]
    ) -> tuple[str, list[str]]:
        problems: list[str] = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                read()
                outcome = "read"
            except refusals:
                outcome = "refused"
            except Exception as error:
                outcome = "failed"
                last = traceback.extract_tb(error.__traceback__)[-1]
                problems.append(f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})")
        problems += [f"warning: {warning.message}" for warning in warned]
        problems += [f"logged: {record.getMessage()}" for record in self.caplog.records]
        self.caplog.clear()
        written = self.capfd.readouterr()
        problems += [f"printed: {text.strip()}" for text in (written.out, written.err) if text]
        return outcome, problems
