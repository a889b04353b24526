"""Imports transformers as the models need it; a module that imports transformers or diffusers imports this one first.

Both import Triton, whose interpreter must be enabled before on a machine without a GPU; and torchao if it is installed,
in seconds and with lines on stderr, which only an optimizer needs.
"""

from ...kernels import runtime  # noqa: F401  # isort: skip

import sys

from ..versions import hide, without

if "transformers" in sys.modules:  # imported by the user's program: it may have found both, and remembers that
    import transformers.modeling_utils
else:
    hide("torchao")
    with without("scipy"):  # used by the losses of object detection alone
        import transformers.modeling_utils  # noqa: F401
