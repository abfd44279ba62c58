"""The run-time type checker of tests: beartype, with an int allowed where a float is declared (PEP 484's tower)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
