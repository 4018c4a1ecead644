"""The public names: there, light, and not hidden by the modules that hold them."""

from __future__ import annotations

import subprocess
import sys

import moses


def test_public_names_are_what_they_say_whatever_was_imported_before():
    code = (
        "import moses, moses.attachment, moses.training, moses.checkpoint\n"
        "modules = {'growth', 'ops', 'routers', 'surgery'}\n"
        "assert all(callable(getattr(moses, name)) for name in {*moses.__all__} - modules), moses.__all__\n"
        "assert all(getattr(moses, name).__name__ == f'moses.{name}' for name in modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    code = "import moses, sys; heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors():
    assert not hasattr(moses, "nonsense")
    assert set(moses.__all__) <= set(dir(moses))
