"""What checks annotations, shapes among them, while tests run; whole numbers pass for floats."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
