"""One torch thread, as for the tests of fastproj.trak: the demo's tensors are as tiny."""

from tests.trak.conftest import _one_thread  # noqa: F401
