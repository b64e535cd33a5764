"""Our package `kernels` shares its name with one of Hugging Face's; the wrong one must not be taken for ours."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class WrongPackageError(ImportError):
    """`kernels` is not the package that this code needs."""


def prefer_ours() -> None:
    """Have `kernels` be the package beside this one, here and in processes begun from here, where another hides it.

    A console script begins with its own folder on the path, `python -m` with the one it is called in. Nothing is
    changed where ours is found, or is not there: check_kernels() then says so.
    """
    try:
        check_kernels()
    except WrongPackageError:
        if (ROOT / "kernels" / "dispatch.py").is_file():
            sys.path.insert(0, str(ROOT))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            importlib.invalidate_caches()


def without_pandas() -> None:
    """Have pyarrow not import pandas, half a second, to see whether what it makes arrays of is of pandas.

    What asks for pandas by name, such as `Table.to_pandas()`, gets it as before. For processes that are ours alone:
    where others make arrays of their data frames, pyarrow would not know them.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    hiding = _Hiding()
    sys.meta_path.insert(0, hiding)
    try:
        pa.array([0])  # pyarrow looks once
    finally:
        sys.meta_path.remove(hiding)


class _Hiding(importlib.abc.MetaPathFinder):
    """Says that there is no pandas."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Nothing for other names. Raises ModuleNotFoundError."""
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not looked for here", name=fullname)


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Inside, there is no garbage collection, and what is made there counts as old afterwards.

    For imports and parsing, nearly all of whose objects stay: looking through them again and again takes a quarter of
    the time. Not for work with tensors, whose memory garbage would keep.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            # At once, every object is in the oldest generation; else the next one made would have all looked through.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def check_kernels() -> None:
    """Raise WrongPackageError if `import kernels` does not give the package beside this one."""
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        raise WrongPackageError(
            f"the package `kernels` is not found; expected it in {ROOT}; run from the checkout or set PYTHONPATH={ROOT}"
        )
    places = [Path(place).resolve() for place in spec.submodule_search_locations or []]
    ours = ROOT / "kernels"
    if places != [ours] or not (ours / "dispatch.py").is_file():
        found = ", ".join(map(str, places)) or spec.origin
        raise WrongPackageError(
            f"`import kernels` finds {found}, which is not Stemline's (Hugging Face has a package of that name); "
            f"expected {ours}; run from the checkout, or put it first: PYTHONPATH={ROOT}"
        )
