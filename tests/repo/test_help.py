"""`help(pytree_grads)` shows a map and every public call, though each is defined in a
module.
"""

import pydoc
import re
import types

import pytest

import pytree_grads

pytestmark = pytest.mark.any_release

SHOWN = pydoc.plain(pydoc.render_doc(pytree_grads))


def test_all_lists_what_is_public():
    public = {
        name
        for name, value in vars(pytree_grads).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(pytree_grads.__all__)
    assert pytree_grads.__all__ == sorted(pytree_grads.__all__)


@pytest.mark.parametrize("name", pytree_grads.__all__)
def test_help_shows_the_call_its_doc_and_its_place_in_the_map(name):
    value = getattr(pytree_grads, name)
    assert re.search(rf"\b{name}\b", pytree_grads.__doc__ or "")
    if isinstance(value, types.ModuleType):  # a submodule has a page of its own
        assert value.__doc__
        return
    assert f"{name}(" in SHOWN
    assert value.__doc__.splitlines()[0] in SHOWN
