"""The public names and their types are deliberate."""

import enum
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

import nanobanana_async as nb
from nanobanana_async import simulator
from tests.typing import surface


def test_public_names_are_deliberate() -> None:
    """The package contains exactly the names in `__all__`."""
    submodules = {module.name for module in pkgutil.iter_modules(nb.__path__)}
    # pytest adds names with "@" when it rewrites assertions in a package with a plugin.
    assert {name for name in vars(nb) if not name.startswith(("_", "@"))} - submodules == set(nb.__all__)
    assert sorted(nb.__all__) == nb.__all__


def test_importing_the_package_imports_no_extra() -> None:
    """Only the runtime dependencies are imported, and what httpx itself imports."""
    extras = "{'aiohttp', 'uvicorn', 'starlette', 'PIL', 'trio', 'httpx2', 'pytest'}"
    code = f"import sys, nanobanana_async, nanobanana_async.simulator; print(sorted({extras} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - started here
    assert ran.stdout.strip() == "[]"


def test_every_public_class_has_a_docstring() -> None:
    """A docstring is the contract of its class."""
    classes = [getattr(nb, name) for name in nb.__all__ if isinstance(getattr(nb, name), type)]
    assert len(classes) > 30
    assert [kind for kind in classes if not kind.__doc__] == []


def test_every_public_name_is_type_checked() -> None:
    """The surface that mypy and pyright check in strict mode uses every public name."""
    text = Path(surface.__file__).read_text(encoding="utf-8")
    assert [name for name in nb.__all__ if f"nb.{name}" not in text] == []


def test_errors_are_caught_by_their_base_class() -> None:
    """The hierarchy of errors is what the surface states."""
    for base, errors in surface.hierarchy().items():
        assert all(issubclass(error, base) for error in errors)


def _has_fields(value: object) -> bool:
    return isinstance(value, type) and (attrs.has(value) or issubclass(value, enum.Enum))


@pytest.mark.parametrize("value", [one for one in (*vars(nb).values(), *vars(simulator).values()) if _has_fields(one)])
def test_g4_help_describes_each_field_of_a_value(value: Any) -> None:  # noqa: ANN401 - an enum or an attrs class
    """G4: docstrings below a field do not reach `help`."""
    fields = attrs.fields_dict(value) if attrs.has(value) else value.__members__
    doc = inspect.cleandoc(value.__doc__ or "")
    assert [name for name in fields if not name.startswith("_") and f"\n    {name}: " not in doc] == []
