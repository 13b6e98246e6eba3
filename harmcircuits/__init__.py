"""Find, mask and measure the weights behind harmful generation, on TransformerLens.

`import harmcircuits` imports no other library of weight: `__init__.pyi` names the module of each
public name, and the module is imported when the name is first used.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("harmcircuits")

_public_value, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name in __all__:
        return _public_value(name)
    from harmcircuits.display import nearest

    raise AttributeError(f"harmcircuits has no {name!r}; {nearest(name, __all__)}")
