"""The Triton kernels: R is made in registers, in the layout in which ``tl.dot`` takes an operand.

Importing this package does not import Triton; ``launch`` and the kernel modules do.

| module | what |
|---|---|
| ``plan`` | which rows of R a launch covers, how P is split, how large a workspace is (no Triton) |
| ``config`` | tile sizes and warps for an architecture, dtype and shape; pins (no Triton) |
| ``generate`` | Philox words to tiles of R, shared by all kernels |
| ``project``, ``transpose``, ``entries`` | the kernels of the dense kinds |
| ``sjlt`` | those of the sparse kind |
| ``launch``, ``launch_sjlt`` | tensors to launches; ``arguments`` is what both pass |
| ``aot`` | compiles without a GPU and reads the machine code: ``python -m fastproj.kernels.aot`` |
"""

OLDEST_TRITON = (3, 3)
