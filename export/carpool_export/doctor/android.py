"""Which kernels the Android runtime has.

The AAR of ExecuTorch 1.4 and 1.5 ships portable, optimised and quantised kernels and one backend,
XNNPACK. The Python runtime of the same version has the portable and optimised ones, and lists
them; the list of the quantised ones is in its package. The AAR itself was not looked into.
"""

from __future__ import annotations

import re
from importlib import resources

from carpool_export.doctor.private import registered_kernels
from carpool_export.doctor.program import XNNPACK

BACKENDS = frozenset({XNNPACK})


def kernels() -> frozenset[str]:
    """Operators with their overload, for example ``aten::mm.out``."""
    text = (resources.files("executorch.kernels.quantized") / "quantized.yaml").read_text("utf-8")
    return registered_kernels() | set(re.findall(r"^- func: ([\w:.]+)\(", text, flags=re.MULTILINE))
