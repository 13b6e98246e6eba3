"""What checks annotations, shapes among them, while tests run; whole numbers pass for floats."""

from beartype import BeartypeConf, FrozenDict, beartype

from harmcircuits.hooks.bridge import Bridge

# `as_bridge` says what is no bridge. To ask a bridge for each name of the protocol, some of them
# computed, took a third of the time of a search.
ANY_BRIDGE = FrozenDict({Bridge: object})

check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=ANY_BRIDGE))
