"""Which libmpi mlx is told of, in a rank that our launcher has not started."""

from __future__ import annotations

from pathlib import Path

from lockstep.runtime import libmpi


def test_the_library_of_the_prefix_is_named_unless_another_is(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libmpi.so.40"
    prefix = {"OPAL_PREFIX": str(tmp_path)}
    for env, named in ((prefix, None), ({}, None)):
        libmpi.announce(given := dict(env))
        assert given.get(libmpi.VARIABLE) == named
    library.parent.mkdir()
    library.touch()
    libmpi.announce(found := dict(prefix))
    assert found[libmpi.VARIABLE] == str(library)
    libmpi.announce(kept := prefix | {libmpi.VARIABLE: "/own"})
    assert kept[libmpi.VARIABLE] == "/own"
