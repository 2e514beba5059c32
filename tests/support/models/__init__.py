"""Models for tests: every construct that the engine must see through, as small as it
can be.
"""

from . import architectures, control, convolutions, layers, libraries, parameters
from ._table import MODELS as MODELS
from ._table import Model as Model
from ._table import N as N
