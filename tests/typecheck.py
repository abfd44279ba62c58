"""The run-time type checker of tests: beartype, with an int allowed where a float is declared (PEP 484's tower).

Checking every call would take more time than all else that tests do. So the first calls of each test are checked, which go
through the prefill and some steps of decoding, and of the others one in a few; `--all-shapes` checks every call.
"""

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

FIRST, ONE_IN = 1000, 11


class Sampling(type(jaxtyping.config)):
    """jaxtyping's settings, which every checked function asks at each call whether checks are off."""

    calls = 0

    @property
    def jaxtyping_disable(self):
        self.calls += 1
        return self.calls > FIRST and self.calls % ONE_IN > 0


def sample():
    """Check a part of the calls from now on, unless none are checked anyway."""
    if not jaxtyping.config.jaxtyping_disable:
        jaxtyping.config.__class__ = Sampling


def begin_test():
    """A test's own first calls are the first ones, so that it does not depend on what ran before."""
    jaxtyping.config.calls = 0
