"""One torch thread, as for the tests of fastproj.trak: the demo's tensors are as tiny."""

from importlib.util import find_spec

from tests.trak.conftest import _one_thread  # noqa: F401

if any(find_spec(name) is None for name in ("accelerate", "datasets", "peft", "transformers")):
    collect_ignore = ["test_trak.py"]  # which needs what the extra [hf] brings
